"""FSDP's units of a mesh of one rank: weights are cast once or used as they are, gradients are kept as they come.

Nothing is gathered or summed there, but FSDP goes through the motions: a cast and a copy of each weight, three copies
of each gradient. Experts have many weights for what one token needs of them, so that these add up; and whoever deals
experts out to all ranks has such a mesh for them.
"""

from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_common import FSDPMeshInfo, TrainingState
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam, alloc_storage
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.distributed.tensor import DTensor


def ease(unit: FSDPModule) -> None:
    """Spares a unit those copies if its mesh has one rank."""
    group: Any = unit._get_fsdp_state()._fsdp_param_group
    if group is not None and isinstance(group.mesh_info, FSDPMeshInfo) and group.mesh_info.mesh.size() == 1:
        group.__class__ = _Alone


class _Alone(FSDPParamGroup):
    @torch.no_grad()
    def wait_for_unshard(self) -> None:
        """Makes the weights of products, in the present stream: one cast, or nothing where they have their type."""
        if self._all_gather_result is None:
            return
        self._all_gather_result = None
        casts = [weight for weight in self.fsdp_params if not _shared(weight)]
        for weight in casts:
            size = weight._sharded_param_data.numel()
            weight.init_all_gather_outputs([size], [weight.param_dtype or weight.orig_dtype], 1, self.device)
            alloc_storage(weight.all_gather_outputs[0])
            weight.init_unsharded_param()
        if casts:
            made = [weight.all_gather_outputs[0] for weight in casts]
            with torch.autograd._unsafe_preserve_version_counter(tuple(made)):  # type: ignore[attr-defined]
                torch._foreach_copy_(made, [weight._sharded_param_data for weight in casts])
        self._to_unsharded()

    @torch.compiler.disable
    def post_backward(self, *_: object) -> None:
        """Hands each gradient to the weight that is held, in the type that gradients are held in."""
        self._training_state = TrainingState.POST_BACKWARD
        came = []
        for weight in self.fsdp_params:
            if hasattr(weight, "_unsharded_param") and weight.unsharded_param.grad is not None:
                came.append((weight, weight.unsharded_grad_data))
                weight.unsharded_param.grad = None
        if self.reshard_after_backward:
            self.reshard()
        for weight, gradient in came:
            _add(weight, gradient, self._orig_dtype or gradient.dtype)


def _shared(weight: FSDPParam) -> bool:
    """Has products read the weight itself if it has their type: FSDP then finds no copy that it could free."""
    held = weight._sharded_param_data
    if weight.param_dtype not in (None, held.dtype):
        return False
    made = getattr(weight, "_unsharded_param", None)
    if made is None or made.data_ptr() != held.data_ptr():
        if made is not None:
            del weight._unsharded_param
        weight.all_gather_outputs = [held]
        weight.init_unsharded_param()
        weight.all_gather_outputs = []
    return True


@torch.no_grad()
def _add(weight: FSDPParam, gradient: Tensor, dtype: torch.dtype) -> None:
    held = weight.sharded_param
    if isinstance(held.grad, DTensor):
        held.grad.to_local().add_(gradient)
    else:
        held.grad = weight.to_sharded_dtensor(gradient.to(dtype).contiguous())
    for hook in (getattr(held, "_post_accumulate_grad_hooks", None) or {}).values():
        hook(held)
