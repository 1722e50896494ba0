"""How weights move along their gradients."""

from typing import Annotated

from farspan.platform.optim.adamw import Adamw

Optim = Annotated[Adamw, "choice"]

__all__ = ["Adamw", "Optim"]
