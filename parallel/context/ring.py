"""Keys and values travel round the ring in both directions at once, and their gradients return straight home.

Ring attention (Liu et al., 2023) sends all keys one way, and lets the sums of dK and dV travel along. Here half of the
key heads go up and half go down, so that both directions of every link carry as much; with one key head the halves are
of its tokens. In the backward each rank sends what it found for an owner directly to that owner, which sums it once.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from torch import Tensor

from farspan.parallel.context.exchange import Give, Packing, Post, Room, Schedule, Take, Wait, aligned
from farspan.parallel.context.layout import Layout, Piece, Span, length_of, placed
from farspan.parallel.context.pinned import Pinned
from farspan.parallel.context.sight import Pieces
from farspan.parallel.context.sums import ALL, Grads, Heads, Me, Saved, Sum, Whole, attend_back, halves


class Lane(NamedTuple):
    """What goes one way round: some heads, of some of the tokens of every rank."""

    way: int
    heads: Heads
    tokens: slice

    def pieces(self, layout: Layout, rank: int) -> Pieces:
        """What of a rank's pieces is in the lane, placed anew."""
        if self.tokens == ALL:
            return layout.pieces[rank]
        return _within(layout, rank, self.tokens.start, self.tokens.stop)


@lru_cache(maxsize=1024)
def _within(layout: Layout, rank: int, start: int, stop: int | None) -> Pieces:
    """The pieces of a rank between two of its tokens, placed anew."""
    spans = [_inside(piece, start, piece.end if stop is None else stop) for piece in layout.pieces[rank]]
    return placed(span for span in spans if span.length > 0)


def _inside(piece: Piece, start: int, stop: int) -> Span:
    low, high = max(piece.at, start), min(piece.end, stop)
    return Span(piece.document, piece.start + low - piece.at, high - low)


def lanes(layout: Layout, heads: int, kv_heads: int) -> tuple[Lane, ...]:
    """Up and down; between two ranks both are the same way, and one message does."""
    if layout.ranks < 3:
        return (Lane(1, (ALL, ALL), ALL),)
    if kv_heads > 1:
        up, down = halves(heads, kv_heads)
        return Lane(1, up, ALL), Lane(-1, down, ALL)
    middle = layout.tokens // 2
    return Lane(1, (ALL, ALL), slice(0, middle)), Lane(-1, (ALL, ALL), slice(middle, None))


class _Cargo:
    """What one rank holds at each step: in a lane that goes up the cargo of rank r-s, in one that goes down of r+s."""

    def __init__(self, me: Me, q: Tensor, k: Tensor, v: Tensor) -> None:
        self.me, self.lanes = me, lanes(me.layout, q.shape[1], k.shape[1])
        self.packings = [Packing(k[:, lane.heads[1]], v[:, lane.heads[1]]) for lane in self.lanes]
        sizes = [max(self._size(i, rank) for rank in range(me.ranks)) for i in range(len(self.lanes))]
        self.most = sum(aligned(size) for size in sizes)

    def owner(self, i: int, rank: int, step: int) -> int:
        return (rank - self.lanes[i].way * step) % self.me.ranks

    def pieces(self, i: int, step: int) -> Pieces:
        return self.lanes[i].pieces(self.me.layout, self.owner(i, self.me.rank, step))

    def bounds(self, rank: int, step: int) -> list[tuple[int, int]]:
        """Where the lanes' cargoes begin and end in what `rank` publishes at a step."""
        out, at = [], 0
        for i in range(len(self.lanes)):
            size = self._size(i, self.owner(i, rank, step))
            out.append((at, at + size))
            at += aligned(size)
        return out

    def room(self, step: int) -> Room:
        return Room(self.bounds(self.me.rank, step)[-1][1], self.most)

    def views(self, room: Tensor, step: int) -> list[list[Tensor]]:
        """Keys and values, or their gradients, of each lane."""
        bounds = self.bounds(self.me.rank, step)
        return [packing.views(room[a:b]) for packing, (a, b) in zip(self.packings, bounds, strict=True)]

    def pack(self, room: Tensor, step: int, tensors: list[tuple[Tensor, Tensor]]) -> None:
        for (a, b), pair in zip(self.bounds(self.me.rank, step), tensors, strict=True):
            self.me.kernels.pack(room[a:b], *pair)

    def hop(self, held: Tensor, room: Tensor, step: int) -> Post:
        """Passes on what this rank holds at `step`, and takes into `room` what it holds next."""
        me, gives, takes = self.me, [], []
        mine, after = self.bounds(me.rank, step), self.bounds(me.rank, step + 1)
        for i, lane in enumerate(self.lanes):
            gives.append(Give(me.to(lane.way), *mine[i]))
            source = me.to(-lane.way)
            takes.append(Take(source, self.bounds(source, step)[i][0], room[slice(*after[i])]))
        return Post(held, gives, takes)

    def home(self, found: Tensor, step: int) -> tuple[Post, list[Tensor]]:
        """Sends the gradients found at `step` to their owners; the answer is what comes of this rank's own."""
        me, gives, takes = self.me, [], []
        mine = self.bounds(me.rank, step)
        for i, lane in enumerate(self.lanes):
            gives.append(Give(self.owner(i, me.rank, step), *mine[i]))
            source = me.to(lane.way * step)
            slot = found.new_empty(self._size(i, me.rank))
            takes.append(Take(source, self.bounds(source, step)[i][0], slot))
        return Post(found, gives, takes), [take.into for take in takes]

    def add(self, slots: list[Tensor], dk: Sum, dv: Sum) -> None:
        for lane, packing, slot in zip(self.lanes, self.packings, slots, strict=True):
            start = lane.tokens.start or 0
            for total, part in zip((dk, dv), packing.views(slot), strict=True):
                total.add(part, slice(start, start + part.shape[0]), lane.heads[1])

    def _size(self, i: int, rank: int) -> int:
        return length_of(self.lanes[i].pieces(self.me.layout, rank)) * self.packings[i].row


