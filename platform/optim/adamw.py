"""AdamW (Loshchilov and Hutter, 2019) in torch's fused kernel, over local shards."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from math import prod

import torch
from torch import Tensor

from farspan.models.roles import ROLES, Role
from farspan.parallel.fsdp import local
from farspan.platform.optim.adam import Adam
from farspan.platform.optim.adamw8 import Adamw8
from farspan.platform.optim.placement import Interleaved, Streamed


@dataclass(frozen=True, kw_only=True)
class Adamw(Adam):
    """AdamW (Loshchilov and Hutter, 2019) with weights and both moments in fp32, in torch's fused kernel."""

    offload: Streamed | Interleaved | None = None
    """Where the state lives; null: on the device. Offloaded, weights are bf16 with the other half of fp32 in the state,
    and the kernel is adamw8's."""

    @property
    def weight_type(self) -> torch.dtype:
        """What weights are held in."""
        return torch.float32 if self.offload is None else torch.bfloat16

    @property
    def in_halves(self) -> Adamw8:
        """The same over bf16 weights."""
        shared = {field.name: getattr(self, field.name) for field in fields(Adam)}
        return Adamw8(**shared, master="residual16", exact=ROLES)

    def state_bytes(self, shape: tuple[int, ...], role: Role) -> int:
        """Of the state of one whole weight: two fp32 moments, and what the weight does not hold of fp32."""
        return (8 if self.offload is None else 10) * prod(shape)

    def build(self, weights: Mapping[str, Tensor], roles: Mapping[str, Role], seed: int) -> "AdamwState":
        return AdamwState(self, weights)


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
