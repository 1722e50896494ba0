"""8-bit codes for the moments of Adam: dynamic exponent, seven decades below a block's maximum.

The values are those of "8-bit Optimizers via Block-wise Quantization" (Dettmers et al., 2022) but for the ends: decade
d of 0..6 has n equal cells between 10^(d−7) and 10^(d−6), n = 2^d for signed codes and 2^(d+1) for unsigned ones, and a
code stands for the middle of its cell. Signed codes are a sign and seven bits, so that −1 exists as 1 does: the
published map has none, and a negative maximum shrinks by 0.7 % with every step. An unsigned code is never zero (code 0
stands for 5.5e-8 of the maximum): a second moment of zero would make a step of first/eps.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

TINY = tl.constexpr(1e-30)
"""The smallest scale of a block that is stored: its reciprocal stays finite."""

_UP = tl.constexpr(12582912.0)
"""1.5 · 2²³: added to a small number, it leaves the nearest integer in the low bits."""
_SIGNED, _UNSIGNED = tl.constexpr(0.501), tl.constexpr(1.499)
"""Where the lines of codes begin below their cells' numbers. A thousandth from a half, so that a block's maximum, half
way between two codes, gets 127, and 255: no code needs to be cut off there. Unsigned codes count from 0 as cells do."""
# Of `between`, whose lines all begin a thousandth too high, as `_UNSIGNED` has it: what they have in common with
# `nearest` is then one line.
_BEFORE = tl.constexpr(1.499 / 2)
_GAP = tl.constexpr(0.499 * 11 / 6 + 0.001)
_GAP_BEFORE = tl.constexpr(0.2505 * 11 / 6 - 0.001)
_LAST = tl.constexpr(2 * 128 / 0.9)
"""The slope of the last step, half a cell wide."""
_CELLS = tl.constexpr(512)
"""Where the cells begin in `tables`: behind what signed and unsigned codes stand for."""
_BOTTOM = tl.constexpr(1.501)
"""Where the line begins of unsigned numbers below 2^-24, all of code 0: it is level, at a thousandth of a code."""


def values(signed: bool) -> list[float]:
    """What the 256 codes stand for: signed ones are 0..127 and then their negatives, unsigned ones grow."""
    magnitudes = [0.0] if signed else [5.5e-8]
    for decade in range(7):
        n = 2**decade if signed else 2 ** (decade + 1)
        magnitudes += [10.0 ** (decade - 6) * (0.1 + 0.9 * (j + 0.5) / n) for j in range(n)]
    top = 127 if signed else 255
    magnitudes = [*magnitudes[:top], 1.0]
    return magnitudes + [-value for value in magnitudes] if signed else magnitudes


def _cells(signed: bool) -> list[float]:
    """For numbers y of each binary exponent (as fp32 stores it, 0..127) the line on which codes grow with y.

    In a decade of n cells y lies n/0.9 · 10^(6−d) y + 8/9 n above the decade's first number less n. Given are, of each
    exponent in turn, the slope and where the line begins, 8/9 n less `_SIGNED` or `_UNSIGNED`, of the decade that the
    largest y is in. Where an exponent holds the end of a decade, some y are of the one before, where codes grow five
    times as fast: lines only ever bend down, so the lower one holds.
    """
    below = (_SIGNED if signed else _UNSIGNED).value
    highest = [2.0 ** (exponent - 126) for exponent in range(127)] + [1.0]
    decades = [next(d for d in range(7) if 10.0 ** (d - 6) >= y or d == 6) for y in highest]
    cells = [2.0**d if signed else 2.0 ** (d + 1) for d in decades]
    lines = [(n / 0.9 * 10.0 ** (6 - d), n * 8 / 9 - below) for n, d in zip(cells, decades, strict=True)]
    if not signed:
        lines = [(0.0, _BOTTOM.value) if y <= 2.0**-24 else line for y, line in zip(highest, lines, strict=True)]
    return [number for line in lines for number in line]


@cache
def tables(device: torch.device) -> Tensor:
    """`values` of signed and of unsigned codes, then the cells of both: fp32, 4 KB."""
    told = values(True) + values(False) + _cells(True) + _cells(False)
    return torch.tensor(told, dtype=torch.float64).float().to(device)


def decode(codes: Tensor, scales: Tensor, block: int, *, signed: bool) -> Tensor:
    """codes: uint8 ... N, scales: fp32 ... N/block -> fp32 ... N."""
    parts = tables(codes.device)[codes.int() + (0 if signed else 256)].unflatten(-1, (-1, block))
    return (parts * scales.unsqueeze(-1)).flatten(-2)


def encode(x: Tensor, block: int, *, signed: bool, random: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x: fp32 ... N -> codes uint8 ... N and scales fp32 ... N/block, a block's largest magnitude.

    random: 32-bit numbers like x (int64), of which 12 bits round up or down so that the mean is x; None: the nearest
    cell. Chance is for unsigned codes alone.
    """
    parts = x.unflatten(-1, (-1, block))
    scales = parts.abs().amax(-1).clamp(min=TINY.value)
    y = (parts.abs() * (1 / scales).unsqueeze(-1)).flatten(-2)
    if random is None:
        place = place_of(y, signed=signed)
    else:
        place = between_codes(y) + ((random & 0xFFF0 | 8).float() * 2.0**-16 - 0.5)
    code = place.round().to(torch.uint8)
    return (code + 128 * (x < 0).to(torch.uint8) if signed else code), scales


