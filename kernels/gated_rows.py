"""SwiGLU times the router's probability, row by row: what is between the two products of an expert."""
# ruff: noqa: ANN001 - a kernel's arguments are pointers p_ and numbers

from math import gcd
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from farspan.kernels.define import define, triton_runs
from farspan.kernels.swiglu import activation

__all__ = ["GATED", "GATED_BACKWARD", "gated", "gated_ref"]


def gated_ref(h: Tensor, p: Tensor) -> Tensor:
    """The specification of `gated`, differentiable by autograd."""
    wide = torch.promote_types(h.dtype, torch.float32)
    gate, up = h.to(wide).unbind(1)
    return (F.silu(gate) * up * p.to(wide).unsqueeze(1)).to(h.dtype)


def gated(h: Tensor, p: Tensor) -> Tensor:
    """p · silu(h[:, 0]) ∘ h[:, 1], in at least fp32 inside and rounded once: M 2 I, M -> M I, dense, of h's type.

    SwiGLU (Shazeer, 2020), times the router's probability of each row, which costs nothing here. h: the last axis
    dense, else it is copied. Saves h and p, forms all else again; dp is a row's sum in one order. Kernels run on the
    current device. Errors: ValueError for unlike shapes.
    """
    if h.dim() != 3 or h.shape[1] != 2 or p.shape != h.shape[:1]:
        raise ValueError(f"gated: h {tuple(h.shape)} and p {tuple(p.shape)} must be M 2 I and M; reshape them")
    out: Tensor = _Gated.apply(h, p)
    return out


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, p: Tensor) -> Tensor:
        ctx.save_for_backward(h, p)
        return GATED(h, p)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor]:
        dh, dp, _ = GATED_BACKWARD(dout, *ctx.saved_tensors, False)
        return dh, dp


# The activation: 3 passes over M I forward, and 5 backward, or 6 with the activation itself. A program takes b_r rows,
# b_i columns at a time: forward one tile, backward whole rows, whose products with the upstream gradient it adds up
# in as many registers as a tile has numbers: hence a tile of half the size.


