"""Fully sharded weights: each layer is one unit, gathered when it runs and cut again afterwards."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from farspan.kernels.random import Normal, key
from farspan.parallel import alone
from farspan.parallel.mesh import Gather, Mesh


def shard(
    model: nn.Module,
    layers: Iterable[nn.Module],
    experts: Iterable[tuple[nn.Module, nn.Module]],
    mesh: Mesh,
    compute: torch.dtype | None,
    gather: Gather,
    along: Mapping[int, int],
) -> None:
    """Cuts `model` over the mesh in place; `compute` is the type of products, None for the weights' own.

    experts: layers, and modules in them whose weights lie by the expert view of the mesh: units of their own, which
    are gathered when their layer is. along: by the id of a weight the dimension that is cut, where that is not the
    first.

    Gradients are plain sums over ranks, in fp32 where products are not fp64: the loss is divided by the global count of
    labels beforehand, so no other factor exists anywhere.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=compute, reduce_dtype=None if compute is None else torch.float32, cast_forward_inputs=False
    )
    how: dict[str, Any] = {"mp_policy": policy, "reshard_after_forward": gather == "layer"}
    how["shard_placement_fn"] = lambda weight: Shard(along.get(id(weight), 0))
    for layer, unit in experts:
        fully_shard(unit, mesh=mesh.expert_weights, **how)
        _with(layer, unit)
    for unit in [*layers, model]:
        fully_shard(unit, mesh=mesh.weights, **how)
    for shards in units(model):
        shards.set_gradient_divide_factor(1.0)
        shards.set_force_sum_reduction_for_comms(True)  # gloo has no pre-multiplied sum
        alone.ease(shards)


def _with(layer: nn.Module, unit: nn.Module) -> None:
    """Moves a unit's hooks to the layer that it is in: what is recomputed or compiled there has no gathers in it."""
    state: Any = unit._get_fsdp_state()  # type: ignore[operator]
    state._pre_forward_hook_handle.remove()
    state._post_forward_hook_handle.remove()
    state._pre_forward_hook_handle = layer.register_forward_pre_hook(state._pre_forward, prepend=True, with_kwargs=True)
    state._post_forward_hook_handle = layer.register_forward_hook(state._post_forward)


def keep_gradients_in(model: nn.Module, dtype: torch.dtype) -> None:
    """What gradients are held and accumulated in, whatever the weights are held in. Called in every forward's wake.

    FSDP rounds a gradient to the weight's type as soon as it is summed over the ranks, and reads that type once, before
    the first forward.
    """
    for unit in units(model):
        group = unit._get_fsdp_state()._fsdp_param_group
        if group is not None:
            group._orig_dtype = dtype


def units(model: nn.Module) -> Iterator[FSDPModule]:
    """The modules whose weights are gathered together."""
    return (module for module in model.modules() if isinstance(module, FSDPModule))


@torch.no_grad()
def fill(weights: Mapping[str, torch.Tensor], starts: Mapping[str, Normal], seed: int) -> None:
    """Writes the weights' first values, the same for every mesh. KeyError: one has no start."""
    for name, weight in weights.items():
        if name not in starts:
            raise KeyError(f"{name}: no initial value; declare it in its module's initial()")
        starts[name].fill(local(weight), key(seed, "initial", name), tuple(weight.shape), offset(weight))


def offset(tensor: torch.Tensor) -> tuple[int, ...]:
    """Where this rank's part of a DTensor begins in the whole; any other tensor is whole."""
    if not isinstance(tensor, DTensor):
        return (0,) * tensor.dim()
    return tuple(compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)[1])


def in_blocks(shape: Sequence[int], block: int) -> tuple[int, ...]:
    """The shape of a tensor with one element for every `block` of the last axis."""
    return (*shape[:-1], shape[-1] // block) if block > 1 else tuple(shape)


def beside(weight: torch.Tensor, dtype: torch.dtype, block: int = 1) -> torch.Tensor:
    """Zeros cut like a weight; of `block` as `around` has it."""
    mine = local(weight)
    return around(weight, torch.zeros(in_blocks(mine.shape, block), dtype=dtype, device=mine.device), block)


def around(weight: torch.Tensor, mine: torch.Tensor, block: int = 1) -> torch.Tensor:
    """`mine`, wherever it lies, as this rank's part of a tensor cut like a weight, with one element for every `block`
    of the weight's last axis; the block divides that axis on every rank."""
    if not isinstance(weight, DTensor):
        return mine
    shape = torch.Size(in_blocks(weight.shape, block))
    strides = tuple(prod(shape[i + 1 :]) for i in range(len(shape)))
    like = mine.to("meta")  # a mesh of GPUs would take a copy of what lies on the host
    spec = DTensor.from_local(
        like, weight.device_mesh, weight.placements, run_check=False, shape=shape, stride=strides
    )._spec
    return DTensor(mine, spec, requires_grad=False)


def gathering_streams(module: nn.Module) -> list[Any]:
    """The streams that gather a unit's weights, besides the present one; none before the first forward."""
    if not isinstance(module, FSDPModule):
        return []
    made = module._get_fsdp_state()._comm_ctx
    if not hasattr(made, "device_handle"):  # it makes them in the first forward
        return []
    return [made.all_gather_copy_in_stream, made.all_gather_stream]


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
