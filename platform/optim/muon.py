"""Muon: momentum whose matrices are made orthogonal, so that a step moves all their directions alike."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod, sqrt
from typing import Literal

import torch
from torch import Tensor

from farspan.models.roles import Role
from farspan.parallel.fsdp import beside, local
from farspan.parallel.whole_matrices import WholeMatrices
from farspan.platform.optim.matrices import (
    Rest,
    RestState,
    at_least_fp32,
    check,
    holds_matrices,
    keep,
)

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of X, XXᵀX and (XXᵀ)²X, after Jordan et al. (2024): steep at 0, so that five steps bring singular values near 1."""
STEPS = 5
EPS = 1e-7
"""A matrix of a smaller norm is left small: the weights of an expert that sees no tokens come to rest."""

_WIDEST_TP = 8
"""The most parts that tensor parallelism may cut the last axis into without cutting a block of codes."""
_LEAST_BLOCK = 16
"""Smaller blocks would spend more than a quarter of a byte a weight on scales: such weights keep fp32 momentum."""


@dataclass(frozen=True, kw_only=True)
class Muon:
    """Muon for the matrices of layers, another optimizer for the rest.

    The equations are those of Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024), and of
    Liu et al., "Muon is Scalable for LLM Training" (2025), whose scaling and decoupled decay they are:

        B ← μ B + (1 − μ) G,    O = orthogonal((1 − μ) G + μ B, or B without nesterov),    W ← (1 − ηλ) W − η s O.

    State: 4 bytes a weight, or 1 and 4/block under int8. Each matrix is made whole on one rank and computed once,
    which sends it there and back (in bf16 on a GPU). Gradients are written over.
    """

    rate: float
    """Peak learning rate of the matrices; the schedule scales it."""
    rest: Rest
    """What moves embedding, head, routers and norms. Its rate is its own and follows the same schedule; its max_norm
    has no say: the whole gradient is clipped by ours."""
    beta: float = 0.95
    """Decay of the mean of gradients, μ, per step."""
    nesterov: bool = True
    """The step looks ahead: the newest gradient counts once more."""
    momentum: Literal["fp32", "int8"] = "fp32"
    """What the mean of gradients is kept in. int8: linear codes in blocks of at most 256 columns of a row, with an fp32
    scale each (arXiv 2509.23106)."""
    scaling: Literal["match_rms_adamw", "original"] = "match_rms_adamw"
    """s for a matrix of A outputs and B inputs. match_rms_adamw: 0.2 √max(A, B), steps as large as AdamW's, whose rate
    and decay fit (Liu et al.); original: √max(1, A/B) (Jordan et al.), for rates about 0.02."""
    weight_decay: float = 0.1
    """Decoupled, of the matrices; what the rest decays is its own."""
    max_norm: float | None = 1.0
    """The gradient of all weights is scaled down to this norm; null: never."""

    def __post_init__(self) -> None:
        check(rate=self.rate, weight_decay=self.weight_decay, max_norm=self.max_norm, rest=self.rest)
        if not 0 <= self.beta < 1:
            raise ValueError(f"beta={self.beta}: must be in [0, 1); 0.95 is usual")

    @property
    def weight_type(self) -> torch.dtype:
        return torch.float32

    def state_bytes(self, shape: tuple[int, ...], role: Role) -> int:
        """Bytes of state of one whole weight."""
        if not holds_matrices(shape, role):
            return self.rest.state_bytes(shape, role)
        block = self.block(shape, role)
        return 4 * prod(shape) if block is None else prod(shape) + 4 * prod(shape) // block

    def block(self, shape: tuple[int, ...], role: Role) -> int | None:
        """Columns that share a scale, from the global shape alone: the same on every mesh. None: kept in fp32."""
        part = shape[-1] // _WIDEST_TP if role.cut_inputs and shape[-1] % _WIDEST_TP == 0 else shape[-1]
        block = min(256, part & -part)
        return block if self.momentum == "int8" and block >= _LEAST_BLOCK else None

    def build(self, weights: Mapping[str, Tensor], roles: Mapping[str, Role], seed: int) -> "MuonState":
        return MuonState(self, weights, roles, seed)


