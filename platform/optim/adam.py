"""What all kinds of AdamW have in common."""

from dataclasses import dataclass

SMALLEST = 1e-18
"""Of eps: kernels square what they divide by."""


@dataclass(frozen=True, kw_only=True)
class Adam:
    """Adam with decoupled weight decay (Loshchilov and Hutter, 2019)."""

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
        if not self.eps >= SMALLEST:
            raise ValueError(f"eps={self.eps}: must be at least {SMALLEST}, whose square fp32 holds; 1e-8 is usual")
        if self.max_norm is not None and self.max_norm <= 0:
            raise ValueError(f"max_norm={self.max_norm}: must be positive; null for no clipping")
