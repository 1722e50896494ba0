"""Every optimizer through `launch`, from file to checkpoint and on again after a kill."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launching import numbers, refusal

from farspan.platform import metrics
from processes import alive

CONFIGS = Path(__file__).parents[2] / "configs"
SMALL = ["data.paths=[corpus]", "data.sequence_length=48", "data.cache=cache", "data.held_out=0.2", "model.width=48"]
SMALL += ["train.batch=4", "train.evaluate={every: 4, rows: 2}", "schedule.warmup=1", "checkpoint.every=null"]
LAYER = "model.blocks=[{repeat: 2, mixer: {kind: softmax, heads: 2}, ffn: {kind: swiglu, hidden: 96}}]"


def train(config: str, folder: Path, *overrides: str) -> None:
    numbers(CONFIGS / f"{config}.yaml", folder, *SMALL, LAYER, *overrides)


def losses(folder: Path) -> dict[int, float]:
    """By step; of a step that ran twice, the last."""
    return {int(line["step"] or 0): line["loss"] for line in metrics.read(folder) if line.get("loss") is not None}  # type: ignore[misc]


@pytest.mark.parametrize(
    ("config", "rest"),
    [
        ("interleaved", ()),
        ("muon", ("launch.ranks=2", "optim.rest.kind=adamw8", "optim.rest.master=fp32")),
        pytest.param("galore", ("optim.rank=8", "optim.every=3"), marks=pytest.mark.laws),
        pytest.param("galore", ("optim.kind=galore", "optim.rank=8"), marks=pytest.mark.laws),
    ],
)
def test_trains_from_file_to_checkpoint(config: str, rest: tuple[str, ...], corpus: Path) -> None:
    train(config, corpus.parent, "name=run", "train.steps=6", *rest)
    folder = corpus.parent / "runs" / "run"
    found = losses(folder)
    assert sorted(found) == [1, 2, 3, 4, 5, 6] and found[6] < found[1]
    assert (folder / "checkpoints" / "LATEST").read_text() == "step-00000006\n"


def test_killed_8_bit_training_goes_on_as_if_never_stopped(corpus: Path) -> None:
    """A rank killed between two saves, with state streamed from host memory and gradients accumulated."""
    long = ("train.steps=24", "train.evaluate=null", "train.micro_batch=1")
    train("adamw8", corpus.parent, "name=whole", *long)
    folder, killed = corpus.parent / "runs" / "killed", ("name=killed", *long, "checkpoint.every=4")
    command = [sys.executable, "-m", "farspan.launch.cli", "train", "--config", str(CONFIGS / "adamw8.yaml")]
    run = subprocess.Popen(
        [*command, *SMALL, LAYER, *killed], cwd=corpus.parent, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    wait_for_step(folder, 6)
    victim = next(pid for pid in alive("farspan.launch.cli") if of_rank(pid, 1, folder))
    os.kill(victim, signal.SIGKILL)
    said, _ = run.communicate(timeout=200)
    assert run.returncode == 0, said.decode()
    assert {line["attempt"] for line in metrics.read(folder)} == {1, 2}, "it was killed while it trained"
    assert losses(folder) == losses(corpus.parent / "runs" / "whole")
    train("adamw8", corpus.parent, *killed, "train.steps=26", "optim.offload=null", "--resume")
    assert max(losses(folder)) == 26


def wait_for_step(folder: Path, step: int) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError, ValueError):
            if json.loads((folder / "agents" / "rank-0.heartbeat").read_text())["step"] >= step:
                return
        time.sleep(0.02)
    raise TimeoutError(f"{folder} did not reach step {step}")


def of_rank(pid: int, rank: int, folder: Path) -> bool:
    with contextlib.suppress(OSError):
        seen = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        return f"RANK={rank}".encode() in seen and str(folder).encode() in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False


@pytest.mark.parametrize(
    ("config", "arguments", "message"),
    [
        ("adamw8", ["optim.master=fp32"], "optim.master=fp32: keeps the weights on the device in fp32"),
        ("adamw8", ["optim.block=100"], "optim.block=100: must be a power of two from 32 to 1024"),
        ("adamw8", ["optim.offload.device_gb=-1"], "optim.offload.device_gb=-1.0: must be 0, which leaves all state"),
        ("adamw8", ["optim.offload.kind=interleaved"], "optim.offload.kind='interleaved'"),
        ("adamw8", ["optim.exact=[heads]"], "optim.exact"),
        (
            "adamw8",
            ["optim.offload.gradients=true", "train.batch=8"],
            "train.micro_batch=2: optim.offload.gradients=True is for a single micro-batch a step",
        ),
        ("interleaved", ["parallel.engine.kind=zero"], "optim.offload: is fsdp's"),
    ],
)
def test_mistakes_are_named(
    config: str,
    arguments: list[str],
    message: str,
    corpus: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(corpus.parent)
    assert message in refusal(CONFIGS / f"{config}.yaml", *SMALL, *arguments, capfd=capfd)
