"""Every configuration that ships decodes, plans on the meta device, and survives being written and read again."""

import subprocess
import sys
from pathlib import Path

import pytest

from farspan.launch import run as runs
from farspan.platform import config

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_decodes_and_plans(path: Path, tmp_path: Path) -> None:
    run = runs.decode(config.read(path))
    lines = runs.plan_of(run)
    assert [line.split("  ")[0] for line in lines] == ["parameters", "FLOPs per token", "mesh", "step", "memory"]
    again = tmp_path / "again.yaml"
    again.write_text(config.dump(run.tree()))
    other = runs.decode(config.read(again))
    assert other.job == run.job and other.launch == run.launch


def test_dry_run_prints_the_plan_and_starts_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "farspan.launch.cli", "train", "--config", "configs/quickstart.yaml", "--dry-run"]
    said = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    for word in ("parameters", "FLOPs per token", "mesh", "memory", "kind: decoder"):
        assert word in said
    assert not list(tmp_path.iterdir())


def test_the_llama_1b_configuration_has_its_size() -> None:
    run = runs.decode(config.read(next(p for p in CONFIGS if p.stem == "llama_1b"), ["launch.ranks=1"]))
    assert "1,235,814,400" in runs.plan_of(run)[0]  # the published Llama-3.2-1B
