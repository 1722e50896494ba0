"""Two attention backends come with torch on NVIDIA: cuDNN, dense only and fastest on Hopper, and FlashAttention 2."""

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from farspan.kernels.softmax_attention_backends import flat, flat_lse, heads_first, last_dense, rows_lse, tokens_first
from farspan.kernels.softmax_attention_mask import Mask, bottom_right

aten = torch.ops.aten


class Cudnn:
    """Full, or causal with T = S. It groups heads itself; its lse is B H T 1; its backward is not deterministic."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> tuple[Tensor, Tensor]:
        out, lse, *_ = aten._scaled_dot_product_cudnn_attention(
            heads_first(q), heads_first(k), heads_first(v), None, True, 0.0, mask.causal, False, scale=mask.scale_of(q)
        )
        return tokens_first(out), lse.view(q.shape[0], q.shape[2], q.shape[1]).contiguous()

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: Mask
    ) -> tuple[Tensor, Tensor, Tensor]:
        # torch finds its built graph by the strides of q, k and v alone and would run one that was built for another
        # layout of out and dout, with wrong gradients: they come in one layout always.
        dout, out = dout.contiguous(), out.contiguous()
        # Seed and offset are read only under dropout; undefined cu_seqlens mean dense.
        seed, offset = (torch.empty((), dtype=torch.int64, device=q.device) for _ in range(2))
        dq, dk, dv = aten._scaled_dot_product_cudnn_attention_backward(
            *(heads_first(x) for x in (dout, q, k, v, out)),
            lse.contiguous().unsqueeze(-1),
            seed,
            offset,
            None,
            None,
            None,
            q.shape[1],
            k.shape[1],
            0.0,
            mask.causal,
            scale=mask.scale_of(q),
        )
        return tokens_first(dq), tokens_first(dk), tokens_first(dv)


class Flash:
    """torch's FlashAttention 2: groups heads itself; documents and windows, no soft cap. Its packed lse is H B*T."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> tuple[Tensor, Tensor]:
        t, s, bounds = q.shape[1], k.shape[1], mask.cu_seqlens
        causal, left, right = bottom_right(mask, t, s)
        query, key, value = (last_dense(x) if bounds is None else flat(x) for x in (q, k, v))
        out, lse, *_ = aten._flash_attention_forward(
            query,
            key,
            value,
            bounds,
            bounds,
            t,  # no document is longer than a row, and an upper bound is all the kernel needs
            s,
            0.0,
            causal,
            False,
            scale=mask.scale_of(q),
            window_size_left=left,
            window_size_right=right,
        )
        if bounds is None:
            return out.contiguous(), lse.contiguous()
        return out.reshape(q.shape), rows_lse(lse, q.shape[0])

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: Mask
    ) -> tuple[Tensor, Tensor, Tensor]:
        t, s, bounds = q.shape[1], k.shape[1], mask.cu_seqlens
        causal, left, right = bottom_right(mask, t, s)
        dq, dk, dv = aten._flash_attention_backward(
            *(last_dense(x) if bounds is None else flat(x) for x in (dout, q, k, v, out)),
            lse.contiguous() if bounds is None else flat_lse(lse),
            bounds,
            bounds,
            t,
            s,
            0.0,
            causal,
            torch.empty(2, dtype=torch.uint64, device=q.device),  # random state and its spare: read only under dropout
            torch.empty(0, dtype=torch.uint64, device=q.device),
            scale=mask.scale_of(q),
            window_size_left=left,
            window_size_right=right,
        )
        return dq.reshape(q.shape).contiguous(), dk.reshape(k.shape).contiguous(), dv.reshape(v.shape).contiguous()


class Varlen(NamedTuple):
    """Sequences end to end, queries and keys each with their own bounds, all seeing the same band of keys.

    Query i of t sees key j of s iff i + s - t - left <= j <= i + s - t + right; -1 is no limit. The bounds
    are int32 [sequences + 1], and the longest lengths upper bounds.
    """

    cu_q: Tensor
    cu_k: Tensor
    longest_q: int
    longest_k: int
    left: int
    right: int
    scale: float

    @property
    def arguments(self) -> tuple[Tensor, Tensor, int, int, float, bool]:
        """What both of FlashAttention's calls take in this order, up to is_causal; no dropout."""
        causal = self.left < 0 and self.right == 0
        return self.cu_q, self.cu_k, self.longest_q, self.longest_k, 0.0, causal

    @property
    def band(self) -> dict[str, int | float]:
        return {"scale": self.scale, "window_size_left": self.left, "window_size_right": self.right}


