"""The first product of experts without a copy of its rows: it fetches them by token, and ends in SwiGLU."""
# ruff: noqa: ANN001 - a kernel's arguments are pointers p_ and numbers

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from farspan.kernels.define import define, triton_runs
from farspan.kernels.gated_rows import GATED
from farspan.kernels.grouped_gemm import GROUPED_MM, clear_tail
from farspan.kernels.permute import SPREAD
from farspan.kernels.swiglu import activation

__all__ = ["GATHERED", "gathered_ref"]

HIDDEN = 1536
"""The most hidden channels for which this should be ahead: torch's own product is faster, and a copy of the rows costs
the same for however many channels. Measured on an H100, in TFLOP/s, against permute, grouped_mm and gated: 576 to 500
(T 32768, D 4096, I 512, E 128, K 8), 530 to 491 (D 2048, I 768), 478 to 345 (T 24576, D 1536, I 256). By these it is
level at about 1700."""
EXPERTS = 2048
"""The most, since every program holds all ends."""


def gathered_ref(
    x: Tensor, w13: Tensor, probability: Tensor, rows: Tensor, places: Tensor, ends: Tensor
) -> tuple[Tensor, Tensor]:
    """w13[e] · x and p · SwiGLU of it, for each row's own expert, token and probability: M 2 I and M I, dense.

    x T D, w13 E 2 I D of its type, probability T K, at least fp32; rows, places and ends are an `Order`'s, with ends of
    at most M. From ends[-1] on both results are zero, whatever x and probability hold for those who visit nobody.
    """
    given = SPREAD(x, places, ends, rows.shape[0])
    h = GROUPED_MM(given, w13.flatten(1, 2).transpose(1, 2), ends).unflatten(1, w13.shape[1:3])
    live = torch.arange(rows.shape[0], device=ends.device) < ends[-1:]
    return h, GATED(h, torch.where(live, probability.flatten()[rows], 0))


# A program stays, and takes one tile after the other: b_m rows of one expert, b_n hidden channels, both their gate and
# their up, so that the activation is at hand. Lines of tiles are counted from the ends by each program for itself. All
# channels of a line follow each other, so that its rows come from the cache but once; where there are many channels,
# `group` lines go through them side by side, so that weights do as well. Offsets are 64-bit.


@triton.jit
def _lines(p_ends, rows, experts: tl.constexpr, b_m: tl.constexpr, b_e: tl.constexpr):  # type: ignore[no-untyped-def]
    """For each expert: where its rows begin and end, its lines, and lines up to it and with it; padded by none."""
    each = tl.arange(0, b_e)
    stop = tl.minimum(tl.load(p_ends + each, mask=each < experts, other=0), rows)
    start = tl.minimum(tl.load(p_ends + each - 1, mask=(each > 0) & (each < experts), other=0), rows)
    count = (stop - start + b_m - 1) // b_m
    return start, stop, count, tl.cumsum(count, 0)


@triton.jit
def _add(a, b, c, d, e, f):  # type: ignore[no-untyped-def]
    return a + d, b + e, c + f


@triton.jit
def _places_of(line, starts, stops, counts, lines, b_m: tl.constexpr):  # type: ignore[no-untyped-def]
    """A line's expert, its first place, and where the expert's end: one sum for all three, as sums meet a barrier."""
    mine = (lines > line) & (lines - counts <= line)
    expert = tl.where(mine, tl.arange(0, lines.shape[0]), 0)
    first = tl.where(mine, starts + (line - (lines - counts)) * b_m, 0)
    return tl.reduce((expert, first, tl.where(mine, stops, 0)), 0, _add)


