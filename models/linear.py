"""Linear layers without a bias, in the type of the weights or in eight bits; the weights are the same either way."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from farspan.kernels.fp8 import Coded, Gradient, Recipe, coded, fp8_linear, linear_problems


@dataclass(frozen=True, kw_only=True)
class Plain:
    """Products in the type that weights and activations have."""

    @property
    def reads_codes(self) -> bool:
        """Whether layers read nothing of x but its codes by rows, so that what makes x may leave codes alone behind."""
        return False

    def problems(self, inputs: int, outputs: int, name: str) -> list[str]:
        """What keeps the layer `name` of these sizes, on one rank, from being built: nothing."""
        return []

    def build(self, inputs: int, outputs: int) -> nn.Linear:
        return nn.Linear(inputs, outputs, bias=False)


@dataclass(frozen=True, kw_only=True)
class Fp8:
    """Products of eight-bit numbers (e4m3) under bf16 weights: for Hopper, simulated on a CPU."""

    recipe: Recipe = "row"
    """row: one scale a token and output. block: one for 128 channels, 128 x 128 of a weight (DeepSeek-V3); slower."""
    weight_gradient: Gradient = "fp8"
    """The product for the weight's gradient: fp8, or bf16, which is exact, slower and keeps twice the bytes of x."""

    @property
    def reads_codes(self) -> bool:
        """Whether layers read nothing of x but its codes by rows, so that what makes x may leave codes alone behind."""
        return self.recipe == "row" and self.weight_gradient == "fp8"

    def problems(self, inputs: int, outputs: int, name: str) -> list[str]:
        """What keeps the layer `name` of these sizes, on one rank, from being built."""
        return [f"{name}: {problem}" for problem in linear_problems(inputs, outputs, self.recipe)]

    def build(self, inputs: int, outputs: int) -> nn.Linear:
        return Fp8Linear(self, inputs, outputs)


Linear = Plain | Fp8


class Fp8Linear(nn.Linear):
    """`nn.Linear` without a bias whose products are of eight-bit numbers; see `farspan.kernels.fp8.fp8_linear`."""

    def __init__(self, config: Fp8, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)
        self.config = config

    def forward(self, x: Tensor | Coded) -> Tensor:
        place, codes = x if isinstance(x, Coded) else (x, None)
        recipe, gradient = self.config.recipe, self.config.weight_gradient
        return fp8_linear(place, self.weight, recipe=recipe, weight_gradient=gradient, quantised=codes)


def together(x: Tensor | Coded, *linears: nn.Module) -> tuple[Tensor, ...]:
    """What several layers make of one x, whose codes are found once for all that take the same ones."""
    if isinstance(x, Coded):
        return tuple(layer(x) for layer in linears)
    found: dict[Recipe, Coded] = {}
    for recipe in {layer.config.recipe: None for layer in linears if isinstance(layer, Fp8Linear)}:
        alike = [layer for layer in linears if isinstance(layer, Fp8Linear) and layer.config.recipe == recipe]
        learns = any(layer.config.weight_gradient == "fp8" and layer.weight.requires_grad for layer in alike)
        found[recipe] = coded(x, recipe, transposed=learns and torch.is_grad_enabled())
    return tuple(layer(found[layer.config.recipe] if isinstance(layer, Fp8Linear) else x) for layer in linears)
