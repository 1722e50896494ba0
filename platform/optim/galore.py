"""GaLore and Natural GaLore: Adam that sees each matrix's gradient through a few of its own directions only.

Plug-ins for comparison, no recommendation. In the table of Natural GaLore's own paper the log perplexity at 60M / 1.1B
parameters is 3.56 / 2.90 for GaLore, 3.53 / 2.80 for Natural GaLore and 3.52 / 2.72 for full-rank Adam: what is lost
grows with the model. Its claim of no additional memory does not hold: the history is `history / 2` times as large as
Adam's low-rank moments.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor

from farspan.kernels.random import Normal, key
from farspan.models.roles import Role
from farspan.parallel.fsdp import local, offset
from farspan.parallel.whole_matrices import Stack, WholeMatrices
from farspan.platform.optim.matrices import (
    Rest,
    RestState,
    at_least_fp32,
    check,
    holds_matrices,
    keep,
    zeros_beside,
)


@dataclass(frozen=True, kw_only=True)
class _LowRank:
    rate: float
    """Peak learning rate of the matrices; the schedule scales it. The papers take about 0.01."""
    rest: Rest
    """What moves the other weights, and matrices whose shorter side is no longer than `rank`. Its rate is its own and
    follows the same schedule; its max_norm has no say: the whole gradient is clipped by ours."""
    rank: int = 128
    """Directions of the shorter side that are kept; a quarter of the width is usual."""
    every: int = 200
    """Updates between two choices of the directions; each is a singular value decomposition of every matrix."""
    scale: float = 0.25
    """What the lifted step is multiplied by, the papers' α."""
    betas: tuple[float, ...] = (0.9, 0.999)
    """Decay of the mean of gradients and of the mean of their squares, per step."""
    eps: float = 1e-6
    """Added to the root of the mean square, against division by zero."""
    weight_decay: float = 0.0
    """Decoupled and after the step, of the matrices; what the rest decays is its own."""
    max_norm: float | None = 1.0
    """The gradient of all weights is scaled down to this norm; null: never."""

    def __post_init__(self) -> None:
        check(rate=self.rate, weight_decay=self.weight_decay, max_norm=self.max_norm, rest=self.rest)
        for name in ("rank", "every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas={list(self.betas)}: must be two numbers in [0, 1)")
        if self.eps <= 0 or self.scale <= 0:
            raise ValueError(f"eps={self.eps}, scale={self.scale}: must be positive; 1e-6 and 0.25 are usual")

    @property
    def weight_type(self) -> torch.dtype:
        return torch.float32

    @property
    def past(self) -> "Past | None":
        """What is kept of earlier gradients; None: nothing."""
        return None

    def projects(self, shape: tuple[int, ...], role: Role) -> bool:
        """Whether a weight's matrices are seen through `rank` directions."""
        return holds_matrices(shape, role) and min(shape[-2:]) > self.rank

    def state_bytes(self, shape: tuple[int, ...], role: Role) -> int:
        """Bytes of state of one whole weight: the directions, two moments and the history, all in fp32."""
        if not self.projects(shape, role):
            return self.rest.state_bytes(shape, role)
        short, long = sorted(shape[-2:])
        copies = 2 + (self.past.steps if self.past else 0)
        return 4 * prod(shape[:-2]) * self.rank * (short + copies * long)

    def build(self, weights: Mapping[str, Tensor], roles: Mapping[str, Role], seed: int) -> "LowRankState":
        return LowRankState(self, weights, roles, seed)


@dataclass(frozen=True, kw_only=True)
class Galore(_LowRank):
    """GaLore (Zhao et al., 2024). With G of m outputs and n inputs, and P the first `rank` right (m ≥ n) or left
    (m < n) singular vectors of the G of every `every`-th update:

        R = G P or Pᵀ G,    N = Adam(R),    W ← (W − η α (N Pᵀ or P N)) (1 − η λ).

    Adam's moments stay as they are when P changes, as in the paper. The signs of P are fixed (its largest entries are
    positive), so that the moments that carry on mean the same on every mesh.
    State: 4 · rank · (short + 2 · long) bytes a matrix, cut over the ranks as the weight is. Each update moves the
    gradient to the rank that projects it and the step back, and P twice.
    """


