"""Activations wait in host memory from forward to backward: each layer's leave as they are made, and return one early.

The host waits for none of it. What a layer keeps is copied out while the layer still runs; its device memory is let go
at the end of the next layer, where the device waits for the copies. So at most two layers' are there at once, and the
allocator sees the same sequence in every step, however far the host runs ahead. A backward's first look at what its
layer kept calls back what the layer before kept. The last layer's, needed at once, never leave. torchtune and
Megatron-LM move saved tensors likewise; here whole memories move, and views come back as views, strides and all.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves

from farspan.parallel.fsdp import local
from farspan.parallel.lane import Lane, Mark, Pool

LEAST = 1 << 20
"""Bytes of the smallest memory that leaves: a smaller one's copy costs more than it frees."""
LAST = 1
"""How many of the last layers keep theirs on the device."""


class Stash:
    """What the layers of one model keep from forward to backward.

    What autograd saves of a layer as a whole comes here by itself: all of it where the layer is compiled, its input
    where it is recomputed. `recompute` hands over what else it keeps, through `pack` and `unpack`.
    """

    def __init__(self, lane: Lane, least: int = LEAST) -> None:
        self.lane, self.least, self.pool = lane, least, Pool(lane.slab)
        self._now: _Visit | None = None
        self._last: _Visit | None = None
        self._leaving: list[Memory] = []

    def watch(self, layers: Sequence[nn.Module]) -> None:
        """Wraps `layer.forward` in place, around recomputation and compilation. `layers`: in order, each run once."""
        for place, layer in enumerate(layers):
            layer.forward = partial(self._run, layer.forward, layer, place, place >= len(layers) - LAST)

    def _run(
        self, forward: Callable[..., Any], layer: nn.Module, place: int, stays: bool, x: Tensor, *others: Any
    ) -> Any:
        if not torch.is_grad_enabled():
            return forward(x, *others)
        before = self._last
        if before is not None and place <= before.place:
            before = None  # another pass begins
        outside = (*layer.parameters(), *tree_leaves(others))
        shared = frozenset(_number(local(tensor)) for tensor in outside if isinstance(tensor, Tensor))
        now = self._now = _Visit(place, stays, shared, before)
        try:
            with saved_tensors_hooks(self.pack, self.unpack):
                return forward(x, *others)
        finally:
            leaving, self._leaving = self._leaving, [memory for memory in now.memories() if memory.away]
            self._last, self._now = now, None
            for memory in leaving:
                memory.let_go()

    def pack(self, tensor: Tensor) -> "Tensor | View":
        """What stands for a tensor until its backward: it itself, where others hold its memory in any case."""
        now, number = self._now, _number(tensor)
        foreign = type(tensor) not in (Tensor, nn.Parameter) or tensor.device.type != self.lane.device.type
        if now is None or foreign or number in now.shared:
            return tensor if tensor.grad_fn is None else tensor.detach()  # with its history it would be a circle
        memory = now.known[number]() if number in now.known else None
        if memory is None or memory.here is None:
            memory = Memory(tensor, now, self.lane, self.pool)
            now.known[number] = ref(memory)
            if not now.stays and memory.size >= self.least:
                memory.leave()
        memory.views += 1
        return View(memory, tensor.dtype, tensor.shape, tensor.stride(), int(tensor.storage_offset()))

    def unpack(self, packed: Any) -> Any:
        """The tensor again: the same numbers, strides, and neighbours in its memory."""
        if not isinstance(packed, View):
            return packed
        packed.memory.visit.look()
        return packed.memory.show(packed)


class _Visit:
    """One forward of one layer. It holds no memory: who does are autograd's and recomputation's views."""

    def __init__(self, place: int, stays: bool, shared: frozenset[int], before: "_Visit | None") -> None:
        self.place, self.stays, self.shared = place, stays, shared
        self.before: _Visit | None = before.before if before is not None and not before.known else before
        self.known: dict[int, ref[Memory]] = {}
        """By number."""
        self._seen = False

    def memories(self) -> "Iterator[Memory]":
        """Those that a backward may still ask for, in the order they were made."""
        return (memory for known in self.known.values() if (memory := known()) is not None)

    def look(self) -> None:
        """A backward has come here: at first, what this layer kept is called, and what the one before it did."""
        if not self._seen:
            self._seen = True
            for visit in (self, self.before):
                for memory in visit.memories() if visit is not None else ():
                    memory.call()


@dataclass(frozen=True)
class View:
    """Stands for a tensor that shows a memory."""

    memory: "Memory"
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int


class Memory:
    """One memory that a layer keeps: on the device, on the host, or on its way."""

    def __init__(self, shown: Tensor, visit: _Visit, lane: Lane, pool: Pool) -> None:
        self.visit, self._lane, self._pool = visit, lane, pool
        self.size = shown.untyped_storage().nbytes()
        with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.ADInplaceOrView, False):  # shares its version
            self.here: Tensor | None = shown.detach()
        """Shows it while it is on the device."""
        self.views = 0
        """How many tensors show it."""
        self._unseen = 0
        """How many of them have not been shown since it came back."""
        self._version = shown._version
        self._piece: Tensor | None = None
        self._written: Mark = None
        self._coming: Mark = None

    @property
    def away(self) -> bool:
        """Whether the host has it, or will."""
        return self._piece is not None

    def leave(self) -> None:
        """Begins the copy to the host."""
        assert self.here is not None
        self._piece = self._pool.take(self.size)
        self._written = self._lane.store(_bytes(self.here), self._piece[: self.size])

    def let_go(self) -> None:
        """Gives the device's memory to what the device is told from now on."""
        self._check()
        self._lane.wait(self._written)
        self.here = None

    def call(self) -> None:
        """Begins the copy back, unless it is here."""
        if self.here is not None or self._piece is None:
            return
        self.here = torch.empty(self.size, dtype=torch.uint8, device=self._lane.device)
        self._coming = self._lane.load(self._piece[: self.size], self.here)
        self._version, self._unseen = self.here._version, self.views

    def show(self, view: View) -> Tensor:
        """The tensor as it was. Once every view has been shown, whoever asked owns the memory."""
        self.call()
        self._check()
        self._arrive()
        shown = torch.empty(0, dtype=view.dtype, device=self._lane.device)
        assert self.here is not None
        shown.set_(self.here.untyped_storage(), view.offset, view.shape, view.stride)
        if self._unseen:
            self._unseen -= 1
            self.here = self.here if self._unseen else None
        return shown

    def _check(self) -> None:
        if self.here is not None and self.here._version != self._version:
            raise RuntimeError("an activation that a layer keeps for its backward was overwritten; copy it first")

    def _arrive(self) -> None:
        self._lane.wait(self._coming)
        self._coming = None

    def __del__(self) -> None:
        """No backward needs it any more. A copy that nobody has waited for must outlive neither end."""
        if self._piece is not None:
            self._arrive()
            self._pool.give(self._piece)


def _bytes(tensor: Tensor) -> Tensor:
    """All of the memory that a tensor shows: flat uint8."""
    memory = tensor.untyped_storage()
    flat = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    return flat.set_(memory, 0, (memory.nbytes(),), (1,))


def _number(tensor: Tensor) -> int:
    """What tells one memory from another among tensors that live at the same time."""
    return tensor.untyped_storage()._cdata
