"""How fast state moves between a host and its GPUs, and how fast either side updates it: measured, never assumed."""

import json
import math
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from statistics import median
from typing import Literal

import torch
from torch import Tensor

Lane = Literal["h2d", "d2h", "cpu"]
"""What shares the host's memory: both directions of the link, and the cores."""

SLAB = 128 << 20
"""Bytes of a copy that is timed: long against its launch, and two of them larger than a processor's cache."""

PARAMETERS = 1 << 24
"""Of an update that is timed; on a machine without GPU an eighth of it."""

REPEATS = 6

PATIENCE = 0.5
"""Seconds after which a slow update is not repeated."""

COPIES = 0.25
"""The share of a host's memory that cores never take from copies. They come first in the rest: published logs of
interleaved updates fit that better than equal or proportional shares (tests/platform/test_placement.py)."""

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
    """Parameters a second that the rank's cores update, with the cast of the weight; 0: they never update."""
    gpu: float
    """Parameters a second that the GPU updates."""
    dram: float
    """Bytes a second that the host's memory reads and writes, for all of its ranks together."""
    ranks: int = 1
    """Ranks that share the host."""

    def __post_init__(self) -> None:
        bad = [field.name for field in fields(self) if not getattr(self, field.name) > 0 and field.name != "cpu"]
        if bad or not self.cpu >= 0:
            raise ValueError(f"rates: {', '.join(bad) or 'cpu'} of {self} must be positive; measure them again")

    @property
    def alone(self) -> bool:
        """The device is the host itself: its cores do one thing at a time, whatever they are called."""
        return math.isinf(self.h2d)

    def speeds(self, busy: Collection[Lane], touched: float) -> dict[Lane, float]:
        """Bytes or parameters a second of every lane that is busy, all at once.

        touched: bytes of host memory that the cores read and write for a parameter; a copied byte is one more.
        """
        both = "h2d" in busy and "d2h" in busy
        ways: dict[Lane, float] = {"h2d": self.h2d, "d2h": self.d2h}
        found = {lane: min(self.duplex if both else speed, SWIFT) for lane, speed in ways.items() if lane in busy}
        slow, cores = self.beside(sum(found.values()), touched if "cpu" in busy else 0.0)
        found = {lane: speed * slow for lane, speed in found.items()}
        return {**found, "cpu": cores} if "cpu" in busy else found

    def beside(self, copied: float, touched: float) -> tuple[float, float]:
        """What the host's memory leaves of `copied` bytes a second, as a share, and of the cores' parameters a second.

        touched: see `speeds`; 0: the cores rest, or need none of it.
        """
        share, cores = min(self.dram / self.ranks, 8 * SWIFT), self.cpu
        if touched > 0:
            cores = min(cores, (share - min(copied, COPIES * share)) / touched)
            share -= cores * touched
        return (min(1.0, share / copied) if copied > 0 else 1.0), cores

    def encode(self) -> str:
        """As JSON that any reader takes: infinity is written as a word."""
        return json.dumps({name: str(value) for name, value in asdict(self).items()})

    @staticmethod
    def decode(text: str) -> "Rates":
        """ValueError: these are not the rates of a machine."""
        try:
            kept = {str(name): float(value) for name, value in json.loads(text).items()}
            return Rates(**{**kept, "ranks": int(kept["ranks"])})  # type: ignore[arg-type]
        except (TypeError, KeyError, AttributeError, OverflowError) as error:
            raise ValueError(f"rates: {text!r} is not what encode wrote; measure them again") from error