@dataclass(frozen=True, kw_only=True)
class NaturalGalore(_LowRank):
    """Natural GaLore (arXiv 2410.16029): GaLore whose R goes through the inverse empirical Fisher matrix before Adam.

    With H the last `history` R of a matrix, flattened, as columns, r the newest and λ the damping, the paper has
    r/λ − H z/λ², where (I + HᵀH/λ) z = Hᵀ r (Woodbury). As r is itself a column of H, that is H (λI + HᵀH)⁻¹ e with e
    the unit vector of its place: the same, and no difference of large numbers, as which it is computed here.
    State: 4 · rank · (short + (2 + history) · long) bytes a matrix, more than Adam's 8 · short · long wherever
    rank > short / 11 at a history of 20.
    """

    history: int = 20
    """How many of the last projected gradients the Fisher matrix is made of; each costs as much as one moment."""
    damping: float = 1e-3
    """λ, added to the Fisher matrix's diagonal."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.history < 1 or self.damping <= 0:
            raise ValueError(
                f"history={self.history}, damping={self.damping}: must be at least 1, and positive; take 20 and 1e-3"
            )

    @property
    def past(self) -> "Past | None":
        return Past(self.history, self.damping)


@dataclass(frozen=True)
class Past:
    """How many earlier gradients are kept, and the damping of what is made of them."""

    steps: int
    damping: float


class LowRankState:
    """Directions, moments and history of every projected matrix, and the state of the rest."""

    def __init__(self, config: _LowRank, weights: Mapping[str, Tensor], roles: Mapping[str, Role], seed: int) -> None:
        self.config = config
        self.weights = {n: w for n, w in weights.items() if config.projects(tuple(w.shape), roles[n])}
        if not self.weights:
            raise ValueError(
                f"optim.rank={config.rank}: every matrix has a side no longer, so that none is projected; lower it, or "
                "take the optimizer of optim.rest"
            )
        others = {name: weight for name, weight in weights.items() if name not in self.weights}
        self.rest = RestState(config.rest, config.rate, others, roles, seed)
        self.whole = WholeMatrices(self.weights, lambda rows, columns: rows * columns * min(rows, columns))
        self.basis = {n: _start(w, config.rank, key(seed, "basis", n)) for n, w in self.weights.items()}
        self.first = {n: _seen(w, config.rank) for n, w in self.weights.items()}
        self.second = {n: _seen(w, config.rank) for n, w in self.weights.items()}
        self.history = _History(config.past, self.weights, config.rank, self.whole) if config.past else None
        device = next(iter(weights.values())).device
        self.steps = torch.zeros(1, device=device)
        self.updates = torch.zeros(1, dtype=torch.int64)
        """Calls of `update`, skipped ones too: on the CPU, where it is read without waiting for the device."""

    def state(self) -> dict[str, Tensor]:
        """By name: `step`, `updates`, `basis.<weight>`, `first.…`, `second.…`, `history.…`, `rest.…`."""
        kinds = {"basis": self.basis, "first": self.first, "second": self.second}
        kinds |= {"history": self.history.tensors} if self.history else {}
        tensors = {f"{kind}.{name}": tensor for kind, of in kinds.items() for name, tensor in of.items()}
        return {"step": self.steps, "updates": self.updates, **tensors, **self.rest.state()}

    @torch.no_grad()
    def update(self, rate: float, scale: Tensor) -> None:
        """See `farspan.parallel.engine.Optimizer`. Gradients are written over.

        Every `every`-th update the host of a GPU waits for the decompositions: torch's cannot do without.
        """
        go = scale != 0
        turn = int(self.updates) % self.config.every == 0
        self.updates += 1
        self.steps += go
        gradients = {name: weight.grad for name, weight in self.weights.items() if weight.grad is not None}
        for gradient in map(local, gradients.values()):
            gradient.copy_(torch.where(go, gradient * scale, 0))  # what is not finite must not reach the decomposition
        seen = {name: _seen(self.weights[name], self.config.rank) for name in gradients}
        for stacks in self._rounds(gradients):
            self._project(stacks, gradients, seen, go if turn else None)
        if self.history:
            self.history.precondition(seen, self.steps, go)
        for name, tensor in seen.items():
            self._adam(name, local(tensor), go)
        for stacks in self._rounds(gradients):
            self._lift(stacks, seen, gradients)
        for name, step in gradients.items():
            weight = local(self.weights[name])
            moved = weight.add(local(step), alpha=-rate * self.config.scale).mul_(1 - rate * self.config.weight_decay)
            keep(weight, moved, go)
        self.rest.update(rate, scale)

    def _rounds(self, gradients: Mapping[str, Tensor]) -> list[list[Stack]]:
        rounds = [[stack for stack in stacks if stack.name in gradients] for stacks in self.whole.rounds]
        return [stacks for stacks in rounds if stacks]

    def _project(
        self, stacks: list[Stack], gradients: Mapping[str, Tensor], seen: Mapping[str, Tensor], go: Tensor | None
    ) -> None:
        """go: choose the directions anew, where it is true; None: it is not their turn."""
        dtype = at_least_fp32(gradients[stacks[0].name])
        wholes = self.whole.gather(stacks, gradients, dtype)
        bases = self.whole.gather(stacks, self.basis, dtype)
        if go is not None:
            bases = {stack: torch.where(go, leading(wholes[stack], self.config.rank), bases[stack]) for stack in wholes}
            self.whole.scatter(stacks, bases, self.basis, dtype)
        through = {s: whole @ bases[s] if _tall(whole) else bases[s].mT @ whole for s, whole in wholes.items()}
        self.whole.scatter(stacks, through, seen, dtype)

    def _lift(self, stacks: list[Stack], seen: Mapping[str, Tensor], into: Mapping[str, Tensor]) -> None:
        dtype = at_least_fp32(seen[stacks[0].name])
        wholes = self.whole.gather(stacks, seen, dtype)
        bases = self.whole.gather(stacks, self.basis, dtype)
        lifted = {
            stack: low @ bases[stack].mT if _tall(self.weights[stack.name]) else bases[stack] @ low
            for stack, low in wholes.items()
        }
        self.whole.scatter(stacks, lifted, into, dtype)

    def _adam(self, name: str, gradient: Tensor, go: Tensor) -> None:
        """The gradient becomes Adam's step in place, before the rate."""
        beta, gamma = self.config.betas
        first, second = local(self.first[name]), local(self.second[name])
        keep(first, first.lerp(gradient, 1 - beta), go)
        keep(second, second.lerp(gradient.square(), 1 - gamma), go)
        steps = self.steps.to(torch.float64)
        mean, square = 1 - beta**steps, 1 - gamma**steps
        gradient.copy_((first / mean.to(first.dtype)) / ((second / square.to(first.dtype)).sqrt() + self.config.eps))


