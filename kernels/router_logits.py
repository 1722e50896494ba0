"""A router's logits in fp32 at the speed of bf16: fp32 weights are three bf16 numbers, and tokens are bf16 already."""
# ruff: noqa: ANN001 - a kernel's arguments are pointers p_ and numbers

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

from farspan.kernels.define import define, triton_runs

__all__ = ["ROUTER_LOGITS", "router_logits", "router_logits_ref"]

LONGEST = 2048
"""Terms that tensor cores sum on their own. They cut sums off rather than round them: on an H100 2048 terms are off by
2⁻²⁰·⁶ of |x| · |w| at most, 7168 by 2⁻¹⁹·⁸, and in parts of 900 by 2⁻²³ as torch's fp32."""


def router_logits_ref(x: Tensor, weight: Tensor) -> Tensor:
    """The specification of `router_logits`, differentiable by autograd."""
    return _wide(x, weight) @ _wide(weight, x).T


def router_logits(x: Tensor, weight: Tensor) -> Tensor:
    """x · weightᵀ in at least fp32: x T D, weight E D -> T E, dense.

    Where x is bf16 and weight fp32, on a GPU, weights are taken apart: w = a + b + c, each the bf16 number nearest to
    what is left, together the 24 bits of fp32. Products of bf16 numbers are exact in fp32, and one product of x with
    all three sums them there; what is lost is in these sums alone, less than 2⁻²⁰ of |x| · |w|. In the backward
    gradients and weights are of two parts each, which loses 2⁻¹⁶ of each term; a gradient is rounded once to its type.
    A weight in bf16 is one part.
    All else is `router_logits_ref`, fp32 on a GPU in the precision that torch is set to. Saves x and weight. Errors:
    ValueError for shapes that do not fit.
    """
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(f"router_logits: x {tuple(x.shape)} and weight {tuple(weight.shape)} must be T D and E D")
    out: Tensor = _RouterLogits.apply(x, weight)
    return out


def _wide(x: Tensor, other: Tensor) -> Tensor:
    return x.to(_type(x, other))


def _type(x: Tensor, other: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(x.dtype, other.dtype), torch.float32)


class _RouterLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return ROUTER_LOGITS(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dlogits: Tensor) -> tuple[Tensor, Tensor]:
        dx, dweight = _BACKWARD(dlogits, *ctx.saved_tensors)
        return dx, dweight


# Parts lie as one factor of one product: below each other, or side by side. Three are made of two where two suffice: of
# (d + e) · (a + b) the product e · b is below what fp32 can tell.


@triton.jit
def _tile(rows, width, b_r: tl.constexpr, b_d: tl.constexpr):  # type: ignore[no-untyped-def]
    row = (tl.program_id(0).to(tl.int64) * b_r + tl.arange(0, b_r))[:, None]
    column = (tl.program_id(1) * b_d + tl.arange(0, b_d))[None, :]
    return row, column, (row < rows) & (column < width)


@triton.jit(do_not_specialize=["rows"])
def _take_apart(  # type: ignore[no-untyped-def]
    p_out,
    p_x,
    rows,
    width,
    out_row,
    step,
    first: tl.constexpr,
    second: tl.constexpr,
    third: tl.constexpr,
    b_r: tl.constexpr,
    b_d: tl.constexpr,
):
    """Three parts of each number, of which 0 is the largest, `step` numbers apart."""
    row, column, mask = _tile(rows, width, b_r, b_d)
    x = tl.load(p_x + row * width + column, mask=mask, other=0.0).to(tl.float32)
    a = x.to(tl.bfloat16)
    rest = x - a.to(tl.float32)
    b = rest.to(tl.bfloat16)
    c = (rest - b.to(tl.float32)).to(tl.bfloat16)
    there = p_out + row * out_row + column
    tl.store(there, a if first == 0 else b if first == 1 else c, mask=mask)
    tl.store(there + step, a if second == 0 else b if second == 1 else c, mask=mask)
    tl.store(there + 2 * step, a if third == 0 else b if third == 1 else c, mask=mask)


@triton.jit(do_not_specialize=["rows"])
def _join(p_out, p_x, rows, width, b_r: tl.constexpr, b_d: tl.constexpr):  # type: ignore[no-untyped-def]
    """The sum of three numbers that lie `width` apart in a row of three times as many, in their order."""
    row, column, mask = _tile(rows, width, b_r, b_d)
    there = p_x + row * (3 * width) + column
    total = tl.load(there, mask=mask, other=0.0) + tl.load(there + width, mask=mask, other=0.0)
    total += tl.load(there + 2 * width, mask=mask, other=0.0)
    tl.store(p_out + row * width + column, total, mask=mask)


