"""The weights of experts, and the layer that a router sends tokens through them in."""

from abc import ABC, abstractmethod
from math import sqrt

import torch
from torch import Tensor, nn

from farspan.kernels.random import Normal
from farspan.models.linear import Linear, Plain
from farspan.parallel.expert import Beside, Dispatcher, Local, Visits
from farspan.parallel.placement import Expert, Placement


class Experts(nn.Module):
    """The weights of all experts, E of them, in stacks: what ranks of ep and etp deal out."""

    def __init__(self, count: int, hidden: int, width: int, depth: int, *, gated: bool = True) -> None:
        """gated: silu(w13[e, 0] · x) is multiplied by w13[e, 1] · x, as SwiGLU has it; otherwise it stands alone."""
        super().__init__()
        self.w13 = nn.Parameter(torch.empty(count, 2 if gated else 1, hidden, width))
        self.w2 = nn.Parameter(torch.empty(count, width, hidden))
        self.size = (3 if gated else 2) * hidden * width
        self.start = {
            "w13": Normal(0.0, width**-0.5),
            "w2": Normal(0.0, hidden**-0.5 / sqrt(2 * depth)),
        }
        self.dispatcher: Dispatcher = Local()

    def initial(self) -> dict[str, Normal]:
        return self.start

    def placements(self) -> dict[str, Placement]:
        return {"w13": Expert(2), "w2": Expert(2)}

    def forward(self, visits: Visits, beside: Beside | None = None) -> Tensor:
        """N D; see `farspan.parallel.expert.dispatch.Dispatcher.run`."""
        return self.dispatcher.run(visits, self.w13, self.w2, beside)


class Dealt(ABC):
    """What configurations of experts answer alike: experts are dealt out to ep and etp, and tp leaves them alone."""

    experts: int
    hidden: int

    @property
    @abstractmethod
    def met(self) -> int:
        """How many experts a token meets: on average where they choose, at most where tokens do."""

    @property
    def wishes(self) -> int:
        """How many experts a token may wish for."""
        return self.met

    def tensor_problems(self, tp: int) -> list[str]:
        """What keeps the layer from being spread over `tp` ranks."""
        return []

    def expert_problems(self, ep: int, etp: int) -> list[str]:
        """What keeps the experts from being dealt out to `ep` ranks, and each to `etp`."""
        found = []
        if self.experts % ep:
            found.append(f"experts={self.experts}: must be a multiple of parallel.ep={ep}")
        if self.hidden % etp:
            found.append(f"hidden={self.hidden}: must be a multiple of parallel.etp={etp}")
        return found

    def linear_problems(self, linear: Linear, width: int, tp: int) -> list[str]:
        """What keeps the products from being built as `linear`."""
        if isinstance(linear, Plain):
            return []
        return ["experts: their products are in the type of the weights alone; set linear: {kind: plain}"]