class _History:
    """The last projected gradients of every matrix, and the inverse of what they say of the Fisher matrix."""

    def __init__(self, past: Past, weights: Mapping[str, Tensor], rank: int, whole: WholeMatrices) -> None:
        self.past, self.whole = past, whole
        self.tensors = {
            name: zeros_beside(weight, (past.steps, *_seen_shape(weight, rank)), at_least_fp32(weight), before=1)
            for name, weight in weights.items()
        }

    def precondition(self, seen: Mapping[str, Tensor], steps: Tensor, go: Tensor) -> None:
        """The newest gradients, `seen` by name, take the oldest's places, and are replaced by H (λI + HᵀH)⁻¹ e."""
        slot = ((steps - 1) % self.past.steps).long()
        for name, tensor in seen.items():
            kept, new = local(self.tensors[name]), local(tensor)
            kept.index_copy_(0, slot, torch.where(go, new, kept.index_select(0, slot)[0]).unsqueeze(0))
        products = self._products(seen)
        eye = torch.eye(self.past.steps, dtype=products.dtype, device=products.device)
        root = torch.linalg.cholesky_ex(products + self.past.damping * eye).L  # which, unlike cholesky, does not wait
        weights = torch.cholesky_solve(eye.index_select(0, slot).mT.expand(len(products), -1, 1), root).squeeze(-1)
        for matrices, (name, tensor) in zip(self._places(seen), seen.items(), strict=True):
            if local(tensor).numel():
                new, kept = _stack(local(tensor)), _stack(local(self.tensors[name]), before=1)
                new.copy_(torch.einsum("es,semr->emr", weights[matrices].to(new.dtype), kept))

    def _products(self, seen: Mapping[str, Tensor]) -> Tensor:
        """HᵀH of every matrix, one after the other, the same on all ranks."""
        count = sum(prod(tensor.shape[:-2]) for tensor in seen.values())
        device = local(next(iter(seen.values()))).device
        sums = torch.zeros(count, self.past.steps, self.past.steps, dtype=torch.float64, device=device)
        for matrices, name in zip(self._places(seen), seen, strict=True):
            copies = self.whole.cut(seen[name]).copies
            if copies[self.whole.rank] == copies[0] and local(seen[name]).numel():  # each part once
                kept = _stack(local(self.tensors[name]), before=1).transpose(0, 1).flatten(2)
                sums[matrices] += kept @ kept.mT
        if self.whole.ranks > 1:
            dist.all_reduce(sums)
        return sums

    def _places(self, seen: Mapping[str, Tensor]) -> list[slice]:
        """Which of all matrices, counted one after the other, this rank holds something of, a slice a weight."""
        found, before = [], 0
        for tensor in seen.values():
            box = self.whole.cut(tensor).boxes[self.whole.rank]
            first = slice(0, 0) if box is None else box[0]
            found.append(slice(before + first.start, before + first.stop))
            before += prod(tensor.shape[:-2])
        return found


