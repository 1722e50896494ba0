"""Seconds for a schedule on a machine that need not be here: what its ghosts wrote down, played on measured figures."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

from farspan.parallel.context.attention import Call
from farspan.parallel.context.ghosts import Action, Begin, Compute, Trace, trace
from farspan.parallel.context.sums import Spanning


@dataclass(frozen=True)
class Curve:
    """Seconds for an amount, through measured points: straight between them and beyond, so a start-up time and a rate
    are two points."""

    points: tuple[tuple[float, float], ...]
    """Amount and seconds, both ascending; at least two."""

    def __post_init__(self) -> None:
        rising = all(a[0] < b[0] and a[1] <= b[1] for a, b in pairwise(self.points))
        if len(self.points) < 2 or not rising or self.points[0][0] < 0:
            raise ValueError(f"curve: {self.points} must be two points or more, with amounts and seconds that rise")

    @staticmethod
    def line(start: float, rate: float) -> "Curve":
        """start: seconds before anything moves; rate: amount a second."""
        return Curve(((0.0, start), (1e9, start + 1e9 / rate)))

    def seconds(self, amount: float) -> float:
        a, b = next((pair for pair in pairwise(self.points) if amount <= pair[1][0]), self.points[-2:])
        slope = (b[1] - a[1]) / (b[0] - a[0])
        return max(0.0, a[1] + (amount - a[0]) * slope)


@dataclass(frozen=True)
class Wire:
    """What connects two ranks."""

    pair: Curve
    """Seconds for a message of so many bytes between two ranks, all else silent."""
    port: float
    """Bytes a second that one rank sends to all others together; as many come in meanwhile. Behind a switch one message
    fills it; where every two ranks have a link of their own it is the sum of those."""


@dataclass(frozen=True)
class Machine:
    """The figures of a machine that a prediction needs; `calibrate` measures them."""

    full: tuple[Curve, Curve]
    """Forward and backward: seconds for the operations of one attention call without a mask."""
    edge: tuple[Curve, Curve]
    """The same for a causal edge, a window, or documents."""
    memory: Curve
    """Seconds for a kernel that reads and writes so many bytes."""
    near: Wire
    """Between ranks of a node."""
    far: Wire | None = None
    """Between nodes."""
    node: int | None = None
    """Consecutive ranks of a node; None: all."""
    post: float = 0.0
    """Seconds from posting an exchange to its start."""
    pulls: bool = False
    """Every post opens with a barrier, and who takes copies one part after the other."""
    in_order: bool = True
    """A rank's exchanges follow each other; otherwise they share its ports as they come."""
    contention: float = 1.0
    """How many times as long kernels take while an exchange is carried by kernels too."""

    def wire(self, a: int, b: int) -> Wire:
        apart = self.far is not None and self.node is not None and a // self.node != b // self.node
        return self.far if apart and self.far is not None else self.near

    def seconds(self, compute: Compute, *, backward: bool) -> float:
        """Of a kernel that has the device for itself."""
        if compute.kind == "bytes":
            return self.memory.seconds(compute.amount)
        return (self.full if compute.kind == "full" else self.edge)[backward].seconds(compute.amount)

    def silent(self) -> "Machine":
        """The same machine with exchanges that take no time."""
        free = Wire(Curve(((0.0, 0.0), (1.0, 0.0))), float("inf"))
        return replace(self, near=free, far=None, post=0.0, pulls=False, contention=1.0)


@dataclass(frozen=True)
class Event:
    """A bar of a timeline."""

    rank: int
    """Whose kernel it is, or who takes what arrives."""
    kind: Literal["compute", "exchange"]
    what: str
    start: float
    end: float
    label: str = ""
    source: int = -1
    size: int = 0
    """Bytes of an exchange."""


@dataclass(frozen=True)
class Timeline:
    """What one attention does on a machine, and how long each part takes."""

    events: tuple[Event, ...]
    seconds: float
    """Until the last rank has done."""
    compute: float
    """The same if no exchange took any time."""
    sent: tuple[tuple[int, ...], ...]
    """Bytes from rank to rank."""
    peak: int
    """The most bytes that any rank holds beyond what it was given."""

    @property
    def exposed(self) -> float:
        """Seconds of communication that nothing hides."""
        return self.seconds - self.compute


def simulate(spanning: Spanning, call: Call, machine: Machine) -> Timeline:
    """Predicts one attention, forward or backward."""
    return play(trace(spanning, call), machine)


def play(of: Trace, machine: Machine) -> Timeline:
    """The same from a trace, which may be played on many machines."""
    played, silent = _Player(of, machine), _Player(of, machine.silent())
    for player in (played, silent):
        player.play()
    return Timeline(tuple(played.events), max(played.clocks), max(silent.clocks), of.sent, max(of.peaks))


