"""What optimizers of matrices share: which weights those are, the rest, and state that is cut like its weight."""

from collections.abc import Mapping
from math import prod
from typing import Annotated

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from farspan.models.roles import Role
from farspan.parallel.engine import Optimizer
from farspan.parallel.fsdp import local
from farspan.platform.optim.adamw import Adamw
from farspan.platform.optim.adamw8 import Adamw8

Rest = Annotated[Adamw | Adamw8, "choice"]
"""What moves the weights that are not treated as matrices: embedding, head, router, norms."""


class RestState:
    """The other weights' optimizer: their rate follows the same schedule from its own peak."""

    def __init__(
        self, config: Rest, peak: float, weights: Mapping[str, Tensor], roles: Mapping[str, Role], seed: int
    ) -> None:
        """peak: the rate of the optimizer that this one belongs to."""
        self.ratio = config.rate / peak
        self.optimizer: Optimizer | None = config.build(weights, roles, seed) if weights else None

    def update(self, rate: float, scale: Tensor) -> None:
        if self.optimizer is not None:
            self.optimizer.update(rate * self.ratio, scale)

    def state(self) -> dict[str, Tensor]:
        """By name: `rest.<what the other optimizer names it>`."""
        tensors = {} if self.optimizer is None else self.optimizer.state()
        return {f"rest.{name}": tensor for name, tensor in tensors.items()}


def check(*, rate: float, weight_decay: float, max_norm: float | None, rest: Rest) -> None:
    """What holds for every optimizer with a rest; ValueError says what does not."""
    if rate <= 0 or weight_decay < 0:
        raise ValueError(f"rate={rate}, weight_decay={weight_decay}: the rate must be positive, the decay not negative")
    if max_norm is not None and max_norm <= 0:
        raise ValueError(f"max_norm={max_norm}: must be positive; null for no clipping")
    if rest.weight_type != torch.float32:
        raise ValueError(
            "rest: keeps its weights in bf16, while matrices here are fp32; set rest.master: fp32, rest.offload: null"
        )


def holds_matrices(shape: tuple[int, ...], role: Role) -> bool:
    """Whether a weight is one matrix, or a stack of experts': E out in, or E 2 out in."""
    return role.kind == "matrix" and len(shape) in (2, 3, 4)


def at_least_fp32(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def zeros_beside(weight: Tensor, shape: tuple[int, ...], dtype: torch.dtype, *, before: int = 0) -> Tensor:
    """Zeros of a (global) `shape`, cut over the same ranks as `weight` along the same axes; `before` axes come first
    that are never cut."""
    if not isinstance(weight, DTensor):
        return torch.zeros(shape, dtype=dtype, device=weight.device)
    placements = [Shard(p.dim + before) if isinstance(p, Shard) else Replicate() for p in weight.placements]
    mine, _ = compute_local_shape_and_global_offset(shape, weight.device_mesh, placements)
    part = torch.zeros(mine, dtype=dtype, device=local(weight).device)
    strides = tuple(prod(shape[i + 1 :]) for i in range(len(shape)))
    return DTensor.from_local(
        part, weight.device_mesh, placements, run_check=False, shape=torch.Size(shape), stride=strides
    )


def keep(place: Tensor, new: Tensor, go: Tensor) -> None:
    """Writes `new` where `go` (a boolean on the device) is true, and otherwise leaves every bit as it is."""
    place.copy_(torch.where(go, new, place))
