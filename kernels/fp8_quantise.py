"""Numbers in eight bits: a row or block shares a power of two, and only rounding to four binary digits costs anything.

Scales are powers of two, the smallest with which a group's largest number is at most 448: multiplying by them is exact,
and a number's codes in two groups differ by their exponent alone. So a row's codes, once made, serve both directions:
the transposed copy for the weight's gradient is those codes moved to the scales of columns, and bf16 is read once.
"""
# ruff: noqa: ANN001, ANN201 - a kernel's arguments are pointers p_ and numbers

from typing import Any, Literal

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from farspan.kernels.define import define, triton_runs

Recipe = Literal["row", "block"]
"""row: a scale for each row. block: one for every 128 numbers of a row, and for 128 x 128 of a weight (DeepSeek-V3)."""

CODES = torch.float8_e4m3fn
SIDE = 128
"""Numbers along the side of a block."""
TILE = {"row": 16, "block": SIDE}
"""Rows are padded to a multiple of so many, as products ask; codes there are 0."""
WIDEST = 16384
"""Numbers of a row that the registers of a program hold."""
WARPS = 4096
"""Warps in all where every program leaves a row behind: as many as an H100 runs at once at 64 registers."""


def scale_ref(amax: Tensor) -> Tensor:
    """The smallest power of two, from 2^-126, with which amax/scale is at most 448; NaN where amax is not finite."""
    bits = amax.float().contiguous().view(torch.int32)
    power = ((bits + 0x1FFFFF) & 0x7F800000) - (8 << 23)  # 448 is 1.75 · 2^8: a mantissa beyond 1.75 takes one more
    return torch.where(amax.isfinite(), power.clamp(min=1 << 23).view(torch.float32), torch.nan)


