"""RMSNorm and LayerNorm that read every row once in each direction, joined to the residual addition before them."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from farspan.kernels.define import define, triton_runs
from farspan.kernels.fp8 import Coded, coded, coded_rows
from farspan.kernels.fp8_quantise import ROWS, codes_shapes
from farspan.kernels.norm_tiles import WIDEST_FORWARD, launch_backward, launch_codes, launch_forward

__all__ = [
    "add_layer_norm",
    "add_layer_norm_ref",
    "add_rms_norm",
    "add_rms_norm_ref",
    "coded_layer_norm",
    "coded_rms_norm",
    "layer_norm",
    "layer_norm_ref",
    "rms_norm",
    "rms_norm_ref",
]


def rms_norm_ref(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`rms_norm` in plain torch."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * rstd * weight.to(wide.dtype)).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) · weight over the last dimension (Zhang and Sennrich, 2019), rounded once.

    x ... D and weight D of any float types; computed in fp32 (fp64 where either is), the result has x's type. Rows that
    no single stride reaches are copied first. Kernels run on the current device. Errors: ValueError for sizes.
    """
    _check("rms_norm", x, None, weight, None)
    if not triton_runs(x, weight):
        return rms_norm_ref(x, weight, eps)
    normed: Tensor = _Norm.apply(x, None, weight, None, eps, False)
    return normed


