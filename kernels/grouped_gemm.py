"""A feed-forward network for each expert: its rows lie together, and one product serves all experts."""
# ruff: noqa: ANN001 - a kernel's arguments are pointers p_ and numbers

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

from farspan.kernels.define import define
from farspan.kernels.gated_rows import GATED, GATED_BACKWARD, gated_ref

__all__ = [
    *("GROUPED_MM", "GROUPED_OUTER"),
    *("experts", "experts_ref", "grouped_mm", "grouped_mm_ref", "grouped_outer_ref"),
]


def grouped_mm_ref(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    """The specification of `grouped_mm`, differentiable by autograd; on a GPU it takes E times the work."""
    products = [rows @ factor for rows, factor in zip(_parts(a, ends), b.unbind(), strict=True)]
    if not a.is_cpu:
        return sum(products[1:], products[0])
    return torch.cat([*products, a.new_zeros(a.shape[0] - sum(map(len, products)), b.shape[2])])


def grouped_mm(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    """Rows of expert e, ends[e-1] to ends[e], times b[e]: M N1, E N1 N2 -> M N2, dense, of the same type.

    ends: int32 E, never falling, at most M. Rows from ends[-1] on come out zero whatever they hold, as do their
    gradients, and an expert without rows has a gradient of zeros. b may have any strides; its gradient lies as b does,
    by columns or by rows. Saves a and b. In bf16 on a GPU this is torch's grouped product, with fewer than 1024 experts
    and no count that comes to the host; what it cannot take (last axes that are not dense, rows that do not begin on 16
    bytes) is copied first. All else is `grouped_mm_ref`. Errors: ValueError for shapes or types that do not fit.
    """
    _check("grouped_mm", a, b, ends)
    out: Tensor = _GroupedMm.apply(a, b, ends)
    return out


def experts_ref(x: Tensor, w13: Tensor, w2: Tensor, p: Tensor, ends: Tensor) -> Tensor:
    """The specification of `experts`, differentiable by autograd."""
    h = grouped_mm_ref(x, w13.flatten(1, 2).transpose(1, 2), ends).unflatten(1, w13.shape[1:3])
    return grouped_mm_ref(gated_ref(h, p), w2.transpose(1, 2), ends)


def experts(x: Tensor, w13: Tensor, w2: Tensor, p: Tensor, ends: Tensor) -> Tensor:
    """Each row through its expert: p · w2[e] · (silu(w13[e, 0] · x) ∘ (w13[e, 1] · x)); M D -> M D.

    w13: E 2 I D, w2: E D I of x's type; p: M, at least fp32; ends as in `grouped_mm`: rows from ends[-1] on are zero,
    as are the gradients of x and p there, whatever these and the upstream gradient hold. Saves the arguments and
    w13 · x, M 2 I; the backward forms the activation again, along with its gradient. Weights are never copied, and
    their gradients are dense. Errors: ValueError for shapes or types that do not fit.
    """
    count, two, inner, width = w13.shape if w13.dim() == 4 else (0, 0, 0, 0)
    if two != 2 or w2.shape != (count, width, inner) or w2.dtype != w13.dtype:
        raise ValueError(
            f"experts: w13 {tuple(w13.shape)} of {w13.dtype} and w2 {tuple(w2.shape)} of {w2.dtype} must be E 2 I D "
            "and E D I of one type; gate and up are w13[:, 0] and w13[:, 1]"
        )
    if p.shape != x.shape[:1]:
        raise ValueError(f"experts: p {tuple(p.shape)} must be {tuple(x.shape[:1])}: one probability a row of x")
    _check("experts", x, w13[:, 0].transpose(1, 2), ends)
    out: Tensor = _Experts.apply(x, w13, w2, p, ends)
    return out


def _check(name: str, a: Tensor, b: Tensor, ends: Tensor) -> None:
    if a.dim() != 2 or b.dim() != 3 or a.shape[1] != b.shape[1] or ends.shape != b.shape[:1] or not b.shape[0]:
        raise ValueError(
            f"{name}: rows {tuple(a.shape)}, factors {tuple(b.shape)} and ends {tuple(ends.shape)} do not fit; "
            "they are M N1, E N1 N2 and E, with an expert at least"
        )
    if a.dtype != b.dtype:
        raise ValueError(f"{name}: rows are {a.dtype}, factors {b.dtype}; cast one to the other's")
    if ends.dtype != torch.int32:
        raise ValueError(f"{name}: ends are {ends.dtype}; they must be int32, so cast them")


class _GroupedMm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
        ctx.save_for_backward(a, b, ends)
        return GROUPED_MM(a, b, ends)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        a, b, ends = ctx.saved_tensors
        da = GROUPED_MM(dout, b.transpose(1, 2), ends) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return da, None, None
        if b.stride(1) == 1:  # by columns: a weight that was stored the other way, whose gradient should lie as it does
            return da, GROUPED_OUTER(dout, a, ends).transpose(1, 2), None
        return da, GROUPED_OUTER(a, dout, ends), None


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w13: Tensor, w2: Tensor, p: Tensor, ends: Tensor) -> Tensor:
        h = GROUPED_MM(x, w13.flatten(1, 2).transpose(1, 2), ends).unflatten(1, w13.shape[1:3])
        ctx.save_for_backward(x, w13, w2, p, ends, h)
        return GROUPED_MM(GATED(h, p), w2.transpose(1, 2), ends)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        x, w13, w2, p, ends, h = ctx.saved_tensors
        dx, dw13, dw2, *_ = ctx.needs_input_grad
        dinner = GROUPED_MM(dout, w2, ends)
        dh, dp, inner = GATED_BACKWARD(dinner, h, p, dw2)
        del dinner
        w2_gradient = GROUPED_OUTER(dout, inner, ends) if dw2 else None
        del inner
        dh = dh.flatten(1, 2)
        return (
            GROUPED_MM(dh, w13.flatten(1, 2), ends) if dx else None,
            GROUPED_OUTER(dh, x, ends).view(w13.shape) if dw13 else None,
            w2_gradient,
            dp,
            None,
        )


# The products. torch's own ends at ends[-1] and leaves whatever memory held behind it, and of an expert without rows it
# promises nothing: what it need not write is cleared by a few programs that see on the GPU where there is any.


def grouped_outer_ref(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    """a[e]ᵀ · b[e] for the rows of each expert: M N1, M N2 -> E N1 N2, the gradient of `grouped_mm`'s factors."""
    return torch.stack([one.T @ other for one, other in zip(_parts(a, ends), _parts(b, ends), strict=True)])


def _parts(x: Tensor, ends: Tensor) -> list[Tensor]:
    """Each expert's rows. On a GPU all rows, zero where they are not its own: no count may come to the host."""
    if x.is_cpu:
        return list(x.tensor_split(ends.tolist())[:-1])
    owner = torch.searchsorted(ends, torch.arange(len(x), device=x.device, dtype=torch.int32), right=True).unsqueeze(1)
    return [torch.where(owner == e, x, 0) for e in range(len(ends))]


def _run_grouped_mm(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    if not a.numel() or not b.numel():
        return _like_grouped_mm(a, b, ends).zero_()
    if not a.is_cuda or a.dtype != torch.bfloat16:
        return grouped_mm_ref(a, b, ends)
    ends, width = ends.contiguous(), b.shape[2]
    inner, outer = -b.shape[1] % 8, -width % 8
    if inner or outer:
        a, b = F.pad(a, (0, inner)), F.pad(b, (0, outer, 0, inner))
    out = F.grouped_mm(_fitting(a), _fitting(b), offs=ends)[:, :width].contiguous()
    clear_tail(out, ends)
    return out


def _like_grouped_mm(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[2])


def _run_grouped_outer(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    if not a.numel() or not b.numel():
        return _like_grouped_outer(a, b, ends).zero_()
    if not a.is_cuda or a.dtype != torch.bfloat16:
        return grouped_outer_ref(a, b, ends)
    ends, height, width = ends.contiguous(), a.shape[1], b.shape[1]
    a, b = (F.pad(x, (0, -x.shape[1] % 8)) if x.shape[1] % 8 else x for x in (a, b))
    out = F.grouped_mm(_fitting(a).T, _fitting(b), offs=ends)[:, :height, :width].contiguous()
    _clear_empty(out, ends)
    return out


def _like_grouped_outer(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    return a.new_empty(ends.shape[0], a.shape[1], b.shape[1])


def _fitting(x: Tensor) -> Tensor:
    """bf16, … N1 N2 in multiples of 8, as TMA takes it: the last axis dense, or the one before it of three."""
    strides = x.stride()
    by_rows = strides[-1] == 1 and strides[-2] >= x.shape[-1]
    by_columns = x.dim() == 3 and strides[-2] == 1 and strides[-1] >= x.shape[-2]
    even = all(stride == 1 or stride % 8 == 0 for stride in strides) and x.data_ptr() % 16 == 0
    return x if (by_rows or by_columns) and even else x.clone(memory_format=torch.contiguous_format)


def clear_tail(out: Tensor, ends: Tensor) -> None:
    """Zeros in rows ends[-1] to M of out: M N."""
    _clear[(512 if out.is_cuda else 2,)](out, ends, ends.shape[0], *out.shape, tail=True, block=4096, num_warps=8)


def _clear_empty(out: Tensor, ends: Tensor) -> None:
    """Zeros in out[e], out: E N1 N2, of each expert e without rows."""
    count, width = ends.shape[0], out[0].numel()
    _clear[(16, count)](out, ends, count, count, width, tail=False, block=4096, num_warps=8)


@triton.jit(do_not_specialize=["experts", "rows"])
def _clear(p_out, p_ends, experts, rows, width, tail: tl.constexpr, block: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of `rows` times `width` numbers."""
    if tail:
        start = tl.load(p_ends + experts - 1).to(tl.int64) * width
        stop = rows.to(tl.int64) * width
    else:
        expert = tl.program_id(1)
        before = tl.load(p_ends + expert - 1, mask=expert > 0, other=0)
        empty = tl.load(p_ends + expert) == before
        start = expert.to(tl.int64) * width
        stop = tl.where(empty, start + width, start)
    zeros = tl.zeros((block,), p_out.dtype.element_ty)
    for first in tl.range(start + tl.program_id(0) * block, stop, tl.num_programs(0) * block):
        at = first + tl.arange(0, block)
        tl.store(p_out + at, zeros, mask=at < stop)


GROUPED_MM = define("grouped_mm(Tensor a, Tensor b, Tensor ends) -> Tensor", _run_grouped_mm, _like_grouped_mm)
GROUPED_OUTER = define(
    "grouped_outer(Tensor a, Tensor b, Tensor ends) -> Tensor", _run_grouped_outer, _like_grouped_outer
)


@register_flop_formula([torch.ops.farspan.grouped_mm, torch.ops.farspan.grouped_outer])
def _flops(a: tuple[int, ...], b: tuple[int, ...], *_: Any, **__: Any) -> int:
    """As if every row were an expert's."""
    return 2 * a[0] * a[1] * b[-1]
