"""How tokens and the experts of other ranks come together: a way is picked here and built once per run."""

from typing import Annotated

from farspan.parallel.expert.deepep import DeepEp
from farspan.parallel.expert.dispatch import Auto, Axes, Beside, Dispatcher, Local, Visits, WeightGather
from farspan.parallel.expert.travel import AllGather, AllToAll

Dispatch = Annotated[Auto | AllToAll | AllGather | WeightGather | DeepEp, "choice"]

__all__ = [
    "AllGather",
    "AllToAll",
    "Auto",
    "Axes",
    "Beside",
    "DeepEp",
    "Dispatch",
    "Dispatcher",
    "Local",
    "Visits",
    "WeightGather",
]