def _block(width: int) -> tuple[int, int]:
    """Rows and columns of a program: 1024 numbers."""
    b_d = min(1024, triton.next_power_of_2(width))
    return 1024 // b_d, b_d


def _parts(x: Tensor, which: tuple[int, int, int], *, beside: bool) -> Tensor:
    """x N1 N2 -> N1 3·N2 if beside, else 3·N1 N2."""
    (rows, width), (b_r, b_d) = x.shape, _block(x.shape[1])
    out = x.new_empty((rows, 3 * width) if beside else (3 * rows, width), dtype=torch.bfloat16)
    spacing = (3 * width, width) if beside else (width, x.numel())
    grid = triton.cdiv(rows, b_r), triton.cdiv(width, b_d)
    _take_apart[grid](out, x.contiguous(), rows, width, *spacing, *which, b_r, b_d, num_warps=4)
    return out


def _joined(x: Tensor) -> Tensor:
    """T 3·E -> T E."""
    rows, width = x.shape[0], x.shape[1] // 3
    out, (b_r, b_d) = x.new_empty(rows, width), _block(width)
    _join[(triton.cdiv(rows, b_r), triton.cdiv(width, b_d))](out, x, rows, width, b_r, b_d, num_warps=4)
    return out


def _product(a: Tensor, b: Tensor, out: torch.dtype) -> Tensor:
    """Of bf16 factors, summed in fp32."""
    if not a.is_cuda:
        return (a.float() @ b.float()).to(out)
    return a @ b if out == a.dtype else torch.mm(a, b, out_dtype=out)


def _summed(x: Tensor, parts: Tensor) -> Tensor:
    """x · partsᵀ in fp32, of LONGEST columns at a time."""
    out = None
    for some, theirs in zip(x.split(LONGEST, 1), parts.split(LONGEST, 1), strict=True):
        found = _product(some, theirs.T, torch.float32)
        out = found if out is None else out.add_(found)
    assert out is not None
    return out


def _parts_pay(x: Tensor, weight: Tensor) -> bool:
    types = x.dtype == torch.bfloat16 and weight.dtype in (torch.bfloat16, torch.float32)
    return types and triton_runs(x) and x.numel() > 0 and weight.numel() > 0


def _run(x: Tensor, weight: Tensor) -> Tensor:
    if not _parts_pay(x, weight):
        return router_logits_ref(x, weight).contiguous()
    if weight.dtype == torch.bfloat16:  # a part itself
        return _summed(x, weight)
    return _joined(_summed(x, _parts(weight, (2, 1, 0), beside=False)))


def _run_backward(dlogits: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    if not _parts_pay(x, weight):
        dx, dweight = dlogits @ _wide(weight, x), dlogits.T @ _wide(x, weight)
        return dx.to(x.dtype).contiguous(), dweight.to(weight.dtype).contiguous()
    both = 2 * len(weight)
    gradient = _parts(dlogits, (0, 1, 0), beside=True)
    dx = _product(gradient, _parts(weight, (0, 0, 1), beside=False), x.dtype)
    large, small = _product(gradient[:, :both].T, x, torch.float32).chunk(2)
    return dx, (large + small).to(weight.dtype)


def _like(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0], dtype=_type(x, weight))


ROUTER_LOGITS = define("router_logits(Tensor x, Tensor weight) -> Tensor", _run, _like)
_BACKWARD = define(
    "router_logits_backward(Tensor dlogits, Tensor x, Tensor weight) -> (Tensor, Tensor)",
    _run_backward,
    lambda _, x, weight: (x.new_empty(x.shape), weight.new_empty(weight.shape)),
)


@register_flop_formula(torch.ops.farspan.router_logits)
def _flops(x: tuple[int, ...], weight: tuple[int, ...], *_: Any, **__: Any) -> int:
    """Those of the model: that each product is three of another type is no more work done."""
    return 2 * x[0] * x[1] * weight[0]


@register_flop_formula(torch.ops.farspan.router_logits_backward)
def _flops_backward(_: Any, x: tuple[int, ...], weight: tuple[int, ...], *__: Any, **___: Any) -> int:
    return 4 * x[0] * x[1] * weight[0]