def slowest(found: Sequence[Rates]) -> Rates:
    """Rate by rate the worst of all ranks, so that all of them choose alike."""
    worst = {field.name: min(getattr(rates, field.name) for rates in found) for field in fields(Rates)}
    return Rates(**{**worst, "ranks": max(rates.ranks for rates in found)})


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
    ranks: int = 1,
    cpu: Trial | None = None,
    gpu: Trial | None = None,
) -> Rates:
    """Times copies and updates on all ranks of a host at once, in about a second. All of them call it together.

    device: where the weights are. Without a GPU nothing moves: the link and the host's memory come back as infinite,
        and both kinds of update as what this processor does.
    barrier: returns when all ranks have called it; it is called before each thing that is timed.
    ranks: those of this host.
    cpu, gpu: what is timed as an update; None: torch's fused AdamW on fp32 state, and the cast of the weight.
    """
    if device.type != "cuda":
        rate = _rate(cpu or _adamw(torch.device("cpu"), PARAMETERS // 8), barrier, _on_host)
        no = math.inf
        return Rates(h2d=no, d2h=no, duplex=no, cpu=rate, gpu=rate, dram=no, ranks=ranks)
    link = _Link(device)
    (down, up, both), dram, room = link.rates(barrier), link.dram(barrier), link.size // 8
    del link
    own = _rate(cpu or _adamw(torch.device("cpu"), PARAMETERS), barrier, _on_host)
    theirs = _rate(gpu or _adamw(device, min(PARAMETERS, room)), barrier, partial(_on_device, device))
    torch.cuda.empty_cache()
    return Rates(h2d=down, d2h=up, duplex=both, cpu=own, gpu=theirs, dram=dram * ranks, ranks=ranks)


def _rate(trial: Trial, barrier: Callable[[], object], seconds: Callable[[Callable[[], object]], float]) -> float:
    """Parameters a second; the first run makes what later ones use."""
    trial.run()
    trial.run()
    barrier()
    start, times = time.perf_counter(), [seconds(trial.run)]
    while len(times) < REPEATS and time.perf_counter() - start < PATIENCE:
        times.append(seconds(trial.run))
    return trial.parameters / median(times)


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


def _adamw(device: torch.device, count: int) -> Trial:
    """AdamW of `count` fp32 weights, and their bf16 copies."""
    weight = torch.zeros(count, device=device)
    weight.grad = torch.ones_like(weight)
    cast = torch.zeros(count, device=device, dtype=torch.bfloat16)
    optimizer = torch.optim.AdamW([weight], lr=1e-3, fused=True)

    def run() -> None:
        optimizer.step()
        cast.copy_(weight)

    return Trial(run, count)


class _Link:
    """Two slabs on either side, and a stream for each direction."""

    def __init__(self, device: torch.device) -> None:
        free, _ = torch.cuda.mem_get_info(device)
        self.device, self.size = device, max(1 << 16, min(SLAB, free // 16))
        self.host = [_pinned(self.size) for _ in range(2)]
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

    def dram(self, barrier: Callable[[], object]) -> float:
        """The most that cores move, alone or with copies beside them: a rank's few cores may not fill it."""
        slabs = [torch.zeros(self.size // 4) for _ in range(2)]
        passes = 0

        def pass_over() -> None:
            nonlocal passes
            slabs[passes % 2].add_(1.0)
            passes += 1

        pass_over()
        pass_over()
        barrier()
        alone = 2 * self.size / median(_on_host(pass_over) for _ in range(REPEATS))
        barrier()
        copies, passes, start = 3 * REPEATS, 0, time.perf_counter()
        events = self._begin(down=True, up=True, copies=copies)
        while not all(ended.query() for _, ended in events):
            pass_over()
        spent = time.perf_counter() - start
        return max(alone, 2 * self.size * (passes + copies) / spent)

    def _begin(self, *, down: bool, up: bool, copies: int) -> list[tuple[torch.cuda.Event, torch.cuda.Event]]:
        """Enqueues copies of both directions turn by turn: neither waits for the other's launches."""
        ways = [way for way, wanted in enumerate((down, up)) if wanted]
        events = {way: tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for way in ways}
        for way in ways:
            events[way][0].record(self.streams[way])
        for _ in range(copies):
            for way in ways:
                into, source = (self.there, self.host) if way == 0 else (self.host, self.there)
                with torch.cuda.stream(self.streams[way]):
                    into[way].copy_(source[way], non_blocking=True)
        for way in ways:
            events[way][1].record(self.streams[way])
        return [(events[way][0], events[way][1]) for way in ways]

    def _finish(self, events: Sequence[tuple[torch.cuda.Event, torch.cuda.Event]]) -> float:
        """Seconds of the slower direction."""
        torch.cuda.synchronize(self.device)
        return max(1e-9, *(begun.elapsed_time(ended) / 1000 for begun, ended in events))


def _pinned(size: int) -> Tensor:
    """Locked memory; where the host gives none, ordinary memory, whose slower copies are then what is measured."""
    try:
        return torch.zeros(size, dtype=torch.uint8, pin_memory=True)
    except RuntimeError:
        return torch.zeros(size, dtype=torch.uint8)
