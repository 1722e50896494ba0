"""A block: tokens look at each other, then each thinks for itself; both added to what was there."""

from dataclasses import dataclass

from torch import Tensor, nn

from farspan.kernels.random import Normal
from farspan.models.ffns import Ffn
from farspan.models.mixers import Mixer
from farspan.models.mixers.softmax import Angles
from farspan.models.norm import RMSNorm
from farspan.parallel.context.local import Local


@dataclass(frozen=True, kw_only=True)
class Block:
    """A run of `repeat` equal layers. A null mixer or ffn is absent, with its norm."""

    repeat: int = 1
    mixer: Mixer | None
    ffn: Ffn | None

    def __post_init__(self) -> None:
        if self.repeat < 1:
            raise ValueError(f"repeat={self.repeat}: must be at least 1; leave the block out instead")
        if self.mixer is None and self.ffn is None:
            raise ValueError("mixer=null and ffn=null: the block does nothing; leave it out instead")

    def build(self, width: int, depth: int, eps: float, context: Local) -> "Layer":
        return Layer(self, width, depth, eps, context)


class Layer(nn.Module):
    """One layer with pre-norm residuals: x + mixer(norm(x)), then x + ffn(norm(x))."""

    def __init__(self, config: Block, width: int, depth: int, eps: float, context: Local) -> None:
        super().__init__()
        self.mixer = config.mixer.build(width, depth, eps, context) if config.mixer else None
        self.mixer_norm = RMSNorm(width, eps) if config.mixer else None
        self.ffn = config.ffn.build(width, depth) if config.ffn else None
        self.ffn_norm = RMSNorm(width, eps) if config.ffn else None

    def initial(self) -> dict[str, Normal]:
        return {}

    def flops(self, lengths: tuple[int, ...]) -> int:
        return sum(part.flops(lengths) for part in (self.mixer, self.ffn) if part is not None)

    def forward(self, x: Tensor, angles: Angles | None, cu_seqlens: Tensor | None) -> Tensor:
        if self.mixer is not None and self.mixer_norm is not None:
            x = x + self.mixer(self.mixer_norm(x), angles, cu_seqlens)
        if self.ffn is not None and self.ffn_norm is not None:
            x = x + self.ffn(self.ffn_norm(x))
        return x
