"""A schedule run on ghosts, tensors without values: who computes, sends and holds how much, and in which order.

No schedule is described a second time: what is written down here is what the one that trains does. A ghost's kernels
only make their results' shapes; whatever else is done with a tensor is seen as an operation, and counted by its bytes.
"""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import TracebackType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from farspan.kernels.softmax_attention_backends import lse_dtype
from farspan.kernels.softmax_attention_tiles import Tiles
from farspan.parallel.context.attention import Call
from farspan.parallel.context.exchange import Post, Room, Schedule, as_bytes, drive
from farspan.parallel.context.sums import Kernels, Me, Rows, Saved, Spanning

META = torch.device("meta")


class Compute(NamedTuple):
    """A kernel on one rank's device."""

    what: str
    """attend, merge, add, pack, delta, stand_in or copy."""
    kind: Literal["full", "edge", "bytes"]
    """An attention without a mask or with an edge, whose amount is operations; or memory traffic in bytes."""
    amount: float
    label: str = ""


class Begin(NamedTuple):
    """An exchange is posted: what this rank takes, source and bytes, in the order in which it asks for it."""

    takes: tuple[tuple[int, int], ...]


class Await(NamedTuple):
    """What was taken under a ticket is needed now."""

    ticket: int


Action = Compute | Begin | Await


@dataclass(frozen=True)
class Trace:
    """What every rank does for one attention: it knows bytes and operations, and no seconds."""

    backward: bool
    actions: tuple[tuple[Action, ...], ...]
    sent: tuple[tuple[int, ...], ...]
    """Bytes from rank to rank."""
    peaks: tuple[int, ...]
    """The most bytes that each rank holds at a time, beyond what it was given: results, buffers and publications."""


def trace(spanning: Spanning, call: Call) -> Trace:
    """Runs every rank's schedule on ghosts."""
    ghosts = [_Ghost(spanning, call, rank) for rank in range(call.layout.ranks)]
    sent = [[0] * len(ghosts) for _ in ghosts]
    for ghost in ghosts:
        for action in ghost.actions:
            for source, size in action.takes if isinstance(action, Begin) else ():
                sent[source][ghost.rank] += size
    actions = tuple(tuple(ghost.actions) for ghost in ghosts)
    return Trace(call.backward, actions, tuple(map(tuple, sent)), tuple(ghost.memory.peak for ghost in ghosts))


class _Ghost:
    """One rank's run: its link, which answers everything at once, and what it wrote down."""

    def __init__(self, spanning: Spanning, call: Call, rank: int) -> None:
        self.rank = rank
        self.actions: list[Action] = []
        self.pending: dict[int, Post] = {}
        self.posts = 0
        self.memory = _Memory(lambda size: self.actions.append(Compute("copy", "bytes", size)))
        t = call.layout.tokens
        q, k, v = (
            torch.empty(t, heads, width, dtype=call.dtype, device=META)
            for heads, width in (
                (call.heads, call.width),
                (call.kv_heads, call.width),
                (call.kv_heads, call.value_width),
            )
        )
        me = Me(rank, call.layout, call.sight, _Kernels(self.actions))
        schedule: Schedule[tuple[Tensor, ...]]
        if call.backward:
            out = q.new_empty(t, call.heads, call.value_width)
            lse = q.new_empty(call.heads, t, dtype=lse_dtype(call.dtype))
            schedule = spanning.backward(me, Saved(torch.empty_like(out), q, k, v, out, lse))
        else:
            schedule = spanning.forward(me, q, k, v)
        with self.memory:
            drive(schedule, self)

    def room(self, asked: Room) -> Tensor:
        return torch.empty(asked.size, dtype=torch.uint8, device=META)

    def post(self, post: Post) -> int:
        sizes = [(take.source, as_bytes(take.into).numel()) for take in post.takes]
        own = sum(size for source, size in sizes if source == self.rank)
        if own:
            self.actions.append(Compute("copy", "bytes", 2 * own))
        self.actions.append(Begin(tuple((source, size) for source, size in sizes if size and source != self.rank)))
        self.pending[self.posts] = post  # a real link keeps what it reads and writes alive
        self.posts += 1
        return self.posts - 1

    def wait(self, ticket: int) -> None:
        self.actions.append(Await(ticket))
        self.pending.pop(ticket)

    def close(self) -> None:
        self.actions += [Await(ticket) for ticket in self.pending]
        self.pending.clear()


