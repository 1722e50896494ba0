"""AdamW with 8-bit moments and bf16 weights that remember fp32: a quarter of the memory, one launch a step."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Annotated

import torch
from torch import Tensor

from farspan.kernels import adamw8
from farspan.kernels.adamw8 import Part, Place, Update
from farspan.kernels.master import RESIDUALS, Master
from farspan.kernels.random import key
from farspan.models.roles import Role, RoleKind
from farspan.parallel.fsdp import beside, local, offset
from farspan.platform.optim.adam import Adam
from farspan.platform.optim.placement import Streamed

SMALLEST_BLOCK = 32
"""Fewer codes to a scale would cost more than an eighth of them."""
SMALL = 4096
"""Weights of fewer elements keep fp32 moments: there is nothing to gain."""
CHANCE = 0.99
"""From this β₂ on codes of the second moment are rounded by chance."""


@dataclass(frozen=True, kw_only=True)
class Adamw8(Adam):
    """AdamW with 8-bit block-wise moments (Dettmers et al., 2022), in one fused pass over all weights."""

    master: Master = "residual8"
    """How precisely weights are remembered. residual16: bf16 and the other half of fp32, nothing is lost; residual8:
    bf16 and 8 bits more; none: bf16, rounded by chance; fp32: in full, and products read a copy."""
    block: int = 256
    """Codes that share a scale, at most: the largest power of two up to it that divides every rank's part of a row."""
    max_tp: int = 8
    """Blocks fit up to this many ranks of tp, whatever tp is now: a run may go on with any of them."""
    exact: tuple[RoleKind, ...] = ("embedding", "head", "router", "norm")
    """Roles of weights that keep fp32 moments and, unless master is fp32, residual16. So do weights of few elements,
    and those whose rows no block of 32 divides."""
    offload: Annotated[Streamed, "choice"] | None = None
    """Where the state lives; null: on the device."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.offload is not None and self.master == "fp32":
            raise ValueError(
                "master=fp32: keeps the weights on the device in fp32, which offload is to spare; residual16 loses "
                "nothing either"
            )
        if not (SMALLEST_BLOCK <= self.block <= 1024 and self.block & (self.block - 1) == 0):
            raise ValueError(f"block={self.block}: must be a power of two from {SMALLEST_BLOCK} to 1024; 256 is usual")
        if self.max_tp < 1 or self.max_tp & (self.max_tp - 1):
            raise ValueError(f"max_tp={self.max_tp}: must be a power of two; 8 is the ranks of one node")

    @property
    def weight_type(self) -> torch.dtype:
        return torch.float32 if self.master == "fp32" else torch.bfloat16

    def block_of(self, shape: tuple[int, ...], role: Role) -> int:
        """Codes that share a scale; 0: the moments stay fp32. By shape and role alone, so that every mesh agrees."""
        if role.kind in self.exact or len(shape) < 2 or prod(shape) < SMALL:
            return 0
        row = shape[-1]
        if role.cut_inputs:
            row = row // self.max_tp if row % self.max_tp == 0 else 0
        found = min(self.block, row & -row)
        return found if found >= SMALLEST_BLOCK else 0

    def master_of(self, block: int) -> Master:
        """How a weight with such moments is remembered."""
        return self.master if block or self.master == "fp32" else "residual16"

    def state_bytes(self, shape: tuple[int, ...], role: Role) -> int:
        """Of the state of one whole weight: moments, scales and residual."""
        block = self.block_of(shape, role)
        residual = RESIDUALS.get(self.master_of(block))
        moments = 2 * prod(shape) + 8 * prod(shape) // block if block else 8 * prod(shape)
        return moments + (0 if residual is None else residual.itemsize * prod(shape))

    @property
    def adam(self) -> adamw8.Adam:
        beta1, beta2 = self.betas
        return adamw8.Adam((beta1, beta2), self.eps, self.weight_decay, stochastic=beta2 >= CHANCE)

    def build(self, weights: Mapping[str, Tensor], roles: Mapping[str, Role], seed: int) -> "Adamw8State":
        return Adamw8State(
            self, weights, {n: self.block_of(tuple(w.shape), roles[n]) for n, w in weights.items()}, seed
        )


def kinds(block: int, master: Master) -> dict[str, tuple[torch.dtype, int]]:
    """The tensors of one weight's state: type, and elements of the weight's rows to one of the tensor's."""
    found: dict[str, tuple[torch.dtype, int]] = dict.fromkeys(("first", "second"), (torch.float32, 1))
    if block:
        found = dict.fromkeys(("first", "second"), (torch.uint8, 1))
        found |= dict.fromkeys(("first_scale", "second_scale"), (torch.float32, block))
    return found | ({"residual": (RESIDUALS[master], 1)} if master in RESIDUALS else {})


def part(weight: Tensor, state: Mapping[str, Tensor], key: int, rows: slice = slice(None)) -> Part:
    """What the kernel reads of a weight, or of some of its local rows. state: of those, by the names of `kinds`."""
    mine = {name: local(tensor) for name, tensor in state.items()}
    first, *others = offset(weight)
    return Part(
        local(weight.detach())[rows],
        mine["first"],
        mine["second"],
        Place((first + (rows.start or 0), *others), tuple(weight.shape)),
        key,
        weight.dim() >= 2,
        mine.get("residual"),
        mine.get("first_scale"),
        mine.get("second_scale"),
    )


class Adamw8State:
    """The moments of every weight, all zero at first, and the count of updates made."""

    def __init__(self, config: Adamw8, weights: Mapping[str, Tensor], blocks: Mapping[str, int], seed: int = 0) -> None:
        self.weights = weights
        self.states = {}
        for name, weight in weights.items():
            check(name, weight, block := blocks[name])
            made = kinds(block, config.master_of(block)).items()
            self.states[name] = {of: beside(weight, *kind) for of, kind in made}
        self.steps = torch.zeros((), dtype=torch.float64, device=local(next(iter(weights.values()))).device)
        self._adam = config.adam
        self._keys = {name: key(seed, "adamw8", name) for name in weights}
        self._update: tuple[list[str], Update] | None = None

    def state(self) -> dict[str, Tensor]:
        """By name: `step`; of each weight `first`, `second` (codes, or fp32) and, where it has them, `first_scale`,
        `second_scale` and `residual`."""
        found = {f"{of}.{name}": tensor for name, state in self.states.items() for of, tensor in state.items()}
        return {"step": self.steps, **found}

    @torch.no_grad()
    def update(self, rate: float, scale: Tensor) -> None:
        """See `farspan.parallel.engine.Optimizer`."""
        names = [name for name, weight in self.weights.items() if weight.grad is not None]
        if self._update is None or self._update[0] != names:
            parts = [part(self.weights[name], self.states[name], self._keys[name]) for name in names]
            self._update = names, Update(parts, self._adam)
        numbers = self._adam.numbers(self.steps, rate, scale)
        self._update[1]([local(self.weights[name].grad) for name in names], numbers)  # type: ignore[arg-type]


def check(name: str, weight: Tensor, block: int) -> None:
    """ValueError: blocks of so many codes would cross the rows that this rank holds."""
    width = local(weight).shape[-1] if block else 0
    if block and width % block:
        raise ValueError(
            f"optim.max_tp: {name}: rows of {weight.shape[-1]} are cut to {width}, which blocks of {block} codes do "
            "not divide; launch convert the run to an optim.max_tp of parallel.tp and parallel.etp at least"
        )
