"""Feed-forward layers of two products, with an activation between them that needs no gate."""

from collections.abc import Callable
from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor, nn

from farspan.kernels.fp8 import Coded
from farspan.kernels.poly_norm import poly_norm
from farspan.kernels.random import Normal
from farspan.kernels.swiglu import squared_relu
from farspan.models.linear import Linear, Plain
from farspan.parallel.placement import Column, Placement, Row


@dataclass(frozen=True, kw_only=True)
class SquaredRelu:
    """relu(x·up)², then down (So et al., 2021)."""

    hidden: int
    """Channels between the two products."""

    def __post_init__(self) -> None:
        _check_hidden(self.hidden)

    def tensor_problems(self, tp: int) -> list[str]:
        """What keeps the channels from being dealt out to `tp` ranks."""
        return [f"hidden={self.hidden}: must be a multiple of parallel.tp={tp}"] if self.hidden % tp else []

    def linear_problems(self, linear: Linear, width: int, tp: int) -> list[str]:
        """What keeps the products, cut over `tp` ranks, from being built as `linear`."""
        return _products(linear, width, self.hidden // tp)

    def build(self, width: int, depth: int, linear: Linear = Plain()) -> "PlainFfn":  # noqa: B008 - frozen
        return PlainFfn(self.hidden, width, depth, squared_relu, linear)


@dataclass(frozen=True, kw_only=True)
class PolyNorm:
    """A learned cubic of x·up, each power divided by its root mean square, then down (Zhuo et al., 2024)."""

    hidden: int
    """Channels between the two products."""
    eps: float = 1e-6
    """Added to the mean square of each power under the root."""

    def __post_init__(self) -> None:
        _check_hidden(self.hidden)
        if self.eps <= 0:
            raise ValueError(f"eps={self.eps}: must be positive; 1e-6 is usual")

    def tensor_problems(self, tp: int) -> list[str]:
        """What keeps the channels from being dealt out to `tp` ranks: the means are over all of them."""
        return [
            f"kind=poly_norm: takes means over all hidden channels, which parallel.tp={tp} would deal out; set "
            "parallel.tp=1, or another kind"
        ]

    def linear_problems(self, linear: Linear, width: int, tp: int) -> list[str]:
        """What keeps the products, cut over `tp` ranks, from being built as `linear`."""
        return _products(linear, width, self.hidden // tp)

    def build(self, width: int, depth: int, linear: Linear = Plain()) -> "PlainFfn":  # noqa: B008 - frozen
        return PlainFfn(self.hidden, width, depth, Polynomial(self.eps), linear)


def _products(linear: Linear, width: int, hidden: int) -> list[str]:
    return [*linear.problems(width, hidden, "to_up"), *linear.problems(hidden, width, "to_out")]


def _check_hidden(hidden: int) -> None:
    if hidden < 1:
        raise ValueError(f"hidden={hidden}: must be at least 1; 4 times the width is usual")


class Polynomial(nn.Module):
    """PolyNorm's activation and its four weights."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(3))
        self.bias = nn.Parameter(torch.empty(1))
        self.eps = eps

    def initial(self) -> dict[str, Normal]:
        return {"weight": Normal(1 / 3, 0.0), "bias": Normal(0.0, 0.0)}

    def forward(self, x: Tensor) -> Tensor:
        return poly_norm(x, self.weight, self.bias, self.eps)


class PlainFfn(nn.Module):
    def __init__(
        self, hidden: int, width: int, depth: int, activation: Callable[[Tensor], Tensor], linear: Linear
    ) -> None:
        super().__init__()
        self.depth, self.activation, self.linear = depth, activation, linear
        self.to_up = linear.build(width, hidden)
        self.to_out = linear.build(hidden, width)

    @property
    def reads_codes(self) -> bool:
        """Whether `forward` takes the codes of x as well, and reads nothing else of it."""
        return self.linear.reads_codes

    def initial(self) -> dict[str, Normal]:
        """For a standard normal u the mean square of relu(u)² is 3/2, of PolyNorm's start 1/2: near enough to 1."""
        inner, outer = self.to_up.in_features, self.to_out.in_features
        return {
            "to_up.weight": Normal(0.0, inner**-0.5),
            "to_out.weight": Normal(0.0, outer**-0.5 / sqrt(2 * self.depth)),
        }

    def placements(self) -> dict[str, Placement]:
        return {"to_up.weight": Column(), "to_out.weight": Row()}

    def flops(self, lengths: tuple[int, ...]) -> int:
        """Forward operations for documents of these lengths: two per weight and token."""
        return 2 * sum(lengths) * 2 * self.to_out.weight.numel()

    def forward(self, x: Tensor | Coded) -> Tensor:
        out: Tensor = self.to_out(self.activation(self.to_up(x)))  # B T D
        return out
