"""DeepSpeed's engine through `launch`: stopped, gone on with, and changed for another engine; and what it refuses."""

import json
import os
import signal
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from farspan.launch import cli
from farspan.platform import metrics
from processes import alive, within

CONFIG = """
name: tiny
model:
  kind: decoder
  width: 18
  blocks: [{repeat: 2, mixer: {kind: softmax, heads: 2, head_dim: 8, qk_norm: true}, ffn: {kind: swiglu, hidden: 24}}]
data: {kind: text, paths: [corpus], sequence_length: 48, held_out: 0.2, cache: cache}
train: {steps: 8, batch: 4, micro_batch: 1, evaluate: {every: 4, rows: 4}, sample: {prompt: "def", tokens: 4}}
optim: {kind: adamw, rate: 1e-2, max_norm: 0.5}
schedule: {kind: cosine, warmup: 2, steps: 8}
launch: {kind: local, ranks: 2, device: cpu}
"""
ZERO = "parallel={engine: {kind: zero, stage: 3}}"
INSTALLED = pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")


@pytest.fixture
def config(tmp_path: Path, corpus: Path) -> Path:
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    return tmp_path / "tiny.yaml"


def start(config: Path, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "farspan.launch.cli", "train", "--config", str(config), *arguments],
        cwd=config.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **environment},
    )


def finished(process: subprocess.Popen[str]) -> str:
    """What the model wrote at the end."""
    said = process.communicate(timeout=240)[0]
    assert process.returncode == 0, said
    return next(line for line in said.splitlines() if "sample: " in line)


def launch(config: Path, *arguments: str) -> str:
    return finished(start(config, *arguments))


def alone(config: Path, *arguments: str) -> str:
    """On one rank, in one process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return finished(start(config, "launch.ranks=1", *arguments, **place))


def wait_for_step(folder: Path, step: int) -> None:
    """Until a heartbeat says that `step` was made."""
    heartbeat = folder / "agents" / "rank-0.heartbeat"
    within(120, lambda: heartbeat.exists() and json.loads(heartbeat.read_text())["step"] >= step)


def rank_of(folder: Path, rank: int) -> int:
    """The process of a rank of a run, by its environment."""
    for pid in alive(str(folder)):
        if f"RANK={rank}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
            return pid
    raise LookupError(f"{folder} has no rank {rank}")


def seen(config: Path, name: str) -> dict[tuple[int, str], float]:
    """Every number of a run that its engine has a say in."""
    lines = metrics.latest(metrics.read(config.parent / "runs" / name))
    keys = ("loss", "grad_norm", "eval_loss")
    return {(line["step"], key): line[key] for line in lines for key in keys if line.get(key) is not None}


def same(config: Path, name: str, other: str) -> None:
    """A run that went on elsewhere was evaluated where it stopped as well."""
    found, wanted = seen(config, name), seen(config, other)
    assert len(wanted) > 16
    assert {at: found[at] for at in wanted} == pytest.approx(wanted, rel=1e-5)


@INSTALLED
def test_stopped_and_gone_on_with_under_fsdp(config: Path) -> None:
    """Stage 3 on two ranks, then FSDP on one: the numbers and the text of a run that knew FSDP alone."""
    text = alone(config, "name=plain")
    launch(config, ZERO, "train.steps=5")
    assert alone(config, "parallel={}", "train.steps=8", "--resume") == text
    same(config, "tiny", "plain")


@INSTALLED
@pytest.mark.laws
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_killed_and_gone_on_with(config: Path, stage: int) -> None:
    """kill -9 of a rank between saves, a restart by itself, and the rest on one rank, state on the host, and cp."""
    common = ("train.steps=40", "schedule.steps=44", "checkpoint.every=4", "name=hurt")
    zero = f"kind: zero, stage: {stage}"
    text = alone(config, "name=plain", "train.steps=44", "schedule.steps=44")
    process = start(config, f"parallel={{engine: {{{zero}}}}}", *common)
    folder = config.parent / "runs" / "hurt"
    wait_for_step(folder, 9)
    os.kill(rank_of(folder, 1), signal.SIGKILL)
    said = process.communicate(timeout=240)[0]
    assert process.returncode == 0 and "restart" in said and "resumed from" in said, said
    spread = f"parallel={{cp: 2, context: {{kind: ring}}, engine: {{{zero}, offload: optimizer}}}}"
    launch(config, "--resume", *common, "train.steps=42", spread)
    assert alone(config, "--resume", *common, "train.steps=44", f"parallel={{engine: {{{zero}}}}}") == text
    same(config, "hurt", "plain")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["parallel.tp=2"], "parallel.tp=2: engine.kind=zero cuts whole weights only; set tp: 1, or engine: {kind:"),
        (["parallel.shard=1"], "parallel.shard=1: engine.kind=zero cuts over all 2 ranks; set shard: auto, or engine"),
        (["parallel.gather=step"], "parallel.gather=step: engine.kind=zero gathers by itself; set gather: auto"),
        (["train.compile=true"], "train.compile=True: parallel.engine.kind=zero runs layers as they are; set it to"),
        (["train.recompute=offload"], "train.recompute=offload: parallel.engine.kind=zero keeps activations"),
        (
            ["optim={kind: adamw8, rate: 1e-2}"],
            "optim.kind=adamw8: parallel.engine.kind=zero steps adamw only; set that, or",
        ),
        (["optim.offload={kind: streamed}"], "optim.offload: is fsdp's; parallel.engine.offload is that of DeepSpeed"),
        (["parallel.engine.stage=4"], "parallel.engine.stage=4: must be 1 or 2 or 3"),
        (
            ["parallel.engine.stage=2", "parallel.engine.offload=optimizer_and_weights"],
            "parallel.engine.offload=optimizer_and_weights: stage=2 keeps whole weights on every rank; set stage: 3",
        ),
    ],
)
def test_mistakes_are_named_before_any_process_starts(
    config: Path, arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(config.parent)
    assert cli.main(["train", "--config", str(config), ZERO, *arguments, "--dry-run"]) == 2
    assert message in capfd.readouterr().err


def test_a_missing_package_is_named(
    config: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(config.parent)
    monkeypatch.setattr("farspan.platform.job.find_spec", lambda _: None)
    assert cli.main(["train", "--config", str(config), ZERO, "--dry-run"]) == 2
    said = capfd.readouterr().err
    assert "DeepSpeed is not installed; pip install 'farspan[deepspeed]', or parallel.engine: {kind: fsdp}" in said
