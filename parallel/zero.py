"""DeepSpeed's ZeRO behind the verbs of `farspan.parallel.engine`, for those who ask for it.

What DeepSpeed would do by itself is switched off: it averages gradients over ranks (the loss is scaled up beforehand),
counts micro-batches, clips, and skips steps. The optimizer that it steps is torch's fused AdamW, which reads the scale
of the gradients, and whether to step at all, on the device. Parts that have no public name (the flat gradients and
master weights, and bringing the weights up to date) are reached in `_Flat` and nowhere else.
"""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, final

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
    set_z3_leaf_module,
)
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from farspan.kernels.random import Normal, key
from farspan.parallel import recompute
from farspan.parallel.context import Runtime
from farspan.parallel.context.shard import Batch
from farspan.parallel.fsdp import full, local
from farspan.parallel.mesh import Mesh, Zero

MOMENTS = {"first": "exp_avg", "second": "exp_avg_sq"}
"""How a checkpoint calls AdamW's moments, and how torch does."""

# torch 2.13 says at every call of DeepSpeed's that these have new names.
warnings.filterwarnings("ignore", r"`torch.distributed.\w+_tensor` is deprecated", FutureWarning)
# On a CPU, DeepSpeed would compile an exchange through shared memory at start, for a minute, and train without it.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


class Decay(Protocol):
    """What AdamW is told besides the learning rate."""

    @property
    def betas(self) -> tuple[float, ...]: ...
    @property
    def eps(self) -> float: ...
    @property
    def weight_decay(self) -> float: ...


def settings(zero: Zero, numel: int, compute: torch.dtype | None, device: torch.device) -> dict[str, Any]:
    """DeepSpeed's configuration for a model of `numel` weights."""
    host = {"device": "cpu", "pin_memory": device.type == "cuda"}
    sharding: dict[str, Any] = {
        "stage": zero.stage,
        "reduce_bucket_size": min(Zero.BUCKET, numel),  # it makes room for all of it
        "stage3_max_live_parameters": Zero.LIVE,
        "stage3_max_reuse_distance": Zero.LIVE,
    }
    if zero.offload != "none":
        sharding["offload_optimizer"] = host
    if zero.offload == "optimizer_and_weights":
        sharding["offload_param"] = host
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "bf16": {"enabled": compute == torch.bfloat16},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": sharding,
    }


