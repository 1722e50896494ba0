"""Tokens go to their experts and come back: a stable sort by expert, a copy of rows and a sum of rows."""
# ruff: noqa: ANN001 - a kernel's arguments are pointers p_ and numbers

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from farspan.kernels.define import define, triton_runs

__all__ = ["GATHER", "SPREAD", "Order", "permute", "permute_ref", "sort", "sort_ref", "unpermute", "unpermute_ref"]

MOST = 4095
"""Experts that one program counts; more are left to torch."""


@dataclass(frozen=True)
class Order:
    """The visits of T tokens, K each, in the order of their experts: the first M of these T·K."""

    rows: Tensor
    """int32 M: the visit t·K + j that lies at each place."""
    places: Tensor
    """int32 T K: where each visit lies, the inverse of rows; from M on there is nothing."""
    ends: Tensor
    """int32 E: where each expert's rows end, and the next one's begin. From ends[-1] on lie those who visit nobody."""


def sort_ref(chosen: Tensor, experts: int, room: int | None = None) -> Order:
    """The specification of `sort`."""
    key = torch.where((chosen >= 0) & (chosen < experts), chosen, experts).flatten()
    key, rows = key.sort(stable=True)
    each = torch.arange(experts, device=chosen.device, dtype=key.dtype)
    ends = torch.searchsorted(key, each, right=True, out_int32=True)
    return Order(rows[:room].int(), rows.argsort().int().view(chosen.shape), ends)


@torch.no_grad()
def sort(chosen: Tensor, experts: int, room: int | None = None) -> Order:
    """The order of experts: of one expert's rows the lower token, then the lower j comes first.

    chosen T K, int32 or int64. What is not in 0..experts-1 visits nobody: it comes last, behind every end. room: how
    many places there are, None for one for every visit. It should leave room for all that visit an expert: ends tell
    how many these are, and whatever lies from room on is not there. The host does not wait, and runs are alike bit for
    bit. Kernels run on the current device. Errors: ValueError for other shapes and types, for 2^31 visits or more, and
    for more room than visits.
    """
    if chosen.ndim != 2 or chosen.dtype not in (torch.int32, torch.int64) or chosen.numel() >= 2**31 or experts < 1:
        raise ValueError(
            f"sort: chosen {tuple(chosen.shape)} of {chosen.dtype} for experts={experts} must be T K of torch.int32 or "
            "int64, fewer than 2^31 entries, for at least one expert"
        )
    room = chosen.numel() if room is None else room
    if not 0 <= room <= chosen.numel():
        raise ValueError(f"sort: room={room} must be from 0 to the {chosen.numel()} visits of chosen")
    if not triton_runs(chosen) or experts > MOST:
        return sort_ref(chosen, experts, room)
    return Order(*_SORT(chosen, experts, room))


def permute_ref(x: Tensor, order: Order) -> Tensor:
    """The specification of `permute`, differentiable by autograd."""
    visits = _wide(x).unsqueeze(1).expand(-1, order.places.shape[1], -1).flatten(0, 1)  # T·K D
    return torch.where(_live(order.ends, order.rows.shape[0]), visits[order.rows.long()], 0).to(x.dtype)


def permute(x: Tensor, order: Order) -> Tensor:
    """Every token's row, once for each of its visits, in the order of experts: x T D -> M D, dense.

    Rows of those who visit nobody are zero. The gradient of a token is the sum over its visits of an expert in order,
    in at least fp32 and rounded once, whatever the upstream gradient holds elsewhere. Only the order is saved. x may be
    strided; rows of it are copied first where they are not dense. Kernels run on the current device. Errors: ValueError
    for another number of tokens.
    """
    if x.ndim != 2 or x.shape[0] != order.places.shape[0]:
        raise ValueError(
            f"permute: x {tuple(x.shape)} must be T D with the {order.places.shape[0]} tokens of the order"
        )
    out: Tensor = _Permute.apply(x, order.places, order.ends, order.rows.shape[0])
    return out


