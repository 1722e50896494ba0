"""Normalisation of each token by itself: by its root mean square, or by mean and variance."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from farspan.kernels.fp8 import Coded
from farspan.kernels.norm import (
    add_layer_norm,
    add_rms_norm,
    coded_layer_norm,
    coded_rms_norm,
    layer_norm,
    rms_norm,
)
from farspan.kernels.random import Normal


@dataclass(frozen=True, kw_only=True)
class Rms:
    """RMSNorm (Zhang and Sennrich, 2019)."""

    eps: float = 1e-5
    """Added to the mean square under the root."""

    def __post_init__(self) -> None:
        _check_eps(self.eps)

    def build(self, width: int) -> "RMSNorm":
        return RMSNorm(width, self.eps)


@dataclass(frozen=True, kw_only=True)
class Layer:
    """LayerNorm (Ba et al., 2016)."""

    eps: float = 1e-5
    """Added to the variance under the root."""
    bias: bool = True
    """A learned shift besides the learned scale."""

    def __post_init__(self) -> None:
        _check_eps(self.eps)

    def build(self, width: int) -> "LayerNorm":
        return LayerNorm(width, self.eps, self.bias)


Norm = Rms | Layer


class RMSNorm(nn.Module):
    """x / rms(x) · weight over the last dimension, in at least fp32 inside."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps

    def initial(self) -> dict[str, Normal]:
        return {"weight": Normal(1.0, 0.0)}

    def flops(self, lengths: tuple[int, ...]) -> int:
        return 0  # no products: bandwidth, not arithmetic

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)

    def add(self, x: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:
        """x + branch, and its norm, in one pass."""
        return add_rms_norm(x, branch, self.weight, self.eps)

    def coded(self, x: Tensor, branch: Tensor | None) -> tuple[Tensor, Coded]:
        """x + branch, or x, and the codes of its norm for layers that read nothing else."""
        return coded_rms_norm(x, branch, self.weight, self.eps, transposed=torch.is_grad_enabled())


class LayerNorm(nn.Module):
    """(x - mean(x)) / deviation(x) · weight + bias over the last dimension, in at least fp32 inside."""

    def __init__(self, width: int, eps: float, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width)) if bias else None
        self.eps = eps

    def initial(self) -> dict[str, Normal]:
        return {"weight": Normal(1.0, 0.0)} | ({} if self.bias is None else {"bias": Normal(0.0, 0.0)})

    def flops(self, lengths: tuple[int, ...]) -> int:
        return 0  # no products: bandwidth, not arithmetic

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.weight, self.bias, self.eps)

    def add(self, x: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:
        """x + branch, and its norm, in one pass."""
        return add_layer_norm(x, branch, self.weight, self.bias, self.eps)

    def coded(self, x: Tensor, branch: Tensor | None) -> tuple[Tensor, Coded]:
        """x + branch, or x, and the codes of its norm for layers that read nothing else."""
        return coded_layer_norm(x, branch, self.weight, self.bias, self.eps, transposed=torch.is_grad_enabled())


def _check_eps(eps: float) -> None:
    if eps <= 0:
        raise ValueError(f"eps={eps}: must be positive; 1e-5 is usual")
