"""Feed-forward layers: what a token does by itself."""

from farspan.models.ffns.gated import Geglu, Swiglu
from farspan.models.ffns.plain import PolyNorm, SquaredRelu

Ffn = Swiglu | Geglu | SquaredRelu | PolyNorm

__all__ = ["Ffn", "Geglu", "PolyNorm", "SquaredRelu", "Swiglu"]