def unpermute_ref(y: Tensor, order: Order) -> Tensor:
    """The specification of `unpermute`, differentiable by autograd."""
    live = torch.where(_live(order.ends, y.shape[0]), _wide(y), 0)
    nothing = live.new_zeros(1, y.shape[1])
    return torch.cat([live, nothing])[order.places.clamp(max=len(y)).long()].sum(1).to(y.dtype)


def unpermute(y: Tensor, order: Order) -> Tensor:
    """The sum of every token's rows, in at least fp32 and rounded once: y M D -> T D, dense.

    Rows of those who visit nobody are no part of it, whatever they hold, and their gradient is zero; each other row's
    is its token's. All else is as in `permute`, whose inverse this is for K = 1. Errors: ValueError for another number
    of rows.
    """
    if y.ndim != 2 or y.shape[0] != order.rows.shape[0]:
        raise ValueError(f"unpermute: y {tuple(y.shape)} must be M D with the {order.rows.shape[0]} rows of the order")
    out: Tensor = _Unpermute.apply(y, order.places, order.ends)
    return out


def _live(ends: Tensor, rows: int) -> Tensor:
    """Which rows are an expert's: M 1."""
    return (torch.arange(rows, device=ends.device) < ends[-1]).unsqueeze(1)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, places: Tensor, ends: Tensor, room: int) -> Tensor:
        ctx.save_for_backward(places, ends)
        return SPREAD(x, places, ends, room)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        return GATHER(dout, *ctx.saved_tensors), None, None, None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, places: Tensor, ends: Tensor) -> Tensor:
        ctx.save_for_backward(places, ends)
        ctx.room = y.shape[0]
        return GATHER(y, places, ends)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        return SPREAD(dout, *ctx.saved_tensors, ctx.room), None, None


# Sorting: each block of visits counts its experts; a running sum over all counts, expert by expert and within one block
# by block, says where each block's visits of each expert begin; a visit lies there, behind its like in the block.

VISITS = 128
"""Of a block. Each is compared with every other: more cost time, fewer make more counts."""


@triton.jit
def _experts_of(p_chosen, visit, count, experts):  # type: ignore[no-untyped-def]
    """Whom visits go to, `experts` standing for nobody: negative numbers are large ones without their sign."""
    chosen = tl.load(p_chosen + visit, mask=visit < count, other=-1)
    whom = chosen.to(tl.uint64) if chosen.dtype == tl.int64 else chosen.to(tl.uint32)
    return tl.minimum(whom, experts).to(tl.int32)


@triton.jit(do_not_specialize=["count", "blocks"])
def _count(p_counts, p_chosen, count, blocks, experts, b_m: tl.constexpr, b_e: tl.constexpr):  # type: ignore[no-untyped-def]
    block = tl.program_id(0).to(tl.int64)
    visit = block * b_m + tl.arange(0, b_m)
    found = tl.histogram(_experts_of(p_chosen, visit, count, experts), b_e, mask=visit < count)
    each = tl.arange(0, b_e)
    tl.store(p_counts + each.to(tl.int64) * blocks + block, found, mask=each <= experts)


@triton.jit(do_not_specialize=["count", "blocks", "room"])
def _place(  # type: ignore[no-untyped-def]
    p_rows,
    p_places,
    p_ends,
    p_chosen,
    p_sums,
    count,
    blocks,
    room,
    experts,
    b_m: tl.constexpr,
    b_e: tl.constexpr,
    b_c: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64)
    inside = tl.arange(0, b_m)
    visit = block * b_m + inside
    expert = _experts_of(p_chosen, visit, count, experts)
    rank = tl.zeros((b_m,), tl.int32)
    for first in range(0, b_m, b_c):
        other = first + tl.arange(0, b_c)
        whom = _experts_of(p_chosen, block * b_m + other, count, experts)
        alike = (whom[:, None] == expert[None, :]) & (other[:, None] < inside[None, :])
        rank += tl.sum(alike.to(tl.int32), 0)
    m_visit = visit < count
    before = expert.to(tl.int64) * blocks + block - 1
    place = rank + tl.load(p_sums + before, mask=m_visit & (before >= 0), other=0)
    tl.store(p_places + visit, place, mask=m_visit)
    tl.store(p_rows + place, visit.to(tl.int32), mask=m_visit & (place < room))
    if block == 0:
        each = tl.arange(0, b_e)
        last = tl.load(p_sums + (each.to(tl.int64) + 1) * blocks - 1, mask=each < experts, other=0)
        tl.store(p_ends + each, last, mask=each < experts)