@final
class ZeroEngine:
    """Owns the model and its optimizer; the verbs, names and numbers are those of `farspan.parallel.engine.Engine`."""

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[nn.Module],
        starts: Mapping[str, Normal],
        mesh: Mesh,
        *,
        context: Runtime,
        seed: int,
        compute: torch.dtype | None,
        kept: float | None,
        zero: Zero,
        decay: Decay,
    ) -> None:
        """As `Engine` has it; `decay` is what its optimizer is told."""
        if (found := get_accelerator().device_name()) != mesh.device.type:
            raise ValueError(f"DS_ACCELERATOR={found}: the ranks run on {mesh.device.type}; do not set it")
        for layer in layers:
            recompute.apply(layer, kept)
            set_z3_leaf_module(layer, True)  # gathered as a whole, outside of what recomputation runs again
        self.mesh, self.context = mesh, context
        self._shapes = {name: weight.shape for name, weight in model.named_parameters()}
        wanted = settings(zero, sum(shape.numel() for shape in self._shapes.values()), compute, mesh.device)
        self._host = DeviceMesh("cpu", torch.arange(mesh.sizes.world), mesh_dim_names=("shard",))
        for unit in [*layers, model]:
            _materialise(unit, compute, mesh.device)
            if zero.stage == 3:  # cut at once, so that one layer is whole at a time
                deepspeed.zero.Init(module=unit, config_dict_or_path=wanted)
        self._weights = dict(model.named_parameters())
        self._torch = self._adamw(decay)
        self._speed = deepspeed.initialize(model=model, optimizer=self._torch, config=wanted)[0]
        self._flat = _Flat(self._speed.optimizer)
        self.optimizer = ZeroAdamw(self)
        self._fill(starts, seed)

    def _adamw(self, decay: Decay) -> torch.optim.AdamW:
        """Matrices are decayed, other weights are not."""
        groups: dict[bool, list[Tensor]] = {True: [], False: []}
        for name, weight in self._weights.items():
            groups[len(self._shapes[name]) >= 2].append(weight)
        kinds = [
            {"params": weights, "weight_decay": decay.weight_decay if matrices else 0.0}
            for matrices, weights in groups.items()
            if weights
        ]
        return torch.optim.AdamW(kinds, betas=(decay.betas[0], decay.betas[1]), eps=decay.eps, fused=True)

    def forward_backward(self, batches: Sequence[Batch], labels: float) -> Tensor:
        """Adds the gradients of one step's micro-batches; returns this rank's part of the loss, a device scalar."""
        total = torch.zeros((), device=self.mesh.device)
        for i, batch in enumerate(batches):
            self._speed.set_gradient_accumulation_boundary(i == len(batches) - 1)
            loss = self._speed(self._placed(batch)) / labels
            self._speed.backward(loss * self.mesh.sizes.world, scale_wrt_gas=False)  # it averages where we sum
            total += loss.detach()
        return total

    def _placed(self, batch: Batch) -> Batch:
        """This rank's part of the batch, on the device."""
        return self.context.cut(batch).to(self.mesh.device)

    def sum(self, value: Tensor) -> Tensor:
        """The sum of a device scalar over the ranks that hold different data: all of them."""
        total = value.clone()
        dist.all_reduce(total, group=self.mesh.weights.get_group("shard"))
        return total

    def gradient_norm(self) -> Tensor:
        """The Euclidean norm of the whole gradient, each weight counted once, as a device scalar in fp64."""
        norms = torch._foreach_norm(self._flat.gradients())
        squares = torch.stack([norm.to(self.mesh.device) for norm in norms]).double().square().sum()
        dist.all_reduce(squares, group=self.mesh.weights.get_group("shard"))
        return squares.sqrt()

    def clear(self) -> None:
        """Drops the gradients."""
        self._flat.clear()

    def evaluate(self, batch: Batch, at: Tensor | None = None) -> Tensor:
        """The model's answer without gradients, alike on all of cp: summed loss, or logits at `at` of row 0."""
        mine = self._placed(batch)
        places, here = (None, None) if at is None else self.context.find(mine, at)
        with torch.no_grad():
            answer: Tensor = self._speed(mine, places)
        if self.context.ranks > 1:
            if here is not None:  # a token is on one rank of cp
                answer = answer.masked_fill(~here.to(answer.device)[:, None], 0.0)
            dist.all_reduce(answer, group=self.mesh.context.handle)
        return answer

    @property
    def weights(self) -> dict[str, Tensor]:
        """A copy of the fp32 weights in the host's memory, by name: DTensors cut as FSDP2 cuts them."""
        return {name: self._cut(safe_get_full_fp32_param(weight)) for name, weight in self._weights.items()}

    def moments(self) -> dict[str, Tensor]:
        """The same of AdamW's moments, as `first.<weight>` and `second.<weight>`."""
        return {
            f"{ours}.{name}": self._cut(safe_get_full_optimizer_state(weight, theirs))
            for ours, theirs in MOMENTS.items()
            for name, weight in self._weights.items()
        }

    def step(self, rate: float, inverse: Tensor, skip: Tensor) -> None:
        """One step of AdamW on the gradients divided by `inverse`; where `skip` is 1 nothing changes."""
        for group in self._torch.param_groups:
            group["lr"] = rate
        at = self._flat.masters[0].device
        self._torch.grad_scale, self._torch.found_inf = inverse.to(at), skip.to(at)  # type: ignore[attr-defined]
        self._speed.step()

    @property
    def steps(self) -> list[Tensor]:
        """AdamW's counts of the steps it made: one for each flat tensor, all alike."""
        return [self._torch.state[master]["step"] for master in self._flat.masters]

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes over what was read into the copies: `model.<weight>`, and the optimizer's as `optim.<name>`."""
        for name, weight in self._weights.items():
            self._write(weight, self._whole(tensors[f"model.{name}"]))
            for ours, theirs in MOMENTS.items():
                self._write(weight, self._whole(tensors[f"optim.{ours}.{name}"]), theirs)
        for step in self.steps:
            step.copy_(tensors["optim.step"].view(()))
        self._flat.refresh()

    @torch.no_grad()
    def _fill(self, starts: Mapping[str, Normal], seed: int) -> None:
        """Writes the weights' first values, those of every other engine and mesh."""
        for master in self._flat.masters:
            moments = {theirs: torch.zeros_like(master) for theirs in MOMENTS.values()}
            self._torch.state[master] = {"step": torch.zeros((), device=master.device), **moments}
        self._flat.link()
        for name, weight in self._weights.items():
            if name not in starts:
                raise KeyError(f"{name}: no initial value; declare it in its module's initial()")
            shape = self._shapes[name]
            whole = torch.empty(shape, device=self.mesh.device)
            starts[name].fill(whole, key(seed, "initial", name), tuple(shape), (0,) * len(shape))
            self._write(weight, whole)
        self._flat.refresh()

    def _cut(self, whole: Tensor) -> DTensor:
        """This rank's rows of a tensor, copied to the host."""
        part, offset = compute_local_shape_and_global_offset(whole.shape, self._host, [Shard(0)])
        mine = whole.narrow(0, offset[0], part[0]).detach().to("cpu", copy=True)
        shape, stride = whole.shape, whole.stride()
        return DTensor.from_local(mine, self._host, [Shard(0)], run_check=False, shape=shape, stride=stride)

    def _whole(self, cut: Tensor) -> Tensor:
        """The reverse of `_cut`, on the device."""
        part, shape, stride = local(cut).to(self.mesh.device), cut.shape, cut.stride()
        mesh = self.mesh.weights
        return full(DTensor.from_local(part, mesh, [Shard(0)], run_check=False, shape=shape, stride=stride))

    @torch.no_grad()
    def _write(self, weight: Tensor, whole: Tensor, moment: str | None = None) -> None:
        """Puts this rank's part of a weight, or of its moment, where the optimizer has it."""
        if self._flat.cuts_weights:  # its own way cannot write a weight that does not divide by the ranks
            size = weight.ds_tensor.numel()  # type: ignore[attr-defined]
            padded = whole.new_zeros(size * self.mesh.sizes.world)
            padded[: whole.numel()] = whole.flatten()
            mine = padded.narrow(0, size * self.mesh.rank, size)
            if moment is None:
                safe_set_local_fp32_param(weight, mine)
            else:
                safe_set_local_optimizer_state(weight, mine, moment)
        elif moment is None:
            safe_set_full_fp32_param(weight, whole)
        else:
            safe_set_full_optimizer_state(weight, whole, moment)


