"""The main job through `launch`, as a person runs it: trains, dies, comes back, refuses, reports."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from launching import said

from farspan.launch import cli
from farspan.platform import metrics
from farspan.platform.data import index
from processes import alive

CONFIG = """
name: tiny
model:
  kind: decoder
  width: 16
  tied: true
  blocks: [{repeat: 1, mixer: {kind: softmax, heads: 2}, ffn: {kind: swiglu, hidden: 24}}]
data: {kind: text, paths: [corpus], sequence_length: 48, held_out: 0.2, cache: cache}
train: {steps: 30, batch: 4, evaluate: {every: 10, rows: 4}, sample: {prompt: "def", tokens: 4}}
optim: {kind: adamw, rate: 1e-2}
schedule: {kind: cosine, warmup: 2}
checkpoint: {every: 5, keep: 3}
metrics: {every: 5}
launch: {kind: local, ranks: 2, device: cpu}
"""


@pytest.fixture
def config(tmp_path: Path, corpus: Path) -> Path:
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    return tmp_path / "tiny.yaml"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, write_corpus: Callable[[Path], Path]) -> Path:
    """The run folder of the tiny job that nobody touched."""
    folder = tmp_path_factory.mktemp("undisturbed")
    write_corpus(folder)
    (folder / "tiny.yaml").write_text(CONFIG)
    trained(folder / "tiny.yaml", "checkpoint.every=null")
    return folder / "runs" / "tiny"


def launch(config: Path, *arguments: str, **started: Any) -> subprocess.Popen[str]:
    """`launch train` in the folder of the config as a process of its own, its output in `.stdout`."""
    line = [sys.executable, "-m", "farspan.launch.cli", "train", "--config", str(config), *arguments]
    return subprocess.Popen(
        line, cwd=config.parent, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **started
    )


def finished(process: subprocess.Popen[str], code: int = 0) -> str:
    text = process.communicate(timeout=240)[0]
    assert process.returncode == code, text
    return text


def trained(config: Path, *arguments: str, code: int = 0) -> str:
    """What a whole `launch train` in the folder of the config says."""
    return said(config.parent, "train", "--config", str(config), *arguments, code=code)


def status(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "status.json").read_text())
    return found


def numbers(folder: Path) -> list[tuple[Any, ...]]:
    keys = ("step", "loss", "grad_norm", "rate", "tokens", "eval_loss")
    return [tuple(line.get(key) for key in keys) for line in metrics.latest(metrics.read(folder))]


def rank_of(folder: Path, rank: int) -> int:
    """The process of a rank, by its environment."""
    for pid in alive("farspan.launch.cli"):
        try:
            seen = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            if f"RANK={rank}".encode() in seen and str(folder).encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                return pid
        except OSError:
            continue
    return 0


def wait_for_step(folder: Path, step: int) -> None:
    """Until a heartbeat says that `step` was made."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        try:
            if json.loads((folder / "agents" / "rank-0.heartbeat").read_text())["step"] >= step:
                return
        except (OSError, ValueError):
            pass
        time.sleep(0.02)
    raise TimeoutError(f"{folder} did not reach step {step}")