def leading(matrices: Tensor, rank: int) -> Tensor:
    """n A B -> n min(A, B) rank: the first singular vectors of the shorter side, their largest entries positive."""
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    basis = (right.mT if _tall(matrices) else left)[..., :rank]
    largest = basis.gather(-2, basis.abs().argmax(dim=-2, keepdim=True))
    return basis * torch.where(largest < 0, -1.0, 1.0).to(basis.dtype)


def _tall(matrices: Tensor) -> bool:
    return matrices.shape[-2] >= matrices.shape[-1]


def _stack(part: Tensor, before: int = 0) -> Tensor:
    """With one axis for the matrices, however many a weight has, after `before` others."""
    return part.view(*part.shape[:before], -1, *part.shape[-2:])


def _seen_shape(weight: Tensor, rank: int) -> tuple[int, ...]:
    """Of a weight's gradient seen through `rank` directions of its matrices' shorter side."""
    rows, columns = weight.shape[-2:]
    return (*weight.shape[:-2], rows, rank) if rows >= columns else (*weight.shape[:-2], rank, columns)


def _seen(weight: Tensor, rank: int) -> Tensor:
    return zeros_beside(weight, _seen_shape(weight, rank), at_least_fp32(weight))


def _start(weight: Tensor, rank: int, key: int) -> Tensor:
    """Random directions, the same on all meshes: they serve until the second decomposition if the first is skipped."""
    shape = (*weight.shape[:-2], min(weight.shape[-2:]), rank)
    basis = zeros_beside(weight, shape, at_least_fp32(weight))
    Normal(0.0, shape[-2] ** -0.5).fill(local(basis), key, shape, offset(basis))
    return basis
