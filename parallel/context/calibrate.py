"""The figures of this machine: kernels and links, timed once through what attention calls, and kept in a file."""

import json
import os
import re
import socket
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from farspan.kernels.softmax_attention_tiles import Tile, Tiles
from farspan.parallel.comm import Group
from farspan.parallel.context.exchange import Give, Link, Post, Room, Take
from farspan.parallel.context.ghosts import operations
from farspan.parallel.context.links import Carrier, Pairs, connect
from farspan.parallel.context.simulate import Curve, Machine, Wire
from farspan.parallel.context.sums import Kernels

VERSION = 1
"""Of the file: another one is measured again."""


WARMUPS = 2
"""Bursts that are not counted."""


@dataclass(frozen=True)
class Probe:
    """What is timed: small enough for a few seconds."""

    dtype: torch.dtype
    heads: int
    kv_heads: int
    width: int
    lengths: tuple[int, ...]
    """Tokens of an attention, and of a merge."""
    messages: tuple[int, ...]
    """Bytes."""
    repeats: int
    burst: int
    """Runs in a row, so that what the host does for one is hidden behind another, as in a step."""


def probe_for(device: torch.device) -> Probe:
    """Sizes for a GPU, or for a CPU that only shows that all of it works."""
    if device.type == "cuda":
        lengths, messages = (512, 2048, 8192, 16384), (1 << 18, 1 << 22, 1 << 25, 1 << 27)
        return Probe(torch.bfloat16, 16, 4, 128, lengths, messages, 5, 4)
    return Probe(torch.float32, 4, 2, 16, (32, 96, 256), (1 << 12, 1 << 16, 1 << 19), 3, 1)


def machine(carrier: Carrier, group: Group, device: torch.device, run: Group) -> Machine:
    """This machine as all ranks of `run` agree on it: read from a file of rank 0, or measured by all together.

    `group` is what a link joins: `run` may hold several, which measure at once, as they will train. The slowest rank
    counts. What was measured is kept in $XDG_CACHE_HOME or ~/.cache, where that can be written.
    """
    link = connect(carrier, group, device)
    hosts = _agreed(socket.gethostname(), group)
    file = _file(link, group, device, len(set(hosts)))
    kept = _agreed(_read(file) if run.rank == 0 else None, run)[0]
    if kept is None:
        measured = _agreed(_measure(link, group, device, _node(hosts)), run)
        kept = _slowest(measured)
        if run.rank == 0:
            _write(file, kept)
    return _machine(kept)


def _agreed(mine: Any, group: Group) -> list[Any]:
    every: list[Any] = [None] * group.size
    dist.all_gather_object(every, mine, group=group.handle)
    return every


def _node(hosts: Sequence[str]) -> int:
    """Consecutive ranks of a node, the same for every node; 1 where nodes hold unlike numbers of them."""
    first = hosts.count(hosts[0])
    blocks = [hosts[i : i + first] for i in range(0, len(hosts), first)]
    even = all(len(set(block)) == 1 and len(block) == first for block in blocks)
    return first if even and len(set(hosts)) == len(blocks) else 1