class _Kernels(Kernels):
    """Makes the shapes of results, and writes down what they would cost."""

    def __init__(self, actions: list[Action]) -> None:
        self.actions = actions

    def forward(self, q: Tensor, k: Tensor, v: Tensor, tiles: Tiles) -> tuple[Tensor, Tensor]:
        self._attend(tiles, operations(q, v, tiles, backward=False))
        out = q.new_empty(tiles.rows, q.shape[1], v.shape[2])
        return out, q.new_empty(q.shape[1], tiles.rows, dtype=lse_dtype(q.dtype))

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, tiles: Tiles
    ) -> tuple[Tensor, Tensor, Tensor]:
        self._attend(tiles, operations(q, v, tiles, backward=True))
        dq, dk = q.new_empty(tiles.rows, *q.shape[1:]), k.new_empty(tiles.keys, *k.shape[1:])
        return dq, dk, v.new_empty(tiles.keys, *v.shape[1:])

    def merge(self, out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor, rows: Rows) -> None:
        self._move("merge", [part, part_lse], [(out, part), (lse, part_lse)])

    def add(self, total: Tensor, part: Tensor, rows: Rows) -> None:
        self._move("add", [part], [(total, part)])

    def pack(self, room: Tensor, *tensors: Tensor) -> None:
        self._move("pack", [*tensors, *tensors], [])

    def delta(self, out: Tensor, dout: Tensor) -> Tensor:
        self._move("delta", [out, dout], [])
        return out.new_empty(out.shape[1::-1], dtype=lse_dtype(out.dtype))

    def stand_in(self, dout: Tensor, delta: Tensor) -> Tensor:
        self._move("stand_in", [dout, dout, delta], [])
        return torch.empty_like(dout, memory_format=torch.contiguous_format)

    def _attend(self, tiles: Tiles, amount: float) -> None:
        if tiles.tiles:
            label = f"{tiles.rows}×{tiles.keys}"
            self.actions.append(Compute("attend", "edge" if tiles.causal else "full", amount, label))

    def _move(self, what: str, read: Sequence[Tensor], updated: Sequence[tuple[Tensor, Tensor]]) -> None:
        """updated: a whole, of which as many numbers are read and written as its part has."""
        size = sum(_bytes(x) for x in read) + sum(2 * whole.element_size() * part.numel() for whole, part in updated)
        if size:
            self.actions.append(Compute(what, "bytes", size))


def operations(q: Tensor, v: Tensor, tiles: Tiles, *, backward: bool) -> float:
    """Multiplications and additions of two products forward, and of five backward."""
    width, value = q.shape[2], v.shape[2]
    return 2.0 * tiles.pairs * q.shape[1] * (3 * width + 2 * value if backward else width + value)


class _Memory(TorchDispatchMode):
    """Counts the bytes alive, and tells of every operation that moves some."""

    def __init__(self, moved: Callable[[int], None]) -> None:
        super().__init__()
        self.moved = moved
        self.live = self.peak = 0
        self.watched: set[weakref.ref[Any]] = set()

    def __torch_dispatch__(
        self, func: OpOverload, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        effect = _effect(func)
        if effect == "view":
            return result
        read = [x for x in args if isinstance(x, Tensor)]
        if not isinstance(result, Tensor) or not all(x.is_meta for x in (*read, result)):
            return result  # an index made on the host, once
        if effect != "write":
            self._watch(result)
        if effect == "fill":
            self.moved(_bytes(result))
        elif effect != "empty":
            others = read[1:] if effect == "write" else read
            self.moved(_bytes(result) + sum(min(_bytes(x), _bytes(result) * 4) for x in others))
        return result

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, value, trace)
        self.watched.clear()

    def _watch(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        size = storage.nbytes()

        def gone(reference: weakref.ref[Any]) -> None:
            self.live -= size
            self.watched.discard(reference)

        self.watched.add(weakref.ref(storage, gone))
        self.live += size
        self.peak = max(self.peak, self.live)


@lru_cache(maxsize=256)
def _effect(func: OpOverload) -> Literal["view", "write", "empty", "fill", "new"]:
    if func.is_view:
        return "view"
    if any(x.alias_info is not None for x in func._schema.returns):
        return "write"
    name = func._schema.name
    if "empty" in name:
        return "empty"
    return "fill" if any(word in name for word in ("zeros", "full", "ones")) else "new"


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