def layer_norm_ref(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """`layer_norm` in plain torch."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    wide = wide - wide.mean(-1, keepdim=True)
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.to(wide.dtype)
    return (normed if bias is None else normed + bias.to(wide.dtype)).to(x.dtype)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """(x - mean) / sqrt(variance + eps) · weight + bias over the last dimension (Ba et al., 2016), rounded once.

    x ... D, weight and bias D; types and errors are those of `rms_norm`.
    """
    _check("layer_norm", x, None, weight, bias)
    if not triton_runs(x, weight, *(() if bias is None else (bias,))):
        return layer_norm_ref(x, weight, bias, eps)
    normed: Tensor = _Norm.apply(x, None, weight, bias, eps, True)
    return normed


def _add_ref(x: Tensor, branch: Tensor) -> Tensor:
    dtype = torch.promote_types(torch.promote_types(x.dtype, branch.dtype), torch.float32)
    return (x.to(dtype) + branch.to(dtype)).to(x.dtype)


def add_rms_norm_ref(x: Tensor, branch: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`add_rms_norm` in plain torch."""
    total = _add_ref(x, branch)
    return total, rms_norm_ref(total, weight, eps)


def add_rms_norm(x: Tensor, branch: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """total = x + branch, rounded to x's type, and rms_norm(total): both ... D. The rest is as in `rms_norm`."""
    _check("add_rms_norm", x, branch, weight, None)
    if not triton_runs(x, branch, weight):
        return add_rms_norm_ref(x, branch, weight, eps)
    total, normed = _Norm.apply(x, branch, weight, None, eps, False)
    return total, normed


def add_layer_norm_ref(
    x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """`add_layer_norm` in plain torch."""
    total = _add_ref(x, branch)
    return total, layer_norm_ref(total, weight, bias, eps)


def add_layer_norm(x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """total = x + branch, rounded to x's type, and layer_norm(total): both ... D. The rest is as in `layer_norm`."""
    _check("add_layer_norm", x, branch, weight, bias)
    if not triton_runs(x, branch, weight, *(() if bias is None else (bias,))):
        return add_layer_norm_ref(x, branch, weight, bias, eps)
    total, normed = _Norm.apply(x, branch, weight, bias, eps, True)
    return total, normed


def coded_rms_norm(
    x: Tensor, branch: Tensor | None, weight: Tensor, eps: float, *, transposed: bool
) -> tuple[Tensor, Coded]:
    """total = x + branch as in `add_rms_norm`, or x, and of rms_norm(total) the codes that fp8 products read, no more.

    They are bit for bit those of `quantise(rms_norm(total), "row")`: numbers are rounded to x's type before they are
    coded, and the gradients are those of `rms_norm`. transposed: with the codes of the transpose, which the weight's
    gradient reads.
    """
    _check("coded_rms_norm", x, branch, weight, None)
    if not triton_runs(x, weight, *(() if branch is None else (branch,))):
        total = x if branch is None else _add_ref(x, branch)
        return total, coded(rms_norm_ref(total, weight, eps), "row", transposed=transposed)
    return _coded(x, branch, weight, None, eps, False, transposed)


def coded_layer_norm(
    x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, *, transposed: bool
) -> tuple[Tensor, Coded]:
    """`coded_rms_norm` for `layer_norm`."""
    _check("coded_layer_norm", x, branch, weight, bias)
    if not triton_runs(x, weight, *(y for y in (branch, bias) if y is not None)):
        total = x if branch is None else _add_ref(x, branch)
        return total, coded(layer_norm_ref(total, weight, bias, eps), "row", transposed=transposed)
    return _coded(x, branch, weight, bias, eps, True, transposed)


def _coded(
    x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, centred: bool, transposed: bool
) -> tuple[Tensor, Coded]:
    *total, place, values, scale, columns = _CodedNorm.apply(x, branch, weight, bias, eps, centred, transposed)
    return total[0] if total else x, coded_rows(place, values, scale, columns, transposed=transposed)


def _check(name: str, x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor | None) -> None:
    width = x.shape[-1:]
    for what, given in (("weight", weight), ("bias", bias)):
        if given is not None and given.shape != width:
            raise ValueError(f"{name}: {what} {tuple(given.shape)} must be D where x {tuple(x.shape)} is ... D")
    if branch is not None and branch.shape != x.shape:
        raise ValueError(f"{name}: branch {tuple(branch.shape)} must be of x's shape {tuple(x.shape)}; expand it")


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, centred: bool
    ) -> Tensor | tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)  # what nobody uses costs no pass over zeros
        ctx.centred, ctx.branch = centred, None if branch is None else branch.dtype
        normed, stats, *total = norm(x, branch, weight, bias, eps, centred)
        ctx.save_for_backward(*(total or (x,)), stats, weight, bias)
        return (*total, normed) if total else normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        return *_gradients(ctx, upstream[-1], None if ctx.branch is None else upstream[0]), None, None


class _CodedNorm(torch.autograd.Function):
    """Instead of what is normed a place for its gradient, a tensor of its shape without memory, and the codes."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        branch: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        eps: float,
        centred: bool,
        columns: bool,
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.centred, ctx.branch = centred, None if branch is None else branch.dtype
        values, scale, largest, stats, *total = norm_codes(x, branch, weight, bias, eps, centred, columns)
        ctx.save_for_backward(*(total or (x,)), stats, weight, bias)
        ctx.mark_non_differentiable(values, scale, largest)
        return *total, x.new_empty(()).expand(x.shape), values, scale, largest

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        return *_gradients(ctx, upstream[-4], None if ctx.branch is None else upstream[0]), None, None, None


def _gradients(ctx: Any, d_normed: Tensor | None, d_total: Tensor | None) -> tuple[Tensor | None, ...]:
    """Of x, branch, weight and bias."""
    total, stats, weight, bias = ctx.saved_tensors
    if d_normed is None:
        d_x, sums = d_total, []
    else:
        d_x, *sums = norm_backward(d_normed, d_total, total, stats, weight, bias, ctx.centred)
    # x and branch get one tensor: autograd adds in place only to what nobody else holds.
    d_branch = None if d_x is None or ctx.branch is None else d_x.to(ctx.branch)
    d_weight, d_bias = (*sums, None, None)[:2]
    return d_x, d_branch, d_weight, d_bias


def _norm(
    x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, centred: bool
) -> list[Tensor]:
    found = _norm_shapes(x, branch, weight, bias, eps, centred)
    if x.numel():
        launch_forward(x, branch, weight, bias, eps, centred, found)
    return found


def _norm_shapes(
    x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, centred: bool
) -> list[Tensor]:
    """normed; 1/deviation and, of LayerNorm, the mean as 1 or 2 times ... in fp32; total where there is a branch."""
    return [x.new_empty(x.shape), *_rest_shapes(x, branch, centred)]


def _rest_shapes(x: Tensor, branch: Tensor | None, centred: bool) -> list[Tensor]:
    stats = x.new_empty((1 + centred, *x.shape[:-1]), dtype=torch.float32)
    return [stats] if branch is None else [stats, x.new_empty(x.shape)]


def _norm_codes(
    x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, centred: bool, columns: bool
) -> list[Tensor]:
    width = x.shape[-1]
    if width > WIDEST_FORWARD:  # rows that no program holds are read again
        normed, *rest = _norm(x, branch, weight, bias, eps, centred)
        return [*ROWS(normed.view(-1, width), columns), *rest]
    found = _norm_codes_shapes(x, branch, weight, bias, eps, centred, columns)
    if x.numel():
        launch_codes(x, branch, weight, bias, eps, centred, found)
    else:
        found[2].zero_()
    return found


def _norm_codes_shapes(
    x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, centred: bool, columns: bool
) -> list[Tensor]:
    """Codes of rows, their scales, and their columns' largest or nothing; then as `_norm_shapes` after normed."""
    return [*codes_shapes(x, columns), *_rest_shapes(x, branch, centred)]


def _norm_backward(
    d_normed: Tensor,
    d_total: Tensor | None,
    total: Tensor,
    stats: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    centred: bool,
) -> list[Tensor]:
    found = _norm_backward_shapes(d_normed, d_total, total, stats, weight, bias, centred)
    if not total.numel():
        return [x.zero_() for x in found]
    launch_backward(d_normed, d_total, total, stats, weight, found)
    return found


def _norm_backward_shapes(
    d_normed: Tensor,
    d_total: Tensor | None,
    total: Tensor,
    stats: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    centred: bool,
) -> list[Tensor]:
    """Gradients of x (and branch), weight and, where there is one, bias."""
    return [like.new_empty(like.shape) for like in (total, weight, bias) if like is not None]


norm = define(
    "norm(Tensor x, Tensor? branch, Tensor weight, Tensor? bias, float eps, bool centred) -> Tensor[]",
    _norm,
    _norm_shapes,
)
norm_codes = define(
    "norm_codes(Tensor x, Tensor? branch, Tensor weight, Tensor? bias, float eps, bool centred, bool columns) "
    "-> Tensor[]",
    _norm_codes,
    _norm_codes_shapes,
)
norm_backward = define(
    "norm_backward(Tensor d_normed, Tensor? d_total, Tensor total, Tensor stats, Tensor weight, Tensor? bias, "
    "bool centred) -> Tensor[]",
    _norm_backward,
    _norm_backward_shapes,
)
