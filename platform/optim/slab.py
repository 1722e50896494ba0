"""The state of a subgroup of weights in one piece of memory, so that one copy moves all of it."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

ALIGNED = 256
"""Bytes: tensors begin where the device loads them in full lines."""


@dataclass(frozen=True)
class Slot:
    """A tensor's place in a slab."""

    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    def of(self, slab: Tensor) -> Tensor:
        """The tensor, in the memory of a flat uint8 slab."""
        return slab[self.start : self.start + self.bytes].view(self.dtype).view(self.shape)


@dataclass(frozen=True)
class Layout:
    """Where each tensor of a subgroup is in its slab."""

    slots: Mapping[str, Slot]
    size: int
    """Bytes."""

    @staticmethod
    def of(tensors: Mapping[str, Tensor]) -> "Layout":
        """One after the other; only shapes and types of the tensors count."""
        slots, end = {}, 0
        for name, tensor in tensors.items():
            slots[name] = Slot(end, tuple(tensor.shape), tensor.dtype)
            end += -(-tensor.numel() * tensor.element_size() // ALIGNED) * ALIGNED
        return Layout(slots, end)

    def views(self, slab: Tensor) -> dict[str, Tensor]:
        return {name: slot.of(slab) for name, slot in self.slots.items()}
