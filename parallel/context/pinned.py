"""What every schedule that a configuration can name has in common, and how it becomes the runtime of a run."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from farspan.parallel.comm import Group
from farspan.parallel.context.attention import Deal, Spread
from farspan.parallel.context.exchange import Schedule
from farspan.parallel.context.layout import Kind
from farspan.parallel.context.links import Carrier, connect
from farspan.parallel.context.local import Local
from farspan.parallel.context.sums import Grads, Me, Saved


@dataclass(frozen=True, kw_only=True)
class Axis:
    """The ranks that a sequence is cut across, as a schedule is built for them."""

    group: Group
    device: torch.device
    multiple: int = 1
    """Every rank's tokens are a multiple of this: tp cuts them further."""
    windowed: bool = False
    """Most layers see a window only."""
    run: Group | None = None
    """All ranks of the run, which must choose alike; None: `group` is all."""


@dataclass(frozen=True, kw_only=True)
class Pinned(ABC):
    """A schedule that a configuration names."""

    layout: Kind | Literal["auto"] = "auto"
    """Who holds which tokens: contiguous; zigzag: chunks r and 2n-1-r of every document; documents: short ones whole,
    long ones in zigzag over few ranks. auto: what the schedule computes evenly with."""
    carrier: Carrier = "auto"
    """What carries the bytes: pairs (messages of the process group: NCCL or gloo), or symmetric (copies straight out of
    the other GPU's memory, without a kernel). auto: symmetric where every GPU can reach every other."""

    @property
    def order(self) -> Kind | None:
        """The layout that it wants in any case."""
        return None

    @property
    def within(self) -> int:
        """Consecutive ranks that are dealt tokens as one."""
        return 1

    @abstractmethod
    def forward(self, me: Me, q: Tensor, k: Tensor, v: Tensor) -> Schedule[tuple[Tensor, Tensor]]:
        """See `farspan.parallel.context.sums.Spanning`."""

    @abstractmethod
    def backward(self, me: Me, saved: Saved) -> Schedule[Grads]:
        """See `farspan.parallel.context.sums.Spanning`."""

    def problems(self, cp: int, heads: int, kv_heads: int) -> list[str]:
        """What keeps it from spreading these heads (of one rank of tp) over `cp` ranks."""
        return []

    def deal(self, axis: Axis) -> Deal:
        """The layouts of batches."""
        wanted = self.order or ("contiguous" if axis.windowed else None)
        if self.layout != "auto":
            wanted = self.layout
        return Deal(wanted or "zigzag", wanted or "documents", self.within, axis.multiple)

    def build(self, axis: Axis | None = None) -> Local | Spread:
        """The runtime: of one rank where there is no axis, or one of a single rank."""
        if axis is None or axis.group.size == 1:
            return Local()
        link = connect(self.carrier, axis.group, axis.device)
        return Spread(axis.group.rank, axis.group.size, lambda _: self, self.deal(axis), link)
