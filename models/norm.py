"""Root-mean-square normalisation (Zhang and Sennrich, 2019)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from farspan.kernels.random import Normal


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
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
