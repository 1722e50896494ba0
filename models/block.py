"""A block: tokens look at each other, then each thinks for itself; both added to what was there."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from farspan.kernels.random import Normal
from farspan.models.ffns import Ffn, Moe, Routed
from farspan.models.ffns.router import Tally
from farspan.models.linear import Linear, Plain
from farspan.models.mixers import Mixer
from farspan.models.mixers.softmax import Angles
from farspan.models.norm import LayerNorm, Norm, RMSNorm
from farspan.parallel.context import Runtime
from farspan.parallel.context.shard import Documents

NormPlacement = Literal["pre", "post", "peri"]


@dataclass(frozen=True, kw_only=True)
class Block:
    """A run of `repeat` equal layers. A null mixer or ffn is absent, with its norms."""

    repeat: int = 1
    """How many such layers follow each other."""
    mixer: Mixer | None
    """What lets tokens see each other; null: nothing."""
    ffn: Ffn | None
    """What each token does for itself; null: nothing."""
    shared_ffn: bool = False
    """All layers of the run have one ffn between them, each with norms of its own (WideNet, Xue et al., 2022)."""
    linear: Linear = Plain()
    """The products of mixer and ffn."""

    def __post_init__(self) -> None:
        if self.repeat < 1:
            raise ValueError(f"repeat={self.repeat}: must be at least 1; leave the block out instead")
        if self.mixer is None and self.ffn is None:
            raise ValueError("mixer=null and ffn=null: the block does nothing; leave it out instead")
        if self.shared_ffn and (self.ffn is None or self.repeat == 1):
            raise ValueError(
                f"shared_ffn=True: repeat={self.repeat} layers have no ffn to share; set repeat to 2 or more and an "
                "ffn, or shared_ffn: false"
            )
        if self.shared_ffn and isinstance(self.ffn, Moe) and self.ffn.jitter:
            raise ValueError(
                f"ffn.jitter={self.ffn.jitter}: is drawn for a layer of its own; set it to 0, or shared_ffn: false"
            )

    def build(self, width: int, depth: int, norm: Norm, placement: NormPlacement, context: Runtime) -> "Layer":
        return Layer(self, width, depth, norm, placement, context)


class Part(NamedTuple):
    """A mixer or ffn and its norms."""

    branch: Callable[[Any], Tensor]
    """From a tensor, or from codes where it reads those."""
    norm: RMSNorm | LayerNorm
    """Before the branch; under post, after its sum."""
    norm_out: Callable[[Tensor], Tensor]
    reads_codes: bool


def _norm_first(x: Tensor, parts: list[Part]) -> Tensor:
    """x + N_out(F(N(x))), part after part; a sum, the norm that follows it and its codes are one pass."""
    found: Tensor | None = None
    for part in parts:
        normed: Any
        if part.reads_codes:
            x, normed = part.norm.coded(x, found)
        elif found is None:
            normed = part.norm(x)
        else:
            x, normed = part.norm.add(x, found)
        found = part.norm_out(part.branch(normed))
    return x if found is None else x + found


def _norm_last(x: Tensor, parts: list[Part]) -> Tensor:
    """N(x + F(x)), part after part; the sum reads what is normed as well, so that its codes are not enough."""
    for part in parts:
        _, x = part.norm.add(x, part.branch(x))
    return x


class Layer(nn.Module):
    """One layer: x meets its mixer, then its ffn, in one of three ways.

    pre: x + F(N(x)). post: N(x + F(x)) (Vaswani et al., 2017). peri: x + N_out(F(N(x))) (Kim et al., 2025,
    arXiv 2502.02732). All begin with the same weights: a branch's last product is shrunk by √(2·depth). Under pre the
    sum of all branches then has a variance near one. Under post each branch is a small step from x, so that gradients
    keep their size at any depth, which branches as large as x would change geometrically (Xiong et al., 2020). Under
    peri the outer norm takes any scale away again, and each branch adds a variance of one.
    """

    def __init__(
        self, config: Block, width: int, depth: int, norm: Norm, placement: NormPlacement, context: Runtime
    ) -> None:
        super().__init__()
        self.width, self.context = width, context
        self.rotation = config.mixer.rotation(width) if config.mixer else None
        self.join = _norm_last if placement == "post" else _norm_first
        self.mixer = config.mixer.build(width, depth, norm.eps, context, config.linear) if config.mixer else None
        self.ffn = config.ffn.build(width, depth, config.linear) if config.ffn else None
        self.mixer_norm = norm.build(width) if config.mixer else nn.Identity()
        self.ffn_norm = norm.build(width) if config.ffn else nn.Identity()
        self.mixer_norm_out = norm.build(width) if config.mixer and placement == "peri" else nn.Identity()
        self.ffn_norm_out = norm.build(width) if config.ffn and placement == "peri" else nn.Identity()

    def share(self, ffn: nn.Module) -> None:
        """From now on runs an ffn that is not its own: who owns it has its weights."""
        del self.ffn
        self.__dict__["ffn"] = ffn

    def initial(self) -> dict[str, Normal]:
        return {}

    def flops(self, lengths: tuple[int, ...]) -> int:
        return sum(part.flops(lengths) for part in (self.mixer, self.ffn) if part is not None)

    def example(self, rows: int, length: int) -> tuple[Tensor, Angles | None, Documents]:
        """Arguments of `forward` for rows of one document each, on the weights' device: to measure the layer with."""
        weight = next(self.parameters())
        x = torch.empty(rows, length, self.width, dtype=weight.dtype, device=weight.device, requires_grad=True)
        positions = torch.zeros(rows, length, dtype=torch.int64, device=weight.device)
        angles = None if self.rotation is None else self.rotation[0].angles(positions, self.rotation[1])
        return x, angles, self.context.example(rows, length)

    def forward(self, x: Tensor, angles: Angles | None, documents: Documents) -> Tensor | tuple[Tensor, Tally]:
        """x: B T D; with it comes what its router reports, where the ffn has one."""
        parts: list[Part] = []
        tallies: list[Tally] = []

        def feed(h: Any) -> Tensor:
            ffn = self.ffn
            if not isinstance(ffn, Routed):
                return ffn(h)  # type: ignore[misc]
            found, tally = ffn(h, documents)
            tallies.append(tally)
            return found

        if (mixer := self.mixer) is not None and not isinstance(self.mixer_norm, nn.Identity):
            norms = self.mixer_norm, self.mixer_norm_out
            parts.append(Part(lambda h: mixer(h, angles, documents), *norms, mixer.reads_codes))
        if self.ffn is not None and not isinstance(self.ffn_norm, nn.Identity):
            parts.append(Part(feed, self.ffn_norm, self.ffn_norm_out, self.ffn.reads_codes))
        out = self.join(x, parts)
        return (out, tallies[0]) if tallies else out
