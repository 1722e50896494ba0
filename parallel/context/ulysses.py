"""Heads for sequence: every rank attends over all tokens with some of the heads, and never merges.

After DeepSpeed-Ulysses (Jacobs et al., 2023). Heads are dealt out by key head where there are enough of them, and by
query head otherwise: then a key head goes to every rank that needs it, and no other. Counts that do not divide leave
some ranks a head more. A rank's heads go in groups: the next group travels while this one computes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from farspan.parallel.context.exchange import Give, Post, Room, Schedule, Sections, Take, Wait, aligned, renumbered
from farspan.parallel.context.layout import Kind, Layout, runs
from farspan.parallel.context.pinned import Pinned
from farspan.parallel.context.sums import Grads, Me, Saved, Spanning, Sum, Whole, attend_back, sums_of


class Section(NamedTuple):
    """Query heads and the key heads that they share evenly, counted from the first of their group; and whose keys."""

    queries: slice
    keys: slice
    source: int
    """The group that these key heads travel with."""


@dataclass(frozen=True)
class Group:
    """Heads of one rank that travel and compute together."""

    queries: slice
    fresh: slice
    """Key heads that travel with this group."""
    sections: tuple[Section, ...]
    finished: tuple[int, ...]
    """The groups whose key heads no later group uses."""


@lru_cache(maxsize=256)
def deal(heads: int, kv_heads: int, ranks: int, groups: int) -> tuple[tuple[Group, ...], ...]:
    """The groups of every rank: as many for all, some perhaps empty."""
    shared = heads // kv_heads
    dealt = []
    for rank in range(ranks):
        low, high = (
            (shared * (i * kv_heads // ranks) for i in (rank, rank + 1))
            if kv_heads >= ranks
            else (i * heads // ranks for i in (rank, rank + 1))
        )
        unit = shared if kv_heads >= ranks * groups else 1  # whole key heads where there are enough for every group
        count = (high - low) // unit
        cuts = [low + unit * (i * count // groups) for i in range(groups + 1)]
        dealt.append(_groups(cuts, shared))
    return tuple(dealt)


def _groups(cuts: Sequence[int], shared: int) -> tuple[Group, ...]:
    fresh: list[slice] = []
    sections: list[tuple[Section, ...]] = []
    for a, b in pairwise(cuts):
        begun = fresh[-1].stop if fresh else a // shared
        fresh.append(slice(min(begun, -(-b // shared)) if b > a else begun, -(-b // shared) if b > a else begun))
        found: list[Section] = []
        for key in range(a // shared, -(-b // shared) if b > a else a // shared):
            source = next(i for i, keys in enumerate(fresh) if keys.start <= key < keys.stop)
            low, high = max(a, key * shared) - a, min(b, (key + 1) * shared) - a
            place = key - fresh[source].start
            last = found[-1] if found else None
            alike = (
                last is not None
                and last.source == source
                and last.queries.stop - last.queries.start == shared * (last.keys.stop - last.keys.start)
            )
            if last is not None and alike and high - low == shared:
                found[-1] = Section(slice(last.queries.start, high), slice(last.keys.start, place + 1), source)
            else:
                found.append(Section(slice(low, high), slice(place, place + 1), source))
        sections.append(tuple(found))
    last_use = {section.source: i for i, group in enumerate(sections) for section in group}
    return tuple(
        Group(slice(a, b), fresh[i], sections[i], tuple(s for s, last in last_use.items() if last == i))
        for i, (a, b) in enumerate(pairwise(cuts))
    )


Cut = Callable[[int], Sequence[Sequence[Tensor]]]
"""For a rank, what of this rank's tensors goes there, or looks like what comes from there: T … by section."""