def _file(link: Link, group: Group, device: torch.device, nodes: int) -> Path | None:
    """Where the figures are kept; None where there is no home for them."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    ranks = f"{group.size}" if nodes == 1 else f"{group.size}on{nodes}"
    parts = "context", name, ranks, type(link).__name__.lower(), torch.__version__
    try:
        home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    except RuntimeError:
        return None
    return home / "farspan" / (re.sub(r"[^A-Za-z0-9.+-]+", "_", "-".join(parts)) + ".json")


def _read(file: Path | None) -> dict[str, Any] | None:
    """What is kept, if it can be read: a damaged file is measured again."""
    if file is None:
        return None
    try:
        kept: dict[str, Any] = json.loads(file.read_text())
        if kept.get("version") == VERSION:
            _machine(kept)
            return kept
    except (OSError, ValueError, TypeError, KeyError, AttributeError, IndexError):
        pass
    return None


def _write(file: Path | None, kept: dict[str, Any]) -> None:
    if file is None:
        return
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, prefix=file.name, delete=False) as draft:
            json.dump(kept, draft, indent=1)
        Path(draft.name).replace(file)
    except OSError:
        pass  # it is measured again next time


def _machine(kept: dict[str, Any]) -> Machine:
    """The machine that `asdict` took apart. ValueError, TypeError, KeyError: these are not the figures of one."""

    def curve(found: dict[str, Any]) -> Curve:
        return Curve(tuple((float(amount), float(seconds)) for amount, seconds in found["points"]))

    def wire(found: dict[str, Any]) -> Wire:
        if not float(found["port"]) > 0:
            raise ValueError(f"port={found['port']}: must be positive")
        return Wire(curve(found["pair"]), float(found["port"]))

    full, edge = ((curve(kept[name][0]), curve(kept[name][1])) for name in ("full", "edge"))
    node, contention = kept["node"], float(kept["contention"])
    if not (node is None or (isinstance(node, int) and node > 0)) or not contention >= 1:
        raise ValueError(f"node={node}, contention={contention}: a whole number or none, and at least 1")
    return Machine(
        full=full,
        edge=edge,
        memory=curve(kept["memory"]),
        near=wire(kept["near"]),
        far=None if kept["far"] is None else wire(kept["far"]),
        node=node,
        post=float(kept["post"]),
        pulls=bool(kept["pulls"]),
        in_order=bool(kept["in_order"]),
        contention=contention,
    )


def _slowest(measured: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Figure by figure the worst of all ranks: the most seconds, and the fewest bytes a second."""

    def worst(values: Sequence[Any], name: str) -> Any:
        if isinstance(values[0], dict):
            return {key: worst([value[key] for value in values], key) for key in values[0]}
        if isinstance(values[0], list | tuple):
            return [worst(parts, name) for parts in zip(*values, strict=True)]
        if values[0] is None or isinstance(values[0], bool):
            return values[0]
        return min(values) if name == "port" else max(values)

    found: dict[str, Any] = worst(measured, "")
    return found


def _measure(link: Link, group: Group, device: torch.device, node: int) -> dict[str, Any]:
    timer = _Timer(link, group, device, probe_for(device))
    kernels, memory = timer.attention(), timer.memory()
    near = timer.wire(1, node if node > 1 else group.size)
    far = timer.wire(node, group.size) if 1 < node < group.size else None
    carried = isinstance(link, Pairs)
    found = Machine(
        full=kernels[0],
        edge=kernels[1],
        memory=memory,
        near=near,
        far=far,
        node=node if far else None,
        pulls=not carried,
        contention=timer.contention() if device.type == "cuda" and carried else 1.0,
    )
    link.close()
    return {"version": VERSION, **asdict(found)}


