"""How attention spans the ranks of the cp axis: a schedule is picked here and built once per run."""

from typing import Annotated

from farspan.parallel.context.auto import Auto

Context = Annotated[Auto, "choice"]

__all__ = ["Auto", "Context"]
