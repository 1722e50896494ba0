"""PolyNorm: a polynomial whose powers are each brought to one size before they are weighed."""
# ruff: noqa: ANN001 - a kernel's arguments are pointers p_ and numbers

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from farspan.kernels.define import define, triton_runs

__all__ = ["poly_norm", "poly_norm_ref"]


def poly_norm_ref(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-6) -> Tensor:
    """The specification of `poly_norm`, differentiable by autograd."""
    wide, weights, out = (y.to(torch.promote_types(y.dtype, torch.float32)) for y in (x, weight, bias))
    for power in (1, 2, 3):
        out = out + weights[power - 1] * F.rms_norm(wide**power, x.shape[-1:], eps=eps)
    return out.to(x.dtype)


def poly_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-6) -> Tensor:
    """The sum over i = 1, 2, 3 of weight_i · xⁱ / √(mean(x²ⁱ) + eps), and bias (Zhuo et al., 2024, arXiv 2411.03884).

    x: ... I, evenly spaced rows with a dense last axis (others are copied); the means are over I. weight: 3, bias: 1,
    of any float type. Returns ... I, dense and in x's type; inside it is at least fp32, where x⁶ holds up to |x| of
    2·10⁶. Saves x and three numbers a row; the weights' gradients are sums in a fixed order. Kernels run on the current
    device. Errors: ValueError for sizes that do not fit and an eps that is not positive.
    """
    if weight.shape != (3,) or bias.shape != (1,) or eps <= 0:
        raise ValueError(
            f"poly_norm: weight {tuple(weight.shape)} must be (3,), bias {tuple(bias.shape)} must be (1,), and "
            f"eps={eps} positive; 1e-6 is usual"
        )
    if not triton_runs(x, weight, bias):
        return poly_norm_ref(x, weight, bias, eps)
    out: Tensor = _PolyNorm.apply(x, weight, bias, eps)
    return out


class _PolyNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        out, scales = _POLY_NORM(x, weight, bias, eps)
        ctx.save_for_backward(x, weight, scales)
        ctx.bias_type = bias.dtype
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scales = ctx.saved_tensors
        dx, sums = _POLY_NORM_BACKWARD(dout, x, weight, scales)
        return dx, sums[:3].to(weight.dtype), sums[3:].to(ctx.bias_type), None


# The kernels: a program takes a row. A short one stays in registers between the sums and what follows from them; of a
# longer one the second reading comes from the cache. The backward needs only four sums of its own, of the gradient
# times each power: the norms' scales are saved, twelve bytes a row.

_MOST_FORWARD, _MOST_BACKWARD = 16384, 8192
"""Channels that stay in registers: with more, a multiprocessor has room for one row alone, and waits while it loads."""


@triton.jit
def _row(p_x, start, width, b_i: tl.constexpr):  # type: ignore[no-untyped-def]
    """A stretch of a row in fp32, its places and which of them are."""
    column = start + tl.arange(0, b_i)
    mask = column < width
    return tl.load(p_x + column, mask=mask, other=0.0).to(tl.float32), column, mask


@triton.jit
def _weights(p_weight, p_scales):  # type: ignore[no-untyped-def]
    """Weights, and scales of a row."""
    first, second, third = tl.load(p_weight), tl.load(p_weight + 1), tl.load(p_weight + 2)
    return (first.to(tl.float32), second.to(tl.float32), third.to(tl.float32),
            tl.load(p_scales), tl.load(p_scales + 1), tl.load(p_scales + 2))  # fmt: skip


@triton.jit
def _value(x, bias, first, second, third):  # type: ignore[no-untyped-def]
    return bias + x * (first + x * (second + x * third))


