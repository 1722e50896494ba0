"""Feed-forward layers: what a token does by itself."""

from farspan.models.ffns.gated import Geglu, Swiglu
from farspan.models.ffns.moe import Moe
from farspan.models.ffns.plain import PolyNorm, SquaredRelu

Ffn = Swiglu | Geglu | SquaredRelu | PolyNorm | Moe

__all__ = ["Ffn", "Geglu", "Moe", "PolyNorm", "SquaredRelu", "Swiglu"]
