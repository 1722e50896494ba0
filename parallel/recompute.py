"""Activation checkpointing: a layer keeps its input and its dearest products, and runs the rest again.

Why a share of the products: between recomputing whole layers and nothing, what costs time to run again are products,
and what costs memory are all outputs alike. torchtitan keeps every second product as it comes, and Megatron-LM's
selective mode runs only attention again (Korthikanti et al., 2022), which a fused kernel makes pointless. Here the
layer is traced once, and the products are kept in the order of operations spared per byte, up to a share of them.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Literal, Protocol, Self

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from farspan.kernels.fp8 import PRODUCT
from farspan.kernels.gathered_gemm import GATHERED
from farspan.kernels.grouped_gemm import GROUPED_MM
from farspan.kernels.route import ROUTE
from farspan.kernels.router_logits import ROUTER_LOGITS
from farspan.parallel.expert.deepep import COMBINE, DISPATCH

Recompute = Literal["none", "block", "selective", "offload"]

KEEP = 0.5
"""The usual share of the products' bytes that selective recomputation keeps."""

TOKENS = 64
"""Tokens that a layer is traced with; operations and bytes grow with them alike."""

_aten = torch.ops.aten
_LEFT = {_aten.mm.default: 0, _aten.bmm.default: 0, _aten._grouped_mm.default: 0}
_LEFT |= {_aten.addmm.default: 1, _aten.baddbmm.default: 1, PRODUCT: 0}
_LEFT |= {GROUPED_MM: 0, GATHERED: 0, ROUTER_LOGITS: 0}
"""Products, and which argument is the left factor."""
_SUMS = {torch.ops._c10d_functional.reduce_scatter_tensor.default}
"""Exchanges that leave less than they take: keeping the sum spares the product before it as well."""
_EXCHANGES = {torch.ops._c10d_functional.all_to_all_single.default, DISPATCH, COMBINE}
"""Rows that came from other ranks, which do not send them twice."""

Call = tuple[OpOverload, int]
"""An op and how many of the same came before it in the layer: known alike to the trace, to a run and to a compiler."""


class Store(Protocol):
    """Where what is kept waits for the backward."""

    def pack(self, tensor: Tensor) -> Any:
        """What stands for the tensor until then."""

    def unpack(self, packed: Any) -> Tensor:
        """The tensor again."""


def apply(layer: nn.Module, keep: float | None, parts: int = 1, store: Store | None = None) -> None:
    """Wraps `layer.forward` in place. Attention's outputs are always kept: it is dear, and may hold exchanges.

    keep: None: nothing runs again; 0: all else does; up to 1: so much of the bytes of the products that would run
    again stays, and 1 spares them all. parts: among how many ranks the tokens of x are dealt out; those of the other
    arguments are not. The layer has `example(rows, length)`, arguments for its forward, and may be on the meta device.
    store: who holds the outputs that stay; None: this does, and torch.compile can see through it.
    """
    if keep is None:
        return
    kept: frozenset[Call] = frozenset()
    if keep > 0:
        x, *others = layer.example(1, TOKENS * parts)  # type: ignore[operator]
        kept = choose(trace(layer, x[:, :TOKENS].detach().clone().requires_grad_(), *others), keep)
    layer.forward = partial(
        checkpoint,
        layer.forward,
        use_reentrant=False,
        preserve_rng_state=False,
        context_fn=_keeping(kept) if store is None else partial(_storing, kept, store),
    )


@cache
def _keeping(kept: frozenset[Call]) -> Callable[[], tuple[AbstractContextManager[None], AbstractContextManager[None]]]:
    """The contexts of a forward and its recomputation: one object for all layers alike, so that they compile once."""
    return partial(_contexts, kept)


def _always() -> set[OpOverload]:
    """Attention, the choice of experts (in numbers a bit apart it would be another one), and rows from elsewhere."""
    return {torch.ops.farspan.attend.default, torch.ops.farspan.attend_spread.default, ROUTE} | _EXCHANGES


def _contexts(kept: frozenset[Call]) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """What one forward of a layer runs in, and its recomputation."""
    always, counts = _always(), {False: Counter[OpOverload](), True: Counter[OpOverload]()}

    def policy(context: Any, op: OpOverload, *_: object, **__: object) -> CheckpointPolicy:
        number = counts[context.is_recompute][op]
        counts[context.is_recompute][op] += 1
        stays = op in always or (op, number) in kept
        return CheckpointPolicy.MUST_SAVE if stays else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


def _storing(kept: frozenset[Call], store: Store) -> tuple["_Keep", "_Recall"]:
    """What one forward of a layer runs in, and its recomputation, with the outputs that stay in `store`."""
    shelf: dict[Call, Any] = {}
    return _Keep(kept, store, shelf), _Recall(store, shelf)


