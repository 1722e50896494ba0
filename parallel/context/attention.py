"""What mixers receive where a sequence is cut across ranks: one attention over all of it, and the cut of a batch.

To compiled code an attention is one opaque operator that is told the name of its runtime and, as numbers, the layout of
its batch: nothing about either is looked up anywhere else, and recomputation and compilation see plain tensors.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import count
from typing import Any, Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from farspan.kernels.define import define
from farspan.kernels.softmax_attention import join_sinks, sinks_gradient
from farspan.kernels.softmax_attention_backends import lse_dtype
from farspan.parallel.context.exchange import Link, drive
from farspan.parallel.context.layout import Kind, Layout, decode, encode, layout
from farspan.parallel.context.shard import IGNORE, Batch, Documents
from farspan.parallel.context.sight import Sight
from farspan.parallel.context.sums import Grads, Kernels, Me, Saved, Spanning


@dataclass(frozen=True)
class Deal:
    """How batches are cut: the layout of rows, that of packed rows, and what the number of tokens is a multiple of."""

    rows: Kind
    packed: Kind
    inner: int = 1
    multiple: int = 1


@dataclass(frozen=True)
class Call:
    """An attention that wants a schedule: of which tokens, with which mask, over tensors of which shapes."""

    layout: Layout
    sight: Sight
    heads: int
    kv_heads: int
    width: int
    """K, of queries and keys."""
    value_width: int
    """V."""
    dtype: torch.dtype
    backward: bool


class Choices(Protocol):
    """Schedules picked while a run goes on: what they were, so that they can be told and made again."""

    def explain(self) -> str:
        """A line for each: what was picked, and why."""

    def chosen(self) -> dict[str, str]:
        """What was picked, by what for."""

    def replay(self, chosen: Mapping[str, str]) -> None:
        """From now on picks the same for the same."""


class Spread:
    """The runtime of cp > 1: `attend` spans the sequence of all ranks, `cut` gives each its part of a batch."""

    def __init__(
        self,
        rank: int,
        ranks: int,
        spanning: Callable[[Call], Spanning],
        deal: Deal,
        link: Link,
        choices: Choices | None = None,
    ) -> None:
        """`spanning` picks the schedule, the same on all ranks; `link` is this rank's way to the others.

        choices: what `spanning` has picked, where it is no foregone conclusion.
        """
        self.name = f"context {next(_NUMBERS)}"
        self.rank, self.ranks, self.choices = rank, ranks, choices
        self.spanning, self.deal, self.link = spanning, deal, link
        self.kernels = Kernels()
        _RUNTIMES[self.name] = self

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        causal: bool,
        window: int | None = None,
        documents: Documents,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """q: B T H K, k: B T Hkv K, v: B T Hkv V of this rank's tokens -> B T H V over the documents of all ranks.

        Errors: ValueError for a batch that `cut` has not cut.
        """
        if documents.layout is None:
            raise ValueError("context: attention over several ranks needs a batch that was cut; call Spread.cut first")
        options = causal, window, None, softcap
        out: Tensor = torch.ops.farspan.attend_spread(q, k, v, sinks, documents.layout, self.name, *options)[0]
        return out

    def cut(self, batch: Batch) -> Batch:
        """This rank's tokens of a batch on the host, as one row of as many on every rank."""
        if batch.prefix is not None:
            raise ValueError(
                "data.objective: a prefix that sees itself both ways cannot be cut across parallel.cp ranks; "
                "set parallel.cp=1, or take an objective without prefix"
            )
        kind, lengths = self.deal.rows, (batch.tokens.shape[1],) * batch.tokens.shape[0]
        if batch.cu_seqlens is not None:
            kind, lengths = self.deal.packed, tuple(n for n in batch.cu_seqlens.diff().tolist() if n)
        arguments = kind, lengths, self.deal.inner, self.deal.multiple
        whole = layout(kind, lengths, self.ranks, *arguments[2:])
        places = whole.places(self.rank)

        def mine(tensor: Tensor, fill: int) -> Tensor:
            pinned = tensor.is_pinned()  # a copy from other memory would wait for the device
            part = torch.full((1, whole.tokens), fill, dtype=tensor.dtype, pin_memory=pinned)
            part[0, : len(places)] = tensor.flatten().index_select(0, places)
            return part

        return replace(
            batch,
            tokens=mine(batch.tokens, 0),
            labels=mine(batch.labels, IGNORE),
            positions=mine(batch.positions, 0),
            cu_seqlens=None,
            layout=encode(*arguments),
            places=mine(batch.numbered(), -1),
            whole=batch.shape,
        )

    def find(self, batch: Batch, at: Tensor) -> tuple[Tensor, Tensor]:
        """Places of row 0 of a whole batch among this rank's tokens, and whether they are here; elsewhere it is 0."""
        assert batch.layout is not None
        places = decode(torch.tensor(batch.layout), self.ranks).places(self.rank)
        here = torch.searchsorted(places, at).clamp(max=max(0, len(places) - 1))
        found = places[here] == at if len(places) else torch.zeros_like(at, dtype=torch.bool)
        return torch.where(found, here, 0), found

    def example(self, rows: int, length: int) -> Documents:
        """Rows of one document each, of which each rank holds rows·length tokens: to measure a layer with."""
        table = encode(self.deal.rows, (length * self.ranks,) * rows, self.deal.inner, self.deal.multiple)
        return Documents(layout=torch.tensor(table, device="cpu"))

    def explain(self) -> str:
        """What was picked so far and why; empty where a configuration names the schedule."""
        return "" if self.choices is None else self.choices.explain()

    def chosen(self) -> dict[str, str]:
        """What was picked so far, to be replayed when the run goes on elsewhere."""
        return {} if self.choices is None else self.choices.chosen()

    def replay(self, chosen: Mapping[str, str]) -> None:
        """Picks what was picked before, whatever this machine would make of it."""
        if self.choices is not None:
            self.choices.replay(chosen)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, table: Tensor, sight: Sight) -> tuple[Tensor, Tensor]:
        """Out T H V, lse H T."""
        me = self._me(table, sight)
        return drive(self.spanning(_call(me, q, k, v, backward=False)).forward(me, q, k, v), self.link)

    def backward(self, saved: Saved, table: Tensor, sight: Sight) -> Grads:
        me = self._me(table, sight)
        call = _call(me, saved.q, saved.k, saved.v, backward=True)
        return drive(self.spanning(call).backward(me, saved), self.link)

    def _me(self, table: Tensor, sight: Sight) -> Me:
        return Me(self.rank, decode(table, self.ranks), sight, self.kernels)


