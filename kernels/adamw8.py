"""AdamW whose moments are 8-bit codes, in one pass over many weights: decode, clip, update, decay, encode, round.

The update is that of Loshchilov and Hutter (2019) in torch.optim.AdamW's order, decay first; codes are those of
`codes8`, weights those of `master`. One launch serves all weights that are stored alike: it reads where they lie from a
table, and its rates, bias corrections, clipping and skipping from device memory, so it may be captured in a CUDA graph.
"""
# ruff: noqa: ANN001 - a kernel's arguments are pointers p_ and numbers

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from farspan.kernels import codes8
from farspan.kernels.define import triton_runs
from farspan.kernels.master import RESIDUALS, Master, draws, join, rest, rounded, split, whole
from farspan.kernels.random import keyed_bits, keyed_bits_from, step_bits, step_keys

TILE = 1024
"""Elements that a program updates at once: 8 a thread, one 128-bit load of bf16."""
TURNS = 8
"""Tiles of one program, one after the other."""
WARPS = 4


@dataclass(frozen=True)
class Place:
    """Where a rank's block of a weight lies in the whole."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]
    """Of the whole."""

    def index(self, block: tuple[int, ...], device: torch.device) -> Tensor:
        """The row-major index in the whole of each element of the block, int64."""
        index = torch.zeros((), dtype=torch.int64, device=device)
        for axis, size in enumerate(block):
            here = torch.arange(self.offset[axis], self.offset[axis] + size, device=device)
            index = index.unsqueeze(-1) + here * prod(self.shape[axis + 1 :])
        return index

    def strides(self, block: tuple[int, ...]) -> tuple[int, int, int, int, int]:
        """How the flat place in a dense block gives the index: first, columns, rows, and steps of planes and of rows.

        index = first + (r // rows) · planes' step + (r % rows) · rows' step + c, for row r and column c of the block.
        """
        first = sum(o * prod(self.shape[axis + 1 :]) for axis, o in enumerate(self.offset))
        if len(block) < 2:
            return first, max(1, prod(block)), 1, 0, 0
        whole = [axis for axis in range(1, len(block) - 1) if block[axis] == self.shape[axis]]
        cut = next((axis for axis in range(1, len(block) - 1) if axis not in whole), 1)
        if any(axis not in whole for axis in range(1, len(block) - 1) if axis != cut):
            raise ValueError(f"a weight {self.shape} cut to {block}: only its first axis, one more and its last may")
        # What lies before the second cut axis is whole but for the first, and counts planes as that does.
        return first, block[-1], prod(block[cut:-1]), prod(self.shape[cut:]), self.shape[-1]


@dataclass(frozen=True)
class Part:
    """A rank's block of one weight and of its state: dense tensors of one shape, on one device."""

    weight: Tensor
    """fp32, or bf16."""
    first: Tensor
    """First moment: uint8 codes, or fp32."""
    second: Tensor
    place: Place
    key: int
    """Of the weight's own randomness."""
    decays: bool
    residual: Tensor | None = None
    """int8 or int16 beside a bf16 weight; None: the weight is all there is."""
    first_scales: Tensor | None = None
    """fp32, one for each block of the last axis; None: moments are fp32."""
    second_scales: Tensor | None = None

    @property
    def block(self) -> int:
        """Codes that share a scale; 0: moments are fp32."""
        if self.first_scales is None:
            return 0
        return int(self.first.shape[-1] // max(1, self.first_scales.shape[-1]))

    @property
    def master(self) -> Master:
        if self.weight.dtype == torch.float32:
            return "fp32"
        found: dict[torch.dtype, Master] = {dtype: name for name, dtype in RESIDUALS.items()}
        return "none" if self.residual is None else found[self.residual.dtype]

    @property
    def cut(self) -> bool:
        """Whether the block is more than a run of rows of the whole."""
        return self.weight.dim() > 1 and tuple(self.weight.shape[1:]) != self.place.shape[1:]


@dataclass(frozen=True)
class Adam:
    """What all weights of an update share."""

    betas: tuple[float, float]
    eps: float
    weight_decay: float
    stochastic: bool
    """Whether codes of the second moment are rounded by chance: from β₂ = 0.99 on a step changes it by less than the
    spacing of codes, and what is rounded to the nearest would stay where it is."""

    def numbers(self, steps: Tensor, rate: float | Tensor, scale: Tensor) -> Tensor:
        """Counts the step, unless scale is 0, and gives what the kernel reads: fp32, 6, on the device of steps.

        steps: fp64 scalar, updates made so far. In turn: the gradient's share of the first moment, its square's of the
        second, rate over the first bias correction, one over the second's root, what decay leaves, and the number of
        the step, 0 to skip it.
        """
        go = scale != 0
        steps += go
        powers = 1 - torch.pow(_on(steps.device, *self.betas), steps)
        decay = torch.ones_like(steps) - rate * self.weight_decay  # a tensor made of the rate would wait for the device
        scale = scale.to(steps.dtype).view(())
        shares = scale * (1 - self.betas[0]), scale * scale * (1 - self.betas[1])
        found = [*shares, rate / powers[0], powers[1].rsqrt(), decay.view(()), steps * go]
        return torch.stack(found).float()


@cache
def _on(device: torch.device, *numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64, device=device)


class Update:
    """The weights of one update, kept in groups that are stored alike; each group is one launch."""

    def __init__(self, parts: Sequence[Part], adam: Adam) -> None:
        self.adam = adam
        groups: dict[Any, list[int]] = {}
        for i, part in enumerate(parts):
            if part.weight.numel():
                stochastic = part.block > 0 and adam.stochastic
                random = stochastic or draws(part.master)
                groups.setdefault((part.master, part.block, stochastic, random and part.cut), []).append(i)
        self._groups = [_Group([parts[i] for i in of], of, adam, k[2], k[3]) for k, of in groups.items()]

    @torch.no_grad()
    def __call__(self, gradients: Sequence[Tensor], numbers: Tensor) -> None:
        """Updates every part by its gradient (dense, bf16 or fp32, in the order of the parts); `numbers`: of `Adam`."""
        for group in self._groups:
            group.update([gradients[i] for i in group.which], numbers)


def update_ref(part: Part, gradient: Tensor, numbers: Tensor, adam: Adam) -> None:
    """One part of an `Update` in plain torch: the specification."""
    first_share, second_share, rate, root, keep, step = numbers.tolist()
    if step == 0:
        return
    coded, gradient = part.block > 0, gradient.float()
    random = None
    if draws(part.master) or (coded and adam.stochastic):
        random = step_bits(part.place.index(tuple(part.weight.shape), part.weight.device), part.key, int(step))
    first, second = part.first, part.second
    if coded:
        assert part.first_scales is not None and part.second_scales is not None
        first = codes8.decode(first, part.first_scales, part.block, signed=True)
        second = codes8.decode(second, part.second_scales, part.block, signed=False)
    first = first * adam.betas[0] + gradient * first_share
    second = second * adam.betas[1] + gradient * gradient * second_share
    wanted = whole(part.weight, part.residual) * (keep if part.decays else 1.0)
    split(wanted - rate * first / (second.sqrt() * root + adam.eps), part.weight, part.residual, random)
    if not coded:
        part.first.copy_(first)
        part.second.copy_(second)
        return
    codes, scales = codes8.encode(first, part.block, signed=True)
    part.first.copy_(codes)
    part.first_scales.copy_(scales)  # type: ignore[union-attr]
    codes, scales = codes8.encode(second, part.block, signed=False, random=random if adam.stochastic else None)
    part.second.copy_(codes)
    part.second_scales.copy_(scales)  # type: ignore[union-attr]


_POINTERS = ("weight", "residual", "first", "second", "first_scales", "second_scales")
_COLUMNS = 16
"""Numbers a weight has in the table: the pointers above, elements, decays, key low, key high, the strides of Place."""


class _Group:
    """Weights stored alike, and the tables that tell one launch where they are."""

    def __init__(self, parts: list[Part], which: list[int], adam: Adam, stochastic: bool, cut: bool) -> None:
        self.parts, self.which, self.adam, self.stochastic, self.cut = parts, which, adam, stochastic, cut
        self._known: tuple[int, ...] = ()
        for part in parts:
            for name in _POINTERS:
                tensor = getattr(part, name)
                if tensor is not None and not tensor.is_contiguous():
                    raise ValueError(f"{name} {tuple(tensor.shape)} of strides {tensor.stride()}: must be dense")
        if triton_runs(parts[0].weight):
            self._tabulate()

    def update(self, gradients: list[Tensor], numbers: Tensor) -> None:
        if not triton_runs(self.parts[0].weight):
            for part, gradient in zip(self.parts, gradients, strict=True):
                update_ref(part, gradient, numbers, self.adam)
            return
        self.point(gradients)
        self._launch(gradients[0].dtype, numbers)

    def point(self, gradients: list[Tensor]) -> None:
        """Tells the device where the gradients lie, if they have moved since the last update."""
        pointers = tuple(gradient.data_ptr() for gradient in gradients)
        if pointers == self._known:
            return
        loose = [tuple(gradient.shape) for gradient in gradients if not gradient.is_contiguous()]
        if loose or len({gradient.dtype for gradient in gradients}) > 1:
            raise ValueError(f"gradients: must be dense and of one type; {loose or 'several types'} are not")
        device = self.parts[0].weight.device
        told = torch.tensor(pointers, dtype=torch.int64, pin_memory=device.type == "cuda")
        self._gradients = told.to(device, non_blocking=True)
        self._known, self._dense = pointers, all(pointer % 16 == 0 for pointer in pointers)

    def _tabulate(self) -> None:
        rows, chunks = [], []
        for i, part in enumerate(self.parts):
            tensors = [getattr(part, name) for name in _POINTERS]
            pointers = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
            shape = tuple(part.weight.shape)
            numbers = [part.weight.numel(), part.decays, part.key & 0xFFFFFFFF, part.key >> 32]
            rows.append([*pointers, *numbers, *part.place.strides(shape), 0])
            chunks += [[i, turn] for turn in range(-(-part.weight.numel() // (TILE * TURNS)))]
        device = self.parts[0].weight.device
        self._table = torch.tensor(rows, dtype=torch.int64).to(device)
        self._chunks = torch.tensor(chunks, dtype=torch.int32).to(device)
        self._aligned = all(p % 16 == 0 for row in rows for p in row[: len(_POINTERS)])
        self._even = all(row[len(_POINTERS)] % 16 == 0 for row in rows)

    def _launch(self, gradient: torch.dtype, numbers: Tensor) -> None:
        part, adam = self.parts[0], self.adam
        _update[(len(self._chunks),)](
            self._table,
            self._chunks,
            self._gradients,
            numbers,
            codes8.tables(numbers.device),
            adam.betas[0],
            adam.betas[1],
            adam.eps,
            wide=gradient == torch.float32,
            master=part.master,
            block=part.block,
            stochastic=self.stochastic,
            cut=self.cut,
            aligned=self._aligned and self._dense,
            even=self._even,
            columns=_COLUMNS,
            tile=TILE,
            turns=TURNS,
            num_warps=WARPS,
        )


@triton.jit
def _pointer(p_table, kind: tl.constexpr, aligned: tl.constexpr):  # type: ignore[no-untyped-def]
    address = tl.load(p_table).to(tl.pointer_type(kind))
    if aligned:  # else the compiler must load and store element by element
        address = tl.multiple_of(address, 16)
    return address


@triton.jit
def _spread(x, span: tl.constexpr):  # type: ignore[no-untyped-def]
    """Each entry span times."""
    return tl.reshape(tl.broadcast_to(x[:, None], (x.shape[0], span)), (x.shape[0] * span,))


@triton.jit
def _update(  # type: ignore[no-untyped-def]
    p_table,
    p_chunks,
    p_gradients,
    p_numbers,
    p_tables,
    beta1,
    beta2,
    eps,
    wide: tl.constexpr,
    master: tl.constexpr,
    block: tl.constexpr,
    stochastic: tl.constexpr,
    cut: tl.constexpr,
    aligned: tl.constexpr,
    even: tl.constexpr,
    columns: tl.constexpr,
    tile: tl.constexpr,
    turns: tl.constexpr,
):
    chunk = p_chunks + 2 * tl.program_id(0)
    which, turn = tl.load(chunk), tl.load(chunk + 1)
    row = p_table + columns * which
    first_share, second_share, rate = tl.load(p_numbers), tl.load(p_numbers + 1), tl.load(p_numbers + 2)
    root, keep, step = tl.load(p_numbers + 3), tl.load(p_numbers + 4), tl.load(p_numbers + 5)
    size = tl.load(row + 6)
    decays = tl.load(row + 7)
    p_gradient = _pointer(p_gradients + which, tl.float32 if wide else tl.bfloat16, aligned)
    p_weight = _pointer(row, tl.float32 if master == "fp32" else tl.bfloat16, aligned)
    p_residual = _pointer(row + 1, tl.int16 if master == "residual16" else tl.int8, aligned)
    p_first = _pointer(row + 2, tl.uint8 if block else tl.float32, aligned)
    p_second = _pointer(row + 3, tl.uint8 if block else tl.float32, aligned)
    p_first_scales = _pointer(row + 4, tl.float32, False)
    p_second_scales = _pointer(row + 5, tl.float32, False)
    size = tl.where(step != 0, size, 0)  # a skipped step: nothing of its gradient is even looked at
    if even:
        size = tl.multiple_of(size, 16)
    keep = tl.where(decays != 0, keep, 1.0)
    kept: tl.constexpr = master == "residual8" or master == "residual16"
    drawn: tl.constexpr = master == "residual8" or master == "none"
    span: tl.constexpr = block if block else 256
    lines: tl.constexpr = tile // span
    if stochastic or drawn:
        before, after = step_keys(tl.load(row + 8), tl.load(row + 9), step)
        origin = tl.load(row + 10)
    for i in range(turns):
        start = (turn.to(tl.int64) * turns + i) * tile
        at = tl.max_contiguous(start + tl.arange(0, tile), 8)  # alike for all types: else tiles change their layout
        line = start // span + tl.arange(0, lines)
        live, there = at < size, line * span < size
        gradient = tl.load(p_gradient + at, live, 0.0).to(tl.float32)
        weight = tl.load(p_weight + at, live, 0.0)
        held = 0
        if kept:
            held = tl.load(p_residual + at, live, 0)
        first, second = tl.load(p_first + at, live, 0), tl.load(p_second + at, live, 0)
        if block:
            first_scale = tl.load(p_first_scales + line, there, 0.0)
            second_scale = tl.load(p_second_scales + line, there, 0.0)
            first, second = codes8.meaning(first, p_tables, True), codes8.meaning(second, p_tables, False)
            first = first * _spread(first_scale * beta1, span) + gradient * first_share
            second = second * _spread(second_scale * beta2, span) + gradient * gradient * second_share
        else:
            first = first * beta1 + gradient * first_share
            second = second * beta2 + gradient * gradient * second_share
        wanted = join(weight, held, master) * keep
        slowness = tl.sqrt(second) * root + eps
        wanted -= rate * first * tl.rsqrt(slowness * slowness)  # a quotient takes six instructions more
        random = tl.zeros((1,), tl.uint32)
        if stochastic or drawn:
            if cut:
                width, rows = tl.load(row + 11), tl.load(row + 12)
                planes, steps = tl.load(row + 13), tl.load(row + 14)
                of = ((line * span if block else at) // width).to(tl.int32)  # a block of codes lies in one row
                plane = of // rows.to(tl.int32)
                base = plane * planes + (of - plane * rows.to(tl.int32)) * steps - of.to(tl.int64) * width
                index = (_spread(base, span) if block else base) + origin + at
                random = keyed_bits(index.to(tl.uint32), (index >> 32).to(tl.uint32), before, after)
            else:
                random = keyed_bits_from(origin + start, tile, before, after)
        stored = rounded(wanted, random, master)
        if kept:
            tl.store(p_residual + at, rest(wanted, stored, random, master).to(p_residual.dtype.element_ty), live)
        tl.store(p_weight + at, stored.to(p_weight.dtype.element_ty), live)
        if block:
            largest = tl.maximum(tl.max(tl.reshape(tl.abs(first), (lines, span)), 1), codes8.TINY)
            highest = tl.maximum(tl.max(tl.reshape(second, (lines, span)), 1), codes8.TINY)
            tl.store(p_first_scales + line, largest, there)
            tl.store(p_second_scales + line, highest, there)
            first = codes8.signed_nearest(first, _spread(1 / largest, span), p_tables)
            y = second * _spread(1 / highest, span)  # a quotient's last bits may put it a little above 1: see codes8
            second = codes8.between(y, random, p_tables) if stochastic else codes8.nearest(y, p_tables)
        tl.store(p_first + at, first.to(p_first.dtype.element_ty), live)
        tl.store(p_second + at, second.to(p_second.dtype.element_ty), live)
