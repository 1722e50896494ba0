"""A mixture of experts through `launch`, from file to checkpoint and on to another number of ranks."""

import json
from pathlib import Path

import pytest
import torch
from launching import numbers, refusal

from farspan.launch import cli
from farspan.platform import metrics
from farspan.platform.stored import Stored

CONFIG = Path(__file__).parents[2] / "configs" / "moe.yaml"
SMALL = ["data.paths=[corpus]", "data.sequence_length=48", "data.cache=cache", "train.batch=4", "train.micro_batch=1"]
SMALL += ["schedule.warmup=1", "schedule.steps=4", "train.steps=4", "checkpoint.every=null", "train.precision=fp32"]
SMALL += ["model.blocks.0.repeat=2"]


def test_trains_and_goes_on_with_fewer_ranks(corpus: Path) -> None:
    """Two ranks that stop half way and one that goes on are one that never stopped; its line tells of the experts."""
    folder, same = corpus.parent, ["train.recompute=selective"]
    same += [
        f"model.blocks.0.ffn.{field}" for field in ("bias=aux_free", "bias_rate=0.1", "jitter=0.1", "capacity=1.5")
    ]
    whole = numbers(CONFIG, folder, *SMALL, *same, "name=whole", "launch.ranks=1")
    numbers(CONFIG, folder, *SMALL, *same, "name=part", "train.steps=2")
    resumed = numbers(CONFIG, folder, *SMALL, *same, "name=part", "launch.ranks=1", "--resume")
    assert [line[0] for line in whole] == [1, 2, 3, 4]
    for ours, theirs in zip(resumed, whole, strict=True):
        assert ours[:3] == pytest.approx(theirs[:3], rel=1e-4)
    assert (
        cli.main(["convert", str(folder / "runs" / "whole"), str(folder / "runs" / "coded"), "optim.kind=adamw8"]) == 0
    )
    ends = [Stored(folder / "runs" / name / "checkpoints" / "step-00000004") for name in ("coded", "whole")]
    coded, kept = (end["model.layers.1.ffn.bias.value"] for end in ends)
    assert torch.equal(coded, kept) and kept.dtype == torch.float32 and kept.abs().max() > 0.05
    last = metrics.read(folder / "runs" / "whole")[-1]
    assert 0 < (last["dropped"] or 0) < 0.5 and (last["router_z"] or 0) > 1
    assert json.loads((folder / "runs" / "whole" / "status.json").read_text())["state"] == "done"
    assert 1 <= (last["load_max"] or 0) <= 4 and 0 < (last["load_entropy"] or 0) <= 1
    assert 0.01 < (last["router_cost"] or 0) < 0.08, "two layers, each of about 0.01"


@pytest.mark.parametrize(
    "name",
    [
        "widenet",
        "expert_choice",
        *(pytest.param(kind, marks=pytest.mark.laws) for kind in ("block_ffn", "smoe_dropout")),
    ],
)
def test_other_experts_are_dealt_out_as_well(name: str, corpus: Path) -> None:
    """Two ranks that have half of them each are one that has all."""
    config, few = CONFIG.with_name(f"{name}.yaml"), ["train.steps=3", "train.evaluate=null"]
    alone = numbers(config, corpus.parent, *SMALL, *few, "name=alone", "launch.ranks=1")
    found = numbers(config, corpus.parent, *SMALL, *few, "name=part", "parallel.ep=2")
    for ours, theirs in zip(found, alone, strict=True):
        assert ours[:3] == pytest.approx(theirs[:3], rel=1e-4)


def test_what_sees_both_ways_is_cut_across_ranks(corpus: Path) -> None:
    """Experts choose, and hidden tokens are told, alike where two ranks have half of every row, held out or not."""
    config, few = CONFIG.with_name("expert_choice.yaml"), ["train.steps=2", "train.evaluate={every: 2, rows: 4}"]
    alone = numbers(config, corpus.parent, *SMALL, *few, "name=both", "launch.ranks=1")
    found = numbers(config, corpus.parent, *SMALL, *few, "name=cut", "parallel.cp=2", "parallel.ep=2")
    assert 3 < alone[-1][3] < 8
    for ours, theirs in zip(found, alone, strict=True):
        given = [(a, b) for a, b in zip(ours, theirs, strict=True) if b is not None]
        assert all(a == pytest.approx(b, rel=1e-4) for a, b in given)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model.blocks.0.ffn.active=9"], "model.blocks.0.ffn.active=9: must be at least 1"),
        (["parallel.engine={kind: zero, stage: 1}"], "model.blocks: experts: parallel.engine.kind=zero"),
        (["model.blocks.0.linear={kind: fp8}"], "set linear: {kind: plain}"),
        (
            ["model.blocks.0.mixer.causal=false"],
            "model.blocks.0.mixer.causal=False: tokens would see what they are to predict; set data.objective={kind: "
            "masked}, or causal: true",
        ),
        (
            ["data.objective={kind: masked}"],
            "data.objective.kind=masked: hidden tokens are told from both sides, and every mixer looks back only; set "
            "model.blocks.0.mixer.causal=false",
        ),
        (
            ["data.objective={kind: masked}", "model.blocks.0.mixer.window=8"],
            "add a mixer without a window and with causal: false",
        ),
        (
            ["data.objective={kind: masked}", "model.blocks.0.mixer.causal=false", "train.sample={prompt: a}"],
            "train.sample: text is written from left to right",
        ),
        (["model.blocks.0.ffn={kind: expert_choice, experts: 4, active: 2, hidden: 8}"], "later ones too; set mixer"),
    ],
)
def test_mistakes_are_named(
    arguments: list[str], message: str, corpus: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(corpus.parent)
    assert message in refusal(CONFIG, *SMALL, *arguments, capfd=capfd)
