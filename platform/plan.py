"""What a job will be, before any process starts: parameters, operations, mesh, memory."""

from dataclasses import dataclass

import torch

from farspan.models.decoder import DecoderModel
from farspan.parallel import recompute, tensor
from farspan.parallel.mesh import Sizes
from farspan.platform.config import kind
from farspan.platform.job import Job
from farspan.platform.trainer import compute_type


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one rank at its fullest, estimated."""

    weights: int
    gradients: int
    optimizer: int
    gathered: int
    """The whole weights of the units that live at once: embedding, head and two layers, or all."""
    activations: int
    """What lives until the backward of one micro-batch, traced on the meta device."""
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
    context: str
    """The kind of context schedule."""
    micro_batches: int
    tokens_per_step: int
    tokens_at_once: int
    """Of one micro-batch on one rank of cp."""
    memory: Memory

    def lines(self) -> list[str]:
        sizes, memory, spread = self.sizes, self.memory, self.sizes.cp > 1
        axes = " · ".join(f"{axis}={getattr(sizes, axis)}" for axis in ("pp", "dp", "cp", "tp"))
        parts = "  ".join(f"{name} {_bytes(size)}" for name, size in vars(memory).items())
        context = f", context {self.context}" if spread else ""
        cut = f", cut into {sizes.cp} parts of {self.tokens_at_once:,}" if spread else ""
        note = "; what cp exchanges within a layer comes on top" if spread else ""
        return [
            f"parameters       {self.parameters:,}",
            f"FLOPs per token  {self.flops_per_token:.4g} (forward and backward)",
            f"mesh             {sizes.world} ranks = {axes}{context}; weights: {sizes.replicate} x shard {sizes.shard}",
            f"step             {self.tokens_per_step:,} tokens in {self.micro_batches} micro-batch(es) a rank{cut}",
            f"memory           about {_bytes(memory.total)} a rank: {parts}{note}",
        ]


def plan(job: Job, world: int, device: str) -> Plan:
    """Builds the model on the meta device and counts; ValueError where the sections do not fit each other."""
    sizes = job.parallel.sizes(world)
    length = job.data.sequence_length
    with torch.device("meta"):
        whole, held = (job.model.build(job.data.vocabulary, job.parallel.context.build()) for _ in range(2))
    tensor.cut(held, sizes.tp)
    rows = job.train.batch // sizes.dp
    micro = min(job.train.micro_batch or rows, rows)
    compute = compute_type(job, torch.device(device)) or torch.float32
    cut = (micro, length) if sizes.cp == 1 else (1, _part(micro * length, sizes))
    return Plan(
        parameters=sum(weight.numel() for weight in whole.parameters()),
        flops_per_token=3 * whole.flops((length,)) / length,
        sizes=sizes,
        context=kind(type(job.parallel.context)),
        micro_batches=-(-rows // micro),
        tokens_per_step=job.train.batch * length,
        tokens_at_once=cut[0] * cut[1],
        memory=_memory(job, held, sizes, cut, compute),
    )


def _part(tokens: int, sizes: Sizes) -> int:
    """Tokens of one rank of cp: what the longest part may have more is left out."""
    return -(-tokens // (sizes.cp * sizes.tp)) * sizes.tp


def _memory(job: Job, model: DecoderModel, sizes: Sizes, cut: tuple[int, int], compute: torch.dtype) -> Memory:
    """Of the pieces that one rank of tp holds; what tp cuts over tokens is counted whole, an upper bound.

    cut: rows of a micro-batch on one rank, and their length; under cp its tokens are one row.
    """
    weights = sum(weight.numel() for weight in model.parameters())
    layers = [sum(weight.numel() for weight in layer.parameters()) for layer in model.layers]
    root = weights - sum(layers)
    head = model.embed.weight
    chunk = min(1 << 27, cut[0] * cut[1] * head.shape[0])
    return Memory(
        weights=4 * weights // sizes.shard,
        gradients=4 * weights // sizes.shard,
        optimizer=job.optim.bytes_per_weight() * weights // sizes.shard,
        gathered=(weights if job.parallel.gathering(sizes) == "step" else root + 2 * max(layers)) * compute.itemsize,
        activations=_activations(job, model.to(compute), *cut),
        logits=chunk * (4 + 4 + compute.itemsize) + 4 * head.numel(),
    )


def _activations(job: Job, model: DecoderModel, rows: int, length: int) -> int:
    """Bytes that live from forward to backward, and what one layer's backward brings back; equal layers traced once."""
    stream = rows * length * model.embed.embedding_dim * model.embed.weight.dtype.itemsize
    norms = sum(1 for norm in (model.embed_norm, model.norm) if any(True for _ in norm.parameters()))
    total, largest = (1 + norms) * stream, 0  # what the outer norms save, and the hidden gradient that the loss keeps
    for first, repeat in model.runs:
        layer = model.layers[first]
        traced = recompute.trace(layer, *layer.example(rows, length))  # type: ignore[operator]
        held, again = traced.held(job.train.kept)
        total += repeat * held
        largest = max(largest, again)
    return total + largest


def _bytes(size: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit in ("B", "KB") else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
