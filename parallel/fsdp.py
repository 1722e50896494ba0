"""Fully sharded weights: each layer is one unit, gathered when it runs and cut again afterwards."""

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from farspan.kernels.random import Normal, key
from farspan.parallel.mesh import Gather, Mesh


def shard(
    model: nn.Module, layers: Iterable[nn.Module], mesh: Mesh, compute: torch.dtype | None, gather: Gather
) -> None:
    """Cuts `model` over the mesh in place; `compute` is the type of products, None for the weights' own.

    Gradients are plain sums over ranks in the weights' type: the loss is divided by the global count of labels
    beforehand, so no other factor exists anywhere.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=compute, reduce_dtype=None if compute is None else torch.float32, cast_forward_inputs=False
    )
    for unit in [*layers, model]:
        fully_shard(unit, mesh=mesh.weights, mp_policy=policy, reshard_after_forward=gather == "layer")
    for shards in units(model):
        shards.set_gradient_divide_factor(1.0)
        shards.set_force_sum_reduction_for_comms(True)  # gloo has no pre-multiplied sum


def units(model: nn.Module) -> Iterator[FSDPModule]:
    """The modules whose weights are gathered together."""
    return (module for module in model.modules() if isinstance(module, FSDPModule))


@torch.no_grad()
def fill(weights: Mapping[str, DTensor], starts: Mapping[str, Normal], seed: int) -> None:
    """Writes the weights' first values, the same for every mesh. KeyError: one has no start."""
    for name, weight in weights.items():
        if name not in starts:
            raise KeyError(f"{name}: no initial value; declare it in its module's initial()")
        _, offset = compute_local_shape_and_global_offset(weight.shape, weight.device_mesh, weight.placements)
        starts[name].fill(local(weight), key(seed, "initial", name), tuple(weight.shape), tuple(offset))


def full(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a DTensor, on every rank; any other tensor itself. All ranks of its mesh call it.

    The axes are gathered one by one, innermost first: torch 2.11 joins some and cannot where their ranks are permuted.
    """
    if not isinstance(tensor, DTensor):
        return tensor
    axes = tensor.device_mesh.ndim
    for axis in reversed(range(axes)):
        tensor = tensor.redistribute(placements=[*tensor.placements[:axis], *[Replicate()] * (axes - axis)])
    return local(tensor)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a DTensor, sharing its memory; any other tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
