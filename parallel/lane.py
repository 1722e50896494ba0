"""Two ways between a device and its host's memory, and that memory: pinned once, cut into pieces, used again.

Pinning takes about a third of a second a gigabyte and may wait for the device, so that a pin for every tensor costs
minutes, and one between the kernels of an exchange can stop all ranks. Slabs grow as they are first needed, in the
first forward, and are never given back.
"""

from collections import defaultdict
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

FIRST, LARGEST = 1 << 26, 1 << 30
"""Bytes of the first slab, and of those that the later ones, each as large as all before it, grow to."""

Mark = Any
"""A point in a way's work that other work can wait for; None: it is done."""


class Lane(Protocol):
    """What carries bytes: tensors are flat uint8. A copy begins when all that the device was told before is done, and
    all copies that the device was told to wait for; two copies else know nothing of each other."""

    device: torch.device

    def slab(self, size: int) -> Tensor:
        """Host memory; RuntimeError: there is none."""

    def store(self, source: Tensor, target: Tensor) -> Mark:
        """Copies to the host."""

    def load(self, source: Tensor, target: Tensor) -> Mark:
        """Copies to the device."""

    def wait(self, mark: Mark) -> None:
        """What the device is told from now on begins after `mark`; the host goes on."""


class Streams:
    """A CUDA device: one stream for each direction, so that both move at once."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._down, self._up = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def slab(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)  # torch pins whole powers of two

    def store(self, source: Tensor, target: Tensor) -> Mark:
        return self._copy(self._down, source, target)

    def load(self, source: Tensor, target: Tensor) -> Mark:
        return self._copy(self._up, source, target)

    def wait(self, mark: Mark) -> None:
        if mark is not None:
            torch.cuda.current_stream(self.device).wait_event(mark)

    def _copy(self, stream: torch.cuda.Stream, source: Tensor, target: Tensor) -> Mark:
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            target.copy_(source, non_blocking=True)
            return stream.record_event()


class Plain:
    """A device whose memory is the host's: copies are done when they return."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def slab(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8)

    def store(self, source: Tensor, target: Tensor) -> Mark:
        target.copy_(source)

    def load(self, source: Tensor, target: Tensor) -> Mark:
        target.copy_(source)

    def wait(self, mark: Mark) -> None:
        pass


def lane_to(device: torch.device) -> Lane:
    return Streams(device) if device.type == "cuda" else Plain(device)


class Pool:
    """Pieces of slabs. Each has one of 8 sizes between two powers of two, and goes to tensors of about that size."""

    def __init__(self, slab: Callable[[int], Tensor]) -> None:
        self._slab = slab
        self._slabs: list[Tensor] = []
        self._used: list[int] = []
        self._free: dict[int, list[Tensor]] = defaultdict(list)
        self._made = 0

    @property
    def bytes(self) -> int:
        """Of all slabs."""
        return sum(slab.numel() for slab in self._slabs)

    @property
    def taken(self) -> int:
        """Pieces that are out."""
        return self._made - sum(len(pieces) for pieces in self._free.values())

    def take(self, size: int) -> Tensor:
        """A piece of at least `size` bytes. RuntimeError: the host has no more."""
        unit = max(4096, 1 << max(0, size.bit_length() - 4))
        size = -(-size // unit) * unit
        if self._free[size]:
            return self._free[size].pop()
        piece = self._cut(size)
        self._made += 1
        return piece

    def give(self, piece: Tensor) -> None:
        """Takes back what the device has been told to wait for."""
        self._free[piece.numel()].append(piece)

    def _cut(self, size: int) -> Tensor:
        at = next((i for i, slab in enumerate(self._slabs) if slab.numel() - self._used[i] >= size), None)
        if at is None:
            at = len(self._slabs)
            self._grow(1 << (max(size, min(max(self.bytes, FIRST), LARGEST)) - 1).bit_length())
        begin = self._used[at]
        self._used[at] += size
        return self._slabs[at][begin : begin + size]

    def _grow(self, size: int) -> None:
        try:
            self._slabs.append(self._slab(size))
        except RuntimeError as error:
            raise RuntimeError(
                f"the host has no {size:,} bytes more to pin, after {self.bytes:,}; lower train.micro_batch or "
                "train.keep, start fewer ranks a node, or set train.recompute: block"
            ) from error
        self._used.append(0)