@triton.jit(do_not_specialize=["rows"])
def _gated_forward(  # type: ignore[no-untyped-def]
    p_out, p_gate, p_up, p_prob, rows, width, h_row, b_r: tl.constexpr, b_i: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * b_r + tl.arange(0, b_r)
    prob = tl.load(p_prob + row, mask=row < rows, other=0.0).to(tl.float32)[:, None]
    column = (tl.program_id(1) * b_i + tl.arange(0, b_i))[None, :]
    mask = (row < rows)[:, None] & (column < width)
    place = row[:, None] * h_row + column
    gate = tl.load(p_gate + place, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(p_up + place, mask=mask, other=0.0).to(tl.float32)
    value, _ = activation(gate, "silu")
    tl.store(p_out + row[:, None] * width + column, (value * up * prob).to(p_out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def _gated_backward(  # type: ignore[no-untyped-def]
    p_dh,
    p_dprob,
    p_out,
    p_dout,
    p_gate,
    p_up,
    p_prob,
    rows,
    width,
    dout_row,
    h_row,
    again: tl.constexpr,
    b_r: tl.constexpr,
    b_i: tl.constexpr,
):
    line = tl.program_id(0).to(tl.int64) * b_r + tl.arange(0, b_r)
    row = line[:, None]
    prob = tl.load(p_prob + line, mask=line < rows, other=0.0).to(tl.float32)[:, None]
    total = tl.zeros((b_r, b_i), tl.float32)
    for first in tl.range(0, width, b_i):
        column = (first + tl.arange(0, b_i))[None, :]
        mask = (row < rows) & (column < width)
        dout = tl.load(p_dout + row * dout_row + column, mask=mask, other=0.0).to(tl.float32)
        gate = tl.load(p_gate + row * h_row + column, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(p_up + row * h_row + column, mask=mask, other=0.0).to(tl.float32)
        value, slope = activation(gate, "silu")
        total += dout * (value * up)
        scaled = dout * prob
        place = row * (2 * width) + column
        tl.store(p_dh + place, (scaled * up * slope).to(p_dh.dtype.element_ty), mask=mask)
        tl.store(p_dh + place + width, (scaled * value).to(p_dh.dtype.element_ty), mask=mask)
        if again:
            out = value * up * prob
            tl.store(p_out + row * width + column, out.to(p_out.dtype.element_ty), mask=mask)
    tl.store(p_dprob + line, tl.sum(total, 1).to(p_dprob.dtype.element_ty), mask=line < rows)


def _tile(width: int, size: int) -> tuple[int, int]:
    """Rows and columns of `size` numbers: columns that fill tiles to the last lane, if they are 64 at least."""
    even = gcd(width, 1024)
    b_i = even if even >= 64 else min(triton.next_power_of_2(width), 1024)
    return size // b_i, b_i


def _launch_gated(out: Tensor, h: Tensor, p: Tensor) -> None:
    """out is dense."""
    if not h.numel():
        return
    (b_r, b_i), (rows, _, width) = _tile(h.shape[2], 4096), h.shape
    h = h if h.stride(2) == 1 else h.contiguous()
    grid = triton.cdiv(rows, b_r), triton.cdiv(width, b_i)
    sizes = rows, width, h.stride(0)
    _gated_forward[grid](out, *h.unbind(1), p.contiguous(), *sizes, b_r=b_r, b_i=b_i, num_warps=8)


def _launch_gated_backward(
    results: tuple[Tensor, Tensor, Tensor], dout: Tensor, h: Tensor, p: Tensor, again: bool
) -> None:
    """results: dh, dp and, if `again`, out; dense."""
    (b_r, b_i), (rows, _, width) = _tile(h.shape[2], 2048), h.shape
    dout, h = (x if x.stride(-1) == 1 else x.contiguous() for x in (dout, h))
    sizes = rows, width, dout.stride(0), h.stride(0)
    tensors = *results, dout, *h.unbind(1), p.contiguous()
    _gated_backward[(triton.cdiv(rows, b_r),)](*tensors, *sizes, again=again, b_r=b_r, b_i=b_i, num_warps=8)


def _run_gated(h: Tensor, p: Tensor) -> Tensor:
    if not triton_runs(h, p):
        return gated_ref(h, p)
    out = _like_gated(h, p)
    _launch_gated(out, h, p)
    return out


def _like_gated(h: Tensor, p: Tensor) -> Tensor:
    return h.new_empty(h.shape[0], h.shape[2])


def _run_gated_backward(dout: Tensor, h: Tensor, p: Tensor, again: bool) -> tuple[Tensor, Tensor, Tensor]:
    if not triton_runs(h, p):
        return _gated_gradients(dout, h, p, again)
    results = _like_gated_backward(dout, h, p, again)
    if not h.numel():
        results[1].zero_()
    else:
        _launch_gated_backward(results, dout, h, p, again)
    return results


def _gated_gradients(dout: Tensor, h: Tensor, p: Tensor, again: bool) -> tuple[Tensor, Tensor, Tensor]:
    """`_gated_backward` in plain torch."""
    wide = torch.promote_types(h.dtype, torch.float32)
    (gate, up), prob, dout = h.to(wide).unbind(1), p.to(wide).unsqueeze(1), dout.to(wide)
    chance = gate.sigmoid()
    value, slope = F.silu(gate), chance * (1 + gate * (1 - chance))
    dh = torch.stack((dout * prob * up * slope, dout * prob * value), 1)
    out = (value * up * prob).to(h.dtype) if again else h.new_empty(0)
    return dh.to(h.dtype), (dout * value * up).sum(1).to(p.dtype), out


def _like_gated_backward(dout: Tensor, h: Tensor, p: Tensor, again: bool) -> tuple[Tensor, Tensor, Tensor]:
    return h.new_empty(h.shape), p.new_empty(p.shape), h.new_empty((h.shape[0], h.shape[2]) if again else 0)


GATED = define("gated_rows(Tensor h, Tensor p) -> Tensor", _run_gated, _like_gated)
GATED_BACKWARD = define(
    "gated_rows_backward(Tensor dout, Tensor h, Tensor p, bool again) -> (Tensor, Tensor, Tensor)",
    _run_gated_backward,
    _like_gated_backward,
)
