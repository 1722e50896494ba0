"""A mixture with objectives and buckets reads the same rows on other ranks and micro-batches, and after a resume."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from farspan.models.block import Block
from farspan.models.decoder import Decoder
from farspan.models.ffns import Swiglu
from farspan.models.mixers import Softmax
from farspan.parallel.context.shard import Batch
from farspan.parallel.mesh import Mesh
from farspan.platform import metrics
from farspan.platform.data import Mixture, Text
from farspan.platform.data.buckets import Documents
from farspan.platform.data.mixture import Point, Source
from farspan.platform.data.objective import Causal, FillInTheMiddle, Mixed, Prefix, SpanCorruption, Weighted
from farspan.platform.job import Checkpoint, Evaluate, Job, Train
from farspan.platform.metrics import Metrics
from farspan.platform.optim import Adamw
from farspan.platform.schedule import Constant
from farspan.platform.trainer import Surroundings, Trainer

KINDS = (Causal(), Prefix(), SpanCorruption(max_spans=4))


def job(corpus: str, steps: int, micro: int) -> Job:
    text: dict[str, Any] = {"paths": (corpus,), "sequence_length": 96, "held_out": 0.2, "cache": f"{corpus}/../cache"}
    mixed = Mixed(objectives=tuple(Weighted(weight=1.0, objective=kind) for kind in KINDS))
    bucketed = Text(**text, packing=Documents(bucket=8), objective=FillInTheMiddle(rate=0.8))
    return Job(
        name="t",
        seed=3,
        model=Decoder(width=16, tied=True, blocks=(Block(repeat=2, mixer=Softmax(heads=2), ffn=Swiglu(hidden=24)),)),
        data=Mixture(
            sources=(Source(weight=0.7, data=Text(**text, objective=mixed)), Source(weight=0.3, data=bucketed)),
            schedule=(Point(at=32, weights=(0.2, 0.8)),),
        ),
        train=Train(steps=steps, batch=4, micro_batch=micro, evaluate=Evaluate(every=4, rows=5)),
        optim=Adamw(rate=1e-2),
        schedule=Constant(),
        checkpoint=Checkpoint(every=4),
        metrics=Metrics(every=2),
    )


def seen(folder: str, corpus: str, steps: int, micro: int) -> list[list[dict[str, Any]]]:
    """Trains, and tells the rows of each step on this rank, without their padding."""
    around = Surroundings(
        folder=Path(folder), say=lambda _: None, stopping=lambda: False, beat=lambda _: None, config={}
    )
    wanted = job(corpus, steps, micro)
    control = dist.new_group(backend="gloo")
    sizes = wanted.parallel.sizes(dist.get_world_size())
    trainer = Trainer(wanted, Mesh(sizes, torch.device("cpu"), control), around)
    told: list[list[dict[str, Any]]] = []
    real = trainer.engine.forward_backward

    def spy(batches: list[Batch], labels: float) -> Tensor:
        told.append([row for batch in batches for row in rows_of(batch)])
        return real(batches, labels)

    trainer.engine.forward_backward = spy  # type: ignore[method-assign,assignment]
    assert trainer.run().kind == "done"
    return told


def rows_of(batch: Batch) -> list[dict[str, Any]]:
    """Tokens, labels, positions and prefix of each row, up to the last token that says or predicts something."""
    inside = torch.zeros(batch.tokens.numel(), dtype=torch.bool)
    if batch.prefix is not None:
        inside[batch.prefix] = True
    used = (batch.tokens != 256) | (batch.labels >= 0)
    rows = []
    for i, prefix in enumerate(inside.view_as(batch.tokens)):
        stop = int(used[i].nonzero()[-1]) + 1
        parts = {"tokens": batch.tokens, "labels": batch.labels, "positions": batch.positions}
        rows.append({name: part[i, :stop].tolist() for name, part in parts.items()})
        rows[-1]["prefix"] = prefix[:stop].tolist()
    return rows


def test_mixture_objectives_and_buckets_resume_on_other_ranks(ranks: Any, corpus: Path, tmp_path: Path) -> None:
    [straight] = ranks(1, seen, folder=str(tmp_path / "one"), corpus=str(corpus), steps=8, micro=4)
    folder = str(tmp_path / "many")
    parts = [
        ranks(2, seen, folder=folder, corpus=str(corpus), steps=4, micro=1),
        ranks(1, seen, folder=folder, corpus=str(corpus), steps=8, micro=3),
    ]
    steps = [[row for rank in part for row in rank[i]] for part in parts for i in range(4)]
    assert steps == straight
    rows = [row for step in straight for row in step]
    assert any(True in row["prefix"] for row in rows) and any(max(row["tokens"]) > 256 for row in rows)
    assert len({len(row["tokens"]) for row in rows}) > 3, "rows of documents are of many lengths"
    losses = [
        [line for line in metrics.latest(metrics.read(tmp_path / name)) if line.get("loss")] for name in ("one", "many")
    ]
    for left, right in zip(*losses, strict=True):
        assert left["loss"] == pytest.approx(right["loss"], rel=1e-4) and left["tokens"] == right["tokens"]