class _Swap:
    """The messages that take a group of ranks' tokens to those of them that have the heads, and back."""

    def __init__(self, me: Me, inner: int) -> None:
        self.layout, self.kernels = me.layout, me.kernels
        self.place, outer = me.rank % inner, me.rank // inner
        self.ranks = range(outer * inner, (outer + 1) * inner)
        joined = me.layout.joined(inner)
        self.tokens = joined.held(outer)
        self.stretches = [_stretches(me.layout, inner, rank) for rank in self.ranks]
        self.held = [me.layout.held(rank) for rank in self.ranks]
        self.outer = Me(outer, joined, me.sight, me.kernels)
        self.peers = range(self.place, me.ranks, inner)
        """The ranks that have the same heads of other tokens."""
        self.most = max(me.layout.held(rank) for rank in range(me.ranks)), max(map(joined.held, range(joined.ranks)))

    def go(self, cut: Cut) -> Schedule[tuple[int, list[Tensor]]]:
        """Sends every rank its heads of this rank's tokens; a ticket, and where those of all tokens arrive."""
        sections = [Sections(*cut(place)) for place in range(len(self.ranks))]
        rows, mine = self.held[self.place], sections[self.place]
        bases = [list(accumulate((aligned(s.size(held)) for s in sections), initial=0)) for held in self.held]
        base = bases[self.place]
        room: Tensor = yield Room(base[-1], sum(aligned(s.size(self.most[0])) for s in sections))
        for place, start in enumerate(base[:-1]):
            for part, group in zip(sections[place].parts(room[start:], rows), cut(place), strict=True):
                self.kernels.pack(part, *(tensor[:rows] for tensor in group))
        landing = room.new_empty(mine.size(self.tokens))
        gives = [
            Give(self.ranks[place], base[place] + low, base[place] + high)
            for place in range(len(self.ranks))
            if place != self.place
            for stretch in self.stretches[self.place]
            for low, high in sections[place].bounds(rows, stretch.here)
        ]
        takes = [
            Take(self.ranks[place], bases[place][self.place] + start, landing[low:high])
            for place, held in enumerate(self.held)
            for stretch in self.stretches[place]
            for (start, _), (low, high) in zip(
                mine.bounds(held, stretch.here), mine.bounds(self.tokens, stretch.there), strict=True
            )
        ]
        ticket: int = yield Post(room, gives, takes)
        return ticket, mine.views(landing, self.tokens)

    def come(self, found: Sequence[Sequence[Tensor]], cut: Cut) -> Schedule[tuple[int, list[list[Tensor]]]]:
        """Returns what was found for all tokens to their ranks; a ticket, and what comes from each for our own."""
        sections = [Sections(*cut(place)) for place in range(len(self.ranks))]
        mine, held = sections[self.place], self.held[self.place]
        room: Tensor = yield Room(mine.size(self.tokens), max(s.size(self.most[1]) for s in sections))
        for part, group in zip(mine.parts(room, self.tokens), found, strict=True):
            self.kernels.pack(part, *group)
        gives = [
            Give(rank, low, high)
            for place, rank in enumerate(self.ranks)
            if place != self.place
            for stretch in self.stretches[place]
            for low, high in mine.bounds(self.tokens, stretch.there)
        ]
        slots = [room.new_empty(section.size(held)) for section in sections]
        takes = [
            Take(self.ranks[place], start, slots[place][low:high])
            for place, section in enumerate(sections)
            for stretch in self.stretches[self.place]
            for (start, _), (low, high) in zip(
                section.bounds(self.tokens, stretch.there), section.bounds(held, stretch.here), strict=True
            )
        ]
        ticket: int = yield Post(room, gives, takes)
        return ticket, [section.views(slot, held) for section, slot in zip(sections, slots, strict=True)]


class _Stretch(NamedTuple):
    here: tuple[int, int]
    """First and last row, exclusive, among a rank's tokens."""
    there: tuple[int, int]
    """And among all tokens."""