@final
class ZeroAdamw:
    """The optimizer of a `ZeroEngine`, as `farspan.parallel.engine.Optimizer` has it."""

    def __init__(self, engine: ZeroEngine) -> None:
        self._engine = engine

    def update(self, rate: float, scale: Tensor) -> None:
        """See `farspan.parallel.engine.Optimizer`; DeepSpeed looks for itself as well whether the norm is finite."""
        skip = (scale == 0).float().view(())
        inverse = torch.where(scale == 0, 1.0, 1 / scale).float().view(())
        self._engine.step(rate, inverse, skip)

    def state(self) -> dict[str, Tensor]:
        """Copies, by the names of AdamW under FSDP2: `step`, `first.<weight>`, `second.<weight>`."""
        return {"step": self._engine.steps[0].detach().to("cpu", copy=True).view(1), **self._engine.moments()}


class _Flat:
    """What DeepSpeed's optimizers hold in flat tensors and have no public name for (0.19)."""

    def __init__(self, optimizer: Any) -> None:
        """`optimizer` is DeepSpeed's: of stages 1 and 2, of stage 3, or of stage 1 under bf16."""
        self._optimizer = optimizer
        self.cuts_weights = hasattr(optimizer, "fp32_partitioned_groups_flat")
        kinds = ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition")
        self.masters: list[Tensor] = next(getattr(optimizer, kind) for kind in kinds if hasattr(optimizer, kind))
        """This rank's part of the weights in fp32, which the optimizer steps."""

    def gradients(self) -> list[Tensor]:
        """This rank's part of the gradient after the last backward of a step; what fills it up is 0."""
        if hasattr(self._optimizer, "fp32_groups_gradient_flat_partition"):
            parts = self._optimizer.fp32_groups_gradient_flat_partition
        elif getattr(self._optimizer, "offload_optimizer", getattr(self._optimizer, "cpu_offload", False)):
            get_accelerator().synchronize()  # they may still be on their way to the host
            parts = [master.grad for master in self.masters]
        else:
            parts = [part for group in self._optimizer.averaged_gradients.values() for part in group]
        return [part for part in parts if part.numel()]

    def clear(self) -> None:
        """Drops the gradients: DeepSpeed adds to those of a skipped step where it offloads under bf16."""
        self._optimizer.zero_grad()
        for held in ("averaged_gradients", "all_grad_tensors"):
            groups = getattr(self._optimizer, held, {})
            groups.update(dict.fromkeys(groups))

    def link(self) -> None:
        """Tells the weights of the moments that were made for them."""
        if not self.cuts_weights:
            self._optimizer._lazy_init_hp_params_optimizer_state()

    def refresh(self) -> None:
        """Makes the weights that products see those of `masters`."""
        if self.cuts_weights:
            self._optimizer._partition_all_parameters()  # whatever is still gathered is old
            for group in range(len(self.masters)):
                self._optimizer._reassign_or_swap_out_partitioned_parameters(group)
        else:
            self._optimizer.update_lp_params()


def _materialise(unit: nn.Module, compute: torch.dtype | None, device: torch.device) -> None:
    """Makes room for the weights of a unit that are still on the meta device, in the type of products."""
    for module in unit.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            if weight.is_meta:
                room = torch.empty(weight.shape, dtype=compute or weight.dtype, device=device)
                module.register_parameter(name, nn.Parameter(room))
