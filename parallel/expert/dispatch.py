"""Tokens travel to the experts of other ranks and back, or experts to tokens: three ways that give the same sums.

Every rank holds E/ep experts, of which etp ranks hold some hidden channels each. The ranks of etp first bring their
tokens together, and in the end each takes its part of the sum of theirs. Between the two, tokens meet the experts of
ep. A probability is part of an expert's work, so that what comes back is only summed.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from farspan.kernels.expert_layer import expert_layer
from farspan.kernels.grouped_gemm import grouped_mm
from farspan.kernels.permute import Order, permute, sort, unpermute
from farspan.parallel.comm import Group, gather, gather_rows, scatter

_OPS = torch.ops._c10d_functional


@dataclass(frozen=True, kw_only=True)
class Axes:
    """The groups that a layer of experts exchanges in; None: of one rank."""

    ep: Group | None = None
    """Ranks that have other experts."""
    etp: Group | None = None
    """Ranks that have other channels of the same experts."""
    mates: Group | None = None
    """Ranks that hold the tokens of the same rows: those of cp and tp."""
    everyone: Group | None = None
    """All ranks that hold tokens."""
    hosts: Group | None = None
    """All ranks, for a number between their hosts."""


class Dispatcher(Protocol):
    """What a layer of experts receives."""

    def expect(self, tokens: int) -> None:
        """Told before each forward, on all ranks, how many tokens this rank's layers will see."""

    def run(self, tokens: Tensor, chosen: Tensor, probability: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
        """What each of this rank's tokens makes of its chosen experts: N D -> N D.

        chosen: N K int32 of all E experts, other numbers for nobody; probability: N K; w13 and w2 as this rank has
        them, E/ep 2 I/etp D and E/ep D I/etp; E/ep 1 I/etp D where experts have no gate, silu(w13 · x) alone.
        """

    def whole(self, counts: Tensor) -> Tensor:
        """The sum over the ranks that hold the tokens of the same rows, without a gradient."""

    def everywhere(self, counts: Tensor) -> Tensor:
        """The sum over all ranks, without a gradient."""

    def every(self, said: Tensor) -> Tensor:
        """N … -> M …: what the ranks say that hold the tokens of the same rows; with a gradient where it is of floating
        point."""


class Local:
    """All experts are here."""

    ragged = True
    """Whether ranks may come with different numbers of tokens."""

    def __init__(self, axes: Axes = Axes()) -> None:
        self.axes = axes
        self._most = 0

    def expect(self, tokens: int) -> None:
        if self.ragged and self.axes.etp is None:
            return
        most = torch.tensor(tokens)
        if self.axes.hosts is not None:
            dist.all_reduce(most, op=dist.ReduceOp.MAX, group=self.axes.hosts.handle)
        self._most = int(most)

    def run(self, tokens: Tensor, chosen: Tensor, probability: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
        if tokens.is_meta:  # to be measured: as many tokens come as go
            return _through(tokens, w13, w2, probability, sort(chosen, len(w13)))
        count = len(tokens)
        if missing := max(0, self._most - count):
            tokens, probability = (F.pad(x, (0, 0, 0, missing)) for x in (tokens, probability))
            chosen = F.pad(chosen, (0, 0, 0, missing), value=-1)
        if (etp := self.axes.etp) is None:
            return self._meet(tokens, chosen, probability, w13, w2)[:count]
        tokens, probability = (gather(x.unsqueeze(0), etp).squeeze(0) for x in (tokens, probability))
        found = self._meet(tokens, gather_rows(chosen, etp).flatten(0, 1), probability, w13, w2)
        return scatter(found.unsqueeze(0), etp).squeeze(0)[:count]

    def whole(self, counts: Tensor) -> Tensor:
        return _summed(counts, self.axes.mates)

    def everywhere(self, counts: Tensor) -> Tensor:
        return _summed(counts, self.axes.everyone)

    def every(self, said: Tensor) -> Tensor:
        if (mates := self.axes.mates) is None or said.is_meta:
            return said
        if said.is_floating_point():
            return gather(said.unsqueeze(0), mates).squeeze(0)
        return gather_rows(said, mates).flatten(0, 1)

    def _meet(self, tokens: Tensor, chosen: Tensor, probability: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
        """tokens: of all etp."""
        return _through(tokens, w13, w2, probability, sort(chosen, len(w13)))


class Gathered(Local):
    """Every rank of ep sees all their tokens, and gives its experts' part of each to the sum: sizes never vary."""

    ragged = False

    def __init__(self, axes: Axes, ep: Group) -> None:
        super().__init__(axes)
        self.ep = ep

    def _meet(self, tokens: Tensor, chosen: Tensor, probability: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
        tokens, probability = (gather(x.unsqueeze(0), self.ep).squeeze(0) for x in (tokens, probability))
        mine = gather_rows(chosen, self.ep).flatten(0, 1) - self.ep.rank * len(w13)
        found = _through(tokens, w13, w2, probability, sort(mine, len(w13)))
        return scatter(found.unsqueeze(0), self.ep).squeeze(0)


class Exchanged(Local):
    """A token travels once to each rank of ep that has experts of its own, with all it has to say to them.

    The host learns the counts of a layer in one read, while the device puts the tokens in order.
    """

    def __init__(self, axes: Axes, ep: Group) -> None:
        super().__init__(axes)
        self.ep = ep

    @torch.compiler.disable  # its sizes are in nobody's graph
    def _meet(self, tokens: Tensor, chosen: Tensor, probability: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
        count, ranks = len(w13), self.ep.size
        owner = chosen.div(count, rounding_mode="floor")
        order = sort(_once(owner), ranks)
        leaving = torch.stack((order.ends.diff(prepend=order.ends[:1] * 0), _given(owner, ranks)), dim=1)
        coming = exchange(leaving, [1] * ranks, [1] * ranks, self.ep)
        read = _Read(torch.stack((leaving, coming)))
        (sent, _), (received, visits) = (side.T.tolist() for side in read.numbers())
        order = replace(order, rows=order.rows[: sum(sent)])
        there, back = (sent, received), (received, sent)
        wishes = chosen[order.rows.long().div(chosen.shape[1], rounding_mode="floor")]
        mine = exchange(wishes, *there, self.ep) - self.ep.rank * count
        guests, share = (exchange(permute(x, order), *there, self.ep) for x in (tokens, probability))
        seats = sort(mine, count)
        seats = replace(seats, rows=seats.rows[: sum(visits)])
        return unpermute(exchange(_through(guests, w13, w2, share, seats), *back, self.ep), order)


def _summed(counts: Tensor, group: Group | None) -> Tensor:
    if group is None or counts.is_meta:
        return counts
    return _OPS.wait_tensor(_OPS.all_reduce(counts.detach(), "sum", group.name))


def _through(tokens: Tensor, w13: Tensor, w2: Tensor, probability: Tensor, order: Order) -> Tensor:
    """What each token makes of its experts among those of w13 and w2."""
    if w13.shape[1] == 2:
        return expert_layer(tokens, w13, w2, probability, order)
    share = probability.flatten()[order.rows.long()].unsqueeze(1)
    found = grouped_mm(permute(tokens, order), w13.squeeze(1).transpose(1, 2), order.ends)
    inner = (F.silu(found.to(share.dtype)) * share).to(found.dtype)
    return unpermute(grouped_mm(inner, w2.transpose(1, 2), order.ends), order)


def _once(owner: Tensor) -> Tensor:
    """owner: N K, with -1 for all but the first of those in a row that are the same."""
    seen = (owner.unsqueeze(2) == owner.unsqueeze(1)).tril(-1).any(2)
    return torch.where(seen, -1, owner)


def _given(owner: Tensor, ranks: int) -> Tensor:
    """How many visits each rank is given, int32."""
    return (owner.flatten().unsqueeze(0) == torch.arange(ranks, device=owner.device).unsqueeze(1)).sum(1).int()


class _Read:
    """Numbers on their way to the host: the device goes on meanwhile."""

    def __init__(self, numbers: Tensor) -> None:
        self._here, self._done = numbers, None
        if numbers.is_cuda:
            side = torch.cuda.Stream(numbers.device)
            side.wait_stream(torch.cuda.current_stream(numbers.device))
            with torch.cuda.stream(side):
                self._here = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
                self._here.copy_(numbers, non_blocking=True)
                self._done = side.record_event()
            numbers.record_stream(side)

    def numbers(self) -> Tensor:
        if self._done is not None:
            self._done.synchronize()
        return self._here


def exchange(x: Tensor, sent: Sequence[int], received: Sequence[int], group: Group) -> Tensor:
    """Rows for every rank, one rank's after the other's, become every rank's rows for this one; backward the reverse.

    x: sum(sent) … -> sum(received) …
    """
    if not x.is_floating_point():
        return _exchanged(x, sent, received, group.name)
    out: Tensor = _Exchange.apply(x, sent, received, group.name)
    return out


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sent: Sequence[int], received: Sequence[int], name: str) -> Tensor:
        ctx.back = received, sent, name
        return _exchanged(x, sent, received, name)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None]:
        return _exchanged(upstream, *ctx.back), None, None, None


def _exchanged(x: Tensor, sent: Sequence[int], received: Sequence[int], name: str) -> Tensor:
    return _OPS.wait_tensor(_OPS.all_to_all_single(x.contiguous(), list(received), list(sent), name))


@dataclass(frozen=True, kw_only=True)
class AllToAll:
    """Tokens travel to the ranks that have their experts, and back: least bytes where micro-batches are small."""

    def build(self, axes: Axes) -> Dispatcher:
        return Local(axes) if axes.ep is None else Exchanged(axes, axes.ep)


@dataclass(frozen=True, kw_only=True)
class AllGather:
    """Every rank of ep sees all their tokens: nothing varies in size and no host waits, for more bytes and rows."""

    def build(self, axes: Axes) -> Dispatcher:
        return Local(axes) if axes.ep is None else Gathered(axes, axes.ep)


@dataclass(frozen=True, kw_only=True)
class WeightGather:
    """Experts travel to the tokens, gathered as other weights are: the ranks of ep are ranks of edp. Least bytes where
    micro-batches are large, and no token waits for another rank's."""

    def build(self, axes: Axes) -> Dispatcher:
        return Local(axes)


@dataclass(frozen=True, kw_only=True)
class Auto:
    """The way that the bytes of a layer and the speed of the link between the ranks make the fastest."""

    def build(self, axes: Axes) -> Dispatcher:
        """ValueError: ranks of ep are there, for which `farspan.parallel.expert.auto` has to choose first."""
        if axes.ep is not None:
            raise ValueError("parallel.dispatch: {kind: auto} was not resolved; name a kind")
        return Local(axes)
