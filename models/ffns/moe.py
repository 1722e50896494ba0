"""Experts: many feed-forward layers, of which a router gives every token to a few (Shazeer et al., 2017)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import log, sqrt
from typing import NamedTuple

import torch
from torch import Tensor, nn

from farspan.kernels.random import Normal
from farspan.kernels.route import Score, route
from farspan.models.ffns.gated import GatedFfn, Swiglu
from farspan.models.linear import Linear, Plain
from farspan.models.roles import RoleKind
from farspan.parallel.context.shard import Documents
from farspan.parallel.expert import Dispatcher, Local
from farspan.parallel.placement import Expert, Placement


class Tally(NamedTuple):
    """What a router reports of this rank's tokens, row by row."""

    given: Tensor
    """Tokens that each expert was given, R E, in at least fp32."""
    scores: Tensor
    """Sums of each expert's scores, of one in all for a token, R E, differentiable; a zero where none are asked for."""
    z: Tensor
    """Sums of the squared log-sum-exp of logits, R, differentiable; a zero where none are asked for."""


@dataclass(frozen=True, kw_only=True)
class Moe:
    """SwiGLU experts, each token's few chosen by its scores; none is dropped and none waits."""

    experts: int
    """How many there are."""
    active: int
    """How many of them a token meets."""
    hidden: int
    """Channels between the two products of one expert."""
    shared: int = 0
    """Channels of an expert that every token meets besides (DeepSeek-AI, 2024); 0: there is none."""
    score: Score = "softmax"
    """softmax: over all experts, of which the best are chosen. softmax_after: over the chosen ones' logits alone
    (Mixtral). sigmoid: of each expert by itself (DeepSeek-V3)."""
    normalised: bool = True
    """A token's probabilities are divided by their sum; those of softmax_after always sum to one."""
    scale: float = 1.0
    """What the probabilities are multiplied by in the end."""
    groups: int = 1
    """Equal groups of experts, of which the best take part (DeepSeek-V3); 1: all do."""
    kept_groups: int = 1
    """How many groups take part, those whose two best experts score most."""
    balance: float = 0.01
    """Weight of a loss that is least where every expert is given as many tokens of a row as any other (Fedus et al.,
    2022): a row's is 1 if so, and their mean, weighed by labels, is added to the mean of the tokens' losses."""
    z_loss: float = 0.0
    """Weight of the mean squared log-sum-exp of the router's logits (Zoph et al., 2022: 1e-3)."""

    def __post_init__(self) -> None:
        if self.experts < 2:
            raise ValueError(f"experts={self.experts}: must be at least 2; kind: swiglu is one for all tokens")
        if self.groups < 1 or self.experts % self.groups:
            raise ValueError(f"groups={self.groups}: must divide experts={self.experts}")
        if not 1 <= self.kept_groups <= self.groups:
            raise ValueError(f"kept_groups={self.kept_groups}: must be from 1 to groups={self.groups}")
        if not 1 <= self.active <= self.experts // self.groups * self.kept_groups:
            raise ValueError(f"active={self.active}: must be at least 1, and no more than the experts that take part")
        if self.hidden < 1 or self.shared < 0:
            raise ValueError(f"hidden={self.hidden}, shared={self.shared}: must be at least 1 and 0")
        if self.balance < 0 or self.z_loss < 0 or self.scale <= 0:
            raise ValueError(
                f"balance={self.balance}, z_loss={self.z_loss}, scale={self.scale}: must not be negative, nor scale 0"
            )

    def tensor_problems(self, tp: int) -> list[str]:
        """What keeps the shared expert from being spread over `tp` ranks; the others are over ep and etp."""
        return [f"shared: {found}" for found in Swiglu(hidden=self.shared).tensor_problems(tp)] if self.shared else []

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

    def build(self, width: int, depth: int, linear: Linear = Plain()) -> "MoeFfn":  # noqa: B008 - frozen
        return MoeFfn(self, width, depth)


class Experts(nn.Module):
    """The weights of all experts, E of them, in stacks: what ranks of ep and etp deal out."""

    def __init__(self, count: int, hidden: int, width: int, depth: int) -> None:
        super().__init__()
        self.w13 = nn.Parameter(torch.empty(count, 2, hidden, width))
        self.w2 = nn.Parameter(torch.empty(count, width, hidden))
        self.depth, self.size = depth, 3 * hidden * width
        self.start = {
            "w13": Normal(0.0, width**-0.5),
            "w2": Normal(0.0, hidden**-0.5 / sqrt(2 * depth)),
        }
        self.dispatcher: Dispatcher = Local()

    def initial(self) -> dict[str, Normal]:
        return self.start

    def placements(self) -> dict[str, Placement]:
        return {"w13": Expert(2), "w2": Expert(2)}

    def forward(self, tokens: Tensor, chosen: Tensor, probability: Tensor) -> Tensor:
        """N D -> N D; see `farspan.parallel.expert.dispatch.Dispatcher.run`."""
        return self.dispatcher.run(tokens, chosen, probability, self.w13, self.w2)


