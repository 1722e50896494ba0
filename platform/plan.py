"""What a job will be, before any process starts: parameters, operations, mesh, memory."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from farspan.models.decoder import DecoderModel
from farspan.models.roles import roles
from farspan.parallel import recompute, tensor
from farspan.parallel.expert import AllGather, Beside, DeepEp, Local, Visits
from farspan.parallel.mesh import Sizes, Zero
from farspan.parallel.placement import along
from farspan.parallel.stash import LAST, LEAST
from farspan.platform.config import kind
from farspan.platform.job import Job
from farspan.platform.optim.cost import WINDOW
from farspan.platform.optim.placement import PIECE, Interleaved, Streamed, in_front
from farspan.platform.trainer import compute_type, held_types


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one rank at its fullest, estimated."""

    weights: int
    gradients: int
    """Beside the activations: of a single micro-batch they come as those go."""
    optimizer: int
    gathered: int
    """The weights of products of the units that live at once: embedding, head and two layers, or all."""
    activations: int
    """What lives until the backward of one micro-batch, traced on the meta device."""
    recomputed: int
    """What the backward of one layer brings back."""
    logits: int
    """The head's gradient, and what a chunk of the loss takes beyond what is recomputed, which finds that gone."""
    host: int
    """What waits in the host's memory, and is in none of the others."""

    @property
    def device(self) -> dict[str, int]:
        """Those on the device by name."""
        return {name: size for name, size in vars(self).items() if name != "host"}

    @property
    def total(self) -> int:
        """On the device."""
        return sum(self.device.values())


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
        if sizes.ep * sizes.etp > 1:
            axes += " = " + " · ".join(f"{axis}={getattr(sizes, axis)}" for axis in ("pp", "edp", "ep", "etp"))
        parts = "  ".join(f"{name} {_bytes(size)}" for name, size in memory.device.items())
        host = f"; about {_bytes(memory.host)} of host memory" if memory.host else ""
        context = f", context {self.context}" if spread else ""
        cut = f", cut into {sizes.cp} parts of {self.tokens_at_once:,}" if spread else ""
        note = "; what cp exchanges within a layer comes on top" if spread else ""
        return [
            f"parameters       {self.parameters:,}",
            f"FLOPs per token  {self.flops_per_token:.4g} (forward and backward)",
            f"mesh             {sizes.world} ranks = {axes}{context}; weights: {sizes.replicate} x shard {sizes.shard}",
            f"step             {self.tokens_per_step:,} tokens in {self.micro_batches} micro-batch(es) a rank{cut}",
            f"memory           about {_bytes(memory.total)} a rank: {parts}{note}{host}",
        ]


