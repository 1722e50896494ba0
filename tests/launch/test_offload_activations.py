"""Activations in host memory, through `launch` from file to checkpoint."""

from pathlib import Path

import pytest
from launching import numbers, refusal

from farspan.launch import cli

CONFIG = Path(__file__).parents[2] / "configs" / "offload_activations.yaml"
SMALL = ["data.paths=[corpus]", "data.cache=cache", "data.held_out=0.2", "train.steps=3", "schedule.warmup=1"]
SMALL += ["train.evaluate={every: 3, rows: 2}", "checkpoint.every=null"]


def losses(folder: Path, *overrides: str) -> list[tuple[float, ...]]:
    return numbers(CONFIG, folder, *SMALL, *overrides)


def test_trains_from_file_to_checkpoint(corpus: Path) -> None:
    found = losses(corpus.parent, "name=host")
    assert [line[0] for line in found if line[1] is not None] == [1, 2, 3] and found[2][1] < found[0][1] < 7
    assert (corpus.parent / "runs" / "host" / "checkpoints" / "LATEST").read_text() == "step-00000003\n"


@pytest.mark.laws
def test_where_activations_wait_never_shows_in_the_numbers(corpus: Path) -> None:
    """In micro-batches of different sizes, and with a tensor-parallel pair."""
    for cut in (["train.micro_batch=5"], ["parallel.tp=2", "train.micro_batch=9"]):
        host = losses(corpus.parent, f"name=host-{len(cut)}", *cut)
        assert host == losses(corpus.parent, f"name=none-{len(cut)}", "train.recompute=none", "train.keep=null", *cut)


def test_the_plan_tells_host_from_device_memory(
    corpus: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Less on the device than by recomputing the same; three of four layers' inputs at the least are on the host."""
    monkeypatch.chdir(corpus.parent)
    said = []
    for recompute in ("offload", "selective"):
        assert cli.main(["train", "--config", str(CONFIG), *SMALL, f"train.recompute={recompute}", "--dry-run"]) == 0
        said.append(next(line for line in capfd.readouterr().out.splitlines() if line.startswith("memory")))
    there, here = said
    assert there.endswith(" MB of host memory") and "host" not in here
    assert float(there.split()[-5]) > 3 * 2
    activations = [float(line.partition("activations ")[2].split()[0]) for line in said]
    assert activations[0] < activations[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train.recompute=block"], "train.keep=0.75: recompute=block has no use for it; set recompute: selective or"),
        (["train.keep=1.5"], "train.keep=1.5: must be from 0 to 1; at 0 only inputs and attention's outputs stay"),
        (["train.recompute=offloaded"], "train.recompute='offloaded': must be none or block or selective or offload"),
    ],
)
def test_mistakes_are_named(
    arguments: list[str], message: str, corpus: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(corpus.parent)
    assert message in refusal(CONFIG, *SMALL, *arguments, capfd=capfd)