def rows_ref(x: Tensor, columns: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Codes of rows T' K, their scales T' 1, and on demand `columns_ref` of them, in plain torch."""
    x = F.pad(x.float(), (0, 0, 0, -x.shape[0] % TILE["row"]))
    scale = scale_ref(x.abs().amax(1, keepdim=True))
    values = (x / scale).to(CODES)
    return values, scale, columns_ref(values, scale) if columns else scale.new_empty(0)


def columns_ref(values: Tensor, scale: Tensor) -> Tensor:
    """The largest number of each column, K, of rows' codes in plain torch."""
    size = (values.float() * scale).abs()
    return size.amax(0) if size.numel() else size.new_zeros(size.shape[1])


def transpose_ref(values: Tensor, rows: Tensor | None, columns: Tensor) -> tuple[Tensor, Tensor]:
    """The transpose, codes K T' and scales K 1, of values or of codes times their rows' scales, in plain torch.

    columns: the largest number of each column, K.
    """
    scale = scale_ref(columns)
    numbers = values.float() if rows is None else values.float() * rows
    return (numbers / scale).to(CODES).t().contiguous(), scale[:, None]


def blocks_ref(x: Tensor, side: int, straight: bool, transposed: bool) -> list[Tensor]:
    """Codes and scales of blocks of side x 128 in plain torch, and those of the transpose."""
    x = F.pad(x.float(), (0, 0, 0, -x.shape[0] % TILE["block"]))
    made = []
    for wanted, matrix in ((straight, x), (transposed, x.t())):
        if wanted:
            rows, width = matrix.shape
            cut = matrix.reshape(rows // side, side, width // SIDE, SIDE)
            scale = scale_ref(cut.abs().amax((1, 3)))  # a side of 1 keeps every row, one of 128 makes squares
            codes = (cut / scale[:, None, :, None]).to(CODES).reshape(rows, width).contiguous()
            made += [codes, _laid_out(scale, side)]
    return made


def _laid_out(scale: Tensor, side: int) -> Tensor:
    """Scales of blocks as cuBLAS reads them: strips lie row beside row, squares are padded to fours of blocks."""
    if side == 1:
        return scale.t().contiguous().t()
    return F.pad(scale, (0, -scale.shape[1] % 4))


# What producers call. Their results are codes and scales of rows that they hold in registers.


@triton.jit
def fp8_scale(amax):  # type: ignore[no-untyped-def]
    """`scale_ref` of fp32 numbers."""
    bits = amax.to(tl.int32, bitcast=True)
    power = tl.maximum(((bits + 0x1FFFFF) & 0x7F800000) - 0x4000000, 0x800000)
    return tl.where(amax < float("inf"), power.to(tl.float32, bitcast=True), float("nan"))


@triton.jit
def fp8_inverse(scale):  # type: ignore[no-untyped-def]
    """1 over a power of two, exactly."""
    return (0x7F000000 - scale.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)


@triton.jit
def fp8_rows(x):  # type: ignore[no-untyped-def]
    """Codes b_r b_k and scales b_r of whole rows: x b_r b_k in fp32, 0 beyond the width.

    A kernel that ends in rows stores the codes at `Quantised.values`, the scales at `Quantised.scale` and may leave out
    bf16; its rows are padded to 16, and those beyond the last are stored as of x = 0.
    """
    scale = fp8_scale(tl.max(tl.abs(x), 1))
    return (x * fp8_inverse(scale)[:, None]).to(tl.float8e4nv), scale


# The kernels. Padded counts come as multiples of 16 or 128, so that the compiler knows how stores are aligned.


@triton.jit(do_not_specialize=["rows", "padded", "steps"])
def _rows(  # type: ignore[no-untyped-def]
    p_values,
    p_scale,
    p_columns,
    p_x,
    rows,
    padded,
    width,
    x_row,
    steps,
    columns: tl.constexpr,
    stages: tl.constexpr,
    b_r: tl.constexpr,
    b_k: tl.constexpr,
):
    """A program takes steps · b_r whole rows and, with `columns`, leaves behind the largest number of each column."""
    column, largest = tl.arange(0, b_k), tl.zeros([b_r, b_k], dtype=tl.float32)
    m_column = (column < width)[None, :]
    for i in tl.range(0, steps, num_stages=stages):
        row = (tl.program_id(0).to(tl.int64) * steps + i) * b_r + tl.arange(0, b_r)
        p_from, m_from = p_x + row[:, None] * x_row + column, (row < rows)[:, None] & m_column
        codes, scale = fp8_rows(tl.load(p_from, mask=m_from, other=0.0).to(tl.float32))
        tl.store(p_values + row[:, None] * width + column, codes, mask=(row < padded)[:, None] & m_column)
        tl.store(p_scale + row, scale, mask=row < padded)
        if columns:
            largest = tl.maximum(largest, tl.abs(codes.to(tl.float32)) * scale[:, None])
    if columns:
        p_to = p_columns + tl.program_id(0).to(tl.int64) * width + column
        tl.store(p_to, tl.max(largest, 0), mask=column < width)


@triton.jit(do_not_specialize=["rows", "padded"])
def _wide_rows(p_values, p_scale, p_x, rows, padded, width, x_row, b_k: tl.constexpr):  # type: ignore[no-untyped-def]
    """A row that is too wide for the registers is read twice, the second time from the cache."""
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, b_k)
    p_row, known, amax = p_x + row * x_row, tl.where(row < rows, width, 0), tl.zeros([b_k], dtype=tl.float32)
    for first in range(0, width, b_k):
        x = tl.load(p_row + first + column, mask=column < known - first, other=0.0).to(tl.float32)
        amax = tl.maximum(amax, tl.abs(x))
    scale = fp8_scale(tl.max(amax, 0))
    for first in range(0, width, b_k):
        x = tl.load(p_row + first + column, mask=column < known - first, other=0.0).to(tl.float32)
        codes = (x * fp8_inverse(scale)).to(tl.float8e4nv)
        tl.store(p_values + row * width + first + column, codes, mask=column < width - first)
    tl.store(p_scale + row, scale)


def _launch_rows(x: Tensor, columns: bool) -> tuple[Tensor, Tensor, Tensor]:
    x, (rows, width) = _dense(x), x.shape
    values, scale, largest = codes_shapes(x, columns)
    sizes = (rows, padded := values.shape[0], width, x.stride(0))
    if not values.numel():
        return values, scale, largest.zero_()
    if width > WIDEST:
        _wide_rows[(padded,)](values, scale, x, *sizes, b_k=WIDEST // 2, num_warps=8)
        return values, scale, _launch_columns(values, scale) if columns else largest
    b_k = triton.next_power_of_2(width)
    b_r = min(16, max(1, (8192 if columns else 4096) // b_k))
    warps = max(4, b_r * b_k // (512 if columns else 1024))
    steps = triton.cdiv(padded, WARPS // warps * b_r) if columns else 1
    programs = triton.cdiv(padded, steps * b_r)
    parts = scale.new_empty(programs, width) if columns else scale
    _rows[(programs,)](
        *(values, scale, parts, x, *sizes, steps),
        columns=columns,
        stages=3 if columns else 1,
        b_r=b_r,
        b_k=b_k,
        num_warps=warps,
    )
    return values, scale, parts.amax(0) if columns else largest


@triton.jit(do_not_specialize=["rows", "steps"])
def _columns(p_parts, p_values, p_scale, rows, width, steps, b_t: tl.constexpr, b_k: tl.constexpr):  # type: ignore[no-untyped-def]
    part = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * b_k + tl.arange(0, b_k)
    largest = tl.zeros([b_t, b_k], dtype=tl.float32)
    for i in range(steps):
        row = (part * steps + i) * b_t + tl.arange(0, b_t)
        m_block = (row < rows)[:, None] & (column < width)[None, :]
        x = tl.load(p_values + row[:, None] * width + column, mask=m_block, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(x) * tl.load(p_scale + row, mask=row < rows, other=0.0)[:, None])
    tl.store(p_parts + part * width + column, tl.max(largest, 0), mask=column < width)


def _launch_columns(values: Tensor, scale: Tensor) -> Tensor:
    rows, width = values.shape
    if not values.numel():
        return scale.new_zeros(width)
    tiles = triton.cdiv(width, SIDE)
    steps = triton.cdiv(rows, 32 * triton.cdiv(WARPS // 4, tiles))
    programs = triton.cdiv(rows, 32 * steps)
    parts = scale.new_empty(programs, width)
    _columns[(programs, tiles)](parts, values, scale, rows, width, steps, b_t=32, b_k=SIDE, num_warps=4)
    return parts.amax(0)


@triton.jit
def _four(a, b, c, d):  # type: ignore[no-untyped-def]
    """Codes of four rows that follow each other as one 32-bit number: single bytes would cross the chip one by one."""
    low = a.to(tl.uint8, bitcast=True).to(tl.uint32) | (b.to(tl.uint8, bitcast=True).to(tl.uint32) << 8)
    high = c.to(tl.uint8, bitcast=True).to(tl.uint32) | (d.to(tl.uint8, bitcast=True).to(tl.uint32) << 8)
    return (low | (high << 16)).to(tl.int32, bitcast=True)


@triton.jit
def _moved(p_values, p_rows, row, rows, column, width, values_row, inverse, scaled: tl.constexpr):  # type: ignore[no-untyped-def]
    """Codes of some rows, brought to the scales of their columns."""
    m_block = (row < rows)[:, None] & (column < width)[None, :]
    x = tl.load(p_values + row[:, None] * values_row + column, mask=m_block, other=0.0).to(tl.float32)
    if scaled:
        x *= tl.load(p_rows + row, mask=row < rows, other=0.0)[:, None]
    return (x * inverse).to(tl.float8e4nv)


@triton.jit(do_not_specialize=["sixteens"])
def _transpose(  # type: ignore[no-untyped-def]
    p_fours,
    p_scale,
    p_values,
    p_rows,
    p_columns,
    sixteens,
    width,
    values_row,
    scaled: tl.constexpr,
    b_t: tl.constexpr,
    b_k: tl.constexpr,
):
    four = tl.program_id(0).to(tl.int64) * b_t + tl.arange(0, b_t)
    column = tl.program_id(1).to(tl.int64) * b_k + tl.arange(0, b_k)
    row, rows = four * 4, sixteens * 16
    scale = fp8_scale(tl.load(p_columns + column, mask=column < width, other=0.0))
    inverse = fp8_inverse(scale)[None, :]
    a = _moved(p_values, p_rows, row, rows, column, width, values_row, inverse, scaled)
    b = _moved(p_values, p_rows, row + 1, rows, column, width, values_row, inverse, scaled)
    c = _moved(p_values, p_rows, row + 2, rows, column, width, values_row, inverse, scaled)
    d = _moved(p_values, p_rows, row + 3, rows, column, width, values_row, inverse, scaled)
    p_to = p_fours + four[:, None] + column[None, :] * (sixteens * 4)
    tl.store(p_to, _four(a, b, c, d), mask=(four < sixteens * 4)[:, None] & (column < width)[None, :])
    if tl.program_id(0) == 0:
        tl.store(p_scale + column, scale, mask=column < width)


def _launch_transpose(values: Tensor, rows: Tensor | None, columns: Tensor) -> tuple[Tensor, Tensor]:
    values, (count, width) = _dense(values), values.shape
    transposed, scale = _transpose_shapes(values, rows, columns)
    if values.numel():
        fours = transposed.view(torch.int32)
        _transpose[(triton.cdiv(count, SIDE), triton.cdiv(width, SIDE))](
            *(fours, scale, values, columns if rows is None else rows, columns, count // 16, width, values.stride(0)),
            scaled=rows is not None,
            b_t=SIDE // 4,
            b_k=SIDE,
            num_warps=8,
        )
    else:
        scale.copy_(scale_ref(columns)[:, None])
    return transposed, scale


@triton.jit
def _loaded(p_x, row, rows, column, x_row):  # type: ignore[no-untyped-def]
    return tl.load(p_x + row[:, None] * x_row + column, mask=(row < rows)[:, None], other=0.0).to(tl.float32)


@triton.jit
def _strips(p_values, p_scale, x, row, column, width):  # type: ignore[no-untyped-def]
    codes, scale = fp8_rows(x)
    tl.store(p_scale + row, scale)
    tl.store(p_values + row[:, None] * width + column, codes)


@triton.jit(do_not_specialize=["rows", "blocks"])
def _blocks(  # type: ignore[no-untyped-def]
    p_values,
    p_scale,
    p_fours,
    p_transposed_scale,
    p_x,
    rows,
    blocks,
    width,
    x_row,
    pitch,
    transposed_pitch,
    square: tl.constexpr,
    straight: tl.constexpr,
    transposed: tl.constexpr,
    side: tl.constexpr,
):
    here, there = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    four, column = here * (side // 4) + tl.arange(0, side // 4), there * side + tl.arange(0, side)
    row = four * 4
    a, b = _loaded(p_x, row, rows, column, x_row), _loaded(p_x, row + 1, rows, column, x_row)
    c, d = _loaded(p_x, row + 2, rows, column, x_row), _loaded(p_x, row + 3, rows, column, x_row)
    if straight and not square:
        p_scale += there * (blocks * side)
        _strips(p_values, p_scale, a, row, column, width)
        _strips(p_values, p_scale, b, row + 1, column, width)
        _strips(p_values, p_scale, c, row + 2, column, width)
        _strips(p_values, p_scale, d, row + 3, column, width)
    if transposed or square:
        size = tl.maximum(tl.maximum(tl.abs(a), tl.abs(b)), tl.maximum(tl.abs(c), tl.abs(d)))
        amax = tl.max(size, 0)
        if square:
            amax = tl.max(amax, 0)
        scale = fp8_scale(amax)
        inverse = fp8_inverse(scale)
        if not square:
            inverse = inverse[None, :]
        a, b = (a * inverse).to(tl.float8e4nv), (b * inverse).to(tl.float8e4nv)
        c, d = (c * inverse).to(tl.float8e4nv), (d * inverse).to(tl.float8e4nv)
        if straight and square:
            p_to = p_values + row[:, None] * width + column
            tl.store(p_scale + here * pitch + there, scale)
            tl.store(p_to, a)
            tl.store(p_to + width, b)
            tl.store(p_to + 2 * width, c)
            tl.store(p_to + 3 * width, d)
        if transposed:
            if square:
                tl.store(p_transposed_scale + there * transposed_pitch + here, scale)
            else:
                tl.store(p_transposed_scale + here * width + column, scale)
            tl.store(p_fours + four[:, None] + column[None, :] * (blocks * (side // 4)), _four(a, b, c, d))


def _launch_blocks(x: Tensor, side: int, straight: bool, transposed: bool) -> list[Tensor]:
    if side == SIDE and straight and transposed:  # stored by one program, Triton 3.6 mixes the two up
        return [*_launch_blocks(x, side, True, False), *_launch_blocks(x, side, False, True)]
    x, made = _dense(x), _blocks_shapes(x, side, straight, transposed)
    if side == SIDE:
        for scale in made[1::2]:
            scale.zero_()  # the fourths that no block fills are read as well
    rows, width = x.shape
    blocks = _padded(rows, "block") // SIDE
    if x.numel():
        (values, scale), (across, across_scale) = made[:2], made[-2:]
        _blocks[(blocks, width // SIDE)](
            *(values, scale, across.view(torch.int32) if transposed else across, across_scale),
            *(x, rows, blocks, width, x.stride(0), scale.stride(0), across_scale.stride(0)),
            square=side == SIDE,
            straight=straight,
            transposed=transposed,
            side=SIDE,
            num_warps=8,
        )
    return made


def _padded(rows: int, recipe: Recipe) -> int:
    return -(-rows // TILE[recipe]) * TILE[recipe]


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def codes_shapes(x: Tensor, columns: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Of x ... K: codes of its rows T' K, their scales T' 1, and room for the largest of each column, K or 0."""
    width = x.shape[-1]
    padded = _padded(x.shape[:-1].numel(), "row")
    scale = x.new_empty(padded, 1, dtype=torch.float32)
    return x.new_empty(padded, width, dtype=CODES), scale, scale.new_empty(width if columns else 0)


def _columns_shapes(values: Tensor, scale: Tensor) -> Tensor:
    return scale.new_empty(values.shape[1])


def _transpose_shapes(values: Tensor, rows: Tensor | None, columns: Tensor) -> tuple[Tensor, Tensor]:
    return values.new_empty(values.shape[1], values.shape[0], dtype=CODES), columns.new_empty(values.shape[1], 1)


def _blocks_shapes(x: Tensor, side: int, straight: bool, transposed: bool) -> list[Tensor]:
    size, made = (_padded(x.shape[0], "block"), x.shape[1]), []
    for wanted, (rows, width) in ((straight, size), (transposed, size[::-1])):
        if wanted:
            strips = x.new_empty(width // SIDE, rows, dtype=torch.float32).t()
            squares = (rows // SIDE, -(-width // SIDE // 4) * 4)
            scale = strips if side == 1 else x.new_empty(squares, dtype=torch.float32)
            made += [x.new_empty(rows, width, dtype=CODES), scale]
    return made


def _either(ref: Any, launch: Any) -> Any:
    """What an operator runs: the kernel where kernels run, else the twin."""
    return lambda x, *rest: launch(x, *rest) if triton_runs(x) else ref(x, *rest)


ROWS = define(
    "fp8_rows(Tensor x, bool columns) -> (Tensor, Tensor, Tensor)", _either(rows_ref, _launch_rows), codes_shapes
)
COLUMNS = define(
    "fp8_columns(Tensor values, Tensor scale) -> Tensor", _either(columns_ref, _launch_columns), _columns_shapes
)
TRANSPOSE = define(
    "fp8_transpose(Tensor values, Tensor? rows, Tensor columns) -> (Tensor, Tensor)",
    _either(transpose_ref, _launch_transpose),
    _transpose_shapes,
)
BLOCKS = define(
    "fp8_blocks(Tensor x, int side, bool straight, bool transposed) -> Tensor[]",
    _either(blocks_ref, _launch_blocks),
    _blocks_shapes,
)