def _run_sort(chosen: Tensor, experts: int, room: int) -> tuple[Tensor, Tensor, Tensor]:
    rows, places, ends = _like_sort(chosen, experts, room)
    if chosen.numel():
        _launch_sort((rows, places, ends), chosen.contiguous(), experts)
    else:
        ends.zero_()
    return rows, places, ends


def _launch_sort(results: tuple[Tensor, Tensor, Tensor], chosen: Tensor, experts: int) -> None:
    count, blocks = chosen.numel(), triton.cdiv(chosen.numel(), VISITS)
    b_e = _experts_padded(experts)
    counts = torch.empty((experts + 1) * blocks, dtype=torch.int32, device=chosen.device)
    _count[(blocks,)](counts, chosen, count, blocks, experts, b_m=VISITS, b_e=b_e, num_warps=4)
    sums = counts.cumsum(0, dtype=torch.int32)
    numbers = count, blocks, results[0].shape[0], experts
    _place[(blocks,)](*results, chosen, sums, *numbers, b_m=VISITS, b_e=b_e, b_c=32, num_warps=4)


def _experts_padded(experts: int) -> int:
    return max(32, triton.next_power_of_2(experts + 1))  # and nobody; a histogram has a bin for each thread of a warp


def _like_sort(chosen: Tensor, experts: int, room: int) -> tuple[Tensor, Tensor, Tensor]:
    shapes = room, chosen.shape, experts
    rows, places, ends = (chosen.new_empty(shape, dtype=torch.int32) for shape in shapes)
    return rows, places, ends


# Moving rows: a program takes b_t tokens and b_d columns, and goes through their K visits. Both ways a token's own row
# is touched once, and each visit's once. Width and strides are constants, so that the compiler knows what 16-byte
# accesses are aligned, for widths that are multiples of 8 alone as well. Offsets of rows are 64-bit. How many rows are
# an expert's is read on the GPU: what lies behind them is zero where it is written and is never read.


