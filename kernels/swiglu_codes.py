"""SwiGLU and GeGLU that leave eight-bit codes behind: of their result a linear layer reads nothing else."""
# ruff: noqa: ANN001 - a kernel's arguments are pointers p_ and numbers

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from farspan.kernels.column_sums import Pace, store_largest, walk
from farspan.kernels.define import define
from farspan.kernels.fp8 import Coded, coded, coded_rows
from farspan.kernels.fp8_quantise import COLUMNS, codes_shapes, fp8_inverse, fp8_rows, fp8_scale
from farspan.kernels.norm_tiles import rows
from farspan.kernels.swiglu import GATED_BACKWARD, activation, fits, geglu_ref, swiglu_ref

__all__ = ["coded_geglu", "coded_swiglu"]

# What measurement may change. Rows that are wider are formed twice.
PACE = Pace(tile=2048, lanes=16, resident=16384)
WIDEST = 16384
BLOCK = 4096


def coded_swiglu(gate: Tensor, up: Tensor, *, transposed: bool) -> Coded:
    """The codes of swiglu(gate, up) that fp8 products read, no more.

    They are bit for bit those of `quantise(swiglu(gate, up), "row")`: numbers are rounded to the type of gate and up
    before they are coded, and the gradients are those of `swiglu`. transposed: with the codes of the transpose, which
    the weight's gradient reads. gate, up: ... I as in `swiglu`, and so are the errors.
    """
    if not fits("coded_swiglu", gate, up):
        return coded(swiglu_ref(gate, up), "row", transposed=transposed)
    return _coded(gate, up, "silu", transposed)


def coded_geglu(gate: Tensor, up: Tensor, *, transposed: bool) -> Coded:
    """`coded_swiglu` for `geglu`."""
    if not fits("coded_geglu", gate, up):
        return coded(geglu_ref(gate, up), "row", transposed=transposed)
    return _coded(gate, up, "gelu", transposed)


def _coded(gate: Tensor, up: Tensor, kind: str, transposed: bool) -> Coded:
    place, values, scale, columns = _CodedGated.apply(gate, up, kind, transposed)
    return coded_rows(place, values, scale, columns, transposed=transposed)


class _CodedGated(torch.autograd.Function):
    """Instead of the result a place for its gradient, a tensor of its shape without memory, and the codes."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, kind: str, columns: bool) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(gate, up)
        ctx.kind = kind
        codes = GATED_CODES(gate, up, kind, columns)
        ctx.mark_non_differentiable(*codes)
        return gate.new_empty(()).expand(gate.shape), *codes

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor, *_: None) -> tuple[Tensor, Tensor, None, None]:
        return *GATED_BACKWARD(dout, *ctx.saved_tensors, ctx.kind), None, None


@triton.jit
def _formed(p_gate, p_up, mask, kind: tl.constexpr):  # type: ignore[no-untyped-def]
    """activation(gate) ∘ up in fp32, as its rounding to the inputs' type leaves it; 0 outside the mask."""
    value, _ = activation(tl.load(p_gate, mask=mask, other=0.0).to(tl.float32), kind)
    value *= tl.load(p_up, mask=mask, other=0.0).to(tl.float32)
    return value.to(p_gate.dtype.element_ty).to(tl.float32)


@triton.jit(do_not_specialize=["count"])
def _forward(  # type: ignore[no-untyped-def]
    p_values,
    p_scale,
    p_columns,
    p_gate,
    p_up,
    count,
    gate_row,
    up_row,
    width: tl.constexpr,
    kind: tl.constexpr,
    b_r: tl.constexpr,
    b_i: tl.constexpr,
    stages: tl.constexpr,
):
    """Whole rows, padded to 16; with p_columns a program leaves behind the largest number of each column."""
    column = tl.arange(0, b_i)[None, :]
    m_column = column < width
    padded = tl.cdiv(count, 16) * 16
    largest = tl.zeros((b_r, b_i), tl.float32)
    for tile in tl.range(tl.program_id(0), tl.cdiv(padded, b_r), tl.num_programs(0), num_stages=stages):
        row = (tile * b_r + tl.arange(0, b_r).to(tl.int64))[:, None]
        mask = (row < count) & m_column
        codes, scale = fp8_rows(_formed(p_gate + row * gate_row + column, p_up + row * up_row + column, mask, kind))
        place = tile * b_r + tl.arange(0, b_r)
        m_place = place < padded
        at = place[:, None].to(tl.int64) * width + column
        tl.store(p_values + at, codes, mask=m_place[:, None] & m_column)
        tl.store(p_scale + place, scale, mask=m_place)
        if p_columns is not None:
            largest = tl.maximum(largest, tl.abs(codes.to(tl.float32)) * scale[:, None])
    if p_columns is not None:
        store_largest(p_columns + tl.program_id(0).to(tl.int64) * width, largest, b_i, width)


@triton.jit(do_not_specialize=["count"])
def _forward_wide(  # type: ignore[no-untyped-def]
    p_values, p_scale, p_gate, p_up, count, gate_row, up_row, width: tl.constexpr, kind: tl.constexpr, b_i: tl.constexpr
):
    """A row in blocks, twice: the second time it comes from the cache."""
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, b_i)
    p_gate, p_up = p_gate + row * gate_row + column, p_up + row * up_row + column
    known, amax = tl.where(row < count, width, 0), tl.zeros((b_i,), tl.float32)
    for first in tl.range(0, width, b_i):
        value = _formed(p_gate + first, p_up + first, column < known - first, kind)
        amax = tl.maximum(amax, tl.abs(value))
    scale = fp8_scale(tl.max(amax, 0))
    for first in tl.range(0, width, b_i):
        value = _formed(p_gate + first, p_up + first, column < known - first, kind)
        codes = (value * fp8_inverse(scale)).to(tl.float8e4nv)
        tl.store(p_values + row * width + first + column, codes, mask=column < width - first)
    tl.store(p_scale + row, scale)


def _launch(gate: Tensor, up: Tensor, kind: str, found: tuple[Tensor, Tensor, Tensor]) -> None:
    """Fills found: codes, scales and, unless that is empty, the columns' largest; gate has at least one entry."""
    values, scale, largest = found
    padded, width = values.shape
    (gates, gate_row), (ups, up_row) = rows(gate), rows(up)
    sizes = gate.numel() // width, gate_row, up_row
    if width > WIDEST:
        _forward_wide[(padded,)](values, scale, gates, ups, *sizes, width=width, kind=kind, b_i=BLOCK, num_warps=8)
        if largest.numel():
            largest.copy_(COLUMNS(values, scale))
        return
    way = walk(PACE, width, 2 * gate.element_size(), gate.device)
    programs = min(way.slots, -(-padded // way.b_r))
    parts = scale.new_empty(programs, width) if largest.numel() else None
    _forward[(programs,)](
        *(values, scale, parts, gates, ups, *sizes),
        width=width,
        kind=kind,
        b_r=way.b_r,
        b_i=way.b_d,
        stages=way.stages,
        num_warps=way.warps,
    )
    if parts is not None:
        torch.amax(parts, 0, out=largest)


def _gated_codes(gate: Tensor, up: Tensor, kind: str, columns: bool) -> tuple[Tensor, Tensor, Tensor]:
    found = codes_shapes(gate, columns)
    if gate.numel():
        _launch(gate, up, kind, found)
    else:
        found[2].zero_()
    return found


GATED_CODES = define(
    "gated_codes(Tensor gate, Tensor up, str kind, bool columns) -> (Tensor, Tensor, Tensor)",
    _gated_codes,
    lambda gate, up, kind, columns: codes_shapes(gate, columns),
)