class _Player:
    """All ranks' clocks. They go on post by post: every rank posts as often, so that each begins when all are known."""

    def __init__(self, of: Trace, machine: Machine) -> None:
        self.trace, self.machine = of, machine
        ranks = range(len(of.actions))
        self.clocks = [0.0 for _ in ranks]
        self.last = [0.0 for _ in ranks]
        """When a rank's last exchange ended."""
        self.ends: list[list[float]] = []
        """When a post was carried, for each rank."""
        self.busy: list[list[tuple[float, float]]] = [[] for _ in ranks]
        self.free: dict[tuple[str, int, int], float] = {}
        """When the queue of a port or of a pair of ranks is empty."""
        self.events: list[Event] = []

    def play(self) -> None:
        left = [iter(actions) for actions in self.trace.actions]
        while True:
            posts = [self._until_post(rank, actions) for rank, actions in enumerate(left)]
            begun = [post for post in posts if post is not None]
            if not begun:
                return
            if len(begun) < len(posts):
                raise RuntimeError(
                    "simulate: some ranks post less often than others; a schedule must post alike on all"
                )
            self._carry(begun)

    def _until_post(self, rank: int, actions: Iterator[Action]) -> Begin | None:
        for action in actions:
            if isinstance(action, Begin):
                return action
            if isinstance(action, Compute):
                self._compute(rank, action)
            else:
                self.clocks[rank] = max(self.clocks[rank], self.ends[action.ticket][rank])
        return None

    def _compute(self, rank: int, action: Compute) -> None:
        start, left = self.clocks[rank], self.machine.seconds(action, backward=self.trace.backward)
        now, slow = start, self.machine.contention
        for low, high in self.busy[rank] if slow > 1 else ():
            if high > now and left > 0:
                alone = min(left, max(0.0, low - now))
                now, left = now + alone, left - alone
                shared = min(left * slow, high - now) if left > 0 else 0.0
                now, left = now + shared, left - shared / slow
        self.clocks[rank] = now + left
        self.events.append(Event(rank, "compute", action.what, start, now + left, action.label))

    def _carry(self, posts: Sequence[Begin]) -> None:
        machine, ranks = self.machine, range(len(posts))
        begins = [self.clocks[rank] + machine.post for rank in ranks]
        if machine.in_order:
            begins = [max(begin, last) for begin, last in zip(begins, self.last, strict=True)]
        if machine.pulls:
            begins = [max(begins)] * len(posts)
        ends = list(begins)
        messages = [self._messages(rank, post) for rank, post in zip(ranks, posts, strict=True)]
        for i in range(max(map(len, messages))):
            for rank in ranks:
                for source, size in messages[rank][i : i + 1]:
                    end = self._message(source, rank, size, max(begins[rank], begins[source]))
                    ends[rank] = max(ends[rank], end)
                    if not machine.pulls:
                        ends[source] = max(ends[source], end)
        for rank in ranks:
            if ends[rank] > begins[rank]:
                self.busy[rank].append((begins[rank], ends[rank]))
        self.last = [max(pair) for pair in zip(self.last, ends, strict=True)]
        self.ends.append(ends)

    def _messages(self, rank: int, post: Begin) -> list[tuple[int, int]]:
        """What a rank takes, from the next rank first, so that all do not ask the same one at once."""
        count = len(self.clocks)
        ordered = sorted(post.takes, key=lambda take: (take[0] - rank) % count)
        if self.machine.pulls:
            return ordered
        sizes: dict[int, int] = {}
        for source, size in ordered:
            sizes[source] = sizes.get(source, 0) + size
        return list(sizes.items())

    def _message(self, source: int, to: int, size: int, ready: float) -> float:
        """When it is there: after what is before it between the two, and in the ports of both."""
        wire = self.machine.wire(source, to)
        far = wire is self.machine.far
        lone, shared = wire.pair.seconds(size), size / wire.port
        queues = [("pulls", to, to) if self.machine.pulls else ("pair", source, to), ("out", source, far)]
        costs = [lone, shared]
        if not self.machine.pulls:
            queues.append(("in", to, far))
            costs.append(shared)
        starts = [max(ready, self.free.get(queue, 0.0)) for queue in queues]
        done = [start + cost for start, cost in zip(starts, costs, strict=True)]
        self.free.update(zip(queues, done, strict=True))
        end = max(done)
        start = max(ready, end - lone)
        if end > start:
            self.events.append(Event(to, "exchange", "take", start, end, source=source, size=size))
        return end
