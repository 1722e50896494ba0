"""Two attentions over disjoint keys are one attention once their log-sum-exps are weighed; here they are."""
# ruff: noqa: ANN001 - a kernel's arguments are pointers p_ and numbers

import torch
import triton
import triton.language as tl
from torch import Tensor

from farspan.kernels.define import triton_runs

__all__ = ["Rows", "add_", "add_ref", "delta", "delta_ref", "merge_", "merge_ref", "stand_in", "stand_in_ref"]

Rows = slice | Tensor | None
"""Which rows of a whole a part belongs to: all, a range, or places (int32 or int64, each at most once)."""


def merge_ref(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor, rows: Rows) -> None:
    """`merge_` in plain torch."""
    where = slice(None) if rows is None else rows
    ours, theirs = lse[:, where], part_lse.to(lse.dtype)
    total = torch.logaddexp(ours, theirs)
    merged = torch.zeros_like(part, dtype=lse.dtype)
    for x, log in ((out[where], ours), (part, theirs)):
        weight = (log - total).exp().T.unsqueeze(-1)  # R H 1
        merged += torch.where((log == -torch.inf).T.unsqueeze(-1), 0.0, x * weight)
    out[where] = merged.to(out.dtype)
    lse[:, where] = total


@torch.no_grad()
def merge_(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor, rows: Rows) -> None:
    """Makes (out, lse)[rows] attention over the keys of both: its softmax-weighted union with (part, part_lse).

    out T H V and part R H V of any float type, lse H T and part_lse H R in fp32 (fp64 beside fp64), natural log; R rows
    are named. A side whose lse is -inf saw nothing and is not read, whatever it holds; where both are, out is 0.
    Errors: ValueError for sizes that do not fit.
    """
    _check(out, part, rows)
    if lse.shape != out.shape[1::-1] or part_lse.shape != part.shape[1::-1]:
        raise ValueError(
            f"merge_: lse {tuple(lse.shape)}, {tuple(part_lse.shape)} do not fit out {tuple(out.shape)}, part "
            f"{tuple(part.shape)}; lse is H T where out is T H V"
        )
    if part.numel() and triton_runs(out, part):
        _launch_merge(out, lse, part, part_lse, rows)
    elif part.numel():
        merge_ref(out, lse, part, part_lse, rows)


def add_ref(total: Tensor, part: Tensor, rows: Rows) -> None:
    """`add_` in plain torch."""
    where = slice(None) if rows is None else rows
    dtype = torch.promote_types(torch.promote_types(total.dtype, part.dtype), torch.float32)
    total[where] = (total[where].to(dtype) + part).to(total.dtype)


@torch.no_grad()
def add_(total: Tensor, part: Tensor, rows: Rows) -> None:
    """total[rows] += part, rounded once: total T H K, part R H K of any float types, summed in at least fp32.

    Every row is named at most once, so the sum is the same at every run. Errors: ValueError for sizes that do not fit.
    """
    _check(total, part, rows)
    if total.dtype != torch.float64 and total.is_contiguous() and part.is_contiguous() and not isinstance(rows, Tensor):
        total[slice(None) if rows is None else rows].add_(part)  # torch's own kernel has at least fp32 inside as well
    elif part.numel() and triton_runs(total, part):
        _launch_add(total, part, rows)
    elif part.numel():
        add_ref(total, part, rows)


def delta_ref(out: Tensor, dout: Tensor) -> Tensor:
    """`delta` in plain torch."""
    dtype = torch.promote_types(out.dtype, torch.float32)
    return (out.to(dtype) * dout.to(dtype)).sum(-1).T.contiguous()


@torch.no_grad()
def delta(out: Tensor, dout: Tensor) -> Tensor:
    """Row sums of out * dout, which attention's backward needs: two R H V -> H R in fp32 (fp64 for fp64)."""
    _check(out, dout, None)
    return _launch_delta(out, dout) if out.numel() and triton_runs(out, dout) else delta_ref(out, dout)


def stand_in_ref(dout: Tensor, delta: Tensor) -> Tensor:
    """`stand_in` in plain torch."""
    left, grad = delta.T.unsqueeze(-1), dout.to(delta.dtype)  # R H 1, R H V
    limit = torch.finfo(dout.dtype).max
    out = torch.zeros_like(dout, memory_format=torch.contiguous_format)
    places = grad.abs().topk(_terms(dout), dim=-1).indices
    for place in places.split(1, dim=-1):
        slope = grad.gather(-1, place)
        entry = torch.where(slope == 0, 0.0, left / slope).clamp(-limit, limit).to(dout.dtype)
        left = left - entry.to(delta.dtype) * slope
        out.scatter_(-1, place, entry)
    return out


