"""The kernels of the norms: few programs, each on its way through many rows, with the next ones already coming."""
# ruff: noqa: ANN001, ANN201 - a kernel's arguments are pointers p_ and numbers

from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from farspan.kernels.column_sums import Pace, Walk, column_sums, store_largest, store_sums, vector, walk
from farspan.kernels.fp8_quantise import COLUMNS, fp8_rows

# What measurement may change. Rows that are wider are cut into blocks: the sums of a LayerNorm's backward, two vectors,
# leave less room for rows in registers than one.
FORWARD = Pace(tile=2048, lanes=32, resident=16384)
CODES = Pace(tile=2048, lanes=32, resident=8192)
"""Differs from FORWARD by how many programs there are alone, so that sums have the same order and the same last bit."""
BACKWARD = Pace(tile=2048, lanes=16, resident=8192)
STRAIGHT = 2048, 8192
"""Widths from and to which a forward has a program for every row: new ones come as fast as others end, and reach 0.97
to 0.99 of a copy on an H200, where programs that walk reach 0.85 to 0.90."""
MANY = 1 << 31
"""Programs, of which no launch has so many."""
WIDEST_FORWARD = 16384
WIDEST_COLUMNS = 8192
WIDEST_RMS = 16384
WIDEST_LAYER = 8192
BLOCK = 4096


def rows(x: Tensor) -> tuple[Tensor, int]:
    """A tensor whose rows are x's, dense and one stride apart, and that stride; x itself where that is so."""
    if x.is_contiguous():
        return x, x.shape[-1]
    flat = (x if x.stride(-1) == 1 else x.contiguous()).reshape(-1, x.shape[-1])
    return flat, flat.stride(0)


# A program takes one tile of rows after the other. What stays the same for all rows is in its registers; tiles are on
# their way to shared memory before their turn (`tl.range` with stages). Offsets of rows are 64-bit. A row's place is
# worked out once for loads and again, written otherwise, for stores: as one value it would be carried in registers from
# the stage of the loads to the last.


