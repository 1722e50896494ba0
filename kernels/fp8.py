"""A linear layer whose three products are of eight-bit numbers, which Hopper multiplies twice as fast as bf16."""

from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from farspan.kernels.define import define
from farspan.kernels.fp8_quantise import (
    BLOCKS,
    COLUMNS,
    ROWS,
    SIDE,
    TILE,
    TRANSPOSE,
    Recipe,
    blocks_ref,
    rows_ref,
    transpose_ref,
)

__all__ = [
    "PRODUCT",
    "Coded",
    "Gradient",
    "Quantised",
    "Recipe",
    "coded",
    "coded_rows",
    "fp8_linear",
    "fp8_linear_ref",
    "linear_problems",
    "quantise",
]

Gradient = Literal["fp8", "bf16"]
"""What the product for the weight's gradient is made of."""


class Quantised(NamedTuple):
    """Codes of a matrix T K and what they are to be multiplied by; T' is T rounded up to `TILE`.

    `values` T' K e4m3, contiguous. `scale` fp32: T' 1 for rows; T' K/128 with strides 1 T' for blocks. `transposed`
    K T' and its `transposed_scale`, for the weight's gradient, are the same matrix the other way round: K 1 for rows,
    K T'/128 with strides 1 K for blocks; None until they are needed.
    """

    values: Tensor
    scale: Tensor
    transposed: Tensor | None = None
    transposed_scale: Tensor | None = None


class Coded(NamedTuple):
    """What linear layers read in place of x ... K: its codes, and where gradients go to.

    `place` has the shape and type of x, and its numbers are nobody's to read: where a producer makes codes in place of
    x, it is a view of one number.
    """

    place: Tensor
    codes: Quantised


def coded(x: Tensor, recipe: Recipe, *, transposed: bool) -> Coded:
    """x ... K beside its codes."""
    return Coded(x, quantise(x.detach().reshape(-1, x.shape[-1]), recipe, transposed=transposed))


def coded_rows(place: Tensor, values: Tensor, scale: Tensor, columns: Tensor, *, transposed: bool) -> Coded:
    """Codes of rows as a producer made them, and on demand those of the transpose; columns: the largest of each, K."""
    return Coded(place, Quantised(values, scale, *(TRANSPOSE(values, scale, columns) if transposed else ())))


@torch.no_grad()
def quantise(x: Tensor, recipe: Recipe, *, transposed: bool = False) -> Quantised:
    """The codes of x T K, and on demand those of its transpose.

    A row that holds an infinity gets a scale of NaN, and NaN stays NaN: what is not finite stays so in every product.
    """
    if recipe == "block":
        return Quantised(*BLOCKS(x, 1, True, transposed))
    values, scale, columns = ROWS(x, transposed)
    return Quantised(values, scale, *(TRANSPOSE(values, scale, columns) if transposed else ()))


@torch.no_grad()
def with_transposed(codes: Quantised, x: Tensor, recipe: Recipe) -> Quantised:
    """The codes of x T K and beside them those of its transpose, made of the codes for rows and of x for blocks."""
    values, scale, transposed, _ = codes
    if transposed is not None:
        return codes
    if recipe == "block":
        return Quantised(values, scale, *BLOCKS(x, 1, False, True))
    return Quantised(values, scale, *TRANSPOSE(values, scale, COLUMNS(values, scale)))


