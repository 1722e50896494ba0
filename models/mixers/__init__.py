"""Sequence mixers: what lets a token see other tokens."""

from typing import Annotated

from farspan.models.mixers.softmax import Softmax

Mixer = Annotated[Softmax, "choice"]

__all__ = ["Mixer", "Softmax"]