@triton.jit
def moments(x, mask, eps: tl.constexpr, width: tl.constexpr, centred: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of each row its mean, 1 / deviation, and x without the mean: b_r, b_r, b_r b_d; x is 0 where the mask is not."""
    mean = tl.zeros((x.shape[0],), tl.float32)
    if centred:
        mean = tl.sum(x, 1) / width
        x = tl.where(mask, x - mean[:, None], 0.0)
    return mean, tl.rsqrt(tl.sum(x * x, 1) / width + eps), x


@triton.jit(do_not_specialize=["count"])
def _forward(  # type: ignore[no-untyped-def]
    p_total,
    p_normed,
    p_stats,
    p_x,
    p_branch,
    p_weight,
    p_bias,
    p_scale,
    p_columns,
    count,
    x_row,
    branch_row,
    eps: tl.constexpr,
    width: tl.constexpr,
    centred: tl.constexpr,
    b_r: tl.constexpr,
    b_d: tl.constexpr,
    stages: tl.constexpr,
):
    """Normed rows. With p_scale p_normed takes their codes, padded to 16 rows, and p_columns each program's largest."""
    column = tl.arange(0, b_d)[None, :]
    m_column = column < width
    weight = vector(p_weight, b_r, b_d, width)
    if p_bias is not None:
        bias = vector(p_bias, b_r, b_d, width)
    ends = count if p_scale is None else tl.cdiv(count, 16) * 16
    largest = tl.zeros((b_r, b_d), tl.float32)
    for tile in tl.range(tl.program_id(0), tl.cdiv(ends, b_r), tl.num_programs(0), num_stages=stages):
        row = tile * b_r + tl.arange(0, b_r).to(tl.int64)
        mask = (row < count)[:, None] & m_column
        x = tl.load(p_x + row[:, None] * x_row + column, mask=mask, other=0.0).to(tl.float32)
        if p_branch is not None:
            x += tl.load(p_branch + row[:, None] * branch_row + column, mask=mask, other=0.0).to(tl.float32)
        place = tile * b_r + tl.arange(0, b_r)
        m_place = place < count
        mask = m_place[:, None] & m_column
        at = place[:, None].to(tl.int64) * width + column
        if p_total is not None:
            total = x.to(p_total.dtype.element_ty)
            tl.store(p_total + at, total, mask=mask)
            x = total.to(tl.float32)
        mean, rstd, x = moments(x, mask, eps, width, centred)
        normed = x * rstd[:, None] * weight
        if p_bias is not None:
            normed += bias
        if p_scale is None:
            tl.store(p_normed + at, normed.to(p_normed.dtype.element_ty), mask=mask)
        else:
            codes, scale = fp8_rows(tl.where(mask, normed.to(p_x.dtype.element_ty).to(tl.float32), 0.0))
            m_padded = place < ends
            # Stores of 16 codes a thread would lay rows out otherwise, whose sums would have another last bit.
            at = tl.max_contiguous(at, [1, 128 // p_x.dtype.element_ty.primitive_bitwidth])
            tl.store(p_normed + at, codes, mask=m_padded[:, None] & m_column)
            tl.store(p_scale + place, scale, mask=m_padded)
            if p_columns is not None:
                largest = tl.maximum(largest, tl.abs(codes.to(tl.float32)) * scale[:, None])
        tl.store(p_stats + place, rstd, mask=m_place)
        if centred:
            tl.store(p_stats + count + place, mean, mask=m_place)
    if p_columns is not None:
        store_largest(p_columns + tl.program_id(0).to(tl.int64) * width, largest, b_d, width)


@triton.jit
def _block(p_x, p_branch, p_total, start, width: tl.constexpr, b_d: tl.constexpr):  # type: ignore[no-untyped-def]
    """Columns b_d from `start` on, which of them are, and x + branch there, rounded as the total is."""
    column = start + tl.arange(0, b_d)
    mask = column < width
    x = tl.load(p_x + column, mask=mask, other=0.0).to(tl.float32)
    if p_branch is not None:
        x += tl.load(p_branch + column, mask=mask, other=0.0).to(tl.float32)
        x = x.to(p_total.dtype.element_ty).to(tl.float32)
    return column, mask, x


@triton.jit(do_not_specialize=["count"])
def _forward_wide(  # type: ignore[no-untyped-def]
    p_total,
    p_normed,
    p_stats,
    p_x,
    p_branch,
    p_weight,
    p_bias,
    count,
    x_row,
    branch_row,
    eps: tl.constexpr,
    width: tl.constexpr,
    centred: tl.constexpr,
    b_d: tl.constexpr,
):
    """A row in blocks, twice: the second time it comes from the cache. Moments are joined as Chan et al. (1983) do."""
    row = tl.program_id(0).to(tl.int64)
    p_x += row * x_row
    if p_branch is not None:
        p_branch += row * branch_row
    mean, square = 0.0, 0.0
    for start in tl.range(0, width, b_d):
        column, mask, x = _block(p_x, p_branch, p_total, start, width, b_d)
        if centred:
            before, here = 1.0 * start, tl.sum(mask.to(tl.float32), 0)
            apart = tl.sum(x, 0) / here - mean
            x = tl.where(mask, x - (mean + apart), 0.0)
            square += apart * apart * before * here / (before + here)
            mean += apart * here / (before + here)
        square += tl.sum(x * x, 0)
    rstd = tl.rsqrt(square / width + eps)
    for start in tl.range(0, width, b_d):
        column, mask, x = _block(p_x, p_branch, p_total, start, width, b_d)
        if p_total is not None:
            tl.store(p_total + row * width + column, x.to(p_total.dtype.element_ty), mask=mask)
        normed = (x - mean) * rstd * tl.load(p_weight + column, mask=mask, other=0.0).to(tl.float32)
        if p_bias is not None:
            normed += tl.load(p_bias + column, mask=mask, other=0.0).to(tl.float32)
        tl.store(p_normed + row * width + column, normed.to(p_normed.dtype.element_ty), mask=mask)
    tl.store(p_stats + row, rstd)
    if centred:
        tl.store(p_stats + count + row, mean)


def launch_forward(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    centred: bool,
    found: list[Tensor],
) -> None:
    """Fills found: normed, statistics and, with a branch, the total; x has at least one entry."""
    width = x.shape[-1]
    count = x.numel() // width
    (flat, x_row), (other, branch_row) = rows(x), (None, 0) if branch is None else rows(branch)
    vectors = weight.contiguous(), None if bias is None else bias.contiguous()
    normed, stats, total = (*found, None)[:3]
    arguments, sizes = (total, normed, stats, flat, other, *vectors), (count, x_row, branch_row)
    if width > WIDEST_FORWARD:
        _forward_wide[(count,)](*arguments, *sizes, eps=eps, width=width, centred=centred, b_d=BLOCK, num_warps=8)
        return
    way = forward_walk(width, _entry(x, branch), x.device)
    programs = min(way.slots, -(-count // way.b_r))
    _walk(way, programs, (*arguments, None, None, *sizes), eps=eps, width=width, centred=centred)


def forward_walk(width: int, entry: int, device: torch.device) -> Walk:
    """The walk of a forward; entry: bytes of loads for each entry of a row."""
    way = walk(FORWARD, width, entry, device)
    return replace(way, stages=1, slots=MANY) if STRAIGHT[0] <= width <= STRAIGHT[1] else way


def _walk(way: Walk, programs: int, arguments: tuple[Any, ...], *, eps: float, width: int, centred: bool) -> None:
    _forward[(programs,)](
        *arguments,
        eps=eps,
        width=width,
        centred=centred,
        b_r=way.b_r,
        b_d=way.b_d,
        stages=way.stages,
        num_warps=way.warps,
    )


def _entry(x: Tensor, branch: Tensor | None) -> int:
    return x.element_size() + (0 if branch is None else branch.element_size())


def launch_codes(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    centred: bool,
    found: list[Tensor],
) -> None:
    """Fills found: codes, scales, columns' largest unless that is empty, statistics and, with a branch, the total.

    x has at least one entry, and rows of at most WIDEST_FORWARD.
    """
    width = x.shape[-1]
    (flat, x_row), (other, branch_row) = rows(x), (None, 0) if branch is None else rows(branch)
    vectors = weight.contiguous(), None if bias is None else bias.contiguous()
    values, scale, largest, stats = found[:4]
    total = found[4] if len(found) == 5 else None
    way = walk(CODES, width, _entry(x, branch), x.device)
    programs = min(way.slots, -(-values.shape[0] // way.b_r))
    inside = largest.numel() and width <= WIDEST_COLUMNS
    parts = scale.new_empty(programs, width) if inside else None
    sizes = x.numel() // width, x_row, branch_row
    arguments = total, values, stats, flat, other, *vectors, scale, parts, *sizes
    _walk(way, programs, arguments, eps=eps, width=width, centred=centred)
    if parts is not None:
        torch.amax(parts, 0, out=largest)
    elif largest.numel():
        largest.copy_(COLUMNS(values, scale))


@triton.jit(do_not_specialize=["count"])
def _row_sums(  # type: ignore[no-untyped-def]
    p_sums,
    p_d_normed,
    p_total,
    p_stats,
    p_weight,
    count,
    d_normed_row,
    total_row,
    width: tl.constexpr,
    centred: tl.constexpr,
    b_d: tl.constexpr,
):
    """What a wide row's gradient needs of all its columns: the mean of slope · normalised, and of slope."""
    row = tl.program_id(0).to(tl.int64)
    p_d_normed += row * d_normed_row
    p_total += row * total_row
    rstd = tl.load(p_stats + row)
    mean = tl.load(p_stats + count + row) if centred else 0.0
    along, level = tl.zeros((b_d,), tl.float32), tl.zeros((b_d,), tl.float32)
    for start in tl.range(0, width, b_d, num_stages=3):
        column = start + tl.arange(0, b_d)
        mask = column < width
        x = (tl.load(p_total + column, mask=mask, other=0.0).to(tl.float32) - mean) * rstd
        slope = tl.load(p_d_normed + column, mask=mask, other=0.0).to(tl.float32)
        slope *= tl.load(p_weight + column, mask=mask, other=0.0).to(tl.float32)
        along += slope * x
        level += slope
    tl.store(p_sums + row, tl.sum(along, 0) / width)
    if centred:
        tl.store(p_sums + count + row, tl.sum(level, 0) / width)


@triton.jit(do_not_specialize=["count"])
def _backward(  # type: ignore[no-untyped-def]
    p_d_x,
    p_parts,
    p_d_normed,
    p_d_total,
    p_total,
    p_stats,
    p_sums,
    p_weight,
    count,
    d_normed_row,
    d_total_row,
    total_row,
    width: tl.constexpr,
    centred: tl.constexpr,
    biased: tl.constexpr,
    held: tl.constexpr,
    b_r: tl.constexpr,
    b_d: tl.constexpr,
    stages: tl.constexpr,
):
    """Gradients of rows, and this program's share of the vectors'. With p_sums a program takes one block of columns.

    held: the weight stays in registers; else it comes from the cache for every tile.
    """
    first = 0 if p_sums is None else tl.program_id(1) * b_d
    column = first + tl.arange(0, b_d)[None, :]
    m_column = column < width
    if held:
        weight = vector(p_weight, b_r, b_d, width, first)
    d_weight, d_bias = tl.zeros((b_r, b_d), tl.float32), tl.zeros((b_r, b_d), tl.float32)
    for tile in tl.range(tl.program_id(0), tl.cdiv(count, b_r), tl.num_programs(0), num_stages=stages):
        row = tile * b_r + tl.arange(0, b_r).to(tl.int64)
        m_row = row < count
        mask = m_row[:, None] & m_column
        rstd = tl.load(p_stats + row, mask=m_row, other=0.0)[:, None]
        x = tl.load(p_total + row[:, None] * total_row + column, mask=mask, other=0.0).to(tl.float32)
        if centred:
            x -= tl.load(p_stats + count + row, mask=m_row, other=0.0)[:, None]
        x *= rstd
        slope = tl.load(p_d_normed + row[:, None] * d_normed_row + column, mask=mask, other=0.0).to(tl.float32)
        d_weight += slope * x
        if biased:
            d_bias += slope
        if held:
            slope *= weight
        else:
            slope *= tl.load(p_weight + column, mask=m_column, other=0.0).to(tl.float32)
        along = tl.sum(slope * x, 1) / width if p_sums is None else tl.load(p_sums + row, mask=m_row, other=0.0)
        d_x = slope - x * along[:, None]
        if centred:
            p_level = p_stats if p_sums is None else p_sums + count
            level = tl.sum(slope, 1) / width if p_sums is None else tl.load(p_level + row, mask=m_row, other=0.0)
            d_x -= level[:, None]
        d_x *= rstd
        if p_d_total is not None:
            d_x += tl.load(p_d_total + row[:, None] * d_total_row + column, mask=mask, other=0.0).to(tl.float32)
        place = (tile * b_r + tl.arange(0, b_r))[:, None]
        at = place.to(tl.int64) * width + column
        tl.store(p_d_x + at, d_x.to(p_d_x.dtype.element_ty), mask=(place < count) & m_column)
    programs = tl.num_programs(0).to(tl.int64)
    store_sums(p_parts + tl.program_id(0) * width, d_weight, b_d, width, first)
    if biased:
        store_sums(p_parts + (programs + tl.program_id(0)) * width, d_bias, b_d, width, first)


def launch_backward(
    d_normed: Tensor, d_total: Tensor | None, total: Tensor, stats: Tensor, weight: Tensor, found: list[Tensor]
) -> None:
    """Fills found: gradients of x, of the weight and, where a third is there, of the bias."""
    width, centred = total.shape[-1], stats.shape[0] == 2
    count = total.numel() // width
    (slope, d_normed_row), (flat, total_row) = rows(d_normed), rows(total)
    other, d_total_row = (None, 0) if d_total is None else rows(d_total)
    weight, sums, blocks = weight.contiguous(), None, 1
    entry = sum(x.element_size() for x in (slope, flat, other) if x is not None)
    if width > (WIDEST_LAYER if centred else WIDEST_RMS):
        sums, blocks = torch.empty_like(stats), -(-width // BLOCK)
        strides = d_normed_row, total_row
        _row_sums[(count,)](
            *(sums, slope, flat, stats, weight, count, *strides), width=width, centred=centred, b_d=BLOCK, num_warps=8
        )
    held = width <= WIDEST_LAYER or blocks > 1
    entry += 0 if held else weight.element_size()
    way = walk(BACKWARD, width if blocks == 1 else BLOCK, entry, total.device)
    programs = min(-(-way.slots // blocks), -(-count // way.b_r))
    parts = stats.new_empty(len(found) - 1, 1, programs, width)
    _backward[(programs, blocks)](
        *(found[0], parts, slope, other, flat, stats, sums, weight, count, d_normed_row, d_total_row, total_row),
        width=width,
        centred=centred,
        biased=len(found) == 3,
        held=held,
        b_r=way.b_r,
        b_d=way.b_d,
        stages=way.stages,
        num_warps=way.warps,
    )
    column_sums(parts, found[1:])
