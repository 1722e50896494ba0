"""DeepSpeed's engine is farspan's: the same losses, norms, weights, moments and checkpoints, however it cuts them."""

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from farspan.models.block import Block
from farspan.models.decoder import Decoder, initial
from farspan.models.ffns import Swiglu
from farspan.models.mixers import Softmax
from farspan.models.roles import roles
from farspan.parallel.context import Axis, Ring
from farspan.parallel.context.shard import IGNORE, Batch
from farspan.parallel.engine import Engine
from farspan.parallel.fsdp import full
from farspan.parallel.mesh import Mesh, Parallel, Zero
from farspan.platform.checkpoint import FORMAT, Saver, load
from farspan.platform.optim import Adamw

pytestmark = pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")

VOCABULARY, LENGTH = 60, 19
MODEL = Decoder(
    width=22,
    tied=True,
    vocabulary=VOCABULARY,
    blocks=(
        Block(repeat=2, mixer=Softmax(heads=4, kv_heads=2, head_dim=8, qk_norm=True), ffn=Swiglu(hidden=36)),
        Block(mixer=Softmax(heads=2, kv_heads=1, head_dim=6), ffn=None),
    ),
)
"""Odd sizes: neither rows nor numbers of weights divide by the ranks."""
OPTIM = Adamw(rate=1e-2, weight_decay=0.3)


