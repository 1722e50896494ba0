"""A run goes on under another optimizer as if nothing had happened, and the run it comes from never notices."""

import faulthandler
import fcntl
import hashlib
import json
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from farspan.launch import cli
from farspan.launch.pulse import read as read_json
from farspan.platform import metrics
from farspan.platform.checkpoint import folder_of, manifest_of, verify
from farspan.platform.stored import Stored

CONFIG = """
name: a
model:
  kind: decoder
  width: 64
  tied: true
  blocks: [{repeat: 1, mixer: {kind: softmax, heads: 2}, ffn: {kind: swiglu, hidden: 96}}]
data: {kind: text, paths: [corpus], sequence_length: 48, held_out: 0.2, cache: cache}
train: {steps: 4, batch: 4}
optim: {kind: adamw, rate: 3e-3}
schedule: {kind: constant}
metrics: {every: 1}
launch: {kind: local, ranks: 1, device: cpu}
"""


@pytest.fixture
def here(tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(CONFIG)
    return tmp_path


@pytest.fixture
def train(here: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Trains as torchrun's only rank, in this process: what a rank does to its process is undone afterwards."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    place = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    heard = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}

    def run(*arguments: str) -> None:
        with monkeypatch.context() as told:
            for name, value in place.items():
                told.setenv(name, value)
            assert cli.main(["train", "--config", *arguments]) == 0

    yield run
    for number, handler in heard.items():
        signal.signal(number, handler)
    faulthandler.unregister(signal.SIGUSR2)


def losses(run: Path) -> dict[int, float]:
    found = metrics.latest(metrics.read(run))
    return {metrics.step_of(line): float(line["loss"] or 0) for line in found if "loss" in line}


def prints(folder: Path) -> dict[str, str]:
    """Every byte of a folder."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_there_and_back_and_on_with_what_others_saved(
    here: Path, train: Callable[..., None], capfd: pytest.CaptureFixture[str]
) -> None:
    """fp32 for 4 steps, 8 bits for 4 more as near as they train, and fp32 again; then moments from a file."""
    a, b, c, d = (Path("runs") / name for name in "abcd")
    train("tiny.yaml")
    train("tiny.yaml", "--resume", "train.steps=8")
    straight = losses(a)
    damaged = next(folder_of(a / "checkpoints", 8).glob("*.safetensors"))
    content = damaged.read_bytes()
    damaged.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    before = prints(a)

    change = ["optim.kind=adamw8", "optim.max_tp=1", "optim.block=64"]
    assert cli.main(["convert", "a", "b", *change]) == 0
    said = capfd.readouterr().out
    assert "step-00000008 does not verify and is passed over" in said and "step 4: adamw, " in said
    assert "launch train --config runs/b/config.yaml --resume" in said
    assert prints(a) == before
    assert [p.name for p in Path("runs").iterdir() if p.name not in "ab"] == [], "nothing is left aside"
    assert read_json(b / "status.json")["state"] == "preempted" and read_json(b / "status.json")["step"] == 4
    assert not verify(folder_of(b / "checkpoints", 4))
    assert (b / metrics.FILE).read_bytes() == (a / metrics.FILE).read_bytes()

    train("runs/b/config.yaml", "--resume")
    assert "resumed from" in capfd.readouterr().out
    found = losses(b)
    assert list(found) == list(straight) == list(range(1, 9))
    for step in range(1, 9):
        assert found[step] == pytest.approx(straight[step], rel=0 if step < 5 else 0.01), step
    assert found[8] != straight[8] and found[8] < found[5] - 0.2

    assert cli.main(["convert", "runs/b", str(here / "runs" / "c"), "optim.kind=adamw"]) == 0
    train("runs/c/config.yaml", "--resume", "train.steps=10")
    assert losses(c)[9] < found[8] + 0.05 and losses(c)[10] < found[7]
    types = {entry["dtype"] for entry in manifest_of(folder_of(c / "checkpoints", 10))["tensors"].values()}
    assert types == {"torch.float32"}

    source = Stored(folder_of(c / "checkpoints", 10))
    names = sorted(name.removeprefix("model.") for name in source if name.startswith("model."))
    entries = {
        i: {"step": 50, "exp_avg": source[f"model.{n}"], "exp_avg_sq": source[f"model.{n}"] ** 2}
        for i, n in enumerate(names)
    }
    torch.save({"state": entries, "param_groups": [{"params": list(entries)}]}, "adam.pt")
    Path("names.json").write_text(json.dumps(names))
    assert cli.main(["convert", "c", "d", "--state", "adam.pt", "--names", "names.json", *change]) == 0
    assert "with moments of 50 updates from elsewhere" in capfd.readouterr().out
    told = Stored(folder_of(d / "checkpoints", 10))
    assert told["optim.step"] == 50 and manifest_of(folder_of(d / "checkpoints", 10))["state"]["step"] == 10
    for name in names:
        assert torch.allclose(told[f"model.{name}"].float(), source[f"model.{name}"], rtol=2**-8)
        if told[f"optim.first.{name}"].dtype == torch.float32:
            assert torch.equal(told[f"optim.first.{name}"], source[f"model.{name}"])

    Path("names.json").write_text(json.dumps(names[::-1]))
    assert cli.main(["convert", "c", "e", "--state", "adam.pt", "--names", "names.json"]) == 2
    assert "and the weight" in capfd.readouterr().err and not Path("runs/e").exists()
    with (c / ".lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert cli.main(["convert", "c", "e"]) == 2
    assert "is in use by process" in capfd.readouterr().err
    assert sorted(p.name for p in Path("runs").iterdir()) == list("abcd")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nothing", "b"], "runs/nothing: is no run (it has no config.yaml)"),
        (["a", "taken"], "runs/taken: exists, and nothing is ever overwritten"),
        (["a", "a"], "runs/a: exists, and nothing is ever overwritten"),
        (["a", "b", "train.steps=9", "seed=1"], "train.steps: convert changes optim"),
        (
            ["a", "b", "optim={kind: muon, rate: 1e-3, rest: {kind: adamw, rate: 1e-3}}"],
            "adamw to muon: only the states",
        ),
        (["a", "b", "name=c"], "name=c: a run is named as its folder is, b"),
        (["a", "b", "optim.blok=9"], "optim.blok=9: unknown key"),
        (["a", "b", "--names", "names.json"], "goes with --state"),
        (["a", "b", "--state", "nothing.pt"], "--state nothing.pt: not readable"),
        (["a", "b", "optim.kind=adamw8"], "holds no checkpoint; there is nothing to convert"),
    ],
)
def test_refusals(here: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str) -> None:
    """Before anything is written, and with the way out."""
    (here / "runs" / "a").mkdir(parents=True)
    (here / "runs" / "a" / "config.yaml").write_text(CONFIG)
    (here / "runs" / "taken").mkdir()
    assert cli.main(["convert", *arguments]) == 2
    assert said in capsys.readouterr().err
    assert sorted(p.name for p in (here / "runs").iterdir()) == ["a", "taken"]
