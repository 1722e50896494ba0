"""What a job will be, before any process starts: parameters, operations, mesh, memory."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from farspan.models.decoder import DecoderModel
from farspan.parallel.context.shard import Batch
from farspan.parallel.mesh import Sizes
from farspan.platform.job import Job
from farspan.platform.trainer import compute_type


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one rank at its fullest, estimated."""

    weights: int
    gradients: int
    optimizer: int
    gathered: int
    """The whole weights of the units that live at once: embedding and head, and two layers."""
    activations: int
    """What the layers save for the backward of one micro-batch, measured on the meta device."""
    logits: int
    """One chunk of the loss, and the head's gradient."""

    @property
    def total(self) -> int:
        return sum(vars(self).values())


@dataclass(frozen=True, kw_only=True)
class Plan:
    parameters: int
    flops_per_token: float
    """Forward and backward, at full-length documents."""
    sizes: Sizes
    micro_batches: int
    tokens_per_step: int
    memory: Memory

    def lines(self) -> list[str]:
        sizes, memory = self.sizes, self.memory
        axes = " · ".join(f"{axis}={getattr(sizes, axis)}" for axis in ("pp", "dp", "cp", "tp"))
        parts = "  ".join(f"{name} {_bytes(size)}" for name, size in vars(memory).items())
        return [
            f"parameters       {self.parameters:,}",
            f"FLOPs per token  {self.flops_per_token:.4g} (forward and backward)",
            f"mesh             {sizes.world} ranks = {axes}; weights: {sizes.replicate} x shard {sizes.shard}",
            f"step             {self.tokens_per_step:,} tokens in {self.micro_batches} micro-batch(es) a rank",
            f"memory           about {_bytes(memory.total)} a rank: {parts}",
        ]


def plan(job: Job, world: int, device: str) -> Plan:
    """Builds the model on the meta device and counts; ValueError where the sections do not fit each other."""
    sizes = job.parallel.sizes(world)
    length = job.data.sequence_length
    with torch.device("meta"):
        model = job.model.build(job.data.vocabulary, job.parallel.context.build())
    rows = job.train.batch // sizes.dp
    micro = min(job.train.micro_batch or rows, rows)
    compute = compute_type(job, torch.device(device)) or torch.float32
    return Plan(
        parameters=sum(weight.numel() for weight in model.parameters()),
        flops_per_token=3 * model.flops((length,)) / length,
        sizes=sizes,
        micro_batches=-(-rows // micro),
        tokens_per_step=job.train.batch * length,
        memory=_memory(job, model, sizes, micro, compute),
    )


def _memory(job: Job, model: DecoderModel, sizes: Sizes, rows: int, compute: torch.dtype) -> Memory:
    weights = sum(weight.numel() for weight in model.parameters())
    layers = [sum(weight.numel() for weight in layer.parameters()) for layer in model.layers]
    root = weights - sum(layers)
    head = model.embed.weight
    chunk = min(1 << 27, rows * job.data.sequence_length * head.shape[0])
    return Memory(
        weights=4 * weights // sizes.shard,
        gradients=4 * weights // sizes.shard,
        optimizer=job.optim.bytes_per_weight() * weights // sizes.shard,
        gathered=(root + 2 * max(layers)) * compute.itemsize,
        activations=_activations(job, model.to(compute), rows),
        logits=chunk * (4 + 4 + compute.itemsize) + 4 * head.numel(),
    )


def _activations(job: Job, model: DecoderModel, rows: int) -> int:
    """Bytes that the layers save: measured layer by layer, equal layers once."""
    shape = rows, job.data.sequence_length
    positions = torch.zeros(shape, dtype=torch.int64, device="meta")
    empty = Batch(tokens=positions, labels=positions, positions=positions, cu_seqlens=None, lengths=(), valid=0)
    x = torch.empty(
        *shape, model.embed.embedding_dim, dtype=model.embed.weight.dtype, device="meta", requires_grad=True
    )
    angles = model.angles(empty.positions)
    total, largest = 2 * x.nbytes, 0  # the final norm's input and the hidden gradient that the loss keeps
    for first, repeat in model.runs:
        rotation = model.rotations[first]
        saved = _saved(model.layers[first], x, None if rotation is None else angles[rotation])
        total += repeat * (x.nbytes if job.train.recompute == "block" else saved)
        largest = max(largest, saved)
    return total + (largest if job.train.recompute == "block" else 0)


def _saved(layer: nn.Module, x: Tensor, angles: tuple[Tensor, Tensor] | None) -> int:
    """Bytes that one layer keeps for its backward, weights and views of one memory counted once."""
    own = {weight.untyped_storage()._cdata for weight in layer.parameters()}
    seen: dict[int, int] = {}
    alive: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            seen[storage._cdata] = storage.nbytes()
            alive.append(tensor)  # a freed storage's address could be taken by another
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(x, angles, None)
    return sum(seen.values())


def _bytes(size: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit in ("B", "KB") else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