class MuonState:
    """The momentum of every matrix, and the state of the rest."""

    def __init__(self, config: Muon, weights: Mapping[str, Tensor], roles: Mapping[str, Role], seed: int) -> None:
        self.config = config
        self.weights = {n: w for n, w in weights.items() if holds_matrices(tuple(w.shape), roles[n])}
        others = {name: weight for name, weight in weights.items() if name not in self.weights}
        self.rest = RestState(config.rest, config.rate, others, roles, seed)
        self.whole = WholeMatrices(self.weights, _operations)
        self.momentum = {
            n: _Coded(n, w, block) if (block := config.block(tuple(w.shape), roles[n])) else _Plain(n, w)
            for n, w in self.weights.items()
        }

    def state(self) -> dict[str, Tensor]:
        """By name: `momentum.<weight>`, `momentum_scale.<weight>` where it is int8, and the rest's as `rest.<…>`."""
        tensors = {name: tensor for buffer in self.momentum.values() for name, tensor in buffer.state().items()}
        return tensors | self.rest.state()

    @torch.no_grad()
    def update(self, rate: float, scale: Tensor) -> None:
        """See `farspan.parallel.engine.Optimizer`. On the way a gradient becomes its matrix's direction in place."""
        go = scale != 0
        gradients = {name: weight.grad for name, weight in self.weights.items() if weight.grad is not None}
        for name, gradient in gradients.items():
            self._advance(name, local(gradient), scale, go)
        for stacks in self.whole.rounds:
            if moving := [stack for stack in stacks if stack.name in gradients]:
                dtype = _products(gradients[moving[0].name])
                wholes = self.whole.gather(moving, gradients, dtype)
                directions = {stack: orthogonal(whole) for stack, whole in wholes.items()}
                self.whole.scatter(moving, directions, gradients, dtype)
        for name, direction in gradients.items():
            weight, step = local(self.weights[name]), rate * self._scaling(*self.weights[name].shape[-2:])
            keep(weight, (weight * (1 - rate * self.config.weight_decay)).add_(local(direction), alpha=-step), go)
        self.rest.update(rate, scale)

    def _advance(self, name: str, gradient: Tensor, scale: Tensor, go: Tensor) -> None:
        """The momentum takes the gradient in, and the gradient becomes what is to be made orthogonal."""
        buffer, decay = self.momentum[name], self.config.beta
        old = buffer.read()
        taken = gradient.to(old.dtype) * scale
        new = old.lerp(taken, 1 - decay)
        buffer.write(new, go)
        gradient.copy_(taken.lerp_(new, decay) if self.config.nesterov else new)

    def _scaling(self, outputs: int, inputs: int) -> float:
        if self.config.scaling == "original":
            return sqrt(max(1.0, outputs / inputs))
        return 0.2 * sqrt(max(outputs, inputs))


def orthogonal(matrices: Tensor) -> Tensor:
    """n A B -> n A B: about U Vᵀ of each matrix U S Vᵀ, most singular values between 0.7 and 1.2; types stay.

    Five steps X ← a X + b XXᵀX + c (XXᵀ)²X of Newton and Schulz's iteration (Jordan et al., 2024; Bernstein and
    Newhouse, 2024), over the shorter side.
    """
    a, b, c = COEFFICIENTS
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp(min=EPS)
    for _ in range(STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def _operations(rows: int, columns: int) -> int:
    """Of one matrix made orthogonal."""
    short, long = sorted((rows, columns))
    return STEPS * (4 * short * short * long + 2 * short**3)


def _products(gradient: Tensor) -> torch.dtype:
    """What matrices travel and multiply in: the iteration forgives bf16's rounding, which CPUs are slow at."""
    return torch.bfloat16 if gradient.is_cuda else at_least_fp32(gradient)


class _Plain:
    """Momentum in fp32."""

    def __init__(self, name: str, weight: Tensor) -> None:
        self.name = name
        self.values = beside(weight, at_least_fp32(weight))

    def state(self) -> dict[str, Tensor]:
        return {f"momentum.{self.name}": self.values}

    def read(self) -> Tensor:
        return local(self.values)

    def write(self, new: Tensor, go: Tensor) -> None:
        keep(local(self.values), new, go)


class _Coded:
    """Momentum in linear codes of −127 to 127, in blocks of a row with a scale each."""

    def __init__(self, name: str, weight: Tensor, block: int) -> None:
        self.name, self.block, self.type = name, block, at_least_fp32(weight)
        self.codes = beside(weight, torch.int8)
        self.scales = beside(weight, torch.float32, block)
        if local(self.codes).shape[-1] != local(self.scales).shape[-1] * block:
            raise ValueError(
                f"optim.momentum=int8: {name} of {tuple(weight.shape)} is cut within a block of {block} columns; "
                f"set optim.momentum=fp32, or parallel.tp to at most {_WIDEST_TP}"
            )

    def state(self) -> dict[str, Tensor]:
        return {f"momentum.{self.name}": self.codes, f"momentum_scale.{self.name}": self.scales}

    def read(self) -> Tensor:
        codes = local(self.codes).to(self.type).unflatten(-1, (-1, self.block))
        return (codes * local(self.scales).unsqueeze(-1)).flatten(-2)

    def write(self, new: Tensor, go: Tensor) -> None:
        blocks = new.unflatten(-1, (-1, self.block))
        scales = (blocks.abs().amax(-1) / 127).clamp(min=torch.finfo(torch.float32).tiny).float()
        codes = (blocks / scales.unsqueeze(-1)).round().clamp(-127, 127).flatten(-2)
        keep(local(self.codes), torch.where(go, codes, 0).to(torch.int8), go)
        keep(local(self.scales), scales, go)