def test_train_resume_verify_report(config: Path) -> None:
    """One run from beginning to end, and everything a person does with it afterwards."""
    text = finished(launch(config))
    folder = config.parent / "runs" / "tiny"
    assert "step     30  loss" in text and "sample: def" in text and "run folder: runs/tiny" in text
    assert status(folder) == {
        "state": "done",
        "exit_code": 0,
        "step": 30,
        "reason": status(folder)["reason"],
        "attempt": 1,
    }
    lines = metrics.read(folder)
    keys = {
        "step",
        "loss",
        "grad_norm",
        "rate",
        "tokens",
        "tokens_per_second",
        "step_seconds",
        "mfu",
        "memory_gb",
        "attempt",
    }
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 31))
    assert all(set(line) == keys for line in lines if "loss" in line)
    assert [line["step"] for line in lines if "eval_loss" in line] == [10, 20, 30]
    assert (folder / "logs" / "rank-0.log").exists() and (folder / "logs" / "rank-1.log").exists()

    text = trained(config, code=2)  # never overwritten silently
    assert "name=tiny: the run" in text and "add --resume to go on with it, or name=another" in text

    text = trained(config, "--resume", "train.steps=20", code=2)
    assert "train.steps=20: the run is at step 30" in text

    text = trained(config, "--resume", "optim.rate=0.5", code=2)
    assert "optim.rate=0.5" in text and "--resume may change only train.steps" in text

    text = trained(config, "--resume", "train.steps=40", "launch.ranks=1")
    assert "resumed from" in text and status(folder)["step"] == 40
    assert "steps: 30" in (folder / "config.yaml").read_text(), "the schedule's horizon stays where it was"

    assert "sound" in said(config.parent, "verify", str(folder))
    file = next((folder / "checkpoints" / "step-00000040").glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-3] ^= 4
    file.write_bytes(content)
    text = said(config.parent, "verify", str(folder / "checkpoints" / "step-00000040"), code=2)
    assert "DAMAGED" in text and "SHA-256 differs" in text
    text = trained(config, "train.steps=40", "--resume", "launch.ranks=1")
    assert "step-00000040 does not verify and is passed over" in text and "resumed from" in text
    assert "DAMAGED" not in said(config.parent, "verify", str(folder)), "step 40 was made and saved again"

    page = Path(said(config.parent, "report", str(folder)).strip().splitlines()[-1])
    assert "<svg" in (config.parent / page).read_text()


@pytest.mark.parametrize("victim", ["rank-1", "rank-0"])
def test_kill_9_of_a_rank_ends_with_the_same_metrics(config: Path, undisturbed: Path, victim: str) -> None:
    process = launch(config, "name=hurt")
    folder = config.parent / "runs" / "hurt"
    wait_for_step(folder, random.Random(time.time()).randint(6, 24))
    os.kill(rank_of(folder, int(victim[-1])), signal.SIGKILL)
    assert "restart" in finished(process)
    assert numbers(folder) == numbers(undisturbed)
    assert {line["attempt"] for line in metrics.read(folder)} == {1, 2}
    assert not alive(str(folder))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_and_exits_85_and_resume_goes_on(config: Path, number: signal.Signals) -> None:
    process = launch(config, "train.steps=3000", "checkpoint.every=null")
    folder = config.parent / "runs" / "tiny"
    wait_for_step(folder, 7)
    process.send_signal(number)
    finished(process, code=85)
    told = status(folder)
    assert told["state"] == "preempted" and told["exit_code"] == 85 and 7 <= told["step"] < 3000
    assert (folder / "checkpoints" / "LATEST").read_text() == f"step-{told['step']:08d}\n"
    assert not alive(str(folder))
    if number == signal.SIGTERM:
        text = trained(config, "--resume", f"train.steps={told['step'] + 2}")
        assert f"resumed from {folder}/checkpoints/step-{told['step']:08d}" in text


def test_a_crash_loop_stops_with_a_clear_reason(config: Path, tmp_path: Path) -> None:
    """A rank that dies at the same place every time: the weights of a damaged checkpoint folder cannot be written."""
    broken = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": str(tmp_path / "hook")}
    (tmp_path / "hook").mkdir()
    hook = "import os\nif os.environ.get('RANK') == '1' and 'WORLD_SIZE' in os.environ:\n    os._exit(17)\n"
    (tmp_path / "hook" / "sitecustomize.py").write_text(hook)
    text = finished(launch(config, "launch.retries=2", env=broken), code=75)
    told = status(config.parent / "runs" / "tiny")
    assert told["state"] == "failed" and told["exit_code"] == 75 and "17" in told["reason"] and "17" in text


