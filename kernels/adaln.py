"""adaLN-Zero of diffusion transformers: a gated branch joins the stream and is normed, scaled and shifted in one go."""
# ruff: noqa: ANN001 - a kernel's arguments are pointers p_ and numbers

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from farspan.kernels.column_sums import Pace, column_sums, store_sums, vector, walk
from farspan.kernels.define import define, triton_runs
from farspan.kernels.norm_tiles import moments

__all__ = ["adaln", "adaln_ref", "add_adaln", "add_adaln_ref"]

# What measurement may change.
FORWARD = Pace(tile=2048, lanes=16, resident=8192)
BACKWARD = Pace(tile=2048, lanes=16, resident=6144)
WIDEST = 8192
"""Wider rows do not fit in registers and go the plain way."""
START = 3
"""Tiles that a program could have done in the time that starting it and adding up its sums takes."""


def adaln_ref(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """`adaln` in plain torch."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    wide = wide - wide.mean(-1, keepdim=True)
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (normed * (1 + scale.to(wide.dtype).unsqueeze(1)) + shift.to(wide.dtype).unsqueeze(1)).to(x.dtype)


def adaln(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """norm(x) · (1 + scale) + shift, norm(x) = (x - mean) / sqrt(variance + eps) over D (Peebles and Xie, 2023).

    x B T D, shift and scale B D of any float types; computed in fp32 (fp64 where one is), rounded once to x's type.
    Rows of more than 8192 go the way of `adaln_ref`. Kernels run on the current device. Errors: ValueError for sizes.
    """
    _check("adaln", x, x, (shift, scale))
    if x.shape[-1] > WIDEST or not triton_runs(x, shift, scale):
        return adaln_ref(x, shift, scale, eps)
    normed: Tensor = _AdaLN.apply(x, None, None, shift, scale, eps)
    return normed


def add_adaln_ref(
    x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """`add_adaln` in plain torch."""
    dtype = torch.promote_types(torch.promote_types(x.dtype, branch.dtype), torch.float32)
    total = (x.to(dtype) + gate.to(dtype).unsqueeze(1) * branch.to(dtype)).to(x.dtype)
    return total, adaln_ref(total, shift, scale, eps)


def add_adaln(
    x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """total = x + gate · branch, rounded to x's type, and adaln(total): both B T D. gate is B D; the rest as there."""
    _check("add_adaln", x, branch, (gate, shift, scale))
    if x.shape[-1] > WIDEST or not triton_runs(x, branch, gate, shift, scale):
        return add_adaln_ref(x, branch, gate, shift, scale, eps)
    total, normed = _AdaLN.apply(x, branch, gate, shift, scale, eps)
    return total, normed


def _check(name: str, x: Tensor, branch: Tensor, modulation: tuple[Tensor, ...]) -> None:
    if x.dim() != 3 or branch.shape != x.shape:
        raise ValueError(f"{name}: x {tuple(x.shape)} and branch {tuple(branch.shape)} must be B T D alike")
    for vectors in modulation:
        if vectors.shape != (x.shape[0], x.shape[2]):
            raise ValueError(
                f"{name}: gate, shift or scale {tuple(vectors.shape)} must be B D where x is B T D {tuple(x.shape)}; "
                "one row of them for each sample"
            )


class _AdaLN(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, branch: Tensor | None, gate: Tensor | None, shift: Tensor, scale: Tensor, eps: float
    ) -> Tensor | tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)  # what nobody uses costs no pass over zeros
        normed, stats, *total = modulate(x, branch, gate, shift, scale, eps)
        ctx.save_for_backward(*(total or (x,)), stats, branch, gate, shift, scale)
        return (*total, normed) if total else normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        total, stats, branch, gate, shift, scale = ctx.saved_tensors
        d_normed, d_total = upstream[-1], None if branch is None else upstream[0]
        if d_normed is None:
            d_normed = torch.zeros_like(total)
        d_x, d_shift, d_scale, *rest = modulate_backward(d_normed, d_total, total, stats, branch, gate, shift, scale)
        d_branch, d_gate = rest or (None, None)
        return d_x, d_branch, d_gate, d_shift, d_scale, None


