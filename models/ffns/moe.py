"""Experts: many feed-forward layers, of which a router gives every token to a few (Shazeer et al., 2017)."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import log, sqrt
from typing import NamedTuple

import torch
from torch import Tensor, nn

from farspan.kernels.grouped_gemm import experts
from farspan.kernels.permute import permute, sort, unpermute
from farspan.kernels.random import Normal
from farspan.kernels.route import Score, route
from farspan.models.ffns.gated import GatedFfn, Swiglu
from farspan.models.linear import Linear, Plain
from farspan.models.roles import RoleKind
from farspan.parallel.placement import Placement


class Tally(NamedTuple):
    """What a router reports of one forward."""

    cost: Tensor
    """What each row is charged for uneven loads and large logits, B, differentiable."""
    load: Tensor
    """Tokens that each expert was given, E, in fp32."""


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
        """What keeps the experts from being spread over `tp` ranks."""
        if tp == 1:
            return []
        return [f"kind=moe: its rows are balanced whole, which parallel.tp={tp} would cut; set parallel.tp=1"]

    def context_problems(self, cp: int) -> list[str]:
        """What keeps the rows from being cut over `cp` ranks."""
        if cp == 1:
            return []
        return [f"kind=moe: its rows are balanced whole, which parallel.cp={cp} would cut; set parallel.cp=1"]

    def linear_problems(self, linear: Linear, width: int, tp: int) -> list[str]:
        """What keeps the products from being built as `linear`."""
        if isinstance(linear, Plain):
            return []
        return ["experts: their products are in the type of the weights alone; set linear: {kind: plain}"]

    def build(self, width: int, depth: int, linear: Linear = Plain()) -> "MoeFfn":  # noqa: B008 - frozen
        return MoeFfn(self, width, depth)


class MoeFfn(nn.Module):
    reads_codes = False

    def __init__(self, config: Moe, width: int, depth: int) -> None:
        super().__init__()
        self.config, self.depth = config, depth
        self.router = nn.Linear(width, config.experts, bias=False)
        self.w13 = nn.Parameter(torch.empty(config.experts, 2, config.hidden, width))
        self.w2 = nn.Parameter(torch.empty(config.experts, width, config.hidden))
        self.shared: GatedFfn | None = Swiglu(hidden=config.shared).build(width, depth) if config.shared else None

    def initial(self) -> dict[str, Normal]:
        """Experts as `GatedFfn`'s; the router's logits have a variance of one, which is small beside what it learns."""
        _, _, hidden, width = self.w13.shape
        return {
            "router.weight": Normal(0.0, width**-0.5),
            "w13": Normal(0.0, width**-0.5),
            "w2": Normal(0.0, hidden**-0.5 / sqrt(2 * self.depth)),
        }

    def roles(self) -> dict[str, RoleKind]:
        return {"router.weight": "router"}

    def placements(self) -> dict[str, Placement]:
        return {}

    def flops(self, lengths: tuple[int, ...]) -> int:
        """Forward operations for documents of these lengths: two per token and weight that it meets."""
        _, _, hidden, width = self.w13.shape
        met = self.router.weight.numel() + self.config.active * 3 * hidden * width
        return 2 * sum(lengths) * met + (0 if self.shared is None else self.shared.flops(lengths))

    def forward(self, x: Tensor) -> tuple[Tensor, Tally]:
        """x: B T D. Logits, scores and choice are in at least fp32."""
        config, tokens = self.config, x.flatten(0, 1)
        wide = torch.promote_types(x.dtype, torch.float32)
        logits = nn.functional.linear(tokens.to(wide), self.router.weight.to(wide))
        groups = None if config.groups == 1 else (config.groups, config.kept_groups)
        settings = {"normalised": config.normalised, "scale": config.scale}
        probability, chosen = route(logits, config.active, score=config.score, groups=groups, **settings)  # type: ignore[arg-type]
        order = sort(chosen, config.experts)
        share = probability.flatten()[order.rows]
        out = unpermute(experts(permute(tokens, order), self.w13, self.w2, share, order.ends), order).view_as(x)
        if self.shared is not None:
            out = out + self.shared(x)
        return out, self._tally(logits.unflatten(0, x.shape[:2]), chosen.view(x.shape[0], -1))

    def _tally(self, logits: Tensor, chosen: Tensor) -> Tally:
        """logits: B T E; chosen: B T·K."""
        config, (rows, length, count) = self.config, logits.shape
        given = logits.new_zeros(rows, count).scatter_add_(1, chosen.long(), logits.new_ones(1).expand(chosen.shape))
        cost = logits.new_zeros(rows)
        if config.balance:
            scores = logits.sigmoid() if config.score == "sigmoid" else logits.softmax(-1)
            if config.score == "sigmoid":
                scores = scores / (scores.sum(-1, keepdim=True) + 1e-20)
            cost = cost + config.balance * count / (length * config.active) * (given * scores.mean(1)).sum(-1)
        if config.z_loss:
            cost = cost + config.z_loss * logits.logsumexp(-1).square().mean(1)
        return Tally(cost, given.sum(0))


def evenness(loads: Sequence[Tensor]) -> dict[str, Tensor]:
    """How evenly tokens were given to experts, of the layer where that is worst: device scalars.

    load_max: the fullest expert's tokens over the mean, 1 at best. load_entropy: of the shares, over that of equal
    ones, 1 at best. loads: of each layer, E.
    """
    fullest = [load.max() / load.mean().clamp(min=1e-30) for load in loads]
    shares = [load / load.sum().clamp(min=1e-30) for load in loads]
    entropies = [torch.special.entr(share).sum() / log(len(share)) for share in shares]
    return {"load_max": torch.stack(fullest).max(), "load_entropy": torch.stack(entropies).min()}