def test_torchrun_is_a_launcher_too(config: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "farspan.launch.cli"]
    command += ["train", "--config", str(config), "train.steps=4"]
    done = subprocess.run(command, cwd=config.parent, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    folder = config.parent / "runs" / "tiny"
    assert status(folder)["state"] == "done" and [n[0] for n in numbers(folder) if n[1] is not None] == [1, 2, 3, 4]


def test_ray_runs_the_same_job_and_survives_a_kill(config: Path, undisturbed: Path) -> None:
    process = launch(config, "name=hurt", "launch.kind=ray", "launch.nodes=1")
    folder = config.parent / "runs" / "hurt"
    wait_for_step(folder, random.Random(time.time()).randint(6, 24))
    os.kill(rank_of(folder, 1), signal.SIGKILL)
    finished(process)
    assert numbers(folder) == numbers(undisturbed)
    assert status(folder)["state"] == "done" and not alive(str(folder))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train.stpes=3"], "train.stpes=3: unknown key; did you mean steps?"),
        (["train.batch=3"], "train.batch=3: must be a multiple of dp=2; try 4"),
        (["model.vocabulary=100"], "model.vocabulary=100: the tokenizer has 257 tokens"),
        (["lanch.kind=ray"], "did you mean launch?"),
        (["data.paths=[/no/such/folder]"], "data.paths[0]='/no/such/folder'"),
        (["model.blocks.0.mixer.heads=3"], "heads=3: must divide width=16"),
        (["parallel.pp=2"], "parallel.pp=2: this version trains with pp=1 only; give the ranks to dp, cp or tp"),
        (
            ["parallel.cp=4", "launch.ranks=4", "parallel.context={kind: grid, inner: 3}"],
            "model.blocks.0.mixer: parallel.context.inner=3: must divide parallel.cp=4",
        ),
        (
            ["parallel.cp=2", "data.objective={kind: prefix}"],
            "parallel.cp=2: data's objective shows a prefix both ways, which cannot be cut across ranks; set it to "
            "bidirectional: false, or parallel.cp=1",
        ),
        (
            ["parallel.tp=2", "model.blocks.0.mixer.heads=1"],
            "model.blocks.0.mixer.heads=1: must be a multiple of parallel.tp=2",
        ),
        (["schedule.warmup=50"], "schedule.warmup=50"),
        (["data.held_out=0"], "data.held_out=0: train.evaluate needs held-out documents"),
        (["name=a/b"], "name='a/b'"),
        (["--resume", "name=never"], "is no run"),
    ],
)
def test_mistakes_are_named_before_any_process_starts(
    config: Path,
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(config.parent)
    assert cli.main(["train", "--config", str(config), *arguments]) == 2
    assert message in capfd.readouterr().err and not (config.parent / "runs").exists()


@dataclass(frozen=True)
class OneRank:
    """A run of eight steps on one rank, and what it wrote at the end."""

    config: Path
    written: str


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory, write_corpus: Callable[[Path], Path]) -> OneRank:
    folder = tmp_path_factory.mktemp("spread")
    write_corpus(folder)
    (folder / "tiny.yaml").write_text(CONFIG)
    text = trained(folder / "tiny.yaml", "name=one", "launch.ranks=1", "train.steps=8", *CHANGES)
    return OneRank(folder / "tiny.yaml", sample_of(text))


CHANGES = (
    "model.width=32",
    "model.blocks.0.mixer.heads=4",
    "model.blocks.0.mixer.kv_heads=2",
    "train.evaluate={every: 4, rows: 4}",
    "checkpoint.every=null",
)
"""To the tiny job: heads enough for four ranks."""


def sample_of(text: str) -> str:
    return next(line for line in text.splitlines() if "sample: " in line)


def same_curve(one_rank: OneRank, name: str) -> None:
    """The losses of a run are those of one rank."""
    one, other = (metrics.latest(metrics.read(one_rank.config.parent / "runs" / run)) for run in ("one", name))
    for key, tolerance in (("loss", 1e-5), ("eval_loss", 1e-5), ("grad_norm", 1e-4)):
        left, right = ([line[key] for line in run if key in line] for run in (one, other))
        assert left and left == pytest.approx(right, rel=tolerance), key