@triton.jit
def _forward(  # type: ignore[no-untyped-def]
    p_out, p_scales, p_x, p_weight, p_bias, width, x_row, eps: tl.constexpr, whole: tl.constexpr, b_i: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    p_x += row * x_row
    p_out += row * width
    if whole:
        x, column, mask = _row(p_x, 0, width, b_i)
        square = x * x
        second, fourth, sixth = square, square * square, square * square * square
    else:
        second = tl.zeros((b_i,), tl.float32)
        fourth = tl.zeros((b_i,), tl.float32)
        sixth = tl.zeros((b_i,), tl.float32)
        for start in range(0, width, b_i):
            x, column, mask = _row(p_x, start, width, b_i)
            square = x * x
            second += square
            fourth += square * square
            sixth += square * square * square
    scale_1 = tl.rsqrt(tl.sum(second, 0) / width + eps)
    scale_2 = tl.rsqrt(tl.sum(fourth, 0) / width + eps)
    scale_3 = tl.rsqrt(tl.sum(sixth, 0) / width + eps)
    tl.store(p_scales + row * 3, scale_1)
    tl.store(p_scales + row * 3 + 1, scale_2)
    tl.store(p_scales + row * 3 + 2, scale_3)
    bias = tl.load(p_bias).to(tl.float32)
    weight_1 = tl.load(p_weight).to(tl.float32) * scale_1
    weight_2 = tl.load(p_weight + 1).to(tl.float32) * scale_2
    weight_3 = tl.load(p_weight + 2).to(tl.float32) * scale_3
    if whole:
        out = _value(x, bias, weight_1, weight_2, weight_3)
        tl.store(p_out + column, out.to(p_out.dtype.element_ty), mask=mask)
    else:
        for start in range(0, width, b_i):
            x, column, mask = _row(p_x, start, width, b_i)
            out = _value(x, bias, weight_1, weight_2, weight_3)
            tl.store(p_out + column, out.to(p_out.dtype.element_ty), mask=mask)


@triton.jit
def _slope(x, dout, rise_1, rise_2, rise_3, fall_1, fall_2, fall_3):  # type: ignore[no-untyped-def]
    """dout times the polynomial's slope, less what each norm takes back along its own direction."""
    square = x * x
    return dout * (rise_1 + x * (rise_2 + x * rise_3)) - x * (fall_1 + square * (fall_2 + square * fall_3))


@triton.jit(do_not_specialize=["rows"])
def _backward(  # type: ignore[no-untyped-def]
    p_dx,
    p_sums,
    p_dout,
    p_x,
    p_weight,
    p_scales,
    rows,
    width,
    dout_row,
    x_row,
    whole: tl.constexpr,
    b_i: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    p_x += row * x_row
    p_dout += row * dout_row
    p_dx += row * width
    if whole:
        x, column, mask = _row(p_x, 0, width, b_i)
        dout, _, _ = _row(p_dout, 0, width, b_i)
        none, first, second, third = dout, dout * x, dout * x * x, dout * x * x * x
    else:
        none = tl.zeros((b_i,), tl.float32)
        first = tl.zeros((b_i,), tl.float32)
        second = tl.zeros((b_i,), tl.float32)
        third = tl.zeros((b_i,), tl.float32)
        for start in range(0, width, b_i):
            x, column, mask = _row(p_x, start, width, b_i)
            dout, _, _ = _row(p_dout, start, width, b_i)
            none += dout
            first += dout * x
            second += dout * x * x
            third += dout * x * x * x
    weight_1, weight_2, weight_3, scale_1, scale_2, scale_3 = _weights(p_weight, p_scales + row * 3)
    sum_1, sum_2, sum_3 = tl.sum(first, 0) * scale_1, tl.sum(second, 0) * scale_2, tl.sum(third, 0) * scale_3
    p_sums += row
    tl.store(p_sums, sum_1)
    tl.store(p_sums + tl.cast(rows, tl.int64), sum_2)
    tl.store(p_sums + 2 * tl.cast(rows, tl.int64), sum_3)
    tl.store(p_sums + 3 * tl.cast(rows, tl.int64), tl.sum(none, 0))
    rise_1, rise_2, rise_3 = weight_1 * scale_1, 2 * weight_2 * scale_2, 3 * weight_3 * scale_3
    fall_1 = rise_1 * scale_1 * sum_1 / width
    fall_2 = rise_2 * scale_2 * sum_2 / width
    fall_3 = rise_3 * scale_3 * sum_3 / width
    if whole:
        dx = _slope(x, dout, rise_1, rise_2, rise_3, fall_1, fall_2, fall_3)
        tl.store(p_dx + column, dx.to(p_dx.dtype.element_ty), mask=mask)
    else:
        for start in range(0, width, b_i):
            x, column, mask = _row(p_x, start, width, b_i)
            dout, _, _ = _row(p_dout, start, width, b_i)
            dx = _slope(x, dout, rise_1, rise_2, rise_3, fall_1, fall_2, fall_3)
            tl.store(p_dx + column, dx.to(p_dx.dtype.element_ty), mask=mask)


def _sizes(width: int, most: int) -> dict[str, Any]:
    """How much of a row is held at once, and by how many warps: a row of up to `most` channels, or stretches."""
    whole = width <= most
    b_i = triton.next_power_of_2(width) if whole else 4096
    return {"whole": whole, "b_i": b_i, "num_warps": min(16, max(1, b_i // 512))}


def _as_rows(x: Tensor) -> Tensor:
    return (x if x.stride(-1) == 1 else x.contiguous()).reshape(-1, x.shape[-1])


def _run_poly_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    out, scales = _like_poly_norm(x, weight, bias, eps)
    if out.numel():
        rows, width = _as_rows(x), x.shape[-1]
        given = (rows, weight.contiguous(), bias, width, rows.stride(0))
        _forward[(rows.shape[0],)](out, scales, *given, eps=eps, **_sizes(width, _MOST_FORWARD))
    return out, scales


def _like_poly_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty((*x.shape[:-1], 3), dtype=torch.float32)


def _run_poly_norm_backward(dout: Tensor, x: Tensor, weight: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    dx, width = x.new_empty(x.shape), x.shape[-1]
    if not x.numel():
        return dx, x.new_zeros(4, dtype=torch.float32)
    rows, grads = _as_rows(x), _as_rows(dout)
    sums = x.new_empty((4, rows.shape[0]), dtype=torch.float32)
    given = (grads, rows, weight.contiguous(), scales, rows.shape[0], width, grads.stride(0), rows.stride(0))
    _backward[(rows.shape[0],)](dx, sums, *given, **_sizes(width, _MOST_BACKWARD))
    return dx, sums.sum(1)


def _like_poly_norm_backward(dout: Tensor, x: Tensor, weight: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(4, dtype=torch.float32)


_POLY_NORM = define(
    "poly_norm(Tensor x, Tensor weight, Tensor bias, float eps) -> (Tensor, Tensor)", _run_poly_norm, _like_poly_norm
)
_POLY_NORM_BACKWARD = define(
    "poly_norm_backward(Tensor dout, Tensor x, Tensor weight, Tensor scales) -> (Tensor, Tensor)",
    _run_poly_norm_backward,
    _like_poly_norm_backward,
)