class _Timer:
    """Times one thing after the other on this rank."""

    def __init__(self, link: Link, group: Group, device: torch.device, probe: Probe) -> None:
        self.link, self.group, self.device, self.probe = link, group, device, probe
        self.kernels = Kernels()

    def seconds(self, work: Callable[[], object]) -> float:
        """The median of a few bursts, a run's share: the device's last result is waited for after each burst."""
        times = []
        for _ in range(WARMUPS + self.probe.repeats):
            self._wait()
            start = time.perf_counter()
            for _ in range(self.probe.burst):
                work()
            self._wait()
            times.append((time.perf_counter() - start) / self.probe.burst)
        return median(times[WARMUPS:])

    def attention(self) -> tuple[tuple[Curve, Curve], tuple[Curve, Curve]]:
        """Without a mask and with an edge: forward and backward."""
        found = []
        for causal in (False, True):
            points: tuple[list[tuple[float, float]], ...] = [], []
            for length in self.probe.lengths:
                q, k, v = self._tensors(length)
                tiles = Tiles((Tile(0, length, 0, length, 0),), causal)
                out, lse = self.kernels.forward(q, k, v, tiles)
                back = torch.randn_like(out), q, k, v, out, lse, tiles
                works: list[Callable[[], object]] = [partial(self.kernels.forward, q, k, v, tiles)]
                works.append(partial(self.kernels.backward, *back))
                for i, work in enumerate(works):
                    points[i].append((operations(q, v, tiles, backward=bool(i)), self.seconds(work)))
            found.append((_rising(points[0]), _rising(points[1])))
        return found[0], found[1]

    def memory(self) -> Curve:
        """Merges: the kernels between the attentions."""
        points = []
        for length in self.probe.lengths:
            part = self._tensors(length)[0]
            out = part.float()
            lse = torch.zeros(out.shape[1::-1], device=self.device)
            size = part.numel() * (part.element_size() + 8) + lse.numel() * 12

            work = partial(self.kernels.merge, out, lse, part, lse.clone(), slice(0, length))
            points.append((float(size), self.seconds(work)))
        return _rising(points)

    def wire(self, step: int, span: int) -> Wire:
        """Messages to the rank `step` further within blocks of `span`, and to all others of the block at once."""
        points = [(float(size), self.seconds(partial(self._shift, size, [step], span))) for size in self.probe.messages]
        pair, most = _rising(points), self.probe.messages[-1]
        others = list(range(step, span, step))
        together = self.seconds(partial(self._shift, most // len(others), others, span))
        start = min(pair.seconds(0.0), together / 2)
        alone = most / max(points[-1][1] - start, 1e-9)
        return Wire(pair, max(alone, (most // len(others)) * len(others) / (together - start)))

    def contention(self) -> float:
        """How much longer attention takes beside an exchange."""
        length, size = self.probe.lengths[-1], self.probe.messages[-1]
        q, k, v = self._tensors(length)
        tiles = Tiles((Tile(0, length, 0, length, 0),), True)

        def attend() -> None:
            for _ in range(4):
                self.kernels.forward(q, k, v, tiles)

        begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))

        def beside() -> float:
            tickets = [self._begin(size, [1], self.group.size) for _ in range(4)]
            begun.record()
            attend()
            ended.record()
            for ticket in tickets:
                self.link.wait(ticket)
            self._wait()
            return begun.elapsed_time(ended) / 1000

        alone, carried = self.seconds(attend), 4 * self.seconds(partial(self._shift, size, [1], self.group.size))
        together = median([beside() for _ in range(self.probe.repeats)])
        if together >= carried:  # while bytes moved, attention did what it would have done alone in that much less
            return min(4.0, max(1.0, carried / max(carried - (together - alone), carried / 4)))
        return min(4.0, max(1.0, together / alone))

    def _shift(self, size: int, steps: Sequence[int], span: int) -> None:
        self.link.wait(self._begin(size, steps, span))

    def _begin(self, size: int, steps: Sequence[int], span: int) -> int:
        """Posts `size` bytes to each of the ranks `steps` further within the block."""
        block, place = self.group.rank // span * span, self.group.rank % span
        room = self.link.room(Room(size * len(steps), size * len(steps)))
        starts = list(accumulate([size] * len(steps), initial=0))
        gives = [Give(block + (place + step) % span, at, at + size) for step, at in zip(steps, starts, strict=False)]
        into = [room.new_empty(size) for _ in steps]
        takes = [Take(block + (place - step) % span, at, x) for step, at, x in zip(steps, starts, into, strict=False)]
        return self.link.post(Post(room, gives, takes))

    def _tensors(self, length: int) -> tuple[Tensor, Tensor, Tensor]:
        heads = self.probe.heads, self.probe.kv_heads, self.probe.kv_heads
        q, k, v = (torch.randn(length, h, self.probe.width, device=self.device, dtype=self.probe.dtype) for h in heads)
        return q, k, v

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _rising(points: Sequence[tuple[float, float]]) -> Curve:
    """The points made to rise, whatever a noisy moment said."""
    seconds = accumulate((seconds for _, seconds in points), max)
    return Curve(tuple((amount, best) for (amount, _), best in zip(points, seconds, strict=True)))
