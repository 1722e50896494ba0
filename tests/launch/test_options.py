"""The model's options and selective recomputation, through `launch` from file to checkpoint."""

import json
from pathlib import Path

import pytest
from launching import numbers, refusal

CONFIG = Path(__file__).parents[2] / "configs" / "options.yaml"
SMALL = ["data.paths=[corpus]", "data.sequence_length=48", "data.cache=cache", "data.held_out=0.2", "train.steps=4"]
SMALL += ["train.batch=4", "train.evaluate={every: 2, rows: 2}", "schedule.warmup=1", "checkpoint.every=null"]


def losses(folder: Path, *overrides: str) -> list[tuple[float, ...]]:
    return numbers(CONFIG, folder, *SMALL, *overrides)


def test_trains_from_file_to_checkpoint(corpus: Path) -> None:
    lines = losses(corpus.parent, "name=whole")
    folder = corpus.parent / "runs" / "whole"
    assert json.loads((folder / "status.json").read_text())["state"] == "done"
    assert [line[0] for line in lines if line[1] is not None] == [1, 2, 3, 4]
    held_out = [line[3] for line in lines if line[3] is not None]
    assert len(held_out) == 2 and held_out[1] < held_out[0] < 7
    names = (folder / "checkpoints" / "LATEST").read_text()
    assert names == "step-00000004\n"


@pytest.mark.laws
def test_recomputation_never_shows_in_the_numbers(corpus: Path) -> None:
    """On two ranks that share the weights, selective recomputation gives the same bits as none."""
    selective = losses(corpus.parent, "name=selective")
    assert selective == losses(corpus.parent, "name=plain", "train.recompute=none", "train.keep=null")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train.recompute=none"], "train.keep=0.75: recompute=none has no use for it; set recompute: selective"),
        (["train.keep=0"], "train.keep=0.0: must be more than 0 and at most 1; recompute: block keeps nothing"),
        (["model.placement=sandwich"], "model.placement='sandwich': must be pre or post or peri"),
        (["model.norm.eps=0"], "model.norm.eps=0.0: must be positive; 1e-5 is usual"),
        (["model.norm_eps=1e-6"], "model.norm_eps=1e-06: unknown key; did you mean norm?"),
        (["model.blocks.0.mixer.rope.scaling.factor=0.5"], "model.blocks.0.mixer.rope.scaling.factor=0.5: must be at"),
    ],
)
def test_mistakes_are_named(
    arguments: list[str], message: str, corpus: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(corpus.parent)
    assert message in refusal(CONFIG, *SMALL, *arguments, capfd=capfd)
