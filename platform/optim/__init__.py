"""How weights move along their gradients."""

from typing import Annotated

from farspan.platform.optim.adamw import Adamw
from farspan.platform.optim.adamw8 import Adamw8
from farspan.platform.optim.galore import Galore, NaturalGalore
from farspan.platform.optim.muon import Muon

Optim = Annotated[Adamw | Adamw8 | Muon | Galore | NaturalGalore, "choice"]

__all__ = ["Adamw", "Adamw8", "Galore", "Muon", "NaturalGalore", "Optim"]
