"""What one rank sees of a batch: its tokens, what they predict, and where each document begins and ends."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

IGNORE = -100
"""The label of a token that predicts nothing: the end of a document, or padding."""


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
    """Lengths of the documents on the host, padding included as documents of their own: they sum to B·T."""
    valid: int
    """How many labels are not `IGNORE`."""
    padding: int = 0
    """How many tokens only fill up a row."""

    def to(self, device: torch.device) -> "Batch":
        """The same batch on `device`; copies from pinned memory do not block the host."""
        bounds = None if self.cu_seqlens is None else self.cu_seqlens.to(device, non_blocking=True)
        return replace(
            self,
            tokens=self.tokens.to(device, non_blocking=True),
            labels=self.labels.to(device, non_blocking=True),
            positions=self.positions.to(device, non_blocking=True),
            cu_seqlens=bounds,
        )
