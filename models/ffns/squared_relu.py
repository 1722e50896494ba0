"""Squared ReLU (So et al., 2021, Primer): relu(x·up)², then down."""

from dataclasses import dataclass
from math import sqrt

import torch.nn.functional as F
from torch import Tensor, nn

from farspan.kernels.random import Normal
from farspan.parallel.placement import Column, Placement, Row


@dataclass(frozen=True, kw_only=True)
class SquaredRelu:
    """relu(x·up)², then down (So et al., 2021)."""

    hidden: int
    """Channels between the two products."""

    def __post_init__(self) -> None:
        if self.hidden < 1:
            raise ValueError(f"hidden={self.hidden}: must be at least 1; 4 times the width is usual")

    def tensor_problems(self, tp: int) -> list[str]:
        """What keeps the channels from being dealt out to `tp` ranks."""
        return [f"hidden={self.hidden}: must be a multiple of parallel.tp={tp}"] if self.hidden % tp else []

    def build(self, width: int, depth: int) -> "SquaredReluFfn":
        return SquaredReluFfn(self, width, depth)


class SquaredReluFfn(nn.Module):
    def __init__(self, config: SquaredRelu, width: int, depth: int) -> None:
        super().__init__()
        self.depth = depth
        self.to_up = nn.Linear(width, config.hidden, bias=False)
        self.to_out = nn.Linear(config.hidden, width, bias=False)

    def initial(self) -> dict[str, Normal]:
        """The mean square of relu(u)² is 3/2 for a standard normal u: near enough to 1 for the usual scales."""
        inner, outer = self.to_up.in_features, self.to_out.in_features
        return {
            "to_up.weight": Normal(0.0, inner**-0.5),
            "to_out.weight": Normal(0.0, outer**-0.5 / sqrt(2 * self.depth)),
        }

    def placements(self) -> dict[str, Placement]:
        return {"to_up.weight": Column(), "to_out.weight": Row()}

    def flops(self, lengths: tuple[int, ...]) -> int:
        """Forward operations for documents of these lengths: two per weight and token."""
        return 2 * sum(lengths) * 2 * self.to_out.weight.numel()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.to_out(F.relu(self.to_up(x)).square())  # B T D
        return out