def batches(step: int, part: int, parts: int) -> list[Batch]:
    """This part's micro-batches, of one row each, of a step's rows, whose labels differ in number."""
    made, rows = torch.Generator().manual_seed(step), 2 * dist.get_world_size()
    tokens, labels = (torch.randint(VOCABULARY, (rows, LENGTH), generator=made) for _ in range(2))
    for row in range(rows):
        labels[row, : 3 * row] = IGNORE
    mine = range(part * rows // parts, (part + 1) * rows // parts)
    positions = torch.arange(LENGTH).unsqueeze(0)
    return [
        Batch(
            tokens=tokens[row : row + 1],
            labels=labels[row : row + 1],
            positions=positions,
            cu_seqlens=None,
            lengths=(LENGTH,),
            valid=int((labels[row] != IGNORE).sum()),
        )
        for row in mine
    ]


def build(cut: dict[str, Any], mesh: Mesh, kept: float | None, compute: torch.dtype | None) -> tuple[Any, Any]:
    """An engine and its optimizer, from the keys of `Parallel`."""
    parallel = Parallel(**cut)
    axis = Axis(group=mesh.context, device=mesh.device) if mesh.sizes.cp > 1 else None
    context = parallel.context.build(axis) if axis else parallel.context.build()
    with torch.device("meta"):
        model = MODEL.build(VOCABULARY, context)
    common: dict[str, Any] = {"context": context, "seed": 3, "compute": compute, "kept": kept}
    if not isinstance(parallel.engine, Zero):
        engine = Engine(model, list(model.layers), initial(model), mesh, **common)
        return engine, OPTIM.build(engine.weights, roles(model), seed=0)
    from farspan.parallel import zero

    original = zero.settings

    def never_whole(*asked: Any) -> dict[str, Any]:
        """So small a model would stay gathered."""
        made = original(*asked)
        made["zero_optimization"] |= {"stage3_param_persistence_threshold": 0, "stage3_max_live_parameters": 0}
        made["zero_optimization"] |= {"stage3_max_reuse_distance": 0, "reduce_bucket_size": 1000}
        return made

    zero.settings = never_whole
    starts = initial(model)
    other = zero.ZeroEngine(model, list(model.layers), starts, mesh, zero=parallel.engine, decay=OPTIM, **common)
    zero.settings = original
    return other, other.optimizer


def whole(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: full(tensor).detach().clone() for name, tensor in tensors.items()}


def copies(engine: Any, optimizer: Any) -> dict[str, Tensor]:
    """What a checkpoint would hold."""
    weights = {f"model.{name}": weight.detach() for name, weight in engine.weights.items()}
    return weights | {f"optim.{name}": tensor for name, tensor in optimizer.state().items()}


def train(engine: Any, optimizer: Any, mesh: Mesh, steps: range) -> list[dict[str, Tensor]]:
    """What a run would see of each step; every gradient is scaled down."""
    seen = []
    for step in steps:
        work = batches(step, mesh.index("dp"), mesh.sizes.dp)
        every = batches(step, 0, 1)
        loss = engine.sum(engine.forward_backward(work, float(sum(batch.valid for batch in every))))
        norm = engine.gradient_norm()
        optimizer.update(1e-2 / (step + 1), 0.1 / norm)
        engine.clear()
        logits = engine.evaluate(every[0], torch.tensor([18, 3]))
        seen.append({"loss": loss, "norm": norm, "logits": logits, "held out": engine.evaluate(every[1])})
    return seen


def probe(cuts: list[dict[str, Any]], folder: str, kept: float | None = None, bf16: bool = False) -> list[Any]:
    """On each cut: three steps, two that are skipped, and a fourth: at once, and from the cut before's checkpoint."""
    control, root = dist.new_group(backend="gloo"), Path(folder)
    compute = torch.bfloat16 if bf16 else None
    saver = Saver(root, keep=len(cuts), control=control, say=print)
    found = []
    for number, asked in enumerate(cuts):
        zero = asked.get("zero")
        cut = {**{k: v for k, v in asked.items() if k != "zero"}, **({"engine": Zero(**zero)} if zero else {})}
        if "cp" in cut:
            cut["context"] = Ring()
        mesh = Mesh(Parallel(**cut).sizes(dist.get_world_size()), torch.device("cpu"), control)
        engine, optimizer = build(cut, mesh, kept, compute)
        start = whole(copies(engine, optimizer))
        seen = train(engine, optimizer, mesh, range(3))
        end = whole(copies(engine, optimizer))
        for labels in (float("nan"), 1.0):  # a loss that is not finite; and one that is, under a scale of 0
            engine.forward_backward(batches(3, mesh.index("dp"), mesh.sizes.dp), labels)
            finite = engine.gradient_norm().isfinite()
            optimizer.update(1e-2, torch.zeros(()))
            engine.clear()
            assert bool(finite) == (labels == 1.0)
        untouched = copies(engine, optimizer)
        assert saver.save(number, untouched, {"format": FORMAT})
        found.append({"start": start, "seen": seen, "end": end, "untouched": whole(untouched)})
        found[-1]["fourth"] = train(engine, optimizer, mesh, range(3, 4))
        load(root, max(0, number - 1), tensors := copies(engine, optimizer), control)
        if zero:
            engine.restore(tensors)
        found[-1]["again"] = train(engine, optimizer, mesh, range(3, 4))
    return found


def same(left: Any, right: Any, tolerance: float) -> None:
    if isinstance(left, dict):
        assert left.keys() == right.keys()
        for key in left:
            same(left[key], right[key], tolerance)
    elif isinstance(left, list):
        for one, other in zip(left, right, strict=True):
            same(one, other, tolerance)
    else:
        torch.testing.assert_close(left.double(), right.double(), rtol=tolerance, atol=tolerance)


CUTS: list[dict[str, Any]] = [{}, {"zero": {"stage": 1}}, {"zero": {"stage": 2}}, {"zero": {"stage": 3}}]
MORE: list[dict[str, Any]] = [
    {"cp": 2},
    {"cp": 2, "zero": {"stage": 1, "offload": "optimizer"}},
    {"cp": 2, "zero": {"stage": 3, "offload": "optimizer"}},
    {"zero": {"stage": 2, "offload": "optimizer"}},
    {"zero": {"stage": 3, "offload": "optimizer_and_weights"}},
]


def compare(results: list[list[Any]], cuts: list[dict[str, Any]], tolerance: float) -> None:
    for of_rank in results:
        for cut, found in zip(cuts, of_rank, strict=True):
            try:
                same(found["start"], of_rank[0]["start"], 0)
                same(found["seen"], of_rank[0]["seen"], tolerance)
                same(found["end"], of_rank[0]["end"], tolerance)
                same(found["untouched"], found["end"], 0)
                same(found["again"], found["fourth"], tolerance)
            except AssertionError as error:
                raise AssertionError(f"{cut}: {error}") from error


def test_every_stage_is_fsdp(ranks: Any, tmp_path: Path) -> None:
    compare(ranks(2, probe, cuts=CUTS, folder=str(tmp_path)), CUTS, 1e-5)


@pytest.mark.laws
@pytest.mark.parametrize("kept", [None, 0.0, 0.5])
def test_with_offloading_over_cut_sequences_and_under_recomputation(
    ranks: Any, tmp_path: Path, kept: float | None
) -> None:
    compare(ranks(2, probe, cuts=MORE, folder=str(tmp_path), kept=kept), MORE, 1e-5)


@pytest.mark.laws
def test_on_three_ranks(ranks: Any, tmp_path: Path) -> None:
    """Few weights divide by them, and their average is rounded."""
    compare(ranks(3, probe, cuts=CUTS, folder=str(tmp_path)), CUTS, 1e-5)


@pytest.mark.laws
def test_in_bf16(ranks: Any, tmp_path: Path) -> None:
    """Products are rounded; weights, moments and first values are not."""
    cuts = [*CUTS, *({"zero": {"stage": stage, "offload": "optimizer"}} for stage in (1, 2, 3))]
    compare(ranks(2, probe, cuts=cuts, folder=str(tmp_path), bf16=True), cuts, 0.02)
