"""Fully sharded weights: each layer is one unit, gathered when it runs and cut again afterwards."""

from collections.abc import Iterable

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from farspan.kernels.random import Normal, key
from farspan.parallel.mesh import Mesh


def shard(model: nn.Module, layers: Iterable[nn.Module], mesh: Mesh, compute: torch.dtype | None) -> None:
    """Cuts `model` over the mesh in place; `compute` is the type of products, None for the weights' own.

    Gradients are plain sums over ranks in the weights' type: the loss is divided by the global count of labels
    beforehand, so no other factor exists anywhere.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=compute, reduce_dtype=None if compute is None else torch.float32, cast_forward_inputs=False
    )
    for unit in [*layers, model]:
        fully_shard(unit, mesh=mesh.weights, mp_policy=policy)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no pre-multiplied sum


def materialise(model: nn.Module, starts: dict[str, Normal], device: torch.device, seed: int) -> None:
    """Gives the cut weights memory on `device` and their first values, the same for every mesh."""
    model.to_empty(device=device)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name not in starts:
                raise KeyError(f"{name}: no initial value; declare it in its module's initial()")
            block, offset = local(weight), (0,) * weight.dim()
            if isinstance(weight, DTensor):
                _, offset = compute_local_shape_and_global_offset(weight.shape, weight.device_mesh, weight.placements)
            starts[name].fill(block, key(seed, "initial", name), tuple(weight.shape), tuple(offset))


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a DTensor, sharing its memory; any other tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