def _call(me: Me, q: Tensor, k: Tensor, v: Tensor, *, backward: bool) -> Call:
    heads, (kv_heads, width) = q.shape[1], k.shape[1:]
    return Call(me.layout, me.sight, heads, kv_heads, width, v.shape[2], q.dtype, backward)


_RUNTIMES: WeakValueDictionary[str, Spread] = WeakValueDictionary()
"""By name, since an operator takes no objects."""
_NUMBERS = count()


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    table: Tensor,
    name: str,
    causal: bool,
    window: int | None,
    scale: float | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    sight = Sight(causal, window, scale, softcap)
    out, lse = _RUNTIMES[name].forward(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), table, sight)
    if sinks is not None:
        out, lse = join_sinks(out, lse, sinks)
    return out.contiguous().view(*q.shape[:-1], v.shape[-1]), lse.contiguous()  # compiled code counts on it


def _attend_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    sinks: Tensor | None,
    table: Tensor,
    name: str,
    causal: bool,
    window: int | None,
    scale: float | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sight = Sight(causal, window, scale, softcap)
    query, key, value = (x.flatten(0, 1) for x in (q, k, v))
    saved = Saved(dout.flatten(0, 1), query, key, value, out.flatten(0, 1), lse)
    dq, dk, dv = _RUNTIMES[name].backward(saved, table, sight)
    dsinks = q.new_empty(0) if sinks is None else sinks_gradient(saved.dout, saved.out, lse, sinks)
    return dq.contiguous().view(q.shape), dk.contiguous().view(k.shape), dv.contiguous().view(v.shape), dsinks


def _attend_fake(q: Tensor, k: Tensor, v: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    lse = q.new_empty(q.shape[2], q.shape[0] * q.shape[1], dtype=lse_dtype(q.dtype))
    return q.new_empty(*q.shape[:-1], v.shape[-1]), lse


def _attend_backward_fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, k, v, sinks = *arguments[1:4], arguments[6]
    grads = (x.new_empty(x.shape) for x in (q, k, v))
    return (*grads, q.new_empty(0) if sinks is None else sinks.new_empty(sinks.shape))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:3], *output, *inputs[3:5])
    ctx.options = inputs[5:]
    ctx.mark_non_differentiable(output[1])


@once_differentiable
def _derive(ctx: Any, dout: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # read once: activation checkpointing hands them out a single time
    *grads, dsinks = torch.ops.farspan.attend_spread_backward(dout, *saved, *ctx.options)
    return (*grads, None if saved[5] is None else dsinks, *(None,) * 6)


_OPTIONS = "Tensor? sinks, Tensor table, str name, bool causal, int? window, float? scale, float? softcap"
define(f"attend_spread(Tensor q, Tensor k, Tensor v, {_OPTIONS}) -> (Tensor, Tensor)", _attend, _attend_fake)
define(
    "attend_spread_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"{_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)",
    _attend_backward,
    _attend_backward_fake,
)
torch.library.register_autograd("farspan::attend_spread", _derive, setup_context=_save)
