"""Experts: many feed-forward layers, of which a router gives every token to a few (Shazeer et al., 2017)."""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from farspan.kernels.random import Normal
from farspan.kernels.route import Score, route
from farspan.kernels.router_logits import router_logits
from farspan.models.ffns.balance import even, quantiles, shifted
from farspan.models.ffns.capacity import Drop, most, within
from farspan.models.ffns.experts import Dealt, Experts
from farspan.models.ffns.gated import GatedFfn, Swiglu
from farspan.models.ffns.router import (
    Jitter,
    Kept,
    Routed,
    RowSums,
    Scope,
    Tally,
    by_row,
    met,
    numbered,
    squared_lse,
    unmet,
    without_padding,
)
from farspan.models.linear import Linear, Plain
from farspan.models.roles import RoleKind
from farspan.parallel.context.shard import Documents
from farspan.parallel.expert import Visits
from farspan.parallel.sums import Now

Bias = Literal["none", "aux_free", "quantile"]


@dataclass(frozen=True, kw_only=True)
class Moe(Dealt):
    """SwiGLU experts, each token's few chosen by its scores."""

    experts: int
    """How many there are."""
    active: int
    """How many of them a token meets."""
    hidden: int
    """Channels between the two products of one expert."""
    shared: int = 0
    """Channels of an expert that every token meets besides (DeepSeek-AI, 2024); 0: there is none."""
    shared_gate: bool = False
    """That expert's output is multiplied by the sigmoid of a learned product with the token (Qwen2)."""
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
    """Weight of a loss that is least where every expert is given as many tokens as any other (Fedus et al., 2022): 1
    if so in a row; the rows' mean, weighed by labels, is added to the mean of the tokens' losses."""
    balance_over: Scope = "row"
    """Whose tokens are to be even: a row's; a micro-batch's of a dp rank; or the step's so far, on all ranks. Only the
    first is the same on every mesh and with micro-batches of any size."""
    bias: Bias = "none"
    """What is added to scores for the choice alone, without a gradient. aux_free: after every step bias_rate more for
    experts with fewer tokens than the mean and as much less for the others (Wang et al., 2024). quantile: what would
    have made the last step's loads even."""
    bias_rate: float = 1e-3
    """How far aux_free moves the bias in a step."""
    z_loss: float = 0.0
    """Weight of the mean squared log-sum-exp of the router's logits (Zoph et al., 2022: 1e-3)."""
    jitter: float = 0.0
    """In training the router reads tokens times a random factor that is this near to 1 (Fedus et al., 2022: 1e-2)."""
    capacity: float | None = None
    """An expert takes so many times its even part of a row's visits, rounded up, and no more; null: all of them."""
    drop: Drop = "last"
    """Which visits beyond that are left out: of the last tokens of the row, or of least probability. The probabilities
    of the others stay what they are."""
    forced: bool = False
    """Experts are chosen in turns, whatever the scores: even loads, for benchmarks only."""

    def __post_init__(self) -> None:
        if self.experts < 2:
            raise ValueError(f"experts={self.experts}: must be at least 2; kind: swiglu is one for all tokens")
        if self.groups < 1 or self.experts % self.groups:
            raise ValueError(f"groups={self.groups}: must divide experts={self.experts}")
        if not 1 <= self.kept_groups <= self.groups:
            raise ValueError(f"kept_groups={self.kept_groups}: must be from 1 to groups={self.groups}")
        taking = self.experts // self.groups * self.kept_groups
        if not 1 <= self.active <= taking:
            raise ValueError(
                f"active={self.active}: must be at least 1, and no more than the {taking} experts that take part"
            )
        if self.hidden < 1 or self.shared < 0:
            raise ValueError(f"hidden={self.hidden}, shared={self.shared}: must be at least 1 and 0")
        if self.shared_gate and not self.shared:
            raise ValueError("shared_gate=True: there is no shared expert to multiply; set shared, or false")
        if self.balance < 0 or self.z_loss < 0 or self.scale <= 0:
            raise ValueError(
                f"balance={self.balance}, z_loss={self.z_loss}, scale={self.scale}: must not be negative, nor scale 0"
            )
        if not 0 <= self.jitter < 1:
            raise ValueError(f"jitter={self.jitter}: must be from 0 to below 1; 1e-2 is usual")
        if self.capacity is not None and self.capacity <= 0:
            raise ValueError(f"capacity={self.capacity}: must be above 0; 1.25 is usual, null for none")
        self._check_bias()
        self._check_idle()

    def _check_bias(self) -> None:
        if self.bias_rate <= 0:
            raise ValueError(f"bias_rate={self.bias_rate}: must be above 0; 1e-3 is usual, bias: none for no bias")
        if self.bias != "none" and self.score == "softmax_after":
            raise ValueError(
                f"bias={self.bias}: is for scores of a fixed range; set score: sigmoid or softmax, or bias: none"
            )
        if self.bias == "quantile" and (self.groups > 1 or self.active == self.experts):
            raise ValueError(
                f"bias=quantile: needs groups=1 and active below experts, not groups={self.groups} and "
                f"active={self.active}; set bias: aux_free"
            )

    def _check_idle(self) -> None:
        """Whoever sets what has no say expects something of it."""
        idle = {
            "drop": (self.capacity is None, "without a capacity no visit is left out; set capacity: 1.25"),
            "balance_over": (not self.balance, "balance=0 charges for nobody's loads; set balance: 0.01"),
            "bias": (self.forced, "forced=True chooses in turns, and no bias decides; set forced: false"),
            "bias_rate": (self.bias != "aux_free", f"bias={self.bias} has no rate; set bias: aux_free"),
            "normalised": (self.score == "softmax_after", "softmax_after always sums to one; set score: softmax"),
        }
        for name, (unused, reason) in idle.items():
            value, usual = getattr(self, name), getattr(Moe, name)
            if unused and value != usual:
                raise ValueError(f"{name}={value}: {reason}, or leave {name} at {usual}")

    def tensor_problems(self, tp: int) -> list[str]:
        """What keeps the shared expert from being spread over `tp` ranks; the others are over ep and etp."""
        return [f"shared: {found}" for found in Swiglu(hidden=self.shared).tensor_problems(tp)] if self.shared else []

    @property
    def met(self) -> int:
        return self.active

    def build(self, width: int, depth: int, linear: Linear = Plain()) -> "MoeFfn":  # noqa: B008 - frozen
        return MoeFfn(self, width, depth)