def plan(job: Job, world: int, device: str) -> Plan:
    """Builds the model on the meta device and counts; ValueError where the sections do not fit each other."""
    sizes = job.parallel.sizes(world)
    if isinstance(job.parallel.dispatch, DeepEp) and sizes.ep > 1 and device != "cuda":
        raise ValueError(
            f"parallel.dispatch.kind=deep_ep: DeepEP runs on GPUs alone, and launch.device is {device}; set "
            "parallel.dispatch: {kind: all_to_all}"
        )
    length = job.data.sequence_length
    with torch.device("meta"):
        whole, held = (job.model.build(job.data.vocabulary, job.parallel.context.build()) for _ in range(2))
    tensor.cut(held, sizes.tp, sizes.ep, sizes.etp)
    if sizes.etp * sizes.ep > 1:
        together = sizes.etp * (sizes.ep if isinstance(job.parallel.dispatch, AllGather) else 1)
        tensor.dispatch(held, _Meeting(together, sizes.etp * sizes.ep))
    rows = job.train.batch // sizes.dp
    micro = min(job.train.micro_batch or rows, rows)
    compute = compute_type(job, torch.device(device)) or torch.float32
    cut = (micro, length) if sizes.cp == 1 else (1, _part(micro * length, sizes))
    memory = _memory(job, held, sizes, cut, compute)
    memory = _under_offload(job, memory, _states(job, whole, held, sizes))
    zero = isinstance(job.parallel.engine, Zero)
    return Plan(
        parameters=sum(weight.numel() for weight in whole.parameters()),
        flops_per_token=3 * whole.flops((length,)) / length,
        sizes=sizes,
        context=kind(type(job.parallel.context)),
        micro_batches=-(-rows // micro),
        tokens_per_step=job.train.batch * length,
        tokens_at_once=cut[0] * cut[1],
        memory=_under_zero(job, memory, held, sizes, compute) if zero else _at_once(memory, -(-rows // micro)),
    )


class _Meeting(Local):
    """On the meta device: what `together` ranks have, as much each, meets this one's experts; or as much comes as goes,
    from `guests` ranks."""

    def __init__(self, together: int, guests: int) -> None:
        super().__init__()
        self.together, self.guests = together, guests

    def run(self, visits: Visits, w13: Tensor, w2: Tensor, beside: Beside | None = None) -> Tensor:
        if self.together == 1:
            return super().run(visits, w13, w2, beside)
        theirs, wishes, share = (x.repeat(self.together, 1) for x in visits[:3])
        found = super().run(Visits(theirs, wishes, share, *visits[3:]), w13, w2)[: len(visits.tokens)]
        return found if beside is None else found + beside()


def _at_once(memory: Memory, micro_batches: int) -> Memory:
    """A second micro-batch's activations find all gradients there; a single one's go, layer by layer, as they come, and
    logits have gone before."""
    if micro_batches > 1:
        return memory
    return replace(memory, gradients=max(0, memory.gradients - memory.activations - memory.logits))


def _part(tokens: int, sizes: Sizes) -> int:
    """Tokens of one rank of cp: what the longest part may have more is left out."""
    return -(-tokens // (sizes.cp * sizes.tp)) * sizes.tp


def _memory(job: Job, model: DecoderModel, sizes: Sizes, cut: tuple[int, int], compute: torch.dtype) -> Memory:
    """Of the pieces that one rank of tp holds; what tp cuts over tokens is counted whole, an upper bound.

    cut: rows of a micro-batch on one rank, and their length; under cp its tokens are one row.
    """
    part = sum(_most(weight, ranks, dim) for _, weight, ranks, dim in _shared(model, sizes))
    head = model.embed.weight
    held = held_types(job, sizes.dp, compute)
    gathered = _gathered(model, sizes, job.gathering(sizes) == "step", held.weights == compute)
    activations, again, host = _activations(job, model.to(compute), *cut)
    chunk = min(1 << 27, cut[0] * cut[1] * head.shape[0]) * (4 + 4 + compute.itemsize)
    learnt = compute.itemsize * head.numel()  # summed in fp32
    return Memory(
        weights=held.weights.itemsize * part,
        gradients=held.gradients.itemsize * part,
        optimizer=0,
        gathered=gathered * compute.itemsize,
        activations=activations,
        recomputed=again,
        logits=learnt + max(0, chunk + 4 * head.numel() - learnt - again),
        host=host,
    )


def _gathered(model: DecoderModel, sizes: Sizes, all_stay: bool, alike: bool) -> int:
    """Numbers of the weights that are made for products and live at once: of all layers, or of two.

    alike: weights are held in the type of products, so that a rank that shares one with nobody needs no other.
    """
    made = {
        id(w): 0 if alike and ranks * sizes.replicate == 1 else w.numel() for _, w, ranks, _ in _shared(model, sizes)
    }
    layers = [sum(made[id(weight)] for weight in layer.parameters()) for layer in model.layers]
    return sum(made.values()) if all_stay else sum(made.values()) - sum(layers) + 2 * max(layers)


def _shared(model: DecoderModel, sizes: Sizes) -> Iterator[tuple[str, torch.nn.Parameter, int, int]]:
    """(name, weight, between how many ranks it is sharded, along which dimension) of all weights of a cut model."""
    dealt = {id(weight) for experts in tensor.experts(model) for weight in experts.parameters()}
    for name, weight in model.named_parameters():
        ranks = sizes.expert_shard if sizes.folded and id(weight) in dealt else sizes.shard
        yield name, weight, ranks, along(tuple(weight.shape), ranks) if id(weight) in dealt else 0


def _most(weight: torch.Tensor, ranks: int, dim: int) -> int:
    """Numbers of the rank that holds most: what is cut is not always even."""
    rows = weight.shape[dim]
    return weight.numel() // rows * -(-rows // ranks)


def _states(job: Job, whole: DecoderModel, held: DecoderModel, sizes: Sizes) -> list[int]:
    """Bytes of one rank's optimizer state: of what is in no layer, and of each layer."""
    known, wholes = roles(whole), dict(whole.named_parameters())
    found = [0] * (1 + len(whole.layers))
    for name, piece, ranks, dim in _shared(held, sizes):
        _, _, rest = name.partition("layers.")
        state = job.optim.state_bytes(tuple(wholes[name].shape), known[name])
        mine = state * _most(piece, ranks, dim) // wholes[name].numel()
        found[1 + int(rest.partition(".")[0]) if rest else 0] += mine
    return found


def _under_offload(job: Job, memory: Memory, states: list[int]) -> Memory:
    """With the optimizer's state where it is to live."""
    offload = job.offload
    if offload is None:
        return replace(memory, optimizer=sum(states))
    largest = max(states)
    stay = in_front(states, offload.device_gb * 1e9) if isinstance(offload, Streamed) else 0
    if stay == len(states):
        return replace(memory, optimizer=sum(states))
    kept, window = sum(states[:stay]), WINDOW * min(PIECE, largest)
    away = sum(states) - kept
    if isinstance(offload, Interleaved):  # were all the CPU's: fp32 weights and gradients and bf16 weights as well
        away *= 2
    gradients = memory.gradients
    if isinstance(offload, Streamed) and offload.gradients:
        # Beside those of layers that stay, three layers' are on the device, and come back in pieces.
        gradients = min(gradients, (3 * largest + kept) * gradients // max(1, sum(states)))
        window += window * (memory.gradients - gradients) // max(1, sum(states))
    host = memory.host + away + memory.gradients - gradients
    return replace(memory, optimizer=kept + window, gradients=gradients, host=host)


def _under_zero(job: Job, memory: Memory, model: DecoderModel, sizes: Sizes, compute: torch.dtype) -> Memory:
    """What DeepSpeed's engine makes of it: fp32 weights beside those of products, and a bucket of gradients."""
    if not isinstance(zero := job.parallel.engine, Zero):
        return memory
    weights = sum(weight.numel() for weight in model.parameters())
    part, alone = weights // sizes.shard, zero.stage == 3 and zero.offload == "none" and compute == torch.float32
    held = {
        "weights": compute.itemsize * (part if zero.stage == 3 else weights),
        "gradients": 4 * (weights if zero.stage == 1 else part),
        "optimizer": (8 if alone else 12) * part,
    }
    away = {"none": 0, "optimizer": 2, "optimizer_and_weights": 3}[zero.offload]
    waiting = ("optimizer", "gradients", "weights")[:away]
    host = sum(held.pop(name) for name in waiting)
    held["gradients"] = held.get("gradients", 0) + compute.itemsize * min(weights, Zero.BUCKET)
    gathered = compute.itemsize * min(weights, Zero.LIVE) if zero.stage == 3 else 0
    return replace(memory, **{**dict.fromkeys(waiting, 0), **held}, gathered=gathered, host=memory.host + host)


def _activations(job: Job, model: DecoderModel, rows: int, length: int) -> tuple[int, int, int]:
    """Bytes that live from forward to backward, and what one layer's backward brings back; equal layers traced once.

    Third: those of the first that wait in host memory, of which at most two layers' are on the device as well.
    """
    stream = rows * length * model.embed.embedding_dim * model.embed.weight.dtype.itemsize
    norms = sum(1 for norm in (model.embed_norm, model.norm) if any(True for _ in norm.parameters()))
    total, largest = (1 + norms) * stream, 0  # what the outer norms save, and the hidden gradient that the loss keeps
    host = most = 0
    for first, repeat in model.runs:
        layer = model.layers[first]
        traced = recompute.trace(layer, *layer.example(rows, length))  # type: ignore[operator]
        held, again = traced.held(job.train.kept)
        away = traced.large(job.train.kept, LEAST) if job.train.stashed else 0
        total += repeat * (held - away)
        host += repeat * away
        largest, most = max(largest, again), max(most, away)
    return total + min(host, 2 * most), largest, host - LAST * away


def _bytes(size: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit in ("B", "KB") else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
