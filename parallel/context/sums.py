"""Partial attentions and gradients on their way to whole ones, and what a schedule knows while it runs."""

from dataclasses import dataclass
from itertools import groupby
from typing import Protocol

import torch
from torch import Tensor

from farspan.kernels import lse as merging
from farspan.kernels.softmax_attention_tiles import Tiles, tiles_backward, tiles_forward
from farspan.parallel.context.exchange import Packing, Schedule
from farspan.parallel.context.layout import Layout
from farspan.parallel.context.sight import Pieces, Sight

ALL = slice(None)
Rows = slice | Tensor


class Kernels:
    """What a schedule computes with; the ghosts of `simulate` put a clock in its place."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, tiles: Tiles) -> tuple[Tensor, Tensor]:
        return tiles_forward(q, k, v, tiles)

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, tiles: Tiles
    ) -> tuple[Tensor, Tensor, Tensor]:
        return tiles_backward(dout, q, k, v, out, lse, tiles)

    def merge(self, out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor, rows: Rows) -> None:
        merging.merge_(out, lse, part, part_lse, rows)

    def add(self, total: Tensor, part: Tensor, rows: Rows) -> None:
        merging.add_(total, part, rows)

    def pack(self, room: Tensor, *tensors: Tensor) -> None:
        """Lays tensors of one type side by side in a publication, as `Packing` reads them."""
        for view, tensor in zip(Packing(*tensors).views(room), tensors, strict=True):
            if view.numel():
                view.copy_(tensor)

    def delta(self, out: Tensor, dout: Tensor) -> Tensor:
        return merging.delta(out, dout)

    def stand_in(self, dout: Tensor, delta: Tensor) -> Tensor:
        return merging.stand_in(dout, delta)


@dataclass(frozen=True)
class Me:
    """One rank of an attention: which, of what layout, with what mask."""

    rank: int
    layout: Layout
    sight: Sight
    kernels: Kernels

    @property
    def ranks(self) -> int:
        return self.layout.ranks

    @property
    def pieces(self) -> Pieces:
        return self.layout.pieces[self.rank]

    def to(self, offset: int) -> int:
        """The rank so far up the ring."""
        return (self.rank + offset) % self.ranks


class Whole:
    """Attention over keys that arrive in parts: out T H V and lse H T of what has been added."""

    def __init__(self, kernels: Kernels, like: Tensor, width: int, *, many: bool) -> None:
        """like: the queries, T H K. many: parts meet more than once, so they are summed in at least fp32."""
        self.kernels, self.like, self.width = kernels, like, width
        self.sum_dtype = torch.promote_types(like.dtype, torch.float32)
        self.dtype = self.sum_dtype if many else like.dtype
        self.out: Tensor | None = None
        self.lse: Tensor | None = None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, lists: tuple[Tiles, ...], heads: slice = ALL) -> None:
        """Adds what `q` (these heads of the queries) sees of these keys."""
        for tiles in lists:
            self.add(*self.kernels.forward(q, k, v, tiles), tiles.row_index(q.device), heads)

    def add(self, part: Tensor, part_lse: Tensor, rows: Rows, heads: slice = ALL) -> None:
        """part R H V and part_lse H R are over keys that no part before has seen."""
        if not part.shape[0]:
            return
        if self.out is None or self.lse is None:
            if part.shape[:2] == self.like.shape[:2] and self.dtype == part.dtype:
                self.out, self.lse = part, part_lse
                return
            t, h = self.like.shape[:2]
            self.out = self.like.new_zeros(t, h, self.width, dtype=self.dtype)
            self.lse = self.like.new_full((h, t), -torch.inf, dtype=self.sum_dtype)
        self.kernels.merge(self.out[:, heads], self.lse[heads], part, part_lse, rows)

    def put(self, part: Tensor, part_lse: Tensor, heads: slice) -> None:
        """The whole attention of some heads, which nothing else adds to."""
        self.add(part, part_lse, slice(0, part.shape[0]), heads)

    def result(self) -> tuple[Tensor, Tensor]:
        """Out in the queries' type; rows that saw nothing are 0, with lse -inf."""
        if self.out is None or self.lse is None:
            t, h = self.like.shape[:2]
            none = self.like.new_full((h, t), -torch.inf, dtype=self.sum_dtype)
            return self.like.new_zeros(t, h, self.width), none
        return self.out.to(self.like.dtype), self.lse


