"""Keys and values are gathered: each rank takes exactly the slices that its queries see, and merges at most once.

After the all-gather of Llama 3 (Dubey et al., 2024) and the group-cast of MagiAttention: against a ring, few exchanges,
long kernels, and of a causal sequence only what is needed. Heads may be gathered in groups: less memory, and the next
group travels while this one computes. Backward gathers again and sends each owner its part of dK and dV, summed there
in the order of ranks.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from farspan.parallel.context.exchange import Give, Packing, Post, Room, Schedule, Take, Wait
from farspan.parallel.context.layout import length_of
from farspan.parallel.context.pinned import Pinned
from farspan.parallel.context.sight import Part, Pieces, exports, imports
from farspan.parallel.context.sums import ALL, Grads, Me, Saved, Sum, Whole, attend_back, halves


@dataclass(frozen=True, kw_only=True)
class Gather(Pinned):
    """Each rank takes exactly the keys and values that its queries see."""

    groups: int = 1
    """Parts that the key heads are gathered in, one after the other: memory for as many; at most one head each."""

    def __post_init__(self) -> None:
        if self.groups < 1:
            raise ValueError(f"groups={self.groups}: must be at least 1")

    def forward(self, me: Me, q: Tensor, k: Tensor, v: Tensor) -> Schedule[tuple[Tensor, Tensor]]:
        out = Whole(me.kernels, q, v.shape[-1], many=False)
        fetches = self._fetches(me, q, k, v)
        ahead = yield from fetches[0].begin()
        if not fetches[0].whole:
            out.attend(q, k, v, me.sight.tiles(me.pieces, me.pieces))
        for i, fetch in enumerate(fetches):
            ticket = ahead
            if i + 1 < len(fetches):
                ahead = yield from fetches[i + 1].begin()
            yield Wait(ticket)
            out.attend(q[:, fetch.query_heads], fetch.keys, fetch.values, fetch.tiles, fetch.query_heads)
        return out.result()

    def backward(self, me: Me, saved: Saved) -> Schedule[Grads]:
        q, k, v = saved.q, saved.k, saved.v
        many = me.ranks > 2
        grads = Sum(me.kernels, q, many=False), Sum(me.kernels, k, many=many), Sum(me.kernels, v, many=many)
        fetches = self._fetches(me, q, k, v)
        ahead = yield from fetches[0].begin()
        local = () if fetches[0].whole else me.sight.tiles(me.pieces, me.pieces)
        parts = halves(q.shape[1], k.shape[1])
        attend_back(me, saved.some(parts[0]), local, grads, parts[0])  # while the first keys arrive
        returns: list[tuple[_Fetch, int]] = []
        for i, fetch in enumerate(fetches):
            ticket = ahead
            if i + 1 < len(fetches):
                ahead = yield from fetches[i + 1].begin()
            yield Wait(ticket)
            returns.append((fetch, (yield from fetch.send_back(saved, grads[0]))))
        for heads in parts[1:]:
            attend_back(me, saved.some(heads), local, grads, heads)  # while the last gradients leave
        for fetch, ticket in returns:
            yield Wait(ticket)
            fetch.add(grads[1], grads[2])
        return grads[0].result(), grads[1].result(), grads[2].result()

    def _fetches(self, me: Me, q: Tensor, k: Tensor, v: Tensor) -> "list[_Fetch]":
        heads = k.shape[1]
        count = min(self.groups, heads)
        cuts = [slice(i * heads // count, (i + 1) * heads // count) for i in range(count)]
        return [_Fetch(me, k, v, cut, q.shape[1] // heads) for cut in cuts]


class _Fetch:
    """Some key heads' keys and values that one rank needs: where they come from, and where their gradients go."""

    def __init__(self, me: Me, k: Tensor, v: Tensor, heads: slice, groups: int) -> None:
        self.me, self.k, self.v, self.heads = me, k[:, heads], v[:, heads], heads
        self.query_heads = slice(heads.start * groups, heads.stop * groups)
        self.whole = me.sight.window is not None
        """Under a window a query's keys lie side by side, its own among them: bands need no merge."""
        self.pieces, self.parts = self._imports(me.rank)
        self.tiles = me.sight.tiles(me.pieces, self.pieces)
        self.rows = length_of(self.pieces)
        self.packing = Packing(self.k, self.v)

    def begin(self) -> Schedule[int]:
        """Publishes this rank's keys and values, and takes what it needs of the others'."""
        me, row = self.me, self.packing.row
        room = yield Room(self.k.shape[0] * row, me.layout.tokens * row)
        me.kernels.pack(room, self.k, self.v)
        buffer = self.k.new_empty(self.rows * row, dtype=torch.uint8)
        self.keys, self.values = self.packing.views(buffer)
        takes = [Take(p.owner, p.source * row, buffer[p.at * row : (p.at + p.length) * row]) for p in self.parts]
        gives = [
            Give(rank, part.source * row, (part.source + part.length) * row)
            for rank, part in self._exports()
            if rank != me.rank
        ]
        ticket: int = yield Post(room, gives, takes)
        return ticket

    def send_back(self, saved: Saved, dq: Sum) -> Schedule[int]:
        """Computes, and returns what it found to the owners."""
        me, row = self.me, self.packing.row
        dk, dv = (Sum(me.kernels, x, many=False) for x in (self.keys, self.values))
        queries = saved.over(self.query_heads, self.keys, self.values)
        attend_back(me, queries, self.tiles, (dq, dk, dv), (self.query_heads, ALL))
        most = max(length_of(self._imports(rank)[0]) for rank in range(me.ranks))
        room = yield Room(self.rows * row, most * row)
        me.kernels.pack(room, dk.result(), dv.result())
        gives = [
            Give(part.owner, part.at * row, (part.at + part.length) * row)
            for part in self.parts
            if part.owner != me.rank
        ]
        self.slots = [
            (part, self.k.new_empty(part.length * row, dtype=torch.uint8), rank) for rank, part in self._exports()
        ]
        takes = [Take(rank, part.at * row, slot) for part, slot, rank in self.slots]
        ticket: int = yield Post(room, gives, takes)
        return ticket

    def add(self, dk: Sum, dv: Sum) -> None:
        """Sums what came back, in the order of ranks."""
        for part, slot, _ in self.slots:
            rows = slice(part.source, part.source + part.length)
            for total, piece in zip((dk, dv), self.packing.views(slot), strict=True):
                total.add(piece, rows, self.heads)

    def _imports(self, rank: int) -> tuple[Pieces, tuple[Part, ...]]:
        return imports(self.me.sight, self.me.layout, rank, self.whole)

    def _exports(self) -> tuple[tuple[int, Part], ...]:
        """What every rank, this one under a window, has of this rank's keys."""
        return exports(self.me.sight, self.me.layout, self.me.rank, self.whole)