@triton.jit(do_not_specialize=["rows"])
def _gathered(  # type: ignore[no-untyped-def]
    p_h,
    p_act,
    p_x,
    p_w,
    p_prob,
    p_rows,
    p_ends,
    rows,
    x_row: tl.constexpr,
    active: tl.constexpr,
    experts: tl.constexpr,
    hidden: tl.constexpr,
    width: tl.constexpr,
    b_e: tl.constexpr,
    b_m: tl.constexpr,
    b_n: tl.constexpr,
    b_k: tl.constexpr,
    group: tl.constexpr,
    stages: tl.constexpr,
):
    starts, stops, counts, lines = _lines(p_ends, rows, experts, b_m, b_e)
    across: tl.constexpr = (hidden + b_n - 1) // b_n
    whole_n: tl.constexpr = hidden % b_n == 0
    whole_k: tl.constexpr = width % b_k == 0
    total = tl.max(lines, 0)
    for tile in tl.range(tl.program_id(0), total * across, tl.num_programs(0)):
        first = tile // (group * across) * group
        beside = tl.minimum(total - first, group)
        inside = tile % (group * across)
        line = first + inside % beside
        column = inside // beside * b_n + tl.arange(0, b_n)

        expert, begin, end = _places_of(line, starts, stops, counts, lines, b_m)
        place = begin + tl.arange(0, b_m)
        live = place < end
        visit = tl.load(p_rows + place, mask=live, other=0)

        k = tl.arange(0, b_k)
        channel = column if whole_n else tl.minimum(column, hidden - 1)
        p_a = p_x + (visit // active).to(tl.int64)[:, None] * x_row + k[None, :]
        p_b = p_w + expert.to(tl.int64) * (2 * hidden * width) + channel.to(tl.int64)[:, None] * width + k[None, :]
        gate = tl.zeros((b_m, b_n), tl.float32)
        up = tl.zeros((b_m, b_n), tl.float32)
        for at in tl.range(0, width, b_k, num_stages=stages):
            if whole_k:
                a, b, c = tl.load(p_a + at), tl.load(p_b + at), tl.load(p_b + hidden * width + at)
            else:
                rest = k[None, :] < width - at
                a = tl.load(p_a + at, mask=rest, other=0.0)
                b = tl.load(p_b + at, mask=rest, other=0.0)
                c = tl.load(p_b + hidden * width + at, mask=rest, other=0.0)
            gate = tl.dot(a, tl.trans(b), gate)
            up = tl.dot(a, tl.trans(c), up)

        mask = live[:, None] if whole_n else live[:, None] & (column < hidden)[None, :]
        there = place.to(tl.int64)[:, None]
        p_gate = p_h + there * (2 * hidden) + column[None, :]
        # Rounded before the activation, as all who form it again from h have it.
        gate, up = gate.to(p_h.dtype.element_ty), up.to(p_h.dtype.element_ty)
        tl.store(p_gate, gate, mask=mask)
        tl.store(p_gate + hidden, up, mask=mask)
        prob = tl.load(p_prob + visit, mask=live, other=0.0).to(tl.float32)[:, None]
        value, _ = activation(gate.to(tl.float32), "silu")
        act = (value * up.to(tl.float32) * prob).to(p_act.dtype.element_ty)
        tl.store(p_act + there * hidden + column[None, :], act, mask=mask)


def _tile(hidden: int, width: int) -> dict[str, int]:
    """How the work is cut. A longer loop has more time to get going, so that a stage less is no loss."""
    b_n = 64 if hidden <= 64 else 128
    group = 1 if triton.cdiv(hidden, b_n) <= 8 else 16
    return {"b_m": 128, "b_n": b_n, "b_k": 64, "group": group, "stages": 4 if width <= 2048 else 3}


def _launch(results: tuple[Tensor, Tensor], x: Tensor, w13: Tensor, probability: Tensor, *order: Tensor) -> None:
    """order: rows and ends. The results are dense."""
    rows, ends = (given.contiguous() for given in order)
    experts, _, hidden, width = w13.shape
    x = x if x.stride(1) == 1 else x.contiguous()
    tile, programs = _tile(hidden, width), 3 if x.is_cpu else _device(x.device)[0]
    most = (triton.cdiv(len(rows), tile["b_m"]) + experts) * triton.cdiv(hidden, tile["b_n"])
    tensors = x, w13.contiguous(), probability.contiguous(), rows, ends
    sizes = len(rows), x.stride(0), probability.shape[1], experts, hidden, width, _padded(experts)
    _gathered[(min(most, programs),)](*results, *tensors, *sizes, **tile, num_warps=8)
    for out in results:
        clear_tail(out.flatten(1), ends)


def _padded(experts: int) -> int:
    return max(32, triton.next_power_of_2(experts))


@cache
def _device(device: torch.device) -> tuple[int, bool]:
    """Multiprocessors, and whether a block may have the shared memory of Hopper: not on GPUs for graphics."""
    found = torch.cuda.get_device_properties(device)
    return found.multi_processor_count, found.major in (9, 10)


def _is_ahead(x: Tensor, w13: Tensor) -> bool:
    """Rows that do not begin on 16 bytes would come in pieces."""
    experts, _, hidden, width = w13.shape
    if experts > EXPERTS or not triton_runs(x):
        return False
    if x.is_cpu:
        return x.dtype != torch.bfloat16  # which the interpreter multiplies as whole numbers
    even = width % 8 == 0 and x.stride(0) % 8 == 0
    return x.dtype == torch.bfloat16 and hidden <= HIDDEN and even and _device(x.device)[1]


def _run(
    x: Tensor, w13: Tensor, probability: Tensor, rows: Tensor, places: Tensor, ends: Tensor
) -> tuple[Tensor, Tensor]:
    results = _like(x, w13, probability, rows)
    if not results[0].numel() or not x.numel():
        return results[0].zero_(), results[1].zero_()
    if not _is_ahead(x, w13):
        return gathered_ref(x, w13, probability, rows, places, ends)
    _launch(results, x, w13, probability, rows, ends)
    return results


def _like(x: Tensor, w13: Tensor, probability: Tensor, rows: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
    shape = rows.shape[0], *w13.shape[1:3]
    return x.new_empty(shape), x.new_empty(shape[0], shape[2])


GATHERED = define(
    "gathered_gated(Tensor x, Tensor w13, Tensor probability, Tensor rows, Tensor places, Tensor ends)"
    " -> (Tensor, Tensor)",
    _run,
    _like,
)


@register_flop_formula(torch.ops.farspan.gathered_gated)
def _flops(x: tuple[int, ...], w13: tuple[int, ...], _: Any, rows: tuple[int, ...], *__: Any, **___: Any) -> int:
    """As if every row were an expert's."""
    return 2 * rows[0] * w13[1] * w13[2] * x[1]
