"""Expert choice: every expert takes the tokens of a row that score most for it (Zhou et al., 2022)."""

from dataclasses import dataclass
from functools import partial
from math import ceil

from torch import Tensor, nn

from farspan.kernels.random import Normal
from farspan.kernels.route import route
from farspan.kernels.router_logits import router_logits
from farspan.models.ffns.capacity import most, within
from farspan.models.ffns.experts import Dealt, Experts
from farspan.models.ffns.router import Routed, Tally, numbered, uncharged, without_padding
from farspan.models.linear import Linear, Plain
from farspan.models.roles import RoleKind
from farspan.parallel.context.shard import Documents
from farspan.parallel.expert import Visits

GRAINS = 1 << 16
"""Parts that probabilities are rounded to: a threshold lies among all tokens of a row, which differ by little."""


@dataclass(frozen=True, kw_only=True)
class ExpertChoice(Dealt):
    """SwiGLU experts that choose their tokens, and loads are even without a charge. A choice sees the whole row: for
    mixers with causal: false."""

    experts: int
    """How many there are."""
    active: float
    """How many of them a token meets on average: an expert takes active * tokens / experts of a row, rounded up."""
    hidden: int
    """Channels between the two products of one expert."""

    def __post_init__(self) -> None:
        if self.experts < 2 or self.hidden < 1:
            raise ValueError(f"experts={self.experts}, hidden={self.hidden}: must be at least 2 and 1")
        if not 0 < self.active <= self.experts:
            raise ValueError(
                f"active={self.active}: must be above 0, and no more than experts={self.experts}; 2 is usual"
            )

    @property
    def met(self) -> int:
        return ceil(self.active)

    @property
    def wishes(self) -> int:
        return self.experts

    def build(self, width: int, depth: int, linear: Linear = Plain()) -> "ExpertChoiceFfn":  # noqa: B008 - frozen
        return ExpertChoiceFfn(self, width, depth)


class ExpertChoiceFfn(Routed):
    def __init__(self, config: ExpertChoice, width: int, depth: int) -> None:
        super().__init__()
        self.config = config
        self.router = nn.Linear(width, config.experts, bias=False)
        self.experts = Experts(config.experts, config.hidden, width, depth)

    def initial(self) -> dict[str, Normal]:
        return {"router.weight": Normal(0.0, self.router.in_features**-0.5)}

    def roles(self) -> dict[str, RoleKind]:
        return {"router.weight": "router"}

    def flops(self, lengths: tuple[int, ...]) -> int:
        """Forward operations for documents of these lengths: two per token and weight that it meets on average."""
        return 2 * round(sum(lengths) * (self.router.weight.numel() + self.config.active * self.experts.size))

    def forward(self, x: Tensor, documents: Documents) -> tuple[Tensor, Tally]:
        """x: B T D. Logits, scores and choice are in at least fp32; who is chosen by nobody is given zeros.

        All tokens wish for all experts, which take so many of the row's as a capacity leaves room for.
        """
        count, tokens = self.config.experts, x.flatten(0, 1)
        numbers, whole = numbered(documents, x)
        logits = router_logits(tokens, self.router.weight)
        probability, every = route(logits, count, score="softmax", normalised=False)
        share = self.config.active / count
        chosen = within(
            without_padding(every, documents),
            probability,
            numbers,
            whole,
            count,
            factor=share,
            drop="least",
            every=self.experts.dispatcher.every,
            grains=GRAINS,
        )
        room = partial(most, active=count, experts=count, factor=share)
        out = self.experts(Visits(tokens, chosen, probability, room, whole)).view_as(x)
        return out, uncharged(chosen, logits, documents, len(x))
