"""Gated feed-forward layers (Shazeer, 2020): one product decides how much of another goes on."""

from dataclasses import dataclass
from math import sqrt
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from farspan.kernels.fp8 import Coded
from farspan.kernels.random import Normal
from farspan.kernels.swiglu import geglu, swiglu
from farspan.kernels.swiglu_codes import coded_geglu, coded_swiglu
from farspan.models.linear import Linear, Plain, together
from farspan.parallel.placement import Column, Placement, Row


class Activation(Protocol):
    def __call__(self, gate: Tensor, up: Tensor) -> Tensor: ...


class CodedActivation(Protocol):
    def __call__(self, gate: Tensor, up: Tensor, *, transposed: bool) -> Coded: ...


class Gate(NamedTuple):
    """What is between the products: as a tensor, and as codes for a layer that reads nothing else."""

    activation: Activation
    coded: CodedActivation


@dataclass(frozen=True, kw_only=True)
class Gated:
    """What the gated kinds share."""

    hidden: int
    """Channels between the two products."""

    def __post_init__(self) -> None:
        if self.hidden < 1:
            raise ValueError(f"hidden={self.hidden}: must be at least 1; 8/3 of the width is usual")

    def tensor_problems(self, tp: int) -> list[str]:
        """What keeps the channels from being dealt out to `tp` ranks."""
        return [f"hidden={self.hidden}: must be a multiple of parallel.tp={tp}"] if self.hidden % tp else []

    def linear_problems(self, linear: Linear, width: int, tp: int) -> list[str]:
        """What keeps the products, cut over `tp` ranks, from being built as `linear`."""
        hidden = self.hidden // tp
        sizes = {"to_gate": (width, hidden), "to_up": (width, hidden), "to_out": (hidden, width)}
        return [found for name, size in sizes.items() for found in linear.problems(*size, name)]


@dataclass(frozen=True, kw_only=True)
class Swiglu(Gated):
    """silu(x·gate) ∘ (x·up), then down (Shazeer, 2020)."""

    def build(self, width: int, depth: int, linear: Linear = Plain()) -> "GatedFfn":  # noqa: B008 - frozen
        return GatedFfn(self.hidden, width, depth, Gate(swiglu, coded_swiglu), linear)


@dataclass(frozen=True, kw_only=True)
class Geglu(Gated):
    """gelu(x·gate) ∘ (x·up), then down, with the tanh approximation of GELU (Shazeer, 2020)."""

    def build(self, width: int, depth: int, linear: Linear = Plain()) -> "GatedFfn":  # noqa: B008 - frozen
        return GatedFfn(self.hidden, width, depth, Gate(geglu, coded_geglu), linear)


class GatedFfn(nn.Module):
    def __init__(self, hidden: int, width: int, depth: int, gate: Gate, linear: Linear) -> None:
        super().__init__()
        self.depth, self.gate, self.linear = depth, gate, linear
        self.to_gate = linear.build(width, hidden)
        self.to_up = linear.build(width, hidden)
        self.to_out = linear.build(hidden, width)

    @property
    def reads_codes(self) -> bool:
        """Whether `forward` takes the codes of x as well, and reads nothing else of it."""
        return self.linear.reads_codes

    def initial(self) -> dict[str, Normal]:
        """The mean square of silu(g)·u is 0.36 for standard normal g and u, of gelu(g)·u 0.43: near enough to 1."""
        inner, outer = self.to_gate.in_features, self.to_out.in_features
        return {
            "to_gate.weight": Normal(0.0, inner**-0.5),
            "to_up.weight": Normal(0.0, inner**-0.5),
            "to_out.weight": Normal(0.0, outer**-0.5 / sqrt(2 * self.depth)),
        }

    def placements(self) -> dict[str, Placement]:
        return {"to_gate.weight": Column(), "to_up.weight": Column(), "to_out.weight": Row()}

    def flops(self, lengths: tuple[int, ...]) -> int:
        """Forward operations for documents of these lengths: two per weight and token."""
        return 2 * sum(lengths) * 3 * self.to_out.weight.numel()

    def forward(self, x: Tensor | Coded) -> Tensor:
        gate, up = together(x, self.to_gate, self.to_up)
        if self.linear.reads_codes:
            inner: Tensor | Coded = self.gate.coded(gate, up, transposed=torch.is_grad_enabled())
        else:
            inner = self.gate.activation(gate, up)
        out: Tensor = self.to_out(inner)  # B T D
        return out
