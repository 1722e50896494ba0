"""`launch data inspect` tells what a configuration trains on, and what it tells is true."""

import json
import re
from pathlib import Path

import pytest

from farspan.launch import cli
from farspan.launch.exit import Exit

CONFIG = """
name: looked_at
model: {kind: decoder, width: 16, blocks: [{mixer: {kind: softmax, heads: 2}, ffn: {kind: swiglu, hidden: 24}}]}
data:
  kind: mixture
  sources:
    - weight: 3
      data: {kind: text, paths: [FOLDER/a], sequence_length: 64, held_out: 0, cache: FOLDER, objective: {kind: prefix}}
    - weight: 1
      data:
        kind: text
        paths: [FOLDER/b]
        sequence_length: 64
        held_out: 0
        cache: FOLDER
        packing: {kind: documents}
        objective: {kind: fill_in_the_middle, rate: 1}
  schedule: [{at: 1000, weights: [1, 1]}]
train: {steps: 100, batch: 8, micro_batch: 4}
optim: {kind: adamw, rate: 1e-2}
schedule: {kind: constant}
launch: {kind: local, ranks: 1, device: cpu}
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    for name, length in (("a", 200), ("b", 30)):
        (tmp_path / name).mkdir()
        for i in range(10):
            (tmp_path / name / f"{i}.txt").write_text(f"{name}{i}\n".ljust(length, "x"))
    path = tmp_path / "looked.yaml"
    path.write_text(CONFIG.replace("FOLDER", str(tmp_path)))
    return path


def test_inspect_describes_a_mixture(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["data", "inspect", "--config", str(config), "--rows", "40", "train.steps=128"]) == Exit.DONE
    said = capsys.readouterr().out
    assert "257 tokens of bytes and 3 sentinels" in said
    assert re.search(r"training documents: 20 of 2,320 tokens; median 116, mean 116, longest 201", said)
    assert re.search(r"16 – 31 +10 +310 +13.4%  █", said) and re.search(r"128 – 255 +10 +2,010 +86.6%  █{32}", said)
    assert "longer than data.sequence_length=64: 10 documents, with 86.6% of the tokens" in said
    assert (
        "rows an epoch     42; training reads 1,024: 24.4 epochs" in said and "of 40 rows in micro-batches of 4" in said
    )
    assert re.search(r" 0 +75.0% +50.0% +637 +32 +19.91\n +1 +25.0% +50.0% +387 +10 +38.70", said)
    assert "<fim_middle>" in said and "⟨end⟩" in said and "seen both ways)" in said and "↵" in said
    filled, labels = (float(re.search(rf"{word} +([\d.]+)%", said)[1]) for word in ("tokens", "labels"))  # type: ignore[index]
    assert 50 < labels < filled < 100


def test_inspect_computes_synthetic_rows(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["data", "inspect", "--config", "configs/needle.yaml", "data.task.questions=2"]) == Exit.DONE
    said = capsys.readouterr().out
    assert "labels          3.1% of the tokens predict" in said and "training documents" not in said
    assert len(re.findall(r"<ask> k\d v\d <ask> k\d v\d\n", said)) == 3


def test_mistakes_are_named(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["data", "inspect", "--config", str(config)]
    assert cli.main([*line, "--rows", "0"]) == Exit.CONFIG
    assert cli.main([*line, "data.sources.0.weight=x"]) == Exit.CONFIG
    assert cli.main([*line, "model.blocks.0.mixer.window=4"]) == Exit.CONFIG
    said = capsys.readouterr().err
    assert "--rows 0: must be at least 1" in said and "data.sources.0.weight='x'" in said
    assert "model.blocks.0.mixer.window=4: a window hides part of a prefix; set it to null, or" in said


def test_a_shipped_config_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    small = ["train.steps=6", "schedule.warmup=0", "train.evaluate.rows=8", "train.batch=4"]
    assert cli.main(["train", "--config", "configs/needle.yaml", *small]) == Exit.DONE
    lines = [json.loads(line) for line in (tmp_path / "runs/needle/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert any("eval_loss" in line for line in lines)