@triton.jit
def _tile(tokens, width: tl.constexpr, b_t: tl.constexpr, b_d: tl.constexpr):  # type: ignore[no-untyped-def]
    blocks: tl.constexpr = (width + b_d - 1) // b_d
    token = (tl.program_id(0) // blocks).to(tl.int64) * b_t + tl.arange(0, b_t)
    column = (tl.program_id(0) % blocks) * b_d + tl.arange(0, b_d)[None, :]
    return token, token < tokens, column, (token < tokens)[:, None] & (column < width)


@triton.jit(do_not_specialize=["tokens", "room", "experts"])
def _spread(  # type: ignore[no-untyped-def]
    p_out,
    p_x,
    p_places,
    p_ends,
    tokens,
    room,
    experts,
    k: tl.constexpr,
    width: tl.constexpr,
    x_row: tl.constexpr,
    b_k: tl.constexpr,
    b_t: tl.constexpr,
    b_d: tl.constexpr,
):
    token, m_token, column, mask = _tile(tokens, width, b_t, b_d)
    end = tl.load(p_ends + experts - 1)
    x = tl.load(p_x + token[:, None] * x_row + column, mask=mask)
    for first in range(0, k, b_k):
        for j in tl.static_range(b_k):
            there = m_token & (first + j < k)
            place = tl.load(p_places + token * k + first + j, mask=there, other=0)
            at = place.to(tl.int64)[:, None] * width + column
            tl.store(
                p_out + at,
                tl.where((place < end)[:, None], x, tl.zeros_like(x)),
                mask=mask & (there & (place < room))[:, None],
            )


@triton.jit(do_not_specialize=["tokens", "room", "experts"])
def _gather(  # type: ignore[no-untyped-def]
    p_out,
    p_y,
    p_places,
    p_ends,
    tokens,
    room,
    experts,
    k: tl.constexpr,
    width: tl.constexpr,
    y_row: tl.constexpr,
    b_k: tl.constexpr,
    b_t: tl.constexpr,
    b_d: tl.constexpr,
):
    token, m_token, column, mask = _tile(tokens, width, b_t, b_d)
    end = tl.minimum(tl.load(p_ends + experts - 1), room)
    total = tl.zeros((b_t, b_d), tl.float32)
    for first in range(0, k, b_k):
        for j in tl.static_range(b_k):
            there = m_token & (first + j < k)
            place = tl.load(p_places + token * k + first + j, mask=there, other=0)
            live = mask & (there & (place < end))[:, None]
            at = place.to(tl.int64)[:, None] * y_row + column
            total += tl.load(p_y + at, mask=live, other=0.0).to(tl.float32)
    tl.store(p_out + token[:, None] * width + column, total.to(p_out.dtype.element_ty), mask=mask)


def _block(k: int, width: int, row: int) -> tuple[int, int, int]:
    """b_k, b_t, b_d: at most 8 visits on their way, each of 2048 entries, or 512 where they are moved one by one; at
    most 512 columns, so that few lanes are idle at 1536 or 2880."""
    entries = 512 if width % 8 or row % 8 else 2048
    b_d = min(512, triton.next_power_of_2(width))
    return max(1, min(8, k)), entries // b_d, b_d


def _launch(kernel: Any, out: Tensor, x: Tensor, places: Tensor, ends: Tensor, room: int) -> None:
    (tokens, k), width = places.shape, x.shape[1]
    if tokens and width:
        x = x if x.stride(1) == 1 else x.contiguous()
        b_k, b_t, b_d = _block(k, width, x.stride(0))
        grid = (triton.cdiv(tokens, b_t) * triton.cdiv(width, b_d),)
        numbers = tokens, room, ends.shape[0], k, width, x.stride(0)
        kernel[grid](out, x, places.contiguous(), ends.contiguous(), *numbers, b_k, b_t, b_d, num_warps=4)


def _run_spread(x: Tensor, places: Tensor, ends: Tensor, room: int) -> Tensor:
    if not triton_runs(x):
        visits = x.unsqueeze(1).expand(-1, places.shape[1], -1).flatten(0, 1)
        at = torch.where(places < ends[-1], places, room).flatten().clamp(max=room).long()  # from room on is nothing
        return x.new_zeros(room + 1, x.shape[1]).index_copy_(0, at, visits)[:-1]
    out = _like_spread(x, places, ends, room)
    _launch(_spread, out, x, places, ends, room)
    return out


def _like_spread(x: Tensor, places: Tensor, ends: Tensor, room: int) -> Tensor:
    return x.new_empty((room, x.shape[1]))


def _run_gather(y: Tensor, places: Tensor, ends: Tensor) -> Tensor:
    if not triton_runs(y):
        return unpermute_ref(y, Order(places, places, ends))  # which reads no rows of an order
    out = _like_gather(y, places, ends)
    _launch(_gather, out, y, places, ends, y.shape[0])
    return out


def _like_gather(y: Tensor, places: Tensor, ends: Tensor) -> Tensor:
    return y.new_empty((places.shape[0], y.shape[1]))


_SORT = define(
    "expert_sort(Tensor chosen, int experts, SymInt room) -> (Tensor, Tensor, Tensor)", _run_sort, _like_sort
)
SPREAD = define("expert_spread(Tensor x, Tensor places, Tensor ends, SymInt room) -> Tensor", _run_spread, _like_spread)
GATHER = define("expert_gather(Tensor y, Tensor places, Tensor ends) -> Tensor", _run_gather, _like_gather)
