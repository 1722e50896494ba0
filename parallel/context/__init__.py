"""How attention spans the ranks of the cp axis: a schedule is picked here and built once per run."""

from typing import Annotated

from farspan.parallel.context.attention import Spread
from farspan.parallel.context.auto import Auto
from farspan.parallel.context.gather import Gather
from farspan.parallel.context.grid import Grid
from farspan.parallel.context.local import Local
from farspan.parallel.context.pinned import Axis
from farspan.parallel.context.ring import Ring
from farspan.parallel.context.token_ring import TokenRing
from farspan.parallel.context.ulysses import Ulysses

Context = Annotated[Auto | Gather | Grid | Ring | TokenRing | Ulysses, "choice"]

Runtime = Local | Spread
"""What mixers attend with and the engine cuts batches with: within one rank, or over all of cp."""

__all__ = ["Auto", "Axis", "Context", "Gather", "Grid", "Ring", "Runtime", "TokenRing", "Ulysses"]
