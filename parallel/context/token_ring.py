"""Queries travel and keys stay: each holder sends what it found for a query straight back to the query's owner.

The schedule is TokenRing's (Wang et al., 2024): queries hop down the ring, and outputs with their log-sum-exp return
the other way. Ours has a backward as well: queries travel with dout, lse and delta, and dQ returns. A query goes no
further than some rank sees it: in causal zigzag the second half of its way needs the second half of its rows. The
owner keeps half of its own block for last, so that the last return is hidden behind it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from torch import Tensor

from farspan.parallel.context.exchange import Give, Post, Room, Schedule, Sections, Take, Wait
from farspan.parallel.context.layout import Layout, Piece
from farspan.parallel.context.pinned import Pinned
from farspan.parallel.context.sight import Pieces, Sight
from farspan.parallel.context.sums import Grads, Me, Saved, Sum, Whole, attend_back, halves, sums_of

Stretch = tuple[int, int]
"""Rows, first and last exclusive."""


@lru_cache(maxsize=4096)
def needs(sight: Sight, layout: Layout, owner: int, rank: int) -> Stretch:
    """The stretch of an owner's rows that meets a rank's keys."""
    lists = sight.tiles(layout.pieces[owner], layout.pieces[rank])
    tiles = [tile for tiles in lists for tile in tiles.tiles]
    return (min(t.row for t in tiles), max(t.row + t.rows for t in tiles)) if tiles else (0, 0)


@lru_cache(maxsize=4096)
def travels(sight: Sight, layout: Layout, owner: int, step: int) -> Stretch:
    """The stretch of an owner's rows that its holder at `step`, or some later one, needs."""
    ends = [needs(sight, layout, owner, (owner - s) % layout.ranks) for s in range(max(step, 1), layout.ranks)]
    ends = [(low, high) for low, high in ends if high > low]
    return (min(low for low, _ in ends), max(high for _, high in ends)) if ends else (0, 0)


class _Ring:
    """What travels down the ring and what returns: at step s rank r holds rows of rank r+s."""

    def __init__(self, me: Me, going: Sections, coming: Sections) -> None:
        self.me, self.going, self.coming = me, going, coming

    def rows(self, owner: int, step: int) -> Stretch:
        return travels(self.me.sight, self.me.layout, owner, step)

    def needed(self, owner: int, rank: int) -> Stretch:
        return needs(self.me.sight, self.me.layout, owner, rank)

    def pieces(self, step: int) -> Pieces:
        """Whose rows this rank holds at a step, placed as it has them."""
        owner = self.me.to(step)
        low, high = self.rows(owner, step)
        inside = [(p, max(p.at, low), min(p.end, high)) for p in self.me.layout.pieces[owner]]
        return tuple(Piece(p.document, p.start + a - p.at, b - a, a - low) for p, a, b in inside if b > a)

    def room(self, step: int) -> Room:
        ranks = range(self.me.ranks)
        sizes = [self.going.size(_length(self.rows((rank + step) % self.me.ranks, step))) for rank in ranks]
        return Room(sizes[self.me.rank], max(sizes))

    def hop(self, held: Tensor, room: Tensor, step: int) -> Post:
        """Passes on what later ranks need of what this one holds at `step`, and takes what it holds next."""
        me, gives, takes = self.me, [], []
        for source, to in ((me.rank, me.to(-1)), (me.to(1), me.rank)):
            owner = (source + step) % me.ranks
            now, after = self.rows(owner, step), self.rows(owner, step + 1)
            bounds = self.going.bounds(_length(now), (after[0] - now[0], after[1] - now[0]))
            landing = self.going.bounds(_length(after), (0, _length(after)))
            for (low, high), (first, last) in zip(bounds, landing, strict=True):
                if source == me.rank:
                    gives.append(Give(to, low, high))
                if to == me.rank:
                    takes.append(Take(source, low, room[first:last]))
        return Post(held, gives, takes)

    def home(self, step: int, *found: Sequence[Tensor]) -> Schedule[tuple[int, Tensor]]:
        """Returns what was found for the rows held at `step`; the answer is a ticket, and what comes for our own."""
        me, ranks = self.me, self.me.ranks
        owner, holder = me.to(step), me.to(-step)
        low = self.rows(owner, step)[0]
        first, last = self.needed(owner, me.rank)
        rows = last - first
        sizes = [self.coming.size(_length(self.needed((rank + step) % ranks, rank))) for rank in range(ranks)]
        room: Tensor = yield Room(sizes[me.rank], max(sizes))
        stretch = slice(first - low, last - low)
        for part, group in zip(self.coming.parts(room, rows), found, strict=True):
            me.kernels.pack(part, *(x[stretch] for x in group))
        slot = room.new_empty(sizes[holder])
        ticket: int = yield Post(room, [Give(owner, 0, sizes[me.rank])], [Take(holder, 0, slot)])
        return ticket, slot

    def returned(self, slot: Tensor, step: int) -> tuple[slice, list[Tensor]]:
        """This rank's rows that its holder at `step` answered, and the answers."""
        stretch = self.needed(self.me.rank, self.me.to(-step))
        return slice(*stretch), self.coming.views(slot, _length(stretch))


