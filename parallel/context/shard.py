"""What one rank sees of a batch: its tokens, what they predict, and where each document begins and ends."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100
"""The label of a token that predicts nothing: the end of a document, or padding."""


def entries(bounds: int) -> int:
    """Entries of a cu_seqlens that holds so many bounds, the last one repeated: few shapes occur."""
    return max(16, 1 << (bounds - 1).bit_length())


class Documents(NamedTuple):
    """Who may see whom among the B·T tokens laid end to end, and which row each is of: what layers are told."""

    cu_seqlens: Tensor | None = None
    """int32, bounds of the documents; None: every row is one document."""
    prefix: Tensor | None = None
    """int64, ascending: places among the B·T tokens that belong to a document's prefix, seen by all of that prefix."""
    prefix_cu_seqlens: Tensor | None = None
    """int32, bounds of the prefixes over the places of `prefix`, one document's after the other's."""
    layout: Tensor | None = None
    """int64 on the host: which rank holds what, as `farspan.parallel.context.layout` writes it; None: all is here."""
    places: Tensor | None = None
    """int32, as many as the layer's tokens: where each lies in the whole micro-batch, its rows end to end, -1 for
    padding; None: the layer's tokens are all there is, in this order."""
    whole: tuple[int, int] = (0, 0)
    """Rows and their length that `places` counts."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One micro-batch of one rank: B rows of T tokens.

    Labels are shifted before any cut: `labels[b, t]` is the token that follows `tokens[b, t]` in its document.
    """

    tokens: Tensor
    """B T int64."""
    labels: Tensor
    """B T int64, `IGNORE` where nothing is predicted."""
    positions: Tensor
    """B T int64, starting from 0 in every document."""
    cu_seqlens: Tensor | None
    """int32, bounds of the documents over the B·T tokens laid end to end: begins with 0, ends with B·T, and the last
    bound repeats up to a power of two so that few shapes occur. None: every row is one document."""
    lengths: tuple[int, ...]
    """Lengths of the documents on the host; padding is none of them: they sum to B·T less `padding`."""
    valid: int
    """How many labels are not `IGNORE`."""
    padding: int = 0
    """How many tokens only fill up a row."""
    prefix: Tensor | None = None
    """int64, ascending: places among the B·T tokens whose document shows them both ways; None: none."""
    prefix_cu_seqlens: Tensor | None = None
    """int32, bounds of the prefixes over the places of `prefix`."""
    layout: tuple[int, ...] | None = None
    """Which rank holds what of the documents, where the tokens are one rank's part; None: they are all here."""
    places: Tensor | None = None
    """B T int32: where each token lies in the whole micro-batch, its rows end to end, -1 for padding; None: these are
    all, in this order."""
    whole: tuple[int, int] | None = None
    """Rows of the whole micro-batch and their length, where `places` counts them."""

    @property
    def shape(self) -> tuple[int, int]:
        """Rows of the whole micro-batch, and their length."""
        rows, length = self.tokens.shape
        return (rows, length) if self.whole is None else self.whole

    @property
    def documents(self) -> Documents:
        layout = None if self.layout is None else torch.tensor(self.layout, dtype=torch.int64)
        return Documents(self.cu_seqlens, self.prefix, self.prefix_cu_seqlens, layout, self.places, self.shape)

    def numbered(self) -> Tensor:
        """`places`, written out where nothing is elsewhere and nothing padding."""
        if self.places is not None:
            return self.places
        return torch.arange(self.tokens.numel(), dtype=torch.int32, device=self.tokens.device).view(self.tokens.shape)

    def to(self, device: torch.device) -> "Batch":
        """The same batch on `device`; copies from pinned memory do not block the host."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))

    def padded(self, multiple: int, apart: bool = False) -> "Batch":
        """The same batch with rows a multiple of `multiple` long.

        The last document of each row goes on over the padding: it has no labels, and what comes before never sees it.
        apart: padding is a document of its own, for layers that see both ways.
        """
        rows, length = self.tokens.shape
        extra = -length % multiple
        if not extra:
            return self

        def moved(places: Tensor | None) -> Tensor | None:
            return None if places is None else places + (places // length * extra).to(places.dtype)

        bounds = moved(self.cu_seqlens)
        if apart:
            starts = torch.arange(rows + 1, dtype=torch.int32, device=self.tokens.device) * (length + extra)
            bounds = torch.cat((starts if bounds is None else bounds, starts[:-1] + length)).sort().values
            bounds = torch.cat((bounds, bounds[-1:].expand(entries(len(bounds)) - len(bounds))))

        return replace(
            self,
            tokens=F.pad(self.tokens, (0, extra)),
            labels=F.pad(self.labels, (0, extra), value=IGNORE),
            positions=F.pad(self.positions, (0, extra)),
            padding=self.padding + extra * len(self.tokens),
            cu_seqlens=bounds,
            prefix=moved(self.prefix),
            places=F.pad(self.numbered(), (0, extra), value=-1),
            whole=self.shape,
        )

    def map(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        """The same batch with every tensor changed."""
        tensors: dict[str, Any] = {
            name: change(value) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **tensors)