@torch.no_grad()
def stand_in(dout: Tensor, delta: Tensor) -> Tensor:
    """An `out` for kernels that only want it for delta: the row sums of out * dout are delta.

    dout R H V, delta H R -> R H V in dout's type. Few entries are not zero, those where |dout| is largest: the first
    takes delta / dout, each further one what rounding left over. Three make fp16 and bf16 as good as fp32, where dout
    has so many. Where dout is zero so is the result; entries that would overflow are cut to the largest finite number.
    """
    if delta.shape != dout.shape[1::-1]:
        raise ValueError(f"stand_in: delta {tuple(delta.shape)} must be H R where dout {tuple(dout.shape)} is R H V")
    return _launch_stand_in(dout, delta) if dout.numel() and triton_runs(dout) else stand_in_ref(dout, delta)


def _terms(dout: Tensor) -> int:
    return min(3, dout.shape[-1]) if dout.dtype in (torch.float16, torch.bfloat16) else 1


def _check(whole: Tensor, part: Tensor, rows: Rows) -> None:
    if isinstance(rows, Tensor):
        count = rows.shape[0]
    else:
        first, last, step = (rows or slice(None)).indices(whole.shape[0])
        count = max(0, last - first)
        if step != 1:
            raise ValueError(f"lse: rows={rows} must go in steps of 1; pass an index tensor instead")
    if part.shape != (count, *whole.shape[1:]):
        raise ValueError(
            f"lse: part {tuple(part.shape)} must be {(count, *whole.shape[1:])}: the {count} named rows of the whole "
            f"{tuple(whole.shape)}; name as many rows as the part has"
        )


# The kernels: a program takes b_r rows of one head, all of their width at once. Neighbouring programs take neighbouring
# heads, so together they read whole rows of memory. Offsets of rows are 64-bit: 2^17 rows of 128 heads of 128 overflow.


