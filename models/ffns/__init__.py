"""Feed-forward layers: what a token does by itself."""

from farspan.models.ffns.squared_relu import SquaredRelu
from farspan.models.ffns.swiglu import Swiglu

Ffn = Swiglu | SquaredRelu

__all__ = ["Ffn", "SquaredRelu", "Swiglu"]