@dataclass(frozen=True, kw_only=True)
class Ring(Pinned):
    """Keys and values travel, half of the heads each way round; dK and dV return directly."""

    def forward(self, me: Me, q: Tensor, k: Tensor, v: Tensor) -> Schedule[tuple[Tensor, Tensor]]:
        out, ring = Whole(me.kernels, q, v.shape[-1], many=me.ranks > 2), _Cargo(me, q, k, v)
        held = yield from self._publish(ring, k, v)
        for step in range(me.ranks):
            ticket, after = yield from self._hop(ring, held, step)
            if step == 0:
                out.attend(q, k, v, me.sight.tiles(me.pieces, me.pieces))
            else:
                for i, (keys, values) in enumerate(ring.views(held, step)):
                    heads = ring.lanes[i].heads[0]
                    out.attend(q[:, heads], keys, values, me.sight.tiles(me.pieces, ring.pieces(i, step)), heads)
            if ticket is not None:
                yield Wait(ticket)
            held = after
        return out.result()

    def backward(self, me: Me, saved: Saved) -> Schedule[Grads]:
        k, v, ring = saved.k, saved.v, _Cargo(me, saved.q, saved.k, saved.v)
        many = me.ranks > 2
        grads = Sum(me.kernels, saved.q, many=many), Sum(me.kernels, k, many=many), Sum(me.kernels, v, many=many)
        local, parts = me.sight.tiles(me.pieces, me.pieces), halves(saved.q.shape[1], k.shape[1])
        held = yield from self._publish(ring, k, v)
        returning: tuple[int, list[Tensor]] | None = None
        for step in range(me.ranks):
            ticket, after = yield from self._hop(ring, held, step)
            if step == 0:
                attend_back(me, saved.some(parts[0]), local, grads, parts[0])
            else:
                found = yield from self._attend_back(ring, held, step, saved, grads[0])
                post, slots = ring.home(found, step)
                ahead = yield post
                if returning is not None:
                    yield Wait(returning[0])
                    ring.add(returning[1], grads[1], grads[2])
                returning = ahead, slots
            if ticket is not None:
                yield Wait(ticket)
            held = after
        for heads in parts[1:]:
            attend_back(me, saved.some(heads), local, grads, heads)  # while the last gradients travel
        if returning is not None:
            yield Wait(returning[0])
            ring.add(returning[1], grads[1], grads[2])
        return grads[0].result(), grads[1].result(), grads[2].result()

    def _publish(self, ring: _Cargo, k: Tensor, v: Tensor) -> Schedule[Tensor]:
        room: Tensor = yield ring.room(0)
        own = [(k[lane.tokens, lane.heads[1]], v[lane.tokens, lane.heads[1]]) for lane in ring.lanes]
        rows = [length_of(ring.pieces(i, 0)) for i in range(len(own))]
        ring.pack(room, 0, [(a[:n], b[:n]) for (a, b), n in zip(own, rows, strict=True)])
        return room

    def _hop(self, ring: _Cargo, held: Tensor, step: int) -> Schedule[tuple[int | None, Tensor]]:
        if step == ring.me.ranks - 1:
            return None, held
        after: Tensor = yield ring.room(step + 1)
        ticket: int = yield ring.hop(held, after, step)
        return ticket, after

    def _attend_back(self, ring: _Cargo, held: Tensor, step: int, saved: Saved, dq: Sum) -> Schedule[Tensor]:
        """Runs the tiles of one step; what it found for the owners, in a publication."""
        me, found = ring.me, []
        for i, (keys, values) in enumerate(ring.views(held, step)):
            heads = ring.lanes[i].heads[0]
            dk, dv = Sum(me.kernels, keys, many=False), Sum(me.kernels, values, many=False)
            tiles = me.sight.tiles(me.pieces, ring.pieces(i, step))
            attend_back(me, saved.over(heads, keys, values), tiles, (dq, dk, dv), (heads, ALL))
            found.append((dk.result(), dv.result()))
        room: Tensor = yield ring.room(step)
        ring.pack(room, step, found)
        return room
