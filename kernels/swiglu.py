"""Between a feed-forward layer's products: SwiGLU, GeGLU and squared ReLU, each in one launch and rounded once."""
# ruff: noqa: ANN001 - a kernel's arguments are pointers p_ and numbers

from math import gcd
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from farspan.kernels.define import define, triton_runs

__all__ = ["geglu", "geglu_ref", "squared_relu", "squared_relu_ref", "swiglu", "swiglu_ref"]


def swiglu_ref(gate: Tensor, up: Tensor) -> Tensor:
    """The specification of `swiglu`, differentiable by autograd."""
    return (F.silu(_wide(gate)) * _wide(up)).to(gate.dtype)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) ∘ up (Shazeer, 2020), in at least fp32 inside and rounded once.

    gate, up: ... I of one shape and type -> ... I, dense. Each may be a half of one ... 2I: rows may lie apart, as long
    as the last axis is dense and all rows are evenly spaced; anything else is copied first. Saves gate and up; the
    backward forms everything else again. Kernels run on the current device. Errors: ValueError for unlike inputs.
    """
    return _gated(gate, up, "silu") if fits("swiglu", gate, up) else swiglu_ref(gate, up)


def geglu_ref(gate: Tensor, up: Tensor) -> Tensor:
    """The specification of `geglu`, differentiable by autograd."""
    return (F.gelu(_wide(gate), approximate="tanh") * _wide(up)).to(gate.dtype)


def geglu(gate: Tensor, up: Tensor) -> Tensor:
    """gelu(gate) ∘ up (Shazeer, 2020), with the tanh approximation of GELU; all else as in `swiglu`."""
    return _gated(gate, up, "gelu") if fits("geglu", gate, up) else geglu_ref(gate, up)


def squared_relu_ref(x: Tensor) -> Tensor:
    """The specification of `squared_relu`, differentiable by autograd."""
    return F.relu(_wide(x)).square().to(x.dtype)


def squared_relu(x: Tensor) -> Tensor:
    """relu(x)² (So et al., 2021), in at least fp32 inside and rounded once: ... I -> ... I, dense. Saves x."""
    if not triton_runs(x):
        return squared_relu_ref(x)
    out: Tensor = _SquaredRelu.apply(x)
    return out


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def fits(name: str, gate: Tensor, up: Tensor) -> bool:
    """Whether the kernels take these, once they are known to fit each other."""
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(
            f"{name}: gate {tuple(gate.shape)} of {gate.dtype} and up {tuple(up.shape)} of {up.dtype} must have one "
            "shape and one type; cast or reshape one"
        )
    return triton_runs(gate, up)


def _gated(gate: Tensor, up: Tensor, kind: str) -> Tensor:
    out: Tensor = _Gated.apply(gate, up, kind)
    return out


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, kind: str) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.kind = kind
        return _GATED(gate, up, kind)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor, None]:
        return *GATED_BACKWARD(dout, *ctx.saved_tensors, ctx.kind), None


class _SquaredRelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return _SQUARED_RELU(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> Tensor:
        return _SQUARED_RELU_BACKWARD(dout, *ctx.saved_tensors)


# The kernels. They move bytes and little else: 3 passes over memory forward and 5 backward, 2 and 3 for one input. A
# program takes a tile of b_r rows by b_i columns; in the backward 16 elements a thread keep its three inputs in flight
# without filling the registers. Offsets of rows are 64-bit.


@triton.jit
def activation(x, kind: tl.constexpr):  # type: ignore[no-untyped-def]
    """The activation of fp32 x and its slope; finite for every finite x, NaN for NaN."""
    if kind == "silu":
        chance = 1.0 / (1.0 + tl.exp(-x))  # exp overflows to inf, and 1/inf is the 0 that is meant
        value = x * chance
        slope = chance * (1.0 + x * (1.0 - chance))
    elif kind == "gelu":
        # (1 + tanh(u)) / 2 is the logistic function of 2u, which keeps the digits of the left tail. It is 0 or 1 in
        # fp32 long before |x| = 16, while x³ could overflow.
        near = tl.minimum(tl.maximum(x, -16.0), 16.0)
        square = near * near
        tail = tl.exp(-1.5957691216057308 * near * (1.0 + 0.044715 * square))  # 2·√(2/π)
        chance = 1.0 / (1.0 + tail)
        other = tl.where(near < 0.0, 1.0 - chance, tail * chance)  # 1 - chance, with all its digits
        value = x * chance
        slope = chance + x * (chance * other) * (1.5957691216057308 + 0.21406444881780074 * square)
    else:
        tl.static_assert(kind == "squared_relu")
        value = tl.where(x <= 0.0, 0.0, x * x)
        slope = tl.where(x <= 0.0, 0.0, 2.0 * x)
    return value, slope


@triton.jit
def _tile(rows, width, b_r: tl.constexpr, b_i: tl.constexpr):  # type: ignore[no-untyped-def]
    """Row numbers b_r 1, int64; columns 1 b_i; which of the tile's entries are."""
    row = (tl.program_id(0).to(tl.int64) * b_r + tl.arange(0, b_r))[:, None]
    column = (tl.program_id(1) * b_i + tl.arange(0, b_i))[None, :]
    return row, column, (row < rows) & (column < width)


