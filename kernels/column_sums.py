"""A few programs walk over many rows and keep sums of their columns; the sums of all are added in a fixed order."""
# ruff: noqa: ANN001, ANN201 - a kernel's arguments are pointers p_ and numbers

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

SHARED = 200 * 1024
"""Bytes of shared memory, of 227 KB an SM on Hopper, that tiles on their way may take."""


@dataclass(frozen=True, kw_only=True)
class Pace:
    """What of a kernel's walk over rows is found by measurement."""

    tile: int
    """Entries of a tile: at least so many, else as many as a row has."""
    lanes: int
    """Entries of a tile that a thread holds, as long as 16 warps can: registers a thread against threads a program."""
    resident: int
    """Entries that all programs of an SM work on at once: what its registers hold of this kernel."""
    ahead: int = 3
    """Tiles in a program's shared memory, at most: the one whose turn it is and those on their way."""


@dataclass(frozen=True)
class Walk:
    """How a kernel goes over rows: tiles of b_r rows and b_d columns, one after the other in each program."""

    b_r: int
    b_d: int
    warps: int
    stages: int
    """Of tl.range: one more than the tiles in shared memory; 1: loads go straight to registers."""
    slots: int
    """Programs that run at the same time."""


@cache
def walk(pace: Pace, width: int, entry: int, device: torch.device) -> Walk:
    """The walk over rows of `width` columns, where the tiles of a round take `entry` bytes of loads for each entry.

    Tiles are copied to shared memory ahead of their turn, so that bytes in flight cost no registers: an H100 wants
    about 40 KB in flight on every SM. Nothing here depends on how many rows there are: a new count compiles nothing.
    """
    b_d = max(16, triton.next_power_of_2(width))
    b_r = max(1, min(128, pace.tile // b_d))
    warps = max(4, min(16, b_r * b_d // (32 * pace.lanes)))
    programs = max(1, pace.resident // (b_r * b_d))
    ahead = min(pace.ahead, SHARED // (programs * b_r * b_d * entry))
    return Walk(b_r, b_d, warps, ahead + 1, programs * _multiprocessors(device))


@cache
def _multiprocessors(device: torch.device) -> int:
    # Interpreted programs run one after the other: one would do, two show that sums are joined.
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


@triton.jit
def vector(p_vector, b_r: tl.constexpr, b_d: tl.constexpr, width: tl.constexpr, first=0):  # type: ignore[no-untyped-def]
    """1 b_d entries from `first` on, in fp32, laid out over the threads as tiles of b_r b_d are.

    Loaded as a vector they would lie otherwise, and the compiler then moves whole tiles instead, in every round.
    """
    row, column = tl.arange(0, b_r)[:, None], first + tl.arange(0, b_d)[None, :]
    tile = tl.load(p_vector + row * 0 + column, mask=(row == 0) & (column < width), other=0.0)
    return tl.sum(tile.to(tl.float32), 0)[None, :]


@triton.jit
def store_sums(p_sums, tile, b_d: tl.constexpr, width: tl.constexpr, first=0):  # type: ignore[no-untyped-def]
    """Writes what the columns of a tile sum to, from column `first` on."""
    column = first + tl.arange(0, b_d)
    tl.store(p_sums + column, tl.sum(tile, 0), mask=column < width)


@triton.jit
def store_largest(p_largest, tile, b_d: tl.constexpr, width: tl.constexpr):  # type: ignore[no-untyped-def]
    """Writes the largest number of each column of a tile."""
    column = tl.arange(0, b_d)
    tl.store(p_largest + column, tl.max(tile, 0), mask=column < width)


def column_sums(parts: Tensor, totals: Sequence[Tensor]) -> None:
    """totals[k] = the sum of parts[k] over P, always in the same order: parts K G P D fp32, at most three totals G D.

    The totals are dense and of any float types; P is at least 1.
    """
    _, groups, count, width = parts.shape
    # Few parts are summed by narrow programs that take many columns, many by wide ones.
    b_p, b_d = (16, 256) if count <= 16 else (128, 32)
    grid = (len(totals) * groups * -(-width // b_d),)  # triton.cdiv takes as long as a launch's arguments
    first, second, third = (*totals, None, None)[:3]
    _column_sums[grid](parts, first, second, third, groups, count, width, b_p=b_p, b_d=b_d, num_warps=4)


@triton.jit(do_not_specialize=["groups", "count"])
def _column_sums(  # type: ignore[no-untyped-def]
    p_parts,
    p_first,
    p_second,
    p_third,
    groups,
    count,
    width,
    b_p: tl.constexpr,
    b_d: tl.constexpr,
):
    blocks = tl.cdiv(width, b_d)
    place = (tl.program_id(0) // blocks).to(tl.int64)
    column = (tl.program_id(0) % blocks) * b_d + tl.arange(0, b_d)
    m_column = column < width
    total = tl.zeros((b_p, b_d), tl.float32)
    for start in tl.range(0, count, b_p, num_stages=4):
        part = start + tl.arange(0, b_p)
        p_part = p_parts + (place * count + part)[:, None] * width + column[None, :]
        total += tl.load(p_part, mask=(part < count)[:, None] & m_column[None, :], other=0.0)
    found = tl.sum(total, 0)
    at = (place % groups) * width + column
    if place < groups:
        tl.store(p_first + at, found.to(p_first.dtype.element_ty), mask=m_column)
    elif place < 2 * groups:
        if p_second is not None:
            tl.store(p_second + at, found.to(p_second.dtype.element_ty), mask=m_column)
    elif p_third is not None:
        tl.store(p_third + at, found.to(p_third.dtype.element_ty), mask=m_column)
