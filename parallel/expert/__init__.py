"""How tokens and the experts of other ranks come together: a way is picked here and built once per run."""

from typing import Annotated

from farspan.parallel.expert.dispatch import AllGather, AllToAll, Auto, Axes, Dispatcher, Local, WeightGather

Dispatch = Annotated[Auto | AllToAll | AllGather | WeightGather, "choice"]

__all__ = ["AllGather", "AllToAll", "Auto", "Axes", "Dispatch", "Dispatcher", "Local", "WeightGather"]