def _modulate(
    x: Tensor, branch: Tensor | None, gate: Tensor | None, shift: Tensor, scale: Tensor, eps: float
) -> list[Tensor]:
    found = _modulate_shapes(x, branch, gate, shift, scale, eps)
    if x.numel():
        _launch_forward(x, branch, (gate, shift, scale), eps, found)
    return found


def _modulate_shapes(
    x: Tensor, branch: Tensor | None, gate: Tensor | None, shift: Tensor, scale: Tensor, eps: float
) -> list[Tensor]:
    """normed; 1/deviation and mean as 2 B T in fp32; total where there is a branch."""
    stats = x.new_empty((2, *x.shape[:-1]), dtype=torch.float32)
    return [x.new_empty(x.shape), stats, *([] if branch is None else [x.new_empty(x.shape)])]


def _modulate_backward(
    d_normed: Tensor,
    d_total: Tensor | None,
    total: Tensor,
    stats: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    shift: Tensor,
    scale: Tensor,
) -> list[Tensor]:
    found = _modulate_backward_shapes(d_normed, d_total, total, stats, branch, gate, shift, scale)
    if not total.numel():
        return [x.zero_() for x in found]
    _launch_backward(d_normed, d_total, total, stats, branch, gate, scale, found)
    return found


def _modulate_backward_shapes(
    d_normed: Tensor,
    d_total: Tensor | None,
    total: Tensor,
    stats: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    shift: Tensor,
    scale: Tensor,
) -> list[Tensor]:
    """Gradients of x, shift and scale, and of branch and gate where there are such."""
    likes = (total, shift, scale, branch, gate)
    return [like.new_empty(like.shape) for like in likes if like is not None]


modulate = define(
    "modulate(Tensor x, Tensor? branch, Tensor? gate, Tensor shift, Tensor scale, float eps) -> Tensor[]",
    _modulate,
    _modulate_shapes,
)
modulate_backward = define(
    "modulate_backward(Tensor d_normed, Tensor? d_total, Tensor total, Tensor stats, Tensor? branch, Tensor? gate, "
    "Tensor shift, Tensor scale) -> Tensor[]",
    _modulate_backward,
    _modulate_backward_shapes,
)


def _strided(x: Tensor | None) -> tuple[Tensor | None, int, int]:
    """x with a dense last axis, and its strides before that."""
    if x is None:
        return None, 0, 0
    x = x if x.stride(-1) == 1 else x.contiguous()
    return x, x.stride(0), x.stride(-2)


# The kernels: a program takes tiles of one sample, one after the other, with the sample's modulation in registers.


