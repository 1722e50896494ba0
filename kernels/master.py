"""bf16 weights that remember more than they hold: a residual beside them, or rounding by chance.

residual16 is the low half of the fp32 weight: nothing is lost. residual8 keeps what rounding took in 127ths of half a
unit in the last place (Zamirai et al., 2020, keep such a rest in bf16; FlashOptim, 2026, in 8 bits): 24 bits in all, of
which the last is rounded up or down by chance, so that the smallest updates still count on the average (Gupta et al.,
2015).
none: the bf16 weight itself is rounded so.
"""

from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

Master = Literal["fp32", "residual16", "residual8", "none"]

RESIDUALS: dict[Master, torch.dtype] = {"residual16": torch.int16, "residual8": torch.int8}

_UP = tl.constexpr(12582912.0)
"""1.5 · 2²³: added to a small number, it leaves the nearest integer in the low bits."""
_STEPS = tl.constexpr(127.0 * 256)
"""Steps of residual8 in 2^e, the weight's power of two: half a unit in its last place is 2^(e−8)."""
_LEAST = tl.constexpr(15 << 23)
"""The exponent below which residual8 counts as at it, or a step would be no number: of weights below 2^-112, for which
less is remembered."""


def draws(master: Master) -> bool:
    """Whether weights stored so are rounded by chance."""
    return master in ("residual8", "none")


def whole(weight: Tensor, residual: Tensor | None) -> Tensor:
    """The fp32 weight. weight: fp32 or bf16; residual: int8, int16 or None, of the same shape."""
    if residual is None:
        return weight.float()
    if residual.dtype == torch.int16:
        return ((weight.view(torch.int16).int() << 16) + residual.int()).view(torch.float32)
    power = (weight.float().view(torch.int32) & 0x7F800000).view(torch.float32)
    return weight.float() + residual.float() * (power * (1 / _STEPS.value))


def split(wanted: Tensor, weight: Tensor, residual: Tensor | None, random: Tensor | None = None) -> None:
    """Writes the fp32 `wanted` into weight and residual.

    random: 32-bit numbers (int64) of the same shape, of whose high 16 bits residual8 takes 15 and none all; None: to
    the nearest, which needs a residual.
    """
    if weight.dtype == torch.float32:
        weight.copy_(wanted)
        return
    bits = wanted.view(torch.int32)
    if residual is None:
        assert random is not None
        weight.view(torch.int16).copy_(((bits.long() + (random >> 16)) >> 16).to(torch.int16))
    elif residual.dtype == torch.int16:
        high = ((bits.long() + 0x8000) >> 16).to(torch.int16)  # ties away from zero, so that the rest is 16 bits
        weight.view(torch.int16).copy_(high)
        residual.copy_((bits - (high.int() << 16)).to(torch.int16))
    else:
        weight.copy_(wanted)
        exponent = (weight.float().view(torch.int32) & 0x7F800000).clamp(min=_LEAST.value)
        steps = (0x7F000000 - exponent).view(torch.float32) * _STEPS.value
        chance = 0.0 if random is None else (random >> 16 | 1).float() * 2.0**-16 - 0.5
        residual.copy_(((wanted - weight.float()) * steps + chance).round().to(torch.int8))


@triton.jit
def join(weight, residual, MASTER: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201, N803
    """As `whole`."""
    wide = weight.to(tl.float32)
    if MASTER == "residual16":
        return (wide.to(tl.int32, bitcast=True) + residual.to(tl.int32)).to(tl.float32, bitcast=True)
    if MASTER == "residual8":
        power = (wide.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
        return wide + residual.to(tl.float32) * (power * (1 / _STEPS))
    return wide


@triton.jit
def rounded(wanted, random, MASTER: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201, N803
    """The weight of `split` in its own type, still held in fp32. random: uint32."""
    if MASTER == "fp32":
        return wanted
    bits = wanted.to(tl.uint32, bitcast=True)
    if MASTER == "none":
        bits += random >> 16
    elif MASTER == "residual16":
        bits += 0x8000
    else:
        bits += 0x7FFF + ((bits >> 16) & 1)  # to the nearest, ties to even
    return (bits & 0xFFFF0000).to(tl.float32, bitcast=True)


@triton.jit
def rest(wanted, weight, random, MASTER: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201, N803
    """The residual of `split`, in the low bits of an int32; weight: what `rounded` gave, random: uint32."""
    if MASTER == "residual16":
        return wanted.to(tl.int32, bitcast=True) - weight.to(tl.int32, bitcast=True)
    exponent = tl.maximum(weight.to(tl.int32, bitcast=True) & 0x7F800000, _LEAST)
    steps = (0x7F000000 - exponent).to(tl.float32, bitcast=True) * _STEPS
    # 2²³ and 15 random bits above a one: between -1/2 and 1/2 but never either, so that 127 stays the largest.
    drawn = ((random >> 16).to(tl.int32) | 0x4B000001).to(tl.float32, bitcast=True)
    place = (wanted - weight) * steps + (drawn * 2.0**-16 - 128.5)
    return (place + _UP).to(tl.int32, bitcast=True)