class MoeFfn(nn.Module):
    reads_codes = False

    def __init__(self, config: Moe, width: int, depth: int) -> None:
        super().__init__()
        self.config = config
        self.router = nn.Linear(width, config.experts, bias=False)
        self.experts = Experts(config.experts, config.hidden, width, depth)
        self.shared: GatedFfn | None = Swiglu(hidden=config.shared).build(width, depth) if config.shared else None

    def initial(self) -> dict[str, Normal]:
        """The router's logits have a variance of one, which is small beside what it learns."""
        return {"router.weight": Normal(0.0, self.router.in_features**-0.5)}

    def roles(self) -> dict[str, RoleKind]:
        return {"router.weight": "router"}

    def flops(self, lengths: tuple[int, ...]) -> int:
        """Forward operations for documents of these lengths: two per token and weight that it meets."""
        met = self.router.weight.numel() + self.config.active * self.experts.size
        return 2 * sum(lengths) * met + (0 if self.shared is None else self.shared.flops(lengths))

    def forward(self, x: Tensor, documents: Documents) -> tuple[Tensor, Tally]:
        """x: B T D, this rank's tokens. Logits, scores and choice are in at least fp32; padding meets no expert."""
        config, tokens = self.config, x.flatten(0, 1)
        wide = torch.promote_types(x.dtype, torch.float32)
        logits = nn.functional.linear(tokens.to(wide), self.router.weight.to(wide))
        groups = None if config.groups == 1 else (config.groups, config.kept_groups)
        settings = {"normalised": config.normalised, "scale": config.scale}
        probability, chosen = route(logits, config.active, score=config.score, groups=groups, **settings)  # type: ignore[arg-type]
        if documents.places is not None:
            chosen = torch.where(documents.places.view(-1, 1) >= 0, chosen, -1)
        out = self.experts(tokens, chosen, probability).view_as(x)
        if self.shared is not None:
            out = out + self.shared(x)
        return out, self._tally(logits, chosen, lambda each: by_row(each, documents, len(x)))

    def _tally(self, logits: Tensor, chosen: Tensor, summed: Callable[[Tensor], Tensor]) -> Tally:
        """logits: N E; chosen: N K; summed: over rows, N E -> R E."""
        config, none = self.config, logits.new_zeros(())
        met = torch.zeros_like(logits, requires_grad=False)
        met = met.scatter(1, chosen.long().clamp(min=0), 1.0) * (chosen[:, :1] >= 0)
        scores = z = none
        if config.balance:
            each = logits.sigmoid() if config.score == "sigmoid" else logits.softmax(-1)
            if config.score == "sigmoid":
                each = each / (each.sum(-1, keepdim=True) + 1e-20)
            scores = summed(each)
        if config.z_loss:
            z = summed(logits.logsumexp(-1).square().unsqueeze(1)).squeeze(1)
        return Tally(summed(met), scores, z)

    def charge(self, tally: Tally, given: Tensor, rows: "RowSums") -> Tensor:
        """What this rank's tokens are charged, in nats times labels: the ranks' parts sum to the whole.

        given: R E, tokens of each row that each expert was given, on all ranks.
        """
        config, cost = self.config, given.new_zeros(())
        weight = rows.labels / rows.tokens.clamp(min=1)  # R
        if config.balance:
            share = given / (rows.tokens * config.active).clamp(min=1).unsqueeze(1)
            cost = cost + config.balance * config.experts * (weight.unsqueeze(1) * share * tally.scores).sum()
        if config.z_loss:
            cost = cost + config.z_loss * (weight * tally.z).sum()
        return cost


def by_row(x: Tensor, documents: Documents, rows: int) -> Tensor:
    """Sums over the tokens of each row, padding left out: N E -> R E. rows: R, where this rank has all of each row."""
    if documents.places is None:
        return x.unflatten(0, (rows, -1)).sum(1)
    rows, length = documents.whole
    number = torch.arange(rows, dtype=torch.int32, device=x.device)
    of = documents.places.flatten().div(length, rounding_mode="floor")  # -1 for padding
    return (number.unsqueeze(1) == of).to(x.dtype) @ x  # the same each time


class RowSums(NamedTuple):
    """Of each row of a micro-batch, on all ranks: R each."""

    tokens: Tensor
    labels: Tensor


def evenness(loads: Sequence[Tensor]) -> dict[str, Tensor]:
    """How evenly tokens were given to experts, of the layer where that is worst: device scalars.

    load_max: the fullest expert's tokens over the mean, 1 at best. load_entropy: of the shares, over that of equal
    ones, 1 at best. loads: of each layer, E.
    """
    fullest = [load.max() / load.mean().clamp(min=1e-30) for load in loads]
    shares = [load / load.sum().clamp(min=1e-30) for load in loads]
    entropies = [torch.special.entr(share).sum() / log(len(share)) for share in shares]
    return {"load_max": torch.stack(fullest).max(), "load_entropy": torch.stack(entropies).min()}
