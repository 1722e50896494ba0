"""What a weight is to the model, as optimizers ask: a matrix of a layer, or one of the weights they treat apart."""

from dataclasses import dataclass
from typing import Literal, get_args

from torch import nn

from farspan.parallel.placement import Expert, Row
from farspan.parallel.tensor import declared

RoleKind = Literal["matrix", "embedding", "head", "router", "norm"]

ROLES: tuple[RoleKind, ...] = get_args(RoleKind)


@dataclass(frozen=True)
class Role:
    """What an optimizer knows about a weight besides its shape; the same on every mesh."""

    kind: RoleKind
    """norm stands for every weight of fewer than two axes: norms, biases, sinks."""
    cut_inputs: bool = False
    """Whether tp, or of experts etp, would cut its last axis."""


def roles(model: nn.Module) -> dict[str, Role]:
    """The role of every weight by its full name: what modules declare in `roles()`, else by the number of axes."""
    told: dict[str, RoleKind] = {
        f"{path}.{name}" if path else name: kind
        for path, module in model.named_modules()
        if hasattr(module, "roles")
        for name, kind in module.roles().items()
    }
    cut = {
        f"{path}.{name}" if path else name
        for path, module, placements in declared(model)
        for name, placement in placements.items()
        if isinstance(placement, Row)
        or (isinstance(placement, Expert) and placement.channels == module.get_parameter(name).dim() - 1)
    }
    return {
        name: Role(told.get(name, "norm" if weight.dim() < 2 else "matrix"), name in cut)
        for name, weight in model.named_parameters()
    }
