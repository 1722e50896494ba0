"""How fast state moves between a host and its GPUs, and how fast either side updates it: measured, never assumed."""

import json
import math
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from farspan.platform.optim.queues import Queues, queues_of

Lane = Literal["h2d", "d2h", "cpu"]
"""What shares the host's memory: both directions of the link, and the cores."""

SLAB = 64 << 20
"""Bytes of a copy that is timed: long against its launch."""

ROUND = 4
"""Slabs that copies of one direction go through in turn, so that caches keep little of them."""

PARAMETERS = 1 << 25
"""Of an update that is timed: 600 MB, twice the cache of a large processor; on a machine without GPU an eighth."""

REPEATS = 12

SPAN = 0.25
"""Seconds that updates are timed for: a first burst may be faster than what cores keep up."""

SWIFT = 1e18
"""Stands for infinity, whose product with no time at all is no number."""


@dataclass(frozen=True, kw_only=True)
class Rates:
    """One rank's rates while all ranks of its host do the same; infinite where nothing moves."""

    h2d: float
    """Bytes a second to the device while nothing comes back."""
    d2h: float
    """Bytes a second from the device while nothing goes there."""
    duplex: float
    """Bytes a second each way while both run."""
    cpu: float
    """Parameters a second that the rank's cores update while nothing is copied, with the cast of the weight; 0: they
    never update."""
    gpu: float
    """Parameters a second that the GPU updates."""
    cpu_beside: float
    """Parameters a second that the cores update while copies go both ways: they share the host's memory."""
    duplex_beside: float
    """Bytes a second each way while the cores update."""

    def __post_init__(self) -> None:
        values = {name: value for name, value in asdict(self).items() if name not in ("cpu", "cpu_beside")}
        bad = [name for name, value in values.items() if not value > 0]
        bad += [name for name in ("cpu", "cpu_beside") if not getattr(self, name) >= 0]
        if bad:
            raise ValueError(f"rates: {', '.join(bad)} of {self} must be positive; measure them again")

    @property
    def alone(self) -> bool:
        """The device is the host itself: its cores do one thing at a time, whatever they are called."""
        return math.isinf(self.h2d)

    def speeds(self, busy: Collection[Lane]) -> dict[Lane, float]:
        """Bytes or parameters a second of every lane that is busy, all at once."""
        both = "h2d" in busy and "d2h" in busy
        ways: dict[Lane, float] = {"h2d": self.h2d, "d2h": self.d2h}
        found = {lane: min(self.duplex if both else speed, SWIFT) for lane, speed in ways.items() if lane in busy}
        if "cpu" not in busy:
            return found
        slow, cores = self.beside(sum(found.values()))
        return {**{lane: speed * slow for lane, speed in found.items()}, "cpu": cores}

    def beside(self, copied: float) -> tuple[float, float]:
        """While the cores update and links would copy so many bytes a second, both ways together: the share of these
        that they do copy, and the cores' parameters a second.

        Copies reach what was measured beside the cores at most, and cores lose in proportion to what is copied: where
        copies go one way only, half of the loss or a little more.
        """
        most = 2 * min(self.duplex_beside, SWIFT)
        lost = max(0.0, self.cpu - self.cpu_beside) * min(1.0, copied / most)
        return (min(1.0, most / copied) if copied > 0 else 1.0), self.cpu - lost

    def encode(self) -> str:
        """As JSON that any reader takes: infinity is written as a word."""
        return json.dumps({name: str(value) for name, value in asdict(self).items()})

    @staticmethod
    def decode(text: str) -> "Rates":
        """ValueError: these are not the rates of a machine."""
        try:
            return Rates(**{str(name): float(value) for name, value in json.loads(text).items()})
        except (TypeError, AttributeError, OverflowError) as error:
            raise ValueError(f"rates: {text!r} is not what encode wrote; measure them again") from error


def slowest(found: Sequence[Rates]) -> Rates:
    """Rate by rate the worst of all ranks, so that all of them choose alike."""
    return Rates(**{field.name: min(getattr(rates, field.name) for rates in found) for field in fields(Rates)})


@dataclass(frozen=True)
class Trial:
    """An update that is timed: that of the optimizer in use, or AdamW's."""

    run: Callable[[], object]
    parameters: int
    """That one run updates."""


