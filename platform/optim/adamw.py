"""AdamW (Loshchilov and Hutter, 2019) in torch's fused kernel, over local shards."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from farspan.parallel.fsdp import local


@dataclass(frozen=True, kw_only=True)
class Adamw:
    """Adam with decoupled weight decay (Loshchilov and Hutter, 2019), in torch's fused kernel."""

    rate: float
    """Peak learning rate; the schedule scales it."""
    betas: tuple[float, ...] = (0.9, 0.95)
    """Decay of the mean of gradients and of the mean of their squares, per step."""
    eps: float = 1e-8
    """Added to the root of the mean square, against division by zero."""
    weight_decay: float = 0.1
    """Decoupled, on matrices only: norms and other vectors are not decayed."""
    max_norm: float | None = 1.0
    """The gradient is scaled down to this norm; null: never."""

    def __post_init__(self) -> None:
        if self.rate < 0 or self.weight_decay < 0:
            raise ValueError(f"rate={self.rate}, weight_decay={self.weight_decay}: must not be negative")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas={list(self.betas)}: must be two numbers in [0, 1)")
        if self.eps <= 0:
            raise ValueError(f"eps={self.eps}: must be positive; 1e-8 is usual")
        if self.max_norm is not None and self.max_norm <= 0:
            raise ValueError(f"max_norm={self.max_norm}: must be positive; null for no clipping")

    def build(self, weights: Mapping[str, Tensor]) -> "AdamwState":
        return AdamwState(self, weights)

    @staticmethod
    def bytes_per_weight() -> int:
        """State of one weight: two fp32 moments."""
        return 8


class AdamwState:
    """Two moments for every weight, and the count of updates made."""

    def __init__(self, config: Adamw, weights: Mapping[str, Tensor]) -> None:
        self.config = config
        self.weights = weights
        self.first = {name: torch.zeros_like(weight) for name, weight in weights.items()}
        self.second = {name: torch.zeros_like(weight) for name, weight in weights.items()}
        device = next(iter(weights.values())).device
        self.steps = torch.zeros(1, device=device)

    def state(self) -> dict[str, Tensor]:
        """By name: `step`, `first.<weight>`, `second.<weight>`."""
        first = {f"first.{name}": moment for name, moment in self.first.items()}
        return {"step": self.steps, **first, **{f"second.{name}": moment for name, moment in self.second.items()}}

    @torch.no_grad()
    def update(self, rate: float, scale: Tensor) -> None:
        """See `farspan.parallel.engine.Optimizer`; the fused kernel itself reads `scale` and whether to skip."""
        skip = (scale == 0).float().view(())
        self.steps += 1 - skip
        inverse = torch.where(scale == 0, 1.0, 1 / scale).float().view(())
        matrices = [name for name, weight in self.weights.items() if weight.dim() >= 2]
        vectors = [name for name, weight in self.weights.items() if weight.dim() < 2]
        for names, decay in ((matrices, self.config.weight_decay), (vectors, 0.0)):
            self._fused(names, rate, decay, inverse, skip)

    def _fused(self, names: list[str], rate: float, decay: float, inverse: Tensor, skip: Tensor) -> None:
        names = [n for n in names if self.weights[n].grad is not None and local(self.weights[n]).numel()]
        if not names:
            return  # a rank may hold no part of any small weight
        torch._fused_adamw_(
            [local(self.weights[n]) for n in names],
            [local(self.weights[n].grad) for n in names],  # type: ignore[arg-type]
            [local(self.first[n]) for n in names],
            [local(self.second[n]) for n in names],
            [],
            [self.steps.view(())] * len(names),
            lr=rate,
            beta1=self.config.betas[0],
            beta2=self.config.betas[1],
            weight_decay=decay,
            eps=self.config.eps,
            amsgrad=False,
            maximize=False,
            grad_scale=inverse,
            found_inf=skip,
        )