def varlen_forward(q: Tensor, k: Tensor, v: Tensor, varlen: Varlen) -> tuple[Tensor, Tensor]:
    """FlashAttention 2: q R H K, k and v C Hkv K -> out R H K, lse H R. Every query sees a key."""
    dense = (last_dense(x) for x in (q, k, v))
    out, lse, *_ = aten._flash_attention_forward(*dense, *varlen.arguments, False, **varlen.band)
    return out.contiguous(), lse


def varlen_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, varlen: Varlen
) -> tuple[Tensor, Tensor, Tensor]:
    """dq R H K, dk and dv C Hkv K from the whole softmax's out R H K and lse H R."""
    dense = (last_dense(x) for x in (dout, q, k, v, out))
    unused = (torch.empty(size, dtype=torch.uint64, device=q.device) for size in (2, 0))  # read only under dropout
    dq, dk, dv = aten._flash_attention_backward(*dense, lse.contiguous(), *varlen.arguments, *unused, **varlen.band)
    return dq.contiguous(), dk.contiguous(), dv.contiguous()


class Ragged(NamedTuple):
    """Sequences end to end, all seeing the same band of keys: what cuDNN's graphs take.

    Query i of t sees key j of s iff i + s - t - left <= j <= i + s - t + right; None is no limit. Counts and lengths
    are rounded up so that few graphs are built; the sequences that rounding adds are empty. Pairs are (queries, keys);
    square: t = s in all sequences.
    """

    sequences: int
    longest: tuple[int, int]
    totals: tuple[int, int]
    left: int | None
    right: int | None
    square: bool
    scale: float
    lengths: Callable[[str], Tensor]
    """int32 [sequences], of "rows" or "keys"."""
    starts: Callable[[str, int], Tensor]
    """int64 [sequences + 1]: where the sequences' "rows" or "keys" begin, times elements a row."""
    launches: dict[Hashable, Any]
    """What the adapter has worked out for these sequences."""


class Uploads:
    """Small tensors made on the host at their first use on a device, and kept there; copied without blocking."""

    def __init__(self) -> None:
        self.made: dict[tuple[Hashable, torch.device, int], Tensor] = {}

    def get(self, name: Hashable, make: Callable[[], Tensor], device: torch.device) -> Tensor:
        # A copy is only ordered before what follows on its own stream, hence one for each stream.
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        place = (name, device, stream)
        if place not in self.made:
            made = make()
            made = made.pin_memory() if device.type == "cuda" else made
            self.made[place] = made.to(device, non_blocking=True)
        return self.made[place]

    def index(self, name: Hashable, spans: tuple["Span", ...], device: torch.device) -> slice | Tensor:
        """The places of the spans: a slice where they are one range, else int32 on `device`."""
        if len(spans) <= 1:
            return slice(*spans[0]) if spans else slice(0, 0)
        return self.get(name, lambda: torch.cat([torch.arange(*span, dtype=torch.int32) for span in spans]), device)


class Span(NamedTuple):
    start: int
    stop: int


def joined(spans: Iterable[Span]) -> tuple[Span, ...]:
    """The same places with neighbours made one."""
    found: list[Span] = []
    for span in spans:
        if found and found[-1].stop == span.start:
            span = Span(found.pop().start, span.stop)
        found.append(span)
    return tuple(found)


class Piece(NamedTuple):
    """Queries and keys that meet, and their first places among the compact rows and keys; every query sees a key."""

    row: int
    rows: int
    key: int
    keys: int
    row_place: int
    key_place: int