@triton.jit(do_not_specialize=["rows"])
def _forward(  # type: ignore[no-untyped-def]
    p_out, p_gate, p_up, rows, width, gate_row, up_row, kind: tl.constexpr, b_r: tl.constexpr, b_i: tl.constexpr
):
    row, column, mask = _tile(rows, width, b_r, b_i)
    gate = tl.load(p_gate + row * gate_row + column, mask=mask, other=0.0).to(tl.float32)
    value, _ = activation(gate, kind)
    if kind != "squared_relu":
        value *= tl.load(p_up + row * up_row + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(p_out + row * width + column, value.to(p_out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def _backward(  # type: ignore[no-untyped-def]
    p_dgate,
    p_dup,
    p_dout,
    p_gate,
    p_up,
    rows,
    width,
    dout_row,
    gate_row,
    up_row,
    kind: tl.constexpr,
    b_r: tl.constexpr,
    b_i: tl.constexpr,
):
    row, column, mask = _tile(rows, width, b_r, b_i)
    place = row * width + column
    dout = tl.load(p_dout + row * dout_row + column, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(p_gate + row * gate_row + column, mask=mask, other=0.0).to(tl.float32)
    if kind != "squared_relu":
        up = tl.load(p_up + row * up_row + column, mask=mask, other=0.0).to(tl.float32)
        value, slope = activation(gate, kind)
        tl.store(p_dup + place, (dout * value).to(p_dup.dtype.element_ty), mask=mask)
        tl.store(p_dgate + place, (dout * up * slope).to(p_dgate.dtype.element_ty), mask=mask)
    else:
        value, slope = activation(gate, kind)
        tl.store(p_dgate + place, (dout * slope).to(p_dgate.dtype.element_ty), mask=mask)


def _launch(kernel: Any, results: tuple[Tensor, ...], inputs: tuple[Tensor, ...], kind: str) -> None:
    """results are dense; both are as the kernel takes them, squared ReLU naming its one input and result twice."""
    if inputs[0].numel() == 0:
        return
    inputs, rows, width, (b_r, b_i) = _layout(inputs)
    grid = (triton.cdiv(rows, b_r), triton.cdiv(width, b_i))
    strides = (x.stride(0) for x in inputs)
    kernel[grid](*results, *inputs, rows, width, *strides, kind=kind, b_r=b_r, b_i=b_i, num_warps=8)


def _layout(inputs: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], int, int, tuple[int, int]]:
    """The inputs as evenly spaced rows, how many and how wide, and a tile of 4096 elements.

    Where all are dense, rows mean nothing: the elements are cut anew, into rows that fill tiles to the last lane. Their
    width depends on I alone, so that a new count of tokens never compiles anew.
    """
    width = inputs[0].shape[-1]
    if all(x.is_contiguous() for x in inputs):
        width = b_i = gcd(width, 4096)
    else:
        b_i = min(triton.next_power_of_2(width), 1024)
    views = tuple((x if x.stride(-1) == 1 else x.contiguous()).reshape(-1, width) for x in inputs)
    return views, views[0].shape[0], width, (4096 // b_i, b_i)


def _run_gated(gate: Tensor, up: Tensor, kind: str) -> Tensor:
    out = _like_gated(gate, up, kind)
    _launch(_forward, (out,), (gate, up), kind)
    return out


def _like_gated(gate: Tensor, up: Tensor, kind: str) -> Tensor:
    return gate.new_empty(gate.shape)


def _run_gated_backward(dout: Tensor, gate: Tensor, up: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    dgate, dup = _like_gated_backward(dout, gate, up, kind)
    _launch(_backward, (dgate, dup), (dout, gate, up), kind)
    return dgate, dup


def _like_gated_backward(dout: Tensor, gate: Tensor, up: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), gate.new_empty(gate.shape)


def _run_squared_relu(x: Tensor) -> Tensor:
    out = x.new_empty(x.shape)
    _launch(_forward, (out,), (x, x), "squared_relu")
    return out


def _run_squared_relu_backward(dout: Tensor, x: Tensor) -> Tensor:
    dx = x.new_empty(x.shape)
    _launch(_backward, (dx, dx), (dout, x, x), "squared_relu")
    return dx


_GATED = define("gated(Tensor gate, Tensor up, str kind) -> Tensor", _run_gated, _like_gated)
GATED_BACKWARD = define(
    "gated_backward(Tensor dout, Tensor gate, Tensor up, str kind) -> (Tensor, Tensor)",
    _run_gated_backward,
    _like_gated_backward,
)
_SQUARED_RELU = define("squared_relu(Tensor x) -> Tensor", _run_squared_relu, lambda x: x.new_empty(x.shape))
_SQUARED_RELU_BACKWARD = define(
    "squared_relu_backward(Tensor dout, Tensor x) -> Tensor",
    _run_squared_relu_backward,
    lambda dout, x: x.new_empty(x.shape),
)
