"""Randomness as a function of where, never of when: a counter hash of key and global index."""

import hashlib
from dataclasses import dataclass
from math import pi, prod

import torch
import triton
import triton.language as tl
from torch import Tensor

_MASK = 0xFFFFFFFF
_ELEMENTS = 1 << 22
"""How many elements are drawn at once: the int64 temporaries stay small beside the weights."""


def key(*parts: int | str) -> int:
    """A 64-bit key from names and numbers, alike on every machine: `key(seed, "layers.0.mixer.to_q", step)`."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def bits(index: Tensor, key: int) -> Tensor:
    """32 random bits for each int64 index, as int64 in [0, 2³²).

    Two rounds of a 32-bit multiply-xorshift finaliser with the constants of Chris Wellons' search
    ("Prospecting for Hash Functions", 2018): one keyed by the low half of the key and the low word of the index,
    one by the high halves. int64 products wrap, which leaves their low 32 bits right.
    """
    x = _mix((index & _MASK) ^ (key & _MASK))
    return _mix(x ^ ((index >> 32) & _MASK) ^ (key >> 32))


def step_bits(index: Tensor, key: int, step: int) -> Tensor:
    """As `bits`, other ones at every step and from a single round: for one draw a weight and step, in a fused kernel.

    The round is keyed twice, before its first product and after it, by two words mixed of key and step.
    """
    before, after = _step_keys(key, step)
    x = (index & _MASK) ^ before
    x = ((x ^ (x >> 16)) * 0x7FEB352D + after + (index >> 32) * 0x9E3779B9) & _MASK
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _MASK
    return x ^ (x >> 16)


def _step_keys(key: int, step: int) -> tuple[int, int]:
    words = torch.tensor([key & _MASK, key >> 32], dtype=torch.int64)
    before, after = _mix(_mix(words ^ (step & _MASK)) ^ words.flip(0)).tolist()
    return before, after


@triton.jit
def step_keys(low, high, step):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    """The two words of `step_bits`, uint32; low and high half of the key, and the step, of any integer type."""
    low, high, step = low.to(tl.uint32), high.to(tl.uint32), step.to(tl.uint32)
    return _mix_words(_mix_words(low ^ step) ^ high), _mix_words(_mix_words(high ^ step) ^ low)


@triton.jit
def keyed_bits(low, high, before, after):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    """`step_bits` of an index, uint32, by its low and high half, uint32, and the words of `step_keys`."""
    return _keyed(low, before, after + high * 0x9E3779B9)


@triton.jit
def keyed_bits_from(first, count: tl.constexpr, before, after):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    """`step_bits` of as many indices from `first`, an int64, on: among so few the high half grows at most once."""
    start, high = first.to(tl.uint32), (first >> 32).to(tl.uint32)
    low = start + tl.arange(0, count).to(tl.uint32)
    here, beyond = after + high * 0x9E3779B9, after + (high + 1) * 0x9E3779B9
    return _keyed(low, before, tl.where(low < start, beyond, here))


@triton.jit
def _keyed(low, before, after):  # type: ignore[no-untyped-def]  # noqa: ANN001
    x = low ^ before
    x = (x ^ (x >> 16)) * 0x7FEB352D + after
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _mix_words(x):  # type: ignore[no-untyped-def]  # noqa: ANN001
    x = (x.to(tl.uint32) ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


def _mix(x: Tensor) -> Tensor:
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _MASK
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _MASK
    return x ^ (x >> 16)


def uniform(index: Tensor, key: int) -> Tensor:
    """fp32 in (0, 1], one for each int64 index, with 24 random bits."""
    return ((bits(index, key) >> 8) + 1).to(torch.float32) * 2.0**-24


def normal(index: Tensor, key: int) -> Tensor:
    """fp32 of mean 0 and variance 1, one for each int64 index (Box and Muller, 1958; at most 5.8 in size)."""
    other = key ^ 0x9E3779B97F4A7C15
    return (-2 * uniform(index, key).log()).sqrt() * (2 * pi * uniform(index, other)).cos()


@dataclass(frozen=True)
class Normal:
    """How a weight begins: around `mean` with deviation `std`; `std=0` is a constant."""

    mean: float
    std: float

    def fill(self, block: Tensor, key: int, shape: tuple[int, ...], offset: tuple[int, ...]) -> None:
        """Writes into `block` its part of the global weight of `shape`; `block` begins at `offset`.

        Every cut of the weight draws the same numbers, since each element's index is its place in the whole.
        """
        if self.std == 0.0 or block.numel() == 0:
            block.fill_(self.mean)
            return
        rows = max(1, _ELEMENTS // max(1, prod(block.shape[1:])))
        for start in range(0, block.shape[0], rows):
            part = block[start : start + rows]
            index = _places(part, shape, (offset[0] + start, *offset[1:]))
            part.copy_(normal(index, key).mul_(self.std).add_(self.mean))


def _places(block: Tensor, shape: tuple[int, ...], offset: tuple[int, ...]) -> Tensor:
    """The row-major index of each element of `block` in a tensor of `shape`, int64."""
    index = torch.zeros((), dtype=torch.int64, device=block.device)
    for axis, size in enumerate(block.shape):
        here = torch.arange(offset[axis], offset[axis] + size, dtype=torch.int64, device=block.device)
        index = index.unsqueeze(-1) + here * prod(shape[axis + 1 :])
    return index