@dataclass(frozen=True)
class Pack:
    """Pieces that one call can take: all see the same band of keys, counted as in `Ragged`."""

    left: int | None
    right: int | None
    pieces: tuple[Piece, ...]

    @cached_property
    def uploads(self) -> Uploads:
        return Uploads()

    @cached_property
    def longest(self) -> tuple[int, int]:
        return max(piece.rows for piece in self.pieces), max(piece.keys for piece in self.pieces)

    @cached_property
    def square(self) -> bool:
        return all(piece.rows == piece.keys for piece in self.pieces)

    @cached_property
    def squared(self) -> tuple["Pack", tuple["Pack", ...]]:
        """Under a window over more keys than queries: the squares on the diagonal, and the bands before them.

        cuDNN's backward runs six times as fast over the two as over the whole.
        """
        if self.left is None or self.right != 0 or self.square:
            return self, ()
        squares, bands = [], dict[int | None, list[Piece]]()
        for row, rows, key, keys, row_place, key_place in self.pieces:
            before = keys - rows  # query i sees keys i + before - left to i + before
            squares.append(Piece(row, rows, key + before, rows, row_place, key_place + before))
            first, seeing = max(0, before - self.left), min(rows, self.left)
            if before > first and seeing:
                left = self.left - seeing
                band = None if left >= before - first - 1 else left
                place = Piece(row, seeing, key + first, before - first, row_place, key_place + first)
                bands.setdefault(band, []).append(place)
        return Pack(self.left, 0, tuple(squares)), tuple(Pack(left, None, tuple(x)) for left, x in bands.items())

    def index(self, start: str, size: str, device: torch.device) -> slice | Tensor:
        """Places that begin at the pieces' `start` and are `size` long: row or row_place, key or key_place."""
        return self.uploads.index(start, self._spans[start, size], device)

    @cached_property
    def _spans(self) -> dict[tuple[str, str], tuple[Span, ...]]:
        return {
            (start, size): joined(Span(getattr(x, start), getattr(x, start) + getattr(x, size)) for x in self.pieces)
            for start, size in (("row", "rows"), ("row_place", "rows"), ("key", "keys"), ("key_place", "keys"))
        }

    @property
    def sequences(self) -> int:
        return power_of_2(len(self.pieces))

    def varlen(self, scale: float, device: torch.device) -> Varlen:
        def bounds(size: str) -> Tensor:
            ends = [0, *accumulate(getattr(piece, size) for piece in self.pieces)]
            return torch.tensor(ends + ends[-1:] * (self.sequences - len(self.pieces)), dtype=torch.int32)

        cu_q = self.uploads.get("cu_q", lambda: bounds("rows"), device)
        cu_k = self.uploads.get("cu_k", lambda: bounds("keys"), device)
        left, right = (-1 if edge is None else edge for edge in (self.left, self.right))
        # A bound of 1 would send FlashAttention down a path for decoding that knows no empty sequences.
        return Varlen(cu_q, cu_k, max(2, self.longest[0]), self.longest[1], left, right, scale)

    @cached_property
    def _ragged(self) -> dict[tuple[float, torch.device], Ragged]:
        return {}

    def ragged(self, scale: float, device: torch.device) -> Ragged:
        if (scale, device) not in self._ragged:
            self._ragged[scale, device] = self._make_ragged(scale, device)
        return self._ragged[scale, device]

    def _make_ragged(self, scale: float, device: torch.device) -> Ragged:
        def sizes(size: str) -> list[int]:
            return [*(getattr(piece, size) for piece in self.pieces), *[0] * (self.sequences - len(self.pieces))]

        def lengths(size: str) -> Tensor:
            made = ("lengths", size)
            return self.uploads.get(made, lambda: torch.tensor(sizes(size), dtype=torch.int32), device)

        def starts(size: str, elements: int) -> Tensor:
            def make() -> Tensor:
                return torch.tensor([*accumulate(sizes(size), initial=0)], dtype=torch.int64) * elements

            return self.uploads.get(("starts", size, elements), make, device)

        longest = (max(128, power_of_2(self.longest[0])), max(128, power_of_2(self.longest[1])))
        totals = rounded(sum(sizes("rows"))), rounded(sum(sizes("keys")))
        return Ragged(self.sequences, longest, totals, self.left, self.right, self.square, scale, lengths, starts, {})


def power_of_2(n: int) -> int:
    """The smallest that is at least n."""
    return 1 << (n - 1).bit_length()


def rounded(n: int) -> int:
    """Up, to four binary digits: workspaces are as large as this says, so a power of two would waste too much."""
    step = max(64, 1 << max(0, n.bit_length() - 4))
    return -(-n // step) * step