@pytest.mark.parametrize("axis", ["tp", pytest.param("cp", marks=pytest.mark.laws)])
def test_stopped_across_ranks_and_gone_on_with_on_one(one_rank: OneRank, axis: str) -> None:
    """Layers or sequences spread over two ranks, and then on one: the losses and the text of one rank."""
    common = [f"name={axis}", "schedule.steps=8", *CHANGES]
    trained(one_rank.config, f"parallel.{axis}=2", "train.steps=4", *common)
    text = trained(one_rank.config, "launch.ranks=1", "train.steps=8", "--resume", *common)
    same_curve(one_rank, axis)
    assert sample_of(text) == one_rank.written


CONTEXTS = ("{kind: gather}", "{kind: ring}", "{kind: token_ring}", "{kind: ulysses}", "{kind: auto}")


@pytest.mark.laws
@pytest.mark.parametrize(
    "parallel",
    [
        *(f"{{cp: 2, context: {context}}}" for context in CONTEXTS),
        "{cp: 4, context: {kind: ring}}",
        "{cp: 4, context: {kind: ulysses}}",
        "{cp: 4, context: {kind: grid, inner: 2, outer: {kind: token_ring}}}",
        "{cp: 2, dp: 2, context: {kind: grid, inner: 2}}",
        "{cp: 2, tp: 2, context: {kind: ring}}",
    ],
)
def test_every_context_schedule_gives_one_ranks_losses(one_rank: OneRank, parallel: str) -> None:
    name = "".join(c if c.isalnum() else "-" for c in parallel)
    ranks = 4 if any(size in parallel for size in ("cp: 4", "dp: 2", "tp: 2")) else 2
    wanted = [f"name={name}", f"parallel={parallel}", f"launch.ranks={ranks}", "train.steps=8", *CHANGES]
    text = trained(one_rank.config, *wanted)
    same_curve(one_rank, name)
    assert sample_of(text) == one_rank.written


def test_bad_data_is_named_and_mended(config: Path) -> None:
    """What only the ranks can see ends them with the reason, and leaves the name free."""
    (config.parent / "bad").mkdir()
    (config.parent / "bad" / "latin.txt").write_bytes(b"caf\xe9")
    text = trained(config, "data.bad_files=stop", "data.paths=[corpus, bad]", code=2)
    assert "bad/latin.txt" in text and "Traceback" not in text
    trained(config, "train.steps=3")  # the name is not burnt: nothing had been trained


def test_data_that_no_retry_can_read_ends_the_run_at_once(config: Path) -> None:
    """One token of two million is outside the vocabulary: the look at the start misses it, the row does not."""
    documents = np.full((500, 4001), 7, np.uint16)
    documents[17, 2500] = 999
    index.write(str(config.parent / "flat"), iter(documents), np.dtype(np.uint16))
    data = "data={kind: tokens, paths: [flat], tokenizer: bytes, sequence_length: 48}"
    text = trained(config, data, "train.batch=256", "train.micro_batch=128", "train.steps=300", code=2)
    assert "flat.bin: token 999 at place 70517 is outside the tokenizer's 257" in text and "attempt 2" not in text


def test_a_run_belongs_to_one_process(config: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    process = launch(config, "train.steps=3000")
    wait_for_step(config.parent / "runs" / "tiny", 2)
    monkeypatch.chdir(config.parent)
    assert cli.main(["train", "--config", str(config), "--resume"]) == 2
    assert f"is in use by process {process.pid}" in capfd.readouterr().err
    process.send_signal(signal.SIGINT)
    finished(process, code=85)


def test_a_folder_that_is_no_run_is_left_alone(config: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    (config.parent / "runs" / "tiny").mkdir(parents=True)
    (config.parent / "runs" / "tiny" / "thesis.txt").write_text("mine")
    monkeypatch.chdir(config.parent)
    assert cli.main(["train", "--config", str(config)]) == 2
    assert "it has no config.yaml; move it away, or take name=another" in capfd.readouterr().err


def test_nothing_held_out_is_refused(config: Path) -> None:
    text = trained(config, "data.paths=[corpus/06.py]", code=2)
    assert "no document is held out" in text and "train.evaluate=null" in text