@triton.jit(do_not_specialize=["samples", "length", "programs"])
def _forward(  # type: ignore[no-untyped-def]
    p_total,
    p_normed,
    p_stats,
    p_x,
    p_branch,
    p_gate,
    p_shift,
    p_scale,
    samples,
    length,
    programs,
    x_sample_row,
    x_row,
    branch_sample_row,
    branch_row,
    gate_row,
    shift_row,
    scale_row,
    eps: tl.constexpr,
    width: tl.constexpr,
    b_r: tl.constexpr,
    b_d: tl.constexpr,
    stages: tl.constexpr,
):
    sample = (tl.program_id(0) // programs).to(tl.int64)
    column = tl.arange(0, b_d)[None, :]
    m_column = column < width
    shift = vector(p_shift + sample * shift_row, b_r, b_d, width)
    scale = 1.0 + vector(p_scale + sample * scale_row, b_r, b_d, width)
    p_x += sample * x_sample_row
    if p_branch is not None:
        gate = vector(p_gate + sample * gate_row, b_r, b_d, width)
        p_branch += sample * branch_sample_row
    for tile in tl.range(tl.program_id(0) % programs, tl.cdiv(length, b_r), programs, num_stages=stages):
        row = tile * b_r + tl.arange(0, b_r).to(tl.int64)
        mask = (row < length)[:, None] & m_column
        x = tl.load(p_x + row[:, None] * x_row + column, mask=mask, other=0.0).to(tl.float32)
        if p_branch is not None:
            branch = tl.load(p_branch + row[:, None] * branch_row + column, mask=mask, other=0.0)
            x += gate * branch.to(tl.float32)
        token = tile * b_r + tl.arange(0, b_r)
        m_token = token < length
        mask = m_token[:, None] & m_column
        place = sample * length + token
        at = place[:, None] * width + column
        if p_total is not None:
            total = x.to(p_total.dtype.element_ty)
            tl.store(p_total + at, total, mask=mask)
            x = total.to(tl.float32)
        mean, rstd, x = moments(x, mask, eps, width, True)
        tl.store(p_normed + at, (x * rstd[:, None] * scale + shift).to(p_normed.dtype.element_ty), mask=mask)
        tl.store(p_stats + place, rstd, mask=m_token)
        tl.store(p_stats + samples.to(tl.int64) * length + place, mean, mask=m_token)


def _launch_forward(
    x: Tensor,
    branch: Tensor | None,
    modulation: tuple[Tensor | None, Tensor, Tensor],
    eps: float,
    found: list[Tensor],
) -> None:
    samples, length, width = x.shape
    (tokens, *x_strides), (other, *branch_strides) = _strided(x), _strided(branch)
    (gate, gate_row, _), (shift, shift_row, _), (scale, scale_row, _) = (_strided(m) for m in modulation)
    entry = x.element_size() + (0 if branch is None else branch.element_size())
    way = walk(FORWARD, width, entry, x.device)
    programs = _programs(samples, -(-length // way.b_r), way.slots)
    normed, stats, total = (*found, None)[:3]
    _forward[(samples * programs,)](
        *(total, normed, stats, tokens, other, gate, shift, scale, samples, length, programs),
        *(*x_strides, *branch_strides, gate_row, shift_row, scale_row),
        eps=eps,
        width=width,
        b_r=way.b_r,
        b_d=way.b_d,
        stages=way.stages,
        num_warps=way.warps,
    )


@lru_cache(maxsize=1024)
def _programs(samples: int, tiles: int, slots: int) -> int:
    """Programs for each sample: as many as run at once, or a few times as many where whole waves then fit better."""

    def time(programs: int) -> int:
        return -(-samples * programs // slots) * (-(-tiles // programs) + START)

    return min({max(1, min(tiles, waves * slots // samples)) for waves in (1, 2, 3, 4)}, key=lambda n: (time(n), n))


@triton.jit(do_not_specialize=["samples", "length", "programs"])
def _backward(  # type: ignore[no-untyped-def]
    p_d_x,
    p_d_branch,
    p_parts,
    p_d_normed,
    p_d_total,
    p_total,
    p_stats,
    p_branch,
    p_gate,
    p_scale,
    samples,
    length,
    programs,
    d_normed_sample_row,
    d_normed_row,
    d_total_sample_row,
    d_total_row,
    total_sample_row,
    total_row,
    branch_sample_row,
    branch_row,
    gate_row,
    scale_row,
    width: tl.constexpr,
    b_r: tl.constexpr,
    b_d: tl.constexpr,
    stages: tl.constexpr,
):
    sample = (tl.program_id(0) // programs).to(tl.int64)
    column = tl.arange(0, b_d)[None, :]
    m_column = column < width
    scale = 1.0 + vector(p_scale + sample * scale_row, b_r, b_d, width)
    p_d_normed += sample * d_normed_sample_row
    p_total += sample * total_sample_row
    p_stats += sample * length
    if p_d_total is not None:
        p_d_total += sample * d_total_sample_row
    if p_branch is not None:
        gate = vector(p_gate + sample * gate_row, b_r, b_d, width)
        p_branch += sample * branch_sample_row
    d_shift, d_scale = tl.zeros((b_r, b_d), tl.float32), tl.zeros((b_r, b_d), tl.float32)
    d_gate = tl.zeros((b_r, b_d), tl.float32)
    for tile in tl.range(tl.program_id(0) % programs, tl.cdiv(length, b_r), programs, num_stages=stages):
        row = tile * b_r + tl.arange(0, b_r).to(tl.int64)
        m_row = row < length
        mask = m_row[:, None] & m_column
        rstd = tl.load(p_stats + row, mask=m_row, other=0.0)[:, None]
        mean = tl.load(p_stats + samples.to(tl.int64) * length + row, mask=m_row, other=0.0)[:, None]
        x = tl.load(p_total + row[:, None] * total_row + column, mask=mask, other=0.0).to(tl.float32)
        x = (x - mean) * rstd
        slope = tl.load(p_d_normed + row[:, None] * d_normed_row + column, mask=mask, other=0.0).to(tl.float32)
        d_shift += slope
        d_scale += slope * x
        slope *= scale
        along, level = tl.sum(slope * x, 1) / width, tl.sum(slope, 1) / width
        d_x = (slope - x * along[:, None] - level[:, None]) * rstd
        if p_d_total is not None:
            d_x += tl.load(p_d_total + row[:, None] * d_total_row + column, mask=mask, other=0.0).to(tl.float32)
        token = (tile * b_r + tl.arange(0, b_r))[:, None]
        mask = (token < length) & m_column
        at = (sample * length + token) * width + column
        tl.store(p_d_x + at, d_x.to(p_d_x.dtype.element_ty), mask=mask)
        if p_branch is not None:
            branch = tl.load(p_branch + row[:, None] * branch_row + column, mask=m_row[:, None] & m_column, other=0.0)
            d_gate += d_x * branch.to(tl.float32)
            tl.store(p_d_branch + at, (d_x * gate).to(p_d_branch.dtype.element_ty), mask=mask)
    # A program's sums of one kind are a row of parts: kinds, samples, programs, D.
    p_parts += tl.program_id(0).to(tl.int64) * width
    kind = tl.num_programs(0).to(tl.int64) * width
    store_sums(p_parts, d_shift, b_d, width)
    store_sums(p_parts + kind, d_scale, b_d, width)
    if p_branch is not None:
        store_sums(p_parts + 2 * kind, d_gate, b_d, width)


def _launch_backward(
    d_normed: Tensor,
    d_total: Tensor | None,
    total: Tensor,
    stats: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    scale: Tensor,
    found: list[Tensor],
) -> None:
    samples, length, width = total.shape
    d_x, d_shift, d_scale, *rest = found
    d_branch, *d_gate = rest or (None,)
    laid = [_strided(x) for x in (d_normed, d_total, total, branch)]
    (slope, *_), (d_sum, *_), (flat, *_), (other, *_) = laid
    (gates, gate_row, _), (scales, scale_row, _) = _strided(gate), _strided(scale)
    way = walk(BACKWARD, width, sum(x.element_size() for x, *_ in laid if x is not None), total.device)
    programs = _programs(samples, -(-length // way.b_r), way.slots)
    parts = stats.new_empty(2 + len(d_gate), samples, programs, width)
    _backward[(samples * programs,)](
        *(d_x, d_branch, parts, slope, d_sum, flat, stats, other, gates, scales, samples, length, programs),
        *(stride for _, *strides in laid for stride in strides),
        *(gate_row, scale_row),
        width=width,
        b_r=way.b_r,
        b_d=way.b_d,
        stages=way.stages,
        num_warps=way.warps,
    )
    column_sums(parts, (d_shift, d_scale, *d_gate))
