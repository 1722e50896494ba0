"""The schedule that is predicted to be fastest, for each kind of attention that a run calls, on the machine it runs on.

Every rank predicts from the same figures and by arithmetic alone, so all pick alike without a word.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import log2

from farspan.parallel.context.attention import Call, Deal, Spread
from farspan.parallel.context.calibrate import machine
from farspan.parallel.context.gather import Gather
from farspan.parallel.context.grid import Grid
from farspan.parallel.context.layout import Layout, layout
from farspan.parallel.context.links import connect
from farspan.parallel.context.local import Local
from farspan.parallel.context.pinned import Axis, Pinned
from farspan.parallel.context.ring import Ring
from farspan.parallel.context.simulate import Machine, Timeline, simulate
from farspan.parallel.context.token_ring import TokenRing
from farspan.parallel.context.ulysses import Ulysses

ALIKE = 1.05
"""Predictions no further apart differ by less than the model errs: the plainest of them is taken."""
CIRCLE = 16
"""Ranks that a ring is thought of for."""
CROWD = 8
"""More documents than this for each rank are predicted as so many."""


@dataclass(frozen=True, kw_only=True)
class Auto:
    """Picks from the machine, the heads, the mask and the documents; forward and backward each for itself."""

    def problems(self, cp: int, heads: int, kv_heads: int) -> list[str]:
        """Nothing keeps it from any heads: gather spreads them all."""
        return []

    def build(self, axis: Axis | None = None) -> Local | Spread:
        """The runtime. The first time on a machine it measures for some seconds, all ranks together."""
        if axis is None or axis.group.size == 1:
            return Local()
        deal = Gather().deal(axis)
        choice = Choice(machine("auto", axis.group, axis.device, axis.run or axis.group), deal)
        link = connect("auto", axis.group, axis.device)
        return Spread(axis.group.rank, axis.group.size, choice, deal, link, choice)


def candidates(call: Call) -> Iterator[Pinned]:
    """The schedules that can spread these heads, plain ones first.

    Under a window rings are none of them: they carry everything past everyone, and a query sees only a halo of it. Nor
    are they over more than CIRCLE ranks: to predict so many steps takes longer than they could ever save.
    """
    ranks = call.layout.ranks
    narrow = call.sight.window is not None or ranks > CIRCLE
    yield Gather()
    yield from (Gather(groups=groups) for groups in (2, 4) if groups <= call.kv_heads)
    if not narrow:
        yield Ring()
        yield TokenRing()
    yield from (Ulysses(groups=groups) for groups in (1, 2) if ranks * groups <= call.heads)
    for inner in (2, 4, 8):
        for outer in (Gather(),) if narrow else (Gather(), Ring()):
            grid = Grid(inner=inner, outer=outer)
            if inner < ranks and not grid.problems(ranks, call.heads, call.kv_heads):
                yield grid


@dataclass(frozen=True)
class Ranked:
    """What was predicted for a kind of attention, the fastest first, and which was taken."""

    taken: Pinned
    predicted: tuple[tuple[Pinned, Timeline], ...]


class Choice:
    """Picks a schedule for each call, and remembers."""

    def __init__(self, machine: Machine, deal: Deal, offered: Callable[[Call], Iterator[Pinned]] = candidates) -> None:
        self.machine, self.deal, self.offered = machine, deal, offered
        self.known: dict[Call, Ranked] = {}
        self.replayed: dict[str, str] = {}

    def __call__(self, call: Call) -> Pinned:
        typical = replace(call, layout=self._typical(call.layout))
        if typical not in self.known:
            self.known[typical] = self._rank(typical)
        return self.known[typical].taken

    def explain(self) -> str:
        """A line for each choice so far: what was taken, its prediction, and those of the next best."""
        return "\n".join(_line(call, ranked) for call, ranked in self.known.items())

    def chosen(self) -> dict[str, str]:
        """What was taken, by the kind of attention."""
        return {_kind(call): describe(ranked.taken) for call, ranked in self.known.items()}

    def replay(self, chosen: Mapping[str, str]) -> None:
        """Takes what was taken before, where it is still offered."""
        self.replayed = dict(chosen)

    def _rank(self, call: Call) -> Ranked:
        before = self.replayed.get(_kind(call))
        offered = list(self.offered(call))
        offered = [spanning for spanning in offered if describe(spanning) == before] or offered
        found = [(spanning, simulate(spanning, call, self.machine)) for spanning in offered]
        limit = ALIKE * min(told.seconds for _, told in found)
        taken = next(spanning for spanning, told in found if told.seconds <= limit)  # plain ones stand first
        found.sort(key=lambda each: each[1].seconds)
        return Ranked(taken, tuple(found))

    def _typical(self, of: Layout) -> Layout:
        """A layout that stands for all with as many tokens whose documents see about as many keys."""
        if len(set(of.lengths)) <= 1:
            return of
        whole = sum(of.lengths)
        mean = sum(length * length for length in of.lengths) / whole  # of the documents that tokens are in
        size = 2 ** (round(2 * log2(mean)) / 2)
        count = min(max(1, round(whole / size)), CROWD * of.ranks)
        even = _whole(of.tokens * of.ranks) // count
        return layout(self.deal.packed, (even,) * count, of.ranks, self.deal.inner, self.deal.multiple)


def _whole(tokens: int) -> int:
    """A number of tokens rounded up to the next eighth of a power of two, so that few occur."""
    step = max(1, 1 << max(0, tokens.bit_length() - 4))
    return -(-tokens // step) * step


def _kind(call: Call) -> str:
    """A kind of attention in words."""
    sight = call.sight
    mask = "causal" if sight.causal else "both ways"
    given = (("window", sight.window), ("scale", sight.scale), ("softcap", sight.softcap))
    rest = "".join(f", {name} {value}" for name, value in given if value is not None)
    width = f"{call.width}" if call.width == call.value_width else f"{call.width} and {call.value_width}"
    pieces, dtype = sum(map(len, call.layout.pieces)), str(call.dtype).removeprefix("torch.")
    count, way = len(call.layout.lengths), "backward" if call.backward else "forward"
    documents = f" in {count} documents of {call.layout.lengths[0]}" if count > 1 else ""
    return (
        f"{way} of {call.layout.ranks} x {call.layout.tokens} tokens{documents}, "
        f"{pieces} pieces, {call.heads}:{call.kv_heads} heads of {width}, {mask}{rest}, {dtype}"
    )


def _line(call: Call, ranked: Ranked) -> str:
    time = dict(ranked.predicted)[ranked.taken]
    others = ", ".join(
        f"{describe(spanning)} {_milli(other.seconds)}"
        for spanning, other in ranked.predicted
        if spanning != ranked.taken
    )
    return (
        f"context: {_kind(call)}: {describe(ranked.taken)}, predicted {_milli(time.seconds)}, "
        f"{_milli(time.exposed)} of it waiting for others, {time.peak / 1e6:.0f} MB; then {others}"
    )


def _milli(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"


def describe(spanning: Pinned) -> str:
    """A schedule as a configuration would pin it, in short."""
    match spanning:
        case Grid(inner=inner, outer=outer):
            return f"grid of {inner} with {describe(outer)}"
        case Gather(groups=groups) | Ulysses(groups=groups) if groups > 1:
            return f"{type(spanning).__name__.lower()} in {groups} groups"
        case TokenRing():
            return "token_ring"
    return type(spanning).__name__.lower()
