"""Settles `parallel.dispatch: {kind: auto}` before a model is built: experts that are gathered lie otherwise."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from farspan.models.ffns import Moe, Sparse
from farspan.parallel.comm import Group
from farspan.parallel.expert import Auto, WeightGather, auto
from farspan.parallel.mesh import Mesh
from farspan.platform import choices
from farspan.platform.job import Job
from farspan.platform.plan import plan


def settled(job: Job, mesh: Mesh, folder: Path, compute: torch.dtype, say: Callable[[str], None]) -> tuple[Job, Mesh]:
    """The job with a dispatch that has a name, and the mesh that goes with it; all ranks call it together.

    What a run picked once for such a mesh it picks again. compute: the type of products.
    """
    sizes, axes = mesh.sizes, mesh.expert_axes if job.model.routes and mesh.sizes.ep > 1 else None
    if not isinstance(job.parallel.dispatch, Auto) or axes is None or axes.ep is None:
        return job, mesh
    layers, room = _layers(job, mesh, compute), _room(mesh)
    where = f"ep={sizes.ep} shard={sizes.expert_shard} on {mesh.device.type}, {sum(x.tokens for x in layers)} tokens"
    where += f", {room / 1e9:.0f} GB" if room else ""
    kept = [choices.kept(folder).get("dispatch")]
    dist.broadcast_object_list(kept, src=0, group=mesh.control)
    known: dict[str, str] = kept[0] if isinstance(kept[0], dict) else {}
    picked = known.get(where, "")
    if picked not in auto.KINDS:
        hosts = Group(mesh.control)
        link = auto.measure(axes.ep, mesh.device, compute, hosts)
        picked, why = auto.pick(layers, sizes.ep, sizes.expert_shard, link, _needs(job, mesh) if room else None, room)
        say(why)
        if hosts.rank == 0:
            choices.keep(folder, "dispatch", {**known, where: picked}, say)
    if isinstance(auto.KINDS[picked], WeightGather):
        mesh = Mesh(replace(sizes, ep=1), mesh.device, mesh.control)
    return _under(job, picked), mesh


def _under(job: Job, kind: str) -> Job:
    return replace(job, parallel=replace(job.parallel, dispatch=auto.KINDS[kind]))


def _room(mesh: Mesh) -> int:
    """Bytes of the smallest device; 0: not known."""
    if mesh.device.type != "cuda":
        return 0
    room = torch.tensor(torch.cuda.get_device_properties(mesh.device).total_memory)
    dist.all_reduce(room, op=dist.ReduceOp.MIN, group=mesh.control)
    return int(room)


def _needs(job: Job, mesh: Mesh) -> dict[str, int]:
    """Bytes that a rank is planned to hold under each kind."""
    return {kind: plan(_under(job, kind), mesh.sizes.world, "cuda").memory.total for kind in auto.KINDS}


def _layers(job: Job, mesh: Mesh, compute: torch.dtype) -> dict[auto.Layer, int]:
    """The layers with experts, and how many of each."""
    rows = job.train.batch // mesh.sizes.dp
    micro = min(job.train.micro_batch or rows, rows)
    tokens = micro * job.data.sequence_length // (mesh.sizes.cp * mesh.sizes.tp)
    found: dict[auto.Layer, int] = {}
    for block in job.model.blocks:
        ffn = block.ffn
        if isinstance(ffn, Sparse):
            layer = auto.Layer(
                tokens=tokens,
                experts=ffn.experts,
                active=ffn.met,
                width=job.model.width,
                hidden=ffn.hidden // mesh.sizes.etp,
                itemsize=compute.itemsize,
                shared=ffn.shared if isinstance(ffn, Moe) else 0,
            )
            found[layer] = found.get(layer, 0) + block.repeat
    return found
