"""Rotary position embedding (Su et al., 2021): positions turn pairs of channels."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Rope:
    """Angles position · theta^(-2i/K) for channel pair i of K; pairs are (i, i + K/2), as in Llama's weights."""

    theta: float = 10000.0

    def __post_init__(self) -> None:
        if self.theta <= 1.0:
            raise ValueError(f"theta={self.theta}: must be greater than 1; 10000 is usual")

    def angles(self, positions: Tensor, key_dim: int) -> tuple[Tensor, Tensor]:
        """Cosine and sine for positions (B T): B T 1 K/2 each, in fp32."""
        pairs = torch.arange(0, key_dim, 2, dtype=torch.float32, device=positions.device)
        angles = positions.to(torch.float32).unsqueeze(-1) * self.theta ** (-pairs / key_dim)
        return angles.cos().unsqueeze(2), angles.sin().unsqueeze(2)


def rotate(x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """Turns x (B T H K) by the angles, in at least fp32; the result has x's type."""
    cos, sin = angles
    a, b = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)