def measure(
    device: torch.device,
    barrier: Callable[[], object],
    *,
    cpu: Trial | None = None,
    gpu: Trial | None = None,
) -> Rates:
    """Times copies and updates, alone and beside each other, on all ranks of a host at once, in a second or two. All
    of them call it together.

    device: where the weights are. Without a GPU nothing moves: the link comes back as infinite, and both kinds of
        update as what this processor does.
    barrier: returns when all ranks have called it; it is called before each thing that is timed.
    cpu, gpu: what is timed as an update; None: AdamW on fp32 state as the run does it, and the cast of the weight.
    RuntimeError: the host has no memory that the device can reach.
    """
    queues = queues_of(device)
    if device.type != "cuda":
        rate = _rate(cpu or _adamw(queues.host, PARAMETERS // 8), barrier, _on_host)
        no = math.inf
        return Rates(h2d=no, d2h=no, duplex=no, cpu=rate, gpu=rate, cpu_beside=rate, duplex_beside=no)
    link, trial = _Link(device, queues), cpu or _adamw(queues.host, PARAMETERS)
    (down, up, both), room = link.rates(barrier), link.size // 4
    own = _rate(trial, barrier, _on_host)
    beside, each = link.beside(trial, both, barrier)
    del link, trial
    queues.close()
    there = gpu or _adamw(partial(_there, device), min(PARAMETERS // 2, room))
    theirs = _rate(there, barrier, partial(_on_device, device))
    del there
    torch.cuda.empty_cache()
    return Rates(
        h2d=down, d2h=up, duplex=both, cpu=own, gpu=theirs, cpu_beside=min(own, beside), duplex_beside=min(both, each)
    )


def _there(device: torch.device, size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, device=device)


def _rate(trial: Trial, barrier: Callable[[], object], seconds: Callable[[Callable[[], object]], float]) -> float:
    """Parameters a second, over a while; the first runs make what later ones use."""
    trial.run()
    trial.run()
    barrier()
    start, times = time.perf_counter(), [seconds(trial.run)]
    while time.perf_counter() - start < SPAN:
        times.append(seconds(trial.run))
    return trial.parameters * len(times) / sum(times)


def _on_host(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return max(time.perf_counter() - start, 1e-9)


def _on_device(device: torch.device, run: Callable[[], object], burst: int = 8) -> float:
    """A run's share of a burst, so that the host's launches hide behind the device."""
    stream = torch.cuda.current_stream(device)
    begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begun.record(stream)
    for _ in range(burst):
        run()
    ended.record(stream)
    ended.synchronize()
    return max(begun.elapsed_time(ended) / 1000 / burst, 1e-9)


def _adamw(memory: Callable[[int], Tensor], count: int) -> Trial:
    """AdamW of `count` fp32 weights, and their bf16 copies, in such memory: the run's own kind, since pages count. The
    kernel divides gradients by a scale, as where the norm is clipped, and writes them back."""
    weight, gradient, first, second = (memory(4 * count).view(torch.float32).zero_() for _ in range(4))
    cast = memory(2 * count).view(torch.bfloat16)
    step, share, ok = (torch.full((), value, device=weight.device) for value in (1.0, 1.0, 0.0))
    gradient.fill_(1.0)

    def run() -> None:
        torch._fused_adamw_(
            [weight],
            [gradient],
            [first],
            [second],
            [],
            [step],
            lr=1e-3,
            beta1=0.9,
            beta2=0.95,
            weight_decay=0.1,
            eps=1e-8,
            amsgrad=False,
            maximize=False,
            grad_scale=share,
            found_inf=ok,
        )
        cast.copy_(weight)

    return Trial(torch.no_grad()(run), count)


class _Link:
    """Slabs on either side, and a stream for each direction."""

    def __init__(self, device: torch.device, queues: Queues) -> None:
        free, _ = torch.cuda.mem_get_info(device)
        self.device, self.size = device, max(1 << 16, min(SLAB, free // 16))
        self.host = [queues.host(ROUND * self.size).split(self.size) for _ in range(2)]
        self.there = [torch.zeros(self.size, dtype=torch.uint8, device=device) for _ in range(2)]
        self.streams = [torch.cuda.Stream(device) for _ in range(2)]
        torch.cuda.synchronize(device)

    def rates(self, barrier: Callable[[], object]) -> tuple[float, float, float]:
        """To the device, from it, and each way at once: bytes a second."""
        found = []
        for down, up in ((True, False), (False, True), (True, True)):
            self._finish(self._begin(down=down, up=up, copies=2))
            barrier()
            seconds = self._finish(self._begin(down=down, up=up, copies=REPEATS))
            found.append(REPEATS * self.size / seconds)
        return found[0], found[1], found[2]

    def beside(self, trial: Trial, duplex: float, barrier: Callable[[], object]) -> tuple[float, float]:
        """While cores update and copies go both ways: parameters, and bytes each way, a second. The cores go on until
        the last copy is done; an update that outlasts it counts no more."""
        copies = 1 + int(SPAN * duplex / self.size)
        barrier()
        events = self._begin(down=True, up=True, copies=copies)
        times: list[float] = []
        while True:
            took = _on_host(trial.run)
            done = all(ended.query() for _, ended in events)
            if not done or not times:
                times.append(took)
            if done:
                return trial.parameters * len(times) / sum(times), copies * self.size / self._finish(events)

    def _begin(self, *, down: bool, up: bool, copies: int) -> list[tuple[torch.cuda.Event, torch.cuda.Event]]:
        """Enqueues copies of both directions turn by turn: neither waits for the other's launches."""
        ways = [way for way, wanted in enumerate((down, up)) if wanted]
        events = {way: tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for way in ways}
        for way in ways:
            events[way][0].record(self.streams[way])
        for i in range(copies):
            for way in ways:
                host, there = self.host[way][i % ROUND], self.there[way]
                into, source = (there, host) if way == 0 else (host, there)
                with torch.cuda.stream(self.streams[way]):
                    into.copy_(source, non_blocking=True)
        for way in ways:
            events[way][1].record(self.streams[way])
        return [(events[way][0], events[way][1]) for way in ways]

    def _finish(self, events: Sequence[tuple[torch.cuda.Event, torch.cuda.Event]]) -> float:
        """Seconds of the slower direction."""
        torch.cuda.synchronize(self.device)
        return max(1e-9, *(begun.elapsed_time(ended) / 1000 for begun, ended in events))
