"""Feed-forward layers: what a token does by itself."""

from typing import Annotated

from farspan.models.ffns.swiglu import Swiglu

Ffn = Annotated[Swiglu, "choice"]

__all__ = ["Ffn", "Swiglu"]
