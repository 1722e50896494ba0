"""Two attention backends come with torch on NVIDIA: cuDNN, dense only and fastest on Hopper, and FlashAttention 2."""

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

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
    """Pieces that one call can take: all see the same band of keys, counted as in `Varlen`, with None for no limit."""

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


def power_of_2(n: int) -> int:
    """The smallest that is at least n."""
    return 1 << (n - 1).bit_length()
