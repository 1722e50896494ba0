"""Experts on several ranks through `launch`: any cut of them, and one cut after another, is one rank all the time."""

import json
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
from launching import numbers, refusal

from farspan.platform import metrics

CONFIG = Path(__file__).parents[2] / "configs" / "expert_parallel.yaml"
SMALL = ["data.paths=[corpus]", "data.sequence_length=48", "data.cache=cache", "train.batch=4", "train.micro_batch=1"]
SMALL += ["schedule.warmup=1", "schedule.steps=4", "train.steps=4", "checkpoint.every=null"]
SMALL += ["train.precision=fp32", "train.recompute=selective", "model.blocks.0.repeat=2"]
ALONE = ["launch.ranks=1", "parallel.ep=1"]


@pytest.mark.parametrize(
    ("first", "then", "travels"),
    [
        pytest.param([], ["parallel.ep=1", "parallel.etp=2"], (True, False), id="ep to etp"),
        pytest.param(
            ["parallel.dispatch={kind: auto}", "model.blocks.0.ffn.capacity=4"],
            ["parallel.dispatch={kind: all_to_all, padded: true}"],
            (None, True),
            id="auto to padded",
            marks=pytest.mark.laws,
        ),
        pytest.param(
            ["parallel.ep=1", "parallel.tp=2", "optim={kind: adamw8, rate: 3e-3}"],
            ["parallel.dispatch={kind: all_gather}"],
            (False, True),
            id="tp to ep, 8 bits",
            marks=pytest.mark.laws,
        ),
        pytest.param(
            ["parallel.cp=2", "parallel.dispatch={kind: all_gather}"],
            ALONE,
            (True, False),
            id="cp to one",
            marks=pytest.mark.laws,
        ),
    ],
)
def test_goes_on_under_another_cut(
    first: list[str], then: list[str], travels: tuple[bool | None, bool], corpus: Path
) -> None:
    """travels: whether tokens do, before and after; None: as `auto` has it."""
    folder, alike = corpus.parent, [key for key in first if key.startswith(("optim", "model"))]
    wanted = numbers(CONFIG, folder, *SMALL, *ALONE, *alike, "name=alone")
    assert [line[0] for line in wanted] == [1, 2, 3, 4]
    numbers(CONFIG, folder, *SMALL, *first, "name=part", "train.steps=2")
    back = [f"{key.partition('=')[0]}=1" for key in first if key.startswith(("parallel.tp", "parallel.cp"))]
    found = numbers(CONFIG, folder, *SMALL, *alike, *back, *then, "name=part", "--resume")
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours[:3] == pytest.approx(theirs[:3], rel=3e-3 if "adamw8" in str(first) else 1e-4)
    assert json.loads((folder / "runs" / "part" / "status.json").read_text())["state"] == "done"
    waited = [(line.get("exchange_seconds") or 0) > 0 for line in metrics.read(folder / "runs" / "part")]
    assert waited[2:] == [travels[1]] * 2 and (travels[0] is None or waited[:2] == [travels[0]] * 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["parallel.ep=3", "launch.ranks=3", "train.batch=6"], "experts=8: must be a multiple of parallel.ep=3"),
        (["parallel.ep=4"], "parallel: ep=4 · etp=1 must divide the 2 ranks that hold one copy of the weights"),
        (["model.blocks.0.ffn={kind: swiglu, hidden: 64}"], "parallel.ep=2, etp=1 are for experts"),
        (["parallel.engine={kind: zero, stage: 1}"], "parallel.ep=2, etp=1: engine.kind=zero cuts whole weights only"),
        (["parallel.dispatch={kind: weights}"], "weight_gather"),
    ],
)
def test_mistakes_are_named(
    arguments: list[str], message: str, corpus: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(corpus.parent)
    assert message in refusal(CONFIG, *SMALL, *arguments, capfd=capfd)


@pytest.mark.parametrize(
    ("installed", "arguments", "message"),
    [
        (False, [], "DeepEP is not installed; build it from"),
        (True, ["train.precision=auto"], "DeepEP runs on GPUs alone, and launch.device is cpu"),
        (True, [], "train.precision=fp32: parallel.dispatch.kind=deep_ep sends tokens in bf16"),
        (True, ["train.deterministic=true"], "train.deterministic=True: parallel.dispatch.kind=deep_ep"),
        (
            True,
            ["model.blocks.0.ffn={kind: block_ffn, experts: 64, hidden: 8}"],
            "model.blocks: ffn: a token may wish for 64 experts, with DeepEP for 32; set fewer",
        ),
        (True, ["model.width=72"], "model.width=72: DeepEP's tokens have a multiple of 16 channels, at most 8176"),
        (True, ["parallel.ep=3", "launch.ranks=3", "train.batch=6"], "parallel.ep=3: DeepEP is for 2, 4, 8, 16"),
    ],
)
def test_what_deep_ep_cannot_do_is_named_beforehand(
    installed: bool,
    arguments: list[str],
    message: str,
    corpus: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(corpus.parent)
    found = ModuleSpec("deep_ep", None) if installed else None
    monkeypatch.setattr("farspan.platform.job.find_spec", lambda name: found)
    said = refusal(CONFIG, *SMALL, "parallel.dispatch={kind: deep_ep}", *arguments, capfd=capfd)
    assert message in said and "parallel.dispatch: {kind: all_to_all}" in said