def _length(stretch: Stretch) -> int:
    return stretch[1] - stretch[0]


@dataclass(frozen=True, kw_only=True)
class TokenRing(Pinned):
    """Queries travel, and what was found for them returns directly to their owner."""

    def forward(self, me: Me, q: Tensor, k: Tensor, v: Tensor) -> Schedule[tuple[Tensor, Tensor]]:
        out = Whole(me.kernels, q, v.shape[-1], many=me.ranks > 2)
        like = q.new_empty(0, q.shape[1], v.shape[2]), q.new_empty(0, q.shape[1], dtype=out.sum_dtype)
        ring = _Ring(me, Sections([q]), Sections([like[0]], [like[1]]))
        local, parts = me.sight.tiles(me.pieces, me.pieces), halves(q.shape[1], k.shape[1])
        held = yield from self._start(ring, [q])
        returning: tuple[int, Tensor] | None = None

        def attend(heads: tuple[slice, slice]) -> None:
            out.attend(q[:, heads[0]], k[:, heads[1]], v[:, heads[1]], local, heads[0])

        for step in range(me.ranks):
            ticket, after = yield from self._hop(ring, held, step)
            if step == 0:
                attend(parts[0])
            else:
                (query,) = ring.going.views(held, _length(ring.rows(me.to(step), step)))
                found = Whole(me.kernels, query, v.shape[-1], many=False)
                found.attend(query, k, v, me.sight.tiles(ring.pieces(step), me.pieces))
                part, part_lse = found.result()
                ahead = yield from ring.home(step, [part], [part_lse.T])
                yield from self._merge(ring, returning, step - 1, out)
                returning = ahead
            if ticket is not None:
                yield Wait(ticket)
            held = after
        for heads in parts[1:]:
            attend(heads)  # while the last answers return
        yield from self._merge(ring, returning, me.ranks - 1, out)
        return out.result()

    def _merge(self, ring: _Ring, returning: tuple[int, Tensor] | None, step: int, out: Whole) -> Schedule[None]:
        if returning is not None:
            yield Wait(returning[0])
            rows, (part, part_lse) = ring.returned(returning[1], step)
            out.add(part, part_lse.T, rows)

    def backward(self, me: Me, saved: Saved) -> Schedule[Grads]:
        q, many = saved.q, me.ranks > 2
        grads = sums_of(me.kernels, q, saved.k, saved.v, many=many)
        delta = me.kernels.delta(saved.out, saved.dout)
        going = [q, saved.dout], [saved.lse.T, delta.T]
        ring = _Ring(me, Sections(*going), Sections([q]))
        local, parts = me.sight.tiles(me.pieces, me.pieces), halves(q.shape[1], saved.k.shape[1])
        held = yield from self._start(ring, *going)
        returning: tuple[int, Tensor] | None = None
        for step in range(me.ranks):
            ticket, after = yield from self._hop(ring, held, step)
            if step == 0:
                attend_back(me, saved.some(parts[0]), local, grads, parts[0])
            else:
                query, dout, lse, shift = ring.going.views(held, _length(ring.rows(me.to(step), step)))
                out = me.kernels.stand_in(dout, shift.T)
                visiting = Saved(dout, query, saved.k, saved.v, out, lse.T.contiguous())
                dq = Sum(me.kernels, query, many=False)
                lists = me.sight.tiles(ring.pieces(step), me.pieces)
                attend_back(me, visiting, lists, (dq, grads[1], grads[2]))
                ahead = yield from ring.home(step, [dq.result()])
                yield from self._add(ring, returning, step - 1, grads[0])
                returning = ahead
            if ticket is not None:
                yield Wait(ticket)
            held = after
        for heads in parts[1:]:
            attend_back(me, saved.some(heads), local, grads, heads)
        yield from self._add(ring, returning, me.ranks - 1, grads[0])
        return grads[0].result(), grads[1].result(), grads[2].result()

    def _add(self, ring: _Ring, returning: tuple[int, Tensor] | None, step: int, dq: Sum) -> Schedule[None]:
        if returning is not None:
            yield Wait(returning[0])
            rows, (part,) = ring.returned(returning[1], step)
            dq.add(part, rows)

    def _start(self, ring: _Ring, *going: Sequence[Tensor]) -> Schedule[Tensor]:
        """What this rank sends out: those of its own rows that any other rank needs."""
        first, last = ring.rows(ring.me.rank, 0)
        room: Tensor = yield ring.room(0)
        for part, group in zip(ring.going.parts(room, last - first), going, strict=True):
            ring.me.kernels.pack(part, *(x[first:last] for x in group))
        return room

    def _hop(self, ring: _Ring, held: Tensor, step: int) -> Schedule[tuple[int | None, Tensor]]:
        if step == ring.me.ranks - 1:
            return None, held
        after: Tensor = yield ring.room(step + 1)
        ticket: int = yield ring.hop(held, after, step)
        return ticket, after