class MoeFfn(Routed):
    def __init__(self, config: Moe, width: int, depth: int) -> None:
        super().__init__()
        self.config, self.scope = config, config.balance_over
        self.router = nn.Linear(width, config.experts, bias=False)
        self.experts = Experts(config.experts, config.hidden, width, depth)
        self.shared: GatedFfn | None = Swiglu(hidden=config.shared).build(width, depth) if config.shared else None
        self.shared_gate = nn.Linear(width, 1, bias=False) if config.shared_gate else None
        self.bias = None if config.bias == "none" else Kept(config.experts)
        self.jitter = Jitter(config.jitter) if config.jitter else None

    def initial(self) -> dict[str, Normal]:
        """The logits of router and gate have a variance of one, which is small beside what they learn."""
        start = Normal(0.0, self.router.in_features**-0.5)
        gate = {} if self.shared_gate is None else {"shared_gate.weight": start}
        return {"router.weight": start, **gate, **({} if self.bias is None else {"bias.value": Normal(0.0, 0.0)})}

    def roles(self) -> dict[str, RoleKind]:
        return {"router.weight": "router", **({} if self.shared_gate is None else {"shared_gate.weight": "router"})}

    def flops(self, lengths: tuple[int, ...]) -> int:
        """Forward operations for documents of these lengths: two per token and weight that it meets."""
        met = self.router.weight.numel() + self.config.active * self.experts.size
        met += 0 if self.shared_gate is None else self.shared_gate.weight.numel()
        return 2 * sum(lengths) * met + (0 if self.shared is None else self.shared.flops(lengths))

    def forward(self, x: Tensor, documents: Documents) -> tuple[Tensor, Tally]:
        """x: B T D, this rank's tokens. Logits, scores and choice are in at least fp32; padding meets no expert."""
        tokens = x.flatten(0, 1)
        numbers, whole = numbered(documents, x)
        logits = self._logits(tokens, numbers, whole[1])
        probability, chosen = self._route(logits, numbers)
        wanted = chosen = without_padding(chosen, documents)
        room, config = None, self.config
        if config.capacity is not None:
            chosen = self._within(wanted, probability, numbers, whole)
            room = partial(most, active=config.active, experts=config.experts, factor=config.capacity)
        beside = None if self.shared is None else partial(self._beside, x)
        out = self.experts(Visits(tokens, chosen, probability, room, whole), beside).view_as(x)
        return out, self._tally(logits, wanted, chosen, documents, len(x))

    def _beside(self, x: Tensor) -> Tensor:
        """What every token is given besides: B T D -> N D."""
        assert self.shared is not None
        found = self.shared(x)
        return (found if self.shared_gate is None else found * self.shared_gate(x).sigmoid()).flatten(0, 1)

    def _logits(self, tokens: Tensor, numbers: Tensor, length: int) -> Tensor:
        if self.jitter is not None and torch.is_grad_enabled():
            tokens = self.jitter(tokens.to(torch.promote_types(tokens.dtype, torch.float32)), numbers, length)
        return router_logits(tokens, self.router.weight)

    def _route(self, logits: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
        config = self.config
        groups = None if config.groups == 1 else (config.groups, config.kept_groups)
        turns: Tensor | None = None
        if config.forced:
            turn = torch.arange(config.active, dtype=torch.int32, device=logits.device)
            turns = (numbers.int().unsqueeze(1) * config.active + turn) % config.experts
        return route(
            logits,
            config.active,
            score=config.score,
            bias=None if self.bias is None else self.bias.value,
            groups=groups,
            normalised=config.normalised,
            scale=config.scale,
            chosen=turns,
        )

    def _within(self, chosen: Tensor, probability: Tensor, numbers: Tensor, whole: tuple[int, int]) -> Tensor:
        config = self.config
        assert config.capacity is not None
        room = {"factor": config.capacity, "drop": config.drop, "every": self.experts.dispatcher.every}
        return within(chosen, probability / config.scale, numbers, whole, config.experts, **room)  # type: ignore[arg-type]

    def _scores(self, logits: Tensor) -> Tensor:
        """N E, of one in all for a token."""
        if self.config.score != "sigmoid":
            return logits.softmax(-1)
        each = logits.sigmoid()
        return each / (each.sum(-1, keepdim=True) + 1e-20)

    def _tally(self, logits: Tensor, wanted: Tensor, chosen: Tensor, documents: Documents, rows: int) -> Tally:
        """logits: N E; wanted, chosen: N K, before and after dropping."""
        config, none = self.config, logits.new_zeros(())
        wish = none
        if config.bias == "quantile" and self.bias is not None and torch.is_grad_enabled():  # a step reads it
            with torch.no_grad():
                scores = logits.softmax(-1) if config.score == "softmax" else logits.sigmoid()
                wish = quantiles(scores, self.bias.value, config.active, documents.places)
        return Tally(
            given=by_row(met(wanted, logits), documents, rows),
            scores=by_row(self._scores(logits), documents, rows) if config.balance else none,
            z=squared_lse(logits, documents, rows, config.z_loss > 0),
            dropped=none if config.capacity is None else ((wanted >= 0) & (chosen < 0)).sum().to(logits.dtype),
            unmet=none if config.capacity is None else unmet(chosen, documents, logits),
            wish=wish,
        )

    def charge(self, tally: Tally, given: Tensor, over: RowSums, rows: RowSums) -> Tensor:
        config, cost = self.config, given.new_zeros(())
        if config.balance:
            cost = cost + config.balance * even(tally.scores, given, over, config.active)
        if config.z_loss:
            cost = cost + config.z_loss * (rows.weight * tally.z).sum()
        return cost

    def tell(self, name: str, now: Now) -> None:
        if self.jitter is not None:
            self.jitter.tell(name, now, self.router.weight.device)

    @torch.no_grad()
    def settle(self, load: Tensor, wish: Tensor, scale: Tensor) -> None:
        if self.bias is None:
            return
        bias = self.bias.value
        if self.config.bias == "quantile":
            moved = (wish / (load.sum() / self.config.active).clamp(min=1)).to(bias.dtype)
        else:
            moved = shifted(bias, load, self.config.bias_rate)
        bias.copy_(torch.where(scale > 0, moved, bias))