def _line(y: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """Of `_cells`: where the line begins, and where it is at y."""
    at = 2 * (y.view(torch.int32) >> 23) + (_CELLS.value if signed else _CELLS.value + 256)
    slope, begin = tables(y.device)[at], tables(y.device)[at + 1]
    return begin, slope * y + begin


def place_of(y: Tensor, *, signed: bool) -> Tensor:
    """The code of y in [0, 1] as a real number, of which the nearest integer is the cell that y is in."""
    begin, here = _line(y, signed)
    return torch.minimum(here, 5 * here - (4.5 * begin + (_SIGNED if signed else _UNSIGNED).value / 2))


def between_codes(y: Tensor) -> Tensor:
    """The unsigned code of y in [0, 1] as a real number, linear in y between what neighbouring codes stand for.

    Middles of cells lie on a line within a decade, and between two decades on another, of a third of the former's
    slope; the lowest of all lines holds, but for the last step, from the last middle to 1.
    """
    begin, here = _line(y, False)
    lines = torch.minimum(here, 5 * here - (4.5 * begin + _BEFORE.value))
    gaps = torch.minimum(here / 3 + (1.5 * begin + _GAP.value), here * (5 / 3) - (0.75 * begin + _GAP_BEFORE.value))
    last = _LAST.value * y + (255.001 - _LAST.value)
    return torch.maximum(torch.minimum(lines, gaps), last) - 0.001


@triton.jit
def meaning(code, p_tables, SIGNED: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201, N803
    """What a code stands for, of a block of scale 1."""
    return tl.load(p_tables + code.to(tl.int32) + (0 if SIGNED else 256))


@triton.jit
def _line_at(y, p_tables, SIGNED: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001, N803
    lines = (p_tables + (_CELLS if SIGNED else _CELLS + 256)).to(tl.pointer_type(tl.int64))  # both numbers at once
    line = tl.load(lines + (y.to(tl.int32, bitcast=True) >> 23))
    begin = (line >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    return begin, line.to(tl.int32).to(tl.float32, bitcast=True) * y + begin


@triton.jit
def nearest(y, p_tables):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    """The unsigned code of the cell that y in [0, 1] is in, int32: `place_of`, rounded."""
    begin, here = _line_at(y, p_tables, False)
    place = tl.minimum(here, 5 * here - (4.5 * begin + _UNSIGNED / 2))
    return (place + _UP).to(tl.int32, bitcast=True) & 0xFF


@triton.jit
def signed_nearest(x, reciprocal, p_tables):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    """The signed code of x · reciprocal in [-1, 1], int32."""
    begin, here = _line_at(tl.abs(x) * reciprocal, p_tables, True)
    place = tl.minimum(here, 5 * here - (4.5 * begin + _SIGNED / 2))
    sign = (x.to(tl.int32, bitcast=True) >> 24) & 0x80
    return ((place + _UP).to(tl.int32, bitcast=True) | sign) & 0xFF


@triton.jit
def between(y, random, p_tables):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    """One of the two unsigned codes next to y in [0, 1], by 12 bits of random (uint32): `between_codes`."""
    begin, here = _line_at(y, p_tables, False)
    lines = tl.minimum(here, 5 * here - (4.5 * begin + _BEFORE))
    gaps = tl.minimum(here * (1 / 3) + (1.5 * begin + _GAP), here * (5 / 3) - (0.75 * begin + _GAP_BEFORE))
    place = tl.maximum(tl.minimum(lines, gaps), _LAST * y + (255.001 - _LAST))
    # 2²³ and 12 random bits, in the middle between 0 and 2¹⁶: so far from either end that no rounding of a place makes
    # a code of more than 255.
    drawn = ((random & 0xFFF0).to(tl.int32) | 0x4B000008).to(tl.float32, bitcast=True)
    return (place + (drawn * 2.0**-16 - 128.501) + _UP).to(tl.int32, bitcast=True) & 0xFF
