"""What a layer of experts asks of those who bring tokens and experts together, and how they meet on one rank.

Every rank holds E/ep experts, of which etp ranks hold some hidden channels each. The ranks of etp first bring their
tokens together, and in the end each takes its part of the sum of theirs. Between the two, tokens meet the experts of
ep. A probability is part of an expert's work, so that what comes back is only summed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from farspan.kernels.expert_layer import expert_layer
from farspan.kernels.grouped_gemm import grouped_mm
from farspan.kernels.permute import Order, permute, sort, unpermute
from farspan.parallel.clock import Waits
from farspan.parallel.comm import Group, gather, gather_rows, scatter

Beside = Callable[[], Tensor]
"""What a rank has to do for its tokens, N D, while they are with the experts of others."""


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


class Visits(NamedTuple):
    """Tokens and the experts that they choose."""

    tokens: Tensor
    """N D."""
    chosen: Tensor
    """N K int32 of all E experts, other numbers for nobody."""
    probability: Tensor
    """N K."""
    most: Callable[[int, int], int] | None = None
    """How many tokens choose one expert at most, of so many rows of such a length; None: all may."""
    whole: tuple[int, int] = (0, 0)
    """The rows that the tokens are of, and their length, where `most` is told."""


class Dispatcher(Protocol):
    """What a layer of experts receives."""

    def expect(self, tokens: int, rows: int, length: int) -> None:
        """Told before each forward, on all ranks, how many tokens this rank's layers will see, and of which whole
        rows."""

    def run(self, visits: Visits, w13: Tensor, w2: Tensor, beside: Beside | None = None) -> Tensor:
        """What each of this rank's tokens makes of its chosen experts, plus what `beside` finds: N D.

        w13 and w2 as this rank has them, E/ep 2 I/etp D and E/ep D I/etp; E/ep 1 I/etp D where experts have no gate,
        silu(w13 · x) alone.
        """

    def waited(self) -> Waits | None:
        """How long this rank waited for exchanges since it was asked last; None where there are none of its own."""

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
        self._tokens, self._rows, self._length = 0, 0, 0
        self.guests = 1 if axes.etp is None else axes.etp.size
        """Ranks whose tokens are put together before they meet experts."""

    def expect(self, tokens: int, rows: int, length: int) -> None:
        if self.ragged and self.axes.etp is None:
            return
        most = torch.tensor((tokens, rows, length))
        if self.axes.hosts is not None:
            dist.all_reduce(most, op=dist.ReduceOp.MAX, group=self.axes.hosts.handle)
        self._tokens, self._rows, self._length = most.tolist()

    def run(self, visits: Visits, w13: Tensor, w2: Tensor, beside: Beside | None = None) -> Tensor:
        tokens, chosen, probability = visits[:3]
        if tokens.is_meta:  # to be measured: as many tokens come as go
            return _sum(*Local._meet(self, visits, w13, w2, beside))
        count = len(tokens)
        if missing := max(0, self._tokens - count):
            tokens, probability = (F.pad(x, (0, 0, 0, missing)) for x in (tokens, probability))
            chosen = F.pad(chosen, (0, 0, 0, missing), value=-1)
        if (etp := self.axes.etp) is not None:
            tokens, probability = (gather(x.unsqueeze(0), etp).squeeze(0) for x in (tokens, probability))
            chosen = gather_rows(chosen, etp).flatten(0, 1)
        found, extra = self._meet(Visits(tokens, chosen, probability, *visits[3:]), w13, w2, beside)
        if etp is not None:
            found = scatter(found.unsqueeze(0), etp).squeeze(0)
        return _sum(found[:count], extra)

    def waited(self) -> Waits | None:
        return None

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

    def _meet(self, visits: Visits, w13: Tensor, w2: Tensor, beside: Beside | None) -> tuple[Tensor, Tensor | None]:
        """visits: of all etp, with as many tokens each -> what they make of experts, and what `beside` found."""
        order = sort(visits.chosen, len(w13), self._room(visits, len(w13), visits.chosen.numel()))
        found = through(visits.tokens, w13, w2, visits.probability, order)
        return found, None if beside is None else beside()

    def _room(self, visits: Visits, experts: int, paid: int) -> int:
        """Of so many visits, those that `experts` of them are paid at most."""
        if visits.most is None:
            return paid
        rows, length = (self._rows, self._length) if self._rows else visits.whole
        return min(paid, experts * self.guests * visits.most(rows, length))


def _sum(found: Tensor, extra: Tensor | None) -> Tensor:
    return found if extra is None else found + extra


def _summed(counts: Tensor, group: Group | None) -> Tensor:
    if group is None or counts.is_meta:
        return counts
    ops = torch.ops._c10d_functional
    return ops.wait_tensor(ops.all_reduce(counts.detach(), "sum", group.name))


def through(tokens: Tensor, w13: Tensor, w2: Tensor, probability: Tensor, order: Order) -> Tensor:
    """What each token makes of its experts among those of w13 and w2."""
    if w13.shape[1] == 2:
        return expert_layer(tokens, w13, w2, probability, order)
    share = probability.flatten()[order.rows.long()].unsqueeze(1)
    found = grouped_mm(permute(tokens, order), w13.squeeze(1).transpose(1, 2), order.ends)
    inner = (F.silu(found.to(share.dtype)) * share).to(found.dtype)
    return unpermute(grouped_mm(inner, w2.transpose(1, 2), order.ends), order)


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