class _Keep(TorchDispatchMode):
    """Hands the outputs that stay to a store, and puts what stands for them on the shelf."""

    def __init__(self, kept: frozenset[Call], store: Store, shelf: dict[Call, Any]) -> None:
        super().__init__()
        self.kept, self.store, self.shelf = kept, store, shelf
        self.always, self.counts = _always(), Counter[OpOverload]()

    def __torch_dispatch__(
        self, func: OpOverload, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        call = func, self.counts[func]
        self.counts[func] += 1
        if func in self.always or call in self.kept:
            if func in _SUMS | _EXCHANGES:
                torch.ops._c10d_functional.wait_tensor(tree_leaves(out)[0])  # the layer's own wait comes after this
            self.shelf[call] = tree_map_only(Tensor, self.store.pack, out)
        return out


class _Recall(TorchDispatchMode):
    """Takes from the shelf what is there; all else runs again."""

    def __init__(self, store: Store, shelf: dict[Call, Any]) -> None:
        super().__init__()
        self.store, self.shelf = store, shelf
        self.counts = Counter[OpOverload]()

    def __enter__(self) -> Self:
        self.counts.clear()  # a graph that is retained comes here again
        super().__enter__()
        return self

    def __torch_dispatch__(
        self, func: OpOverload, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        call = func, self.counts[func]
        self.counts[func] += 1
        if call not in self.shelf:
            return func(*args, **(kwargs or {}))
        return tree_map(self.store.unpack, self.shelf[call])


@dataclass(frozen=True)
class Step:
    """One operation of a layer's forward; memories are numbers."""

    call: Call
    flops: int
    """Of a product; anything else costs bandwidth only."""
    reads: frozenset[int]
    writes: frozenset[int]


@dataclass(frozen=True)
class Trace:
    """What a layer did in one forward, and what its backward needs of it."""

    steps: tuple[Step, ...]
    sizes: dict[int, int]
    """Bytes of every memory that the layer made, and of its input."""
    saved: frozenset[int]
    """What a plain run holds for the backward; weights, and arguments that other layers share, are left out."""
    input: int

    def again(self, kept: frozenset[Call]) -> list[Step]:
        """What has to run again for the backward when only the outputs of `kept` and of attention are at hand."""
        makers: dict[int, list[Step]] = defaultdict(list)
        for step in self.steps:
            for memory in step.writes:
                makers[memory].append(step)
        always, found, seen, wanted = _always(), set[Call](), set[int](), list(self.saved)
        while wanted:
            if (memory := wanted.pop()) in seen:
                continue
            seen.add(memory)
            for step in makers[memory]:
                if step.call[0] not in always and step.call not in kept:
                    found.add(step.call)
                    wanted += step.reads
        return [step for step in self.steps if step.call in found]

    def flops(self, kept: frozenset[Call]) -> int:
        """Operations of the products that have to run again."""
        return sum(step.flops for step in self.again(kept))

    def bytes(self, memories: Iterable[int]) -> int:
        return sum(self.sizes[memory] for memory in memories if memory in self.sizes)

    def held(self, keep: float | None) -> tuple[int, int]:
        """Bytes that the layer holds from its forward to its backward, and those that come back for its backward."""
        stay = self._stay(keep)
        return self.bytes(stay), self.bytes(self.saved - stay)

    def large(self, keep: float | None, least: int) -> int:
        """Of the bytes held, those of memories of at least `least` bytes: what `farspan.parallel.stash` moves."""
        return self.bytes(memory for memory in self._stay(keep) if self.sizes.get(memory, 0) >= least)

    def _stay(self, keep: float | None) -> frozenset[int]:
        """The memories that are held."""
        if keep is None:
            return self.saved
        kept, always = choose(self, keep), _always()
        return frozenset({self.input}).union(*(s.writes for s in self.steps if s.call in kept or s.call[0] in always))


def choose(traced: Trace, keep: float) -> frozenset[Call]:
    """The products to keep, within a share `keep` of the bytes that spare all of them."""
    every = _fill(traced, None)
    size = sum(traced.bytes(step.writes) for step in traced.steps if step.call in every)
    return every if keep >= 1 else _fill(traced, int(keep * size))


def _fill(traced: Trace, room: int | None) -> frozenset[Call]:
    """Keeps what spares most operations per byte and still fits, one after the other; None: room for all."""
    kept: frozenset[Call] = frozenset()
    steps = [step for step in traced.again(kept) if step.flops or step.call[0] in _SUMS]
    while True:
        now = traced.flops(kept)
        spared = [(now - traced.flops(kept | {step.call}), traced.bytes(step.writes), step.call) for step in steps]
        fits = [(flops / size, size, call) for flops, size, call in spared if flops and (room is None or size <= room)]
        if not fits:
            return kept
        _, size, call = max(fits, key=lambda fit: fit[:2])
        kept, room = kept | {call}, None if room is None else room - size


def trace(layer: nn.Module, x: Tensor, *others: Any) -> Trace:
    """Runs the layer's forward once, best on the meta device, and notes who makes what of what."""
    recorder = _Recorder()
    outside = {_memory(tensor) for tensor in (*layer.parameters(), *tree_leaves(others)) if isinstance(tensor, Tensor)}
    saved: set[int] = set()

    def pack(tensor: Tensor) -> Tensor:
        if any(isinstance(held, nn.Parameter) for held in (tensor, tensor._base)):
            outside.add(_memory(tensor))  # a weight that the layer shares with others
        recorder.alive.append(tensor)
        saved.add(_memory(tensor))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), recorder:
        layer(x, *others)
    sizes = {_memory(tensor): tensor.untyped_storage().nbytes() for tensor in (x, *recorder.alive)}
    return Trace(
        steps=tuple(recorder.steps),
        sizes={memory: size for memory, size in sizes.items() if memory not in outside},
        saved=frozenset(saved - outside),
        input=_memory(x),
    )


class _Recorder(TorchDispatchMode):
    """Notes every operation below autograd; views share their memory with what they show."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Step] = []
        self.alive: list[Tensor] = []
        """All that was made: a freed memory's number could be taken by another."""
        self.counts: Counter[OpOverload] = Counter()

    def __torch_dispatch__(
        self, func: OpOverload, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        self.alive += made
        flops = 2 * made[0].numel() * args[_LEFT[func]].shape[-1] if func in _LEFT else 0
        reads = frozenset(_memory(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
        call = func, self.counts[func]
        self.counts[func] += 1
        self.steps.append(Step(call, flops, reads, frozenset(map(_memory, made))))
        return out


def _memory(tensor: Tensor) -> int:
    """What tells one memory from another among tensors that live at the same time."""
    return tensor.untyped_storage()._cdata