@torch.no_grad()
def quantise_weight(weight: Tensor, recipe: Recipe, *, transposed: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes N K of a weight and their scales: N 1, or N/128 K/128 with the last axis padded to a multiple of 4.

    With `transposed` also what `transpose_weight` wants to have of rows; codes themselves are not to be kept: a sharded
    weight's would take half of what sharding spares.
    """
    if recipe == "row":
        values, scale, columns = ROWS(weight, transposed)
        return values, scale, columns
    return *BLOCKS(weight, SIDE, True, False), None


@torch.no_grad()
def transpose_weight(weight: Tensor, columns: Tensor | None, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """Codes K N of a weight and their scales: K 1, or K/128 N/128 padded. columns: what `quantise_weight` left."""
    values, scale = TRANSPOSE(weight, None, columns) if recipe == "row" else BLOCKS(weight, SIDE, False, True)
    return values, scale


def dequantise(values: Tensor, scale: Tensor) -> Tensor:
    """The numbers that codes stand for, in fp32; scale has any of the forms above."""
    rows, width = values.shape
    if scale.shape[0] != rows:  # squares
        scale = scale.repeat_interleave(SIDE, 0)
    if scale.shape[1] > 1:
        scale = scale.repeat_interleave(SIDE, 1)[:, :width]
    return values.float() * scale


def linear_problems(inputs: int, outputs: int, recipe: Recipe) -> list[str]:
    """What keeps a weight of these sizes from fp8: both are contracted over, in tiles of 16 or in blocks."""
    tile = TILE[recipe]
    return [
        f"{name}={size}: must be a multiple of {tile} for fp8 with recipe: {recipe}; or take linear: {{kind: plain}}"
        for name, size in (("inputs", inputs), ("outputs", outputs))
        if size % tile
    ]


def fp8_linear(
    x: Tensor,
    weight: Tensor,
    *,
    recipe: Recipe = "row",
    weight_gradient: Gradient = "fp8",
    quantised: Quantised | None = None,
) -> Tensor:
    """x · weightᵀ of e4m3 codes: x ... K and weight N K in bf16 -> ... N, rounded to bf16.

    row: every product's two factors have a scale for each row and column of its result, so the codes of transposed
    matrices have other scales. The forward sums in the tensor core's own accumulator, gradients go on to fp32 every
    128 numbers. block: scales of 1 x 128, the weight's of 128 x
    128, and every sum goes on to fp32, as DeepSeek-V3 has it (2024, arXiv 2412.19437). All codes are e4m3: under scales
    this fine no gradient needs the range of e5m2. weight_gradient: of fp8, which saves the codes of x for the backward
    in place of x; or of bf16, which is exact and saves x.

    quantised: the codes of x as rows, `quantise(x.flatten(0, -2), recipe)`, where a producer or a neighbour has them.
    x is then read only by a bf16 weight gradient, and where blocks lack their transpose; else it may be any tensor of
    its shape, which the gradient goes to. On a CPU all is simulated, in any float type: the codes are the same, the
    products fp32 (fp64 for fp64). Kernels run on the current device. Errors: ValueError for sizes and types that the
    products do not take.
    """
    _check(x, weight, recipe)
    flat = x.reshape(-1, x.shape[-1])
    both = weight_gradient == "fp8" and weight.requires_grad and torch.is_grad_enabled()
    if quantised is None:
        quantised = quantise(flat.detach(), recipe, transposed=both)
    elif quantised.values.shape != (-(-flat.shape[0] // TILE[recipe]) * TILE[recipe], flat.shape[1]):
        raise ValueError(
            f"fp8_linear: quantised.values {tuple(quantised.values.shape)} are not those of x {tuple(x.shape)} padded "
            f"to {TILE[recipe]} rows; quantise x flattened to two axes, by the same recipe"
        )
    elif both:
        quantised = with_transposed(quantised, flat.detach(), recipe)
    learns = torch.is_grad_enabled()
    *factor, columns = quantise_weight(weight.detach(), recipe, transposed=learns and x.requires_grad)
    place = None
    if learns and (x.requires_grad or weight.requires_grad):
        place = _Gradients.apply(flat, weight, columns, *quantised[2:], recipe, weight_gradient)
    out: Tensor = _Result.apply(place, *quantised[:2], *factor, flat.shape[0], x.dtype, recipe == "row")
    return out.reshape(*x.shape[:-1], weight.shape[0])


def fp8_linear_ref(x: Tensor, weight: Tensor, *, recipe: Recipe = "row", weight_gradient: Gradient = "fp8") -> Tensor:
    """The specification: numbers are rounded to their codes and multiplied in at least fp32, forward and backward."""
    _check(x, weight, recipe)
    out: Tensor = _Simulated.apply(x.reshape(-1, x.shape[-1]), weight, recipe, weight_gradient)
    return out.reshape(*x.shape[:-1], weight.shape[0])


def _check(x: Tensor, weight: Tensor, recipe: Recipe) -> None:
    if x.shape[-1] != weight.shape[1] or linear_problems(weight.shape[1], weight.shape[0], recipe):
        wrong = "; ".join(linear_problems(weight.shape[1], weight.shape[0], recipe)) or "inputs differ"
        raise ValueError(f"fp8_linear: x {tuple(x.shape)}, weight {tuple(weight.shape)}: {wrong}")
    if x.dtype != weight.dtype or (x.is_cuda and x.dtype != torch.bfloat16):
        raise ValueError(
            f"fp8_linear: x is {x.dtype} and weight {weight.dtype} on {x.device}; on a GPU both must be bfloat16: set "
            "train.precision: bf16, or linear: {kind: plain}"
        )


class _Gradients(torch.autograd.Function):
    """Holds what the gradients are made of, and the result's place in the graph: a tensor of its size without memory.

    Recomputation stops with the last tensor that it has to hold, which is here, before the product.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        columns: Tensor | None,
        transposed: Tensor | None,
        transposed_scale: Tensor | None,
        recipe: Recipe,
        gradient: Gradient,
    ) -> Tensor:
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        saved = (transposed, transposed_scale) if gradient == "fp8" else (x, None)
        ctx.save_for_backward(weight if needs_x else None, columns, *(saved if needs_weight else (None, None)))
        ctx.recipe, ctx.gradient, ctx.dtype = recipe, gradient, x.dtype
        return x.new_empty(()).expand(x.shape[0], weight.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        weight, columns, kept, kept_scale = ctx.saved_tensors
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        dx = dw = None
        fp8 = needs_weight and ctx.gradient == "fp8"
        if needs_x or fp8:
            codes = quantise(dy, ctx.recipe, transposed=fp8)
        if needs_x:
            weights = transpose_weight(weight, columns, ctx.recipe)
            dx = PRODUCT(codes.values, codes.scale, *weights, ctx.dtype, False)[: dy.shape[0]]
        if fp8:
            dw = PRODUCT(codes.transposed, codes.transposed_scale, kept, kept_scale, ctx.dtype, False)
        elif needs_weight:
            dw = dy.t() @ kept
        return dx, dw, *(None,) * 5


class _Result(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        place: Tensor | None,
        values: Tensor,
        scale: Tensor,
        weights: Tensor,
        weight_scale: Tensor,
        tokens: int,
        dtype: torch.dtype,
        fast: bool,
    ) -> Tensor:
        out: Tensor = PRODUCT(values, scale, weights, weight_scale, dtype, fast)
        return out[:tokens]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return dy, *(None,) * 7


class _Simulated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, recipe: Recipe, gradient: Gradient) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.recipe, ctx.gradient = recipe, gradient
        return _multiply(_rounded(x, recipe), _rounded(weight, recipe, weight=True).t(), x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        recipe = ctx.recipe
        dx = _multiply(_rounded(dy, recipe), _rounded(weight, recipe, weight=True, transposed=True), x.dtype)
        if ctx.gradient == "fp8":
            dy, x = (_rounded(matrix, recipe, transposed=True) for matrix in (dy, x))
        return dx, _multiply(dy.t(), x, weight.dtype), None, None


def _rounded(x: Tensor, recipe: Recipe, *, weight: bool = False, transposed: bool = False) -> Tensor:
    """x as its codes have it; with `transposed`, as those of its transpose do."""
    if recipe == "block":
        codes = blocks_ref(x, SIDE if weight else 1, not transposed, transposed)
    else:
        values, scale, columns = rows_ref(x, True)
        codes = [values, scale]
        if transposed:
            codes = list(transpose_ref(x if weight else values, None if weight else scale, columns))
    rounded = dequantise(codes[0], codes[1])
    return (rounded.t() if transposed else rounded)[: x.shape[0]]


def _multiply(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    wide = torch.promote_types(dtype, torch.float32)
    return (a.to(wide) @ b.to(wide)).to(dtype)


def _product(a: Tensor, scale_a: Tensor, b: Tensor, scale_b: Tensor, dtype: torch.dtype, fast: bool) -> Tensor:
    """a · bᵀ of codes M K and N K: `fast` leaves sums in the tensor core's own, shorter accumulator."""
    if not a.is_cuda:
        return _multiply(dequantise(a, scale_a), dequantise(b, scale_b).t(), dtype)
    if not a.numel():
        return a.new_zeros(a.shape[0], b.shape[0], dtype=dtype)
    if scale_a.shape[1] > 1 or scale_b.shape[1] > 1:
        return _block_product(a, scale_a, b, scale_b, dtype)
    return torch._scaled_mm(a, b.t(), scale_a, scale_b.t(), out_dtype=dtype, use_fast_accum=fast)


def _block_product(a: Tensor, scale_a: Tensor, b: Tensor, scale_b: Tensor, dtype: torch.dtype) -> Tensor:
    """cuBLAS takes strips as they lie, and squares with the blocks of K first: torch's older call knows no padding."""
    square = scale_b.shape[0] != b.shape[0]
    return F.scaled_mm(
        a,
        b.t(),
        scale_a,
        F.ScalingType.BlockWise1x128,
        scale_b.t() if square else scale_b,
        F.ScalingType.BlockWise128x128 if square else F.ScalingType.BlockWise1x128,
        output_dtype=dtype,
    )


def _product_shape(a: Tensor, scale_a: Tensor, b: Tensor, scale_b: Tensor, dtype: torch.dtype, fast: bool) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[0], dtype=dtype)


PRODUCT = define(
    "fp8_product(Tensor a, Tensor scale_a, Tensor b, Tensor scale_b, ScalarType dtype, bool fast) -> Tensor",
    _product,
    _product_shape,
)
"""The one operator of all three products: what selective recomputation counts."""
