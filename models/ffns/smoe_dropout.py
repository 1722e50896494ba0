"""SMoE-Dropout: a router of random numbers that never learn, and more and more experts for every token (Chen et al.,
2023)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from farspan.kernels.random import Normal
from farspan.kernels.route import route
from farspan.kernels.router_logits import router_logits
from farspan.models.ffns.experts import Dealt, Experts
from farspan.models.ffns.router import Kept, Routed, Tally, uncharged, without_padding
from farspan.models.linear import Linear, Plain
from farspan.parallel.context.shard import Documents
from farspan.parallel.expert import Visits
from farspan.parallel.sums import Now


@dataclass(frozen=True, kw_only=True)
class SmoeDropout(Dealt):
    """SwiGLU experts of a fixed random router; a token meets more of them from step to step, as in a dropout that ends.

    What was trained so can be used with any number of experts a token, the more the better.
    """

    experts: int
    """How many there are."""
    hidden: int
    """Channels between the two products of one expert."""
    first: int
    """How many of them a token meets in the beginning."""
    last: int
    """And in the end."""
    over: int
    """Steps from the one to the other, along a straight line."""

    def __post_init__(self) -> None:
        if not 1 <= self.first <= self.last <= self.experts:
            raise ValueError(
                f"first={self.first}, last={self.last}: must rise from 1 at least to experts={self.experts} at most"
            )
        if self.hidden < 1 or self.over < 1:
            raise ValueError(f"hidden={self.hidden}, over={self.over}: must be at least 1")

    def active(self, step: int) -> int:
        """How many experts a token meets after so many steps."""
        return self.first + round((self.last - self.first) * min(1.0, step / self.over))

    @property
    def met(self) -> int:
        return self.last

    def build(self, width: int, depth: int, linear: Linear = Plain()) -> "SmoeDropoutFfn":  # noqa: B008 - frozen
        return SmoeDropoutFfn(self, width, depth)


class SmoeDropoutFfn(Routed):
    def __init__(self, config: SmoeDropout, width: int, depth: int) -> None:
        super().__init__()
        self.config = config
        self.router = Kept(config.experts, width)
        self.active = Kept()
        self.experts = Experts(config.experts, config.hidden, width, depth)

    def initial(self) -> dict[str, Normal]:
        start = Normal(0.0, self.router.value.shape[1] ** -0.5)
        return {"router.value": start, "active.value": Normal(float(self.config.first), 0.0)}

    def flops(self, lengths: tuple[int, ...]) -> int:
        """Forward operations for documents of these lengths, at the end of the growth: before it they are fewer."""
        return 2 * sum(lengths) * (self.router.value.numel() + self.config.last * self.experts.size)

    def forward(self, x: Tensor, documents: Documents) -> tuple[Tensor, Tally]:
        """As `last` experts a token, of which those that do not take part yet are nobody: sizes never change, and the
        rows of nobody cost memory only."""
        tokens, most = x.flatten(0, 1), self.config.last
        logits = router_logits(tokens, self.router.value)
        _, chosen = route(logits.detach(), most, score="softmax_after")
        takes = torch.arange(most, device=x.device) < self.active.value
        share = logits.gather(1, chosen.long()).masked_fill(~takes, -torch.inf).softmax(-1)
        chosen = without_padding(torch.where(takes, chosen, -1), documents)
        out = self.experts(Visits(tokens, chosen, share)).view_as(x)
        return out, uncharged(chosen, logits, documents, len(x))

    def tell(self, name: str, now: Now) -> None:
        self.active.value.fill_(self.config.active(now.step))