class Sum:
    """A gradient that arrives in parts, summed in the order in which they are added."""

    def __init__(self, kernels: Kernels, like: Tensor, *, many: bool) -> None:
        self.kernels, self.like = kernels, like
        self.dtype = torch.promote_types(like.dtype, torch.float32) if many else like.dtype
        self.total: Tensor | None = None
        self.begun: list[bool] = []
        """Which heads hold something; the memory of the others was never written."""

    def add(self, part: Tensor, rows: Rows, heads: slice = ALL) -> None:
        tokens, count = self.like.shape[:2]
        if not part.numel():
            return
        if self.total is None:
            if part.shape == self.like.shape and part.dtype == self.dtype:
                self.total, self.begun = part, [True] * count
                return
            self.total, self.begun = self.like.new_empty(self.like.shape, dtype=self.dtype), [False] * count
        first = heads.start or 0
        for begun, stretch in groupby(range(part.shape[1]), key=lambda i: self.begun[first + i]):
            members = list(stretch)
            columns = slice(first + members[0], first + members[-1] + 1)
            piece = part[:, members[0] : members[-1] + 1]
            if not begun and part.shape[0] == tokens:
                self.total[:, columns].copy_(piece)
            else:
                if not begun:
                    self.total[:, columns].zero_()
                self.kernels.add(self.total[:, columns], piece, rows)
            self.begun[columns] = [True] * len(members)

    def result(self) -> Tensor:
        if self.total is None:
            return self.like.new_zeros(self.like.shape)
        for head, begun in enumerate(self.begun):
            if not begun:
                self.total[:, head].zero_()
        return self.total.to(self.like.dtype)


@dataclass(frozen=True)
class Saved:
    """What a backward starts from: dout and out T H V, q T H K, lse H T of the whole softmax, and keys and values."""

    dout: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    lse: Tensor

    def over(self, heads: slice, k: Tensor, v: Tensor) -> "Saved":
        """Some query heads of the same, over other keys that belong to them."""
        return Saved(self.dout[:, heads], self.q[:, heads], k, v, self.out[:, heads], self.lse[heads])

    def some(self, heads: "Heads") -> "Saved":
        """Some heads of the same."""
        return self.over(heads[0], self.k[:, heads[1]], self.v[:, heads[1]])


class Spanning(Protocol):
    """A schedule: attention over a sequence cut across ranks, as generators that `exchange` carries."""

    def forward(self, me: Me, q: Tensor, k: Tensor, v: Tensor) -> Schedule[tuple[Tensor, Tensor]]:
        """q T H K, k T Hkv K, v T Hkv V of this rank -> out T H V, lse H T; padding gets 0 and -inf."""

    def backward(self, me: Me, saved: "Saved") -> "Schedule[Grads]":
        """dq T H K, dk T Hkv K, dv T Hkv V."""


Heads = tuple[slice, slice]
"""Some query heads, and the key heads that belong to them."""
Sums = tuple[Sum, Sum, Sum]
Grads = tuple[Tensor, Tensor, Tensor]


def attend_back(me: Me, saved: Saved, lists: tuple[Tiles, ...], sums: Sums, heads: Heads = (ALL, ALL)) -> None:
    """Adds the gradients of the tiles; `heads` are where the query and key heads of `saved` stand in the sums."""
    for tiles in lists:
        rows, keys = tiles.row_index(saved.q.device), tiles.key_index(saved.q.device)
        dout, out, lse = rows_of(saved.dout, rows), rows_of(saved.out, rows), columns_of(saved.lse, rows)
        dq, dk, dv = me.kernels.backward(dout, saved.q, saved.k, saved.v, out, lse, tiles)
        sums[0].add(dq, rows, heads[0])
        sums[1].add(dk, keys, heads[1])
        sums[2].add(dv, keys, heads[1])


def sums_of(kernels: Kernels, q: Tensor, k: Tensor, v: Tensor, *, many: bool) -> Sums:
    """The gradients of q, k, v, to be summed."""
    return Sum(kernels, q, many=many), Sum(kernels, k, many=many), Sum(kernels, v, many=many)


def rows_of(tensor: Tensor, rows: Rows) -> Tensor:
    """Rows of T … , a view where they are a stretch."""
    return tensor[rows] if isinstance(rows, slice) else tensor.index_select(0, rows)


def columns_of(tensor: Tensor, rows: Rows) -> Tensor:
    """The same of H T."""
    return tensor[:, rows] if isinstance(rows, slice) else tensor.index_select(1, rows)


def halves(heads: int, kv_heads: int) -> tuple[Heads, ...]:
    """All heads in two parts, or one where there is a single key head."""
    groups, half = heads // kv_heads, (kv_heads + 1) // 2
    cuts = [(0, half), (half, kv_heads)] if kv_heads > 1 else [(0, kv_heads)]
    return tuple((slice(a * groups, b * groups), slice(a, b)) for a, b in cuts)