@triton.jit
def _block(count, heads, width, b_r: tl.constexpr, b_v: tl.constexpr):  # type: ignore[no-untyped-def]
    """head; row numbers b_r int64 and which of them are; columns 1 b_v and which of b_r b_v entries are."""
    head = (tl.program_id(0) % heads).to(tl.int64)
    row = (tl.program_id(0) // heads).to(tl.int64) * b_r + tl.arange(0, b_r)
    column = tl.arange(0, b_v)[None, :]
    return head, row, row < count, column, (row < count)[:, None] & (column < width)


@triton.jit(do_not_specialize=["first", "count"])
def _merge(  # type: ignore[no-untyped-def]
    p_out,
    p_lse,
    p_part,
    p_part_lse,
    p_rows,
    first,
    count,
    heads,
    width,
    out_row,
    out_head,
    lse_head,
    lse_row,
    part_row,
    part_head,
    part_lse_head,
    part_lse_row,
    indexed: tl.constexpr,
    b_r: tl.constexpr,
    b_v: tl.constexpr,
):
    head, row, m_row, column, m_block = _block(count, heads, width, b_r, b_v)
    place = tl.load(p_rows + row, mask=m_row, other=0).to(tl.int64) if indexed else row + first
    p_total = p_lse + head * lse_head + place * lse_row
    ours = tl.load(p_total, mask=m_row, other=float("-inf"))
    theirs = tl.load(p_part_lse + head * part_lse_head + row * part_lse_row, mask=m_row, other=float("-inf"))
    most, least = tl.maximum(ours, theirs), tl.minimum(ours, theirs)
    alone = least == float("-inf")  # one side saw nothing: the other is the result as it is
    total = tl.where(alone, most, most + tl.log(1.0 + tl.exp(tl.where(alone, 0.0, least - most))))
    m_ours, m_theirs = (ours > float("-inf"))[:, None], (theirs > float("-inf"))[:, None]
    our_weight = tl.exp(tl.where(m_ours, (ours - total)[:, None], 0.0))
    their_weight = tl.exp(tl.where(m_theirs, (theirs - total)[:, None], 0.0))
    p_whole = p_out + head * out_head + place[:, None] * out_row + column
    p_new = p_part + head * part_head + row[:, None] * part_row + column
    # A row that gains nothing is not written, one that saw nothing not read.
    out = tl.load(p_whole, mask=m_block & m_ours & m_theirs, other=0.0).to(tl.float32)
    part = tl.load(p_new, mask=m_block & m_theirs, other=0.0).to(tl.float32)
    merged = (out * our_weight + part * their_weight).to(p_out.dtype.element_ty)
    tl.store(p_whole, merged, mask=m_block & (m_theirs | ~m_ours))
    tl.store(p_total, total, mask=m_row)


def _launch_merge(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor, rows: Rows) -> None:
    grid, sizes, blocks = _launch(part)
    out, part = _dense(out), _last_dense(part)
    _merge[grid](
        *(out, lse, part, part_lse, *_places(rows, out)),
        *sizes,
        *(*out.stride()[:2], *lse.stride(), *part.stride()[:2], *part_lse.stride()),
        indexed=isinstance(rows, Tensor),
        **blocks,
    )


@triton.jit(do_not_specialize=["first", "count"])
def _add(  # type: ignore[no-untyped-def]
    p_total,
    p_part,
    p_rows,
    first,
    count,
    heads,
    width,
    total_row,
    total_head,
    part_row,
    part_head,
    indexed: tl.constexpr,
    b_r: tl.constexpr,
    b_v: tl.constexpr,
):
    head, row, m_row, column, m_block = _block(count, heads, width, b_r, b_v)
    place = tl.load(p_rows + row, mask=m_row, other=0).to(tl.int64) if indexed else row + first
    p_whole = p_total + head * total_head + place[:, None] * total_row + column
    part = tl.load(p_part + head * part_head + row[:, None] * part_row + column, mask=m_block).to(tl.float32)
    total = tl.load(p_whole, mask=m_block).to(tl.float32) + part
    tl.store(p_whole, total.to(p_total.dtype.element_ty), mask=m_block)


def _launch_add(total: Tensor, part: Tensor, rows: Rows) -> None:
    grid, sizes, blocks = _launch(part)
    total, part = _dense(total), _last_dense(part)
    strides = (*total.stride()[:2], *part.stride()[:2])
    _add[grid](total, part, *_places(rows, total), *sizes, *strides, indexed=isinstance(rows, Tensor), **blocks)


@triton.jit(do_not_specialize=["count"])
def _delta(  # type: ignore[no-untyped-def]
    p_delta,
    p_out,
    p_dout,
    count,
    heads,
    width,
    out_row,
    out_head,
    dout_row,
    dout_head,
    b_r: tl.constexpr,
    b_v: tl.constexpr,
):
    head, row, m_row, column, m_block = _block(count, heads, width, b_r, b_v)
    out = tl.load(p_out + head * out_head + row[:, None] * out_row + column, mask=m_block, other=0.0)
    dout = tl.load(p_dout + head * dout_head + row[:, None] * dout_row + column, mask=m_block, other=0.0)
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    tl.store(p_delta + head * count + row, delta, mask=m_row)


def _launch_delta(out: Tensor, dout: Tensor) -> Tensor:
    grid, sizes, blocks = _launch(out)
    out, dout = _last_dense(out), _last_dense(dout)
    result = torch.empty(out.shape[1], out.shape[0], dtype=torch.float32, device=out.device)
    _delta[grid](result, out, dout, *sizes, *out.stride()[:2], *dout.stride()[:2], **blocks)
    return result


@triton.jit(do_not_specialize=["count"])
def _stand_in(  # type: ignore[no-untyped-def]
    p_out,
    p_dout,
    p_delta,
    count,
    heads,
    width,
    dout_row,
    dout_head,
    delta_head,
    delta_row,
    limit,
    terms: tl.constexpr,
    b_r: tl.constexpr,
    b_v: tl.constexpr,
):
    head, row, m_row, column, m_block = _block(count, heads, width, b_r, b_v)
    dout = tl.load(p_dout + head * dout_head + row[:, None] * dout_row + column, mask=m_block, other=0.0)
    dout = dout.to(tl.float32)
    left = tl.load(p_delta + head * delta_head + row * delta_row, mask=m_row, other=0.0)
    size, out = tl.abs(dout), tl.zeros_like(dout)
    for _ in tl.static_range(terms):
        hit = column == tl.argmax(size, 1)[:, None]
        slope = tl.sum(tl.where(hit, dout, 0.0), 1)
        entry = tl.where(slope == 0.0, 0.0, left / tl.where(slope == 0.0, 1.0, slope))
        # Rounded as it will be stored, so that the next entry knows what is missing.
        entry = tl.minimum(tl.maximum(entry, -limit), limit).to(p_out.dtype.element_ty).to(tl.float32)
        left -= entry * slope
        out = tl.where(hit, entry[:, None], out)
        size = tl.where(hit, -1.0, size)
    p_row = p_out + (row[:, None] * heads + head) * width + column
    tl.store(p_row, out.to(p_out.dtype.element_ty), mask=m_block)


def _launch_stand_in(dout: Tensor, delta: Tensor) -> Tensor:
    grid, sizes, blocks = _launch(dout)
    dout, limit = _last_dense(dout), torch.finfo(dout.dtype).max
    out = torch.empty(dout.shape, dtype=dout.dtype, device=dout.device)
    strides = (*dout.stride()[:2], *delta.stride())
    _stand_in[grid](out, dout, delta, *sizes, *strides, limit, terms=_terms(dout), **blocks)
    return out


def _launch(part: Tensor) -> tuple[tuple[int], tuple[int, int, int], dict[str, int]]:
    """Grid; rows, heads, width; sizes of a block: 2048 entries, for more the registers of four warps spill."""
    count, heads, width = part.shape
    b_v = triton.next_power_of_2(width)
    b_r = max(1, 2048 // b_v)
    return (triton.cdiv(count, b_r) * heads,), (count, heads, width), {"b_r": b_r, "b_v": b_v}


def _places(rows: Rows, whole: Tensor) -> tuple[Tensor, int]:
    """The index tensor, or any tensor beside the first row of a range."""
    if isinstance(rows, Tensor):
        return rows.contiguous(), 0
    return whole, (rows or slice(None)).indices(whole.shape[0])[0]


def _dense(whole: Tensor) -> Tensor:
    if whole.stride(-1) != 1 and whole.shape[-1] > 1:
        raise ValueError(f"lse: strides {whole.stride()}: the last axis is written in place and must be dense")
    return whole


def _last_dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
