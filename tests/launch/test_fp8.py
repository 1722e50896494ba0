"""Layers in eight bits, through `launch` from file to checkpoint."""

import json
from pathlib import Path

import pytest
from launching import numbers, refusal

CONFIG = Path(__file__).parents[2] / "configs" / "fp8.yaml"
SMALL = ["data.paths=[corpus]", "data.sequence_length=48", "data.cache=cache", "data.held_out=0.2", "train.steps=4"]
SMALL += ["train.batch=4", "train.evaluate={every: 2, rows: 2}", "schedule.warmup=1", "checkpoint.every=null"]
PLAIN = [f"model.blocks.{i}.linear={{kind: plain}}" for i in range(3)]


def lines(folder: Path, *overrides: str) -> list[tuple[float, ...]]:
    return numbers(CONFIG, folder, *SMALL, *overrides)


def test_trains_from_file_to_checkpoint(corpus: Path) -> None:
    found = lines(corpus.parent, "name=eight")
    folder = corpus.parent / "runs" / "eight"
    assert json.loads((folder / "status.json").read_text())["state"] == "done"
    assert [line[0] for line in found if line[1] is not None] == [1, 2, 3, 4]
    held_out = [line[3] for line in found if line[3] is not None]
    assert len(held_out) == 2 and held_out[1] < held_out[0] < 7
    assert (folder / "checkpoints" / "LATEST").read_text() == "step-00000004\n"


@pytest.mark.laws
def test_eight_bits_train_as_all_of_them_do(corpus: Path) -> None:
    """From the same weights: losses nearly the same, and never quite; recomputation changes no bit."""
    eight, plain = lines(corpus.parent, "name=codes"), lines(corpus.parent, "name=plain", *PLAIN)
    for mine, other in zip(eight, plain, strict=True):
        for found, wanted in zip(mine[1::2], other[1::2], strict=True):
            assert (found is None) == (wanted is None)
            assert found is None or (found != wanted and found == pytest.approx(wanted, rel=0.03))
    assert lines(corpus.parent, "name=again", "train.recompute=block") == eight


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model.blocks.0.ffn.hidden=360"], "model.blocks.0.linear: ffn.to_gate: outputs=360: must be"),
        (["model.blocks.2.ffn.hidden=352"], "model.blocks.2.linear: ffn.to_gate: outputs=352: must be"),
        (["model.blocks.0.linear.recipe=rows"], "model.blocks.0.linear.recipe='rows': must be row or block"),
        (["model.blocks.1.ffn.hidden=496", "parallel.tp=2"], "model.blocks.1.linear: ffn.to_up: outputs=248: must be"),
    ],
)
def test_mistakes_are_named(
    arguments: list[str], message: str, corpus: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(corpus.parent)
    assert message in refusal(CONFIG, *SMALL, *arguments, capfd=capfd)