@lru_cache(maxsize=1024)
def _stretches(layout: Layout, inner: int, rank: int) -> list[_Stretch]:
    """Where a rank's pieces are among those of its group."""
    among = dict(runs(layout.joined(inner).pieces[rank // inner]))
    out: list[_Stretch] = []
    for piece in layout.pieces[rank]:
        around = next(p for p in among[piece.document] if p.start <= piece.start < p.stop)
        place = around.at + piece.start - around.start
        if out and out[-1].there[1] == place:
            here, there = out.pop()
            out.append(_Stretch((here[0], piece.end), (there[0], place + piece.length)))
        else:
            out.append(_Stretch((piece.at, piece.end), (place, place + piece.length)))
    return out


class Alone:
    """The schedule of one rank."""

    def forward(self, me: Me, q: Tensor, k: Tensor, v: Tensor) -> Schedule[tuple[Tensor, Tensor]]:
        out = Whole(me.kernels, q, v.shape[-1], many=False)
        out.attend(q, k, v, me.sight.tiles(me.pieces, me.pieces))
        yield from ()
        return out.result()

    def backward(self, me: Me, saved: Saved) -> Schedule[Grads]:
        grads = sums_of(me.kernels, saved.q, saved.k, saved.v, many=False)
        attend_back(me, saved, me.sight.tiles(me.pieces, me.pieces), grads)
        yield from ()
        return grads[0].result(), grads[1].result(), grads[2].result()


@dataclass(frozen=True)
class Swapping:
    """Groups of `inner` consecutive ranks swap heads for sequence, and `outer` spans what the groups hold.

    groups: how many parts a rank's heads travel in.
    """

    inner: int
    outer: Spanning
    groups: int

    def forward(self, me: Me, q: Tensor, k: Tensor, v: Tensor) -> Schedule[tuple[Tensor, Tensor]]:
        dealt, swap = self._deal(me, q, k), _Swap(me, self.inner)
        out = q.new_zeros(*q.shape[:2], v.shape[2])
        lse = q.new_full(q.shape[1::-1], -torch.inf, dtype=torch.promote_types(q.dtype, torch.float32))
        arrivals: list[list[Tensor]] = []

        def going(i: int, place: int) -> list[list[Tensor]]:
            heads = dealt[place][i]
            return [[q[:, heads.queries], k[:, heads.fresh], v[:, heads.fresh]]]

        def coming(i: int, place: int) -> list[list[Tensor]]:
            return [[out[:, dealt[place][i].queries]], [lse.T[:, dealt[place][i].queries]]]

        def attend(i: int, arrived: list[Tensor]) -> Schedule[list[list[Tensor]]]:
            arrivals.append(arrived)
            found = Whole(me.kernels, arrived[0], v.shape[2], many=False)
            for section in dealt[swap.place][i].sections:
                keys, values = (x[:, section.keys] for x in arrivals[section.source][1:])
                schedule = self.outer.forward(swap.outer, arrived[0][:, section.queries], keys, values)
                found.put(*(yield from renumbered(schedule, swap.peers)), section.queries)
            part, part_lse = found.result()
            return [[part], [part_lse.T]]

        def collect(i: int, slots: list[list[Tensor]]) -> None:
            for groups, (part, part_lse) in zip(dealt, slots, strict=True):
                out[: part.shape[0], groups[i].queries] = part
                lse[groups[i].queries, : part.shape[0]] = part_lse.T

        yield from self._pipeline(swap, len(dealt[0]), going, attend, coming, collect)
        return out, lse

    def backward(self, me: Me, saved: Saved) -> Schedule[Grads]:
        q, k, v, dout, lse = saved.q, saved.k, saved.v, saved.dout, saved.lse.T
        dealt, swap = self._deal(me, q, k), _Swap(me, self.inner)
        delta = me.kernels.delta(saved.out, dout).T
        grads = sums_of(me.kernels, q, k, v, many=False)
        arrivals: list[list[Tensor]] = []
        sums: list[tuple[Sum, Sum]] = []

        def going(i: int, place: int) -> list[list[Tensor]]:
            queries, fresh = dealt[place][i].queries, dealt[place][i].fresh
            return [[q[:, queries], dout[:, queries], k[:, fresh], v[:, fresh]], [lse[:, queries], delta[:, queries]]]

        def coming(i: int, place: int) -> list[list[Tensor]]:
            groups = dealt[place]
            fresh = [groups[source].fresh for source in groups[i].finished]
            return [[q[:, groups[i].queries]], *([k[:, heads], v[:, heads]] for heads in fresh)]

        def attend(i: int, arrived: list[Tensor]) -> Schedule[list[list[Tensor]]]:
            arrivals.append(arrived)
            query, upstream, keys, values, total, shift = arrived
            sums.append((Sum(me.kernels, keys, many=False), Sum(me.kernels, values, many=False)))
            dq = Sum(me.kernels, query, many=False)
            stand_in = me.kernels.stand_in(upstream, shift.T)
            visiting = Saved(upstream, query, keys, values, stand_in, total.T.contiguous())
            for section in dealt[swap.place][i].sections:
                keys, values = (x[:, section.keys] for x in arrivals[section.source][2:4])
                part = self.outer.backward(swap.outer, visiting.over(section.queries, keys, values))
                found = yield from renumbered(part, swap.peers)
                places = section.queries, section.keys, section.keys
                for total_, piece, heads in zip((dq, *sums[section.source]), found, places, strict=True):
                    total_.add(piece, slice(0, piece.shape[0]), heads)
            done = [[total_.result() for total_ in sums[source]] for source in dealt[swap.place][i].finished]
            return [[dq.result()], *done]

        def collect(i: int, slots: list[list[Tensor]]) -> None:
            for groups, (dq, *rest) in zip(dealt, slots, strict=True):
                rows = slice(0, dq.shape[0])
                grads[0].add(dq, rows, groups[i].queries)
                fresh = [groups[source].fresh for source in groups[i].finished]
                for heads, dk, dv in zip(fresh, rest[::2], rest[1::2], strict=True):
                    grads[1].add(dk, rows, heads)
                    grads[2].add(dv, rows, heads)

        yield from self._pipeline(swap, len(dealt[0]), going, attend, coming, collect)
        return grads[0].result(), grads[1].result(), grads[2].result()

    def _deal(self, me: Me, q: Tensor, k: Tensor) -> tuple[tuple[Group, ...], ...]:
        most = -(-q.shape[1] // self.inner)  # heads of a rank: no use in more groups
        return deal(q.shape[1], k.shape[1], self.inner, min(self.groups, most))

    def _pipeline(
        self,
        swap: _Swap,
        groups: int,
        going: Callable[[int, int], list[list[Tensor]]],
        attend: Callable[[int, list[Tensor]], Schedule[list[list[Tensor]]]],
        coming: Callable[[int, int], list[list[Tensor]]],
        collect: Callable[[int, list[list[Tensor]]], None],
    ) -> Schedule[None]:
        """Group i + 1 arrives while group i computes, and group i - 1 returns."""
        ahead = yield from swap.go(partial(going, 0))
        returning: list[tuple[int, list[list[Tensor]]]] = []
        for i in range(groups):
            ticket, arrived = ahead
            if i + 1 < groups:
                ahead = yield from swap.go(partial(going, i + 1))
            yield Wait(ticket)
            found = yield from attend(i, arrived)
            returning.append((yield from swap.come(found, partial(coming, i))))
            if i:
                yield Wait(returning[i - 1][0])
                collect(i - 1, returning[i - 1][1])
        yield Wait(returning[-1][0])
        collect(groups - 1, returning[-1][1])


@dataclass(frozen=True, kw_only=True)
class Ulysses(Pinned):
    """All ranks swap heads for sequence: each has all tokens of some heads."""

    groups: int = 1
    """Parts that a rank's heads travel in: while one computes, the next is on its way."""

    def __post_init__(self) -> None:
        if self.groups < 1:
            raise ValueError(f"groups={self.groups}: must be at least 1")

    @property
    def order(self) -> Kind:
        return "contiguous"

    def forward(self, me: Me, q: Tensor, k: Tensor, v: Tensor) -> Schedule[tuple[Tensor, Tensor]]:
        return Swapping(me.ranks, Alone(), self.groups).forward(me, q, k, v)

    def backward(self, me: Me, saved: Saved) -> Schedule[Grads]:
        return Swapping(me.ranks, Alone(), self.groups).backward(me, saved)
