"""Runs of `launch train` in a folder, and the numbers they leave."""

import subprocess
import sys
from pathlib import Path

import pytest

from farspan.launch import cli
from farspan.platform import metrics


def numbers(config: Path, folder: Path, *overrides: str) -> list[tuple[float, ...]]:
    """Step, loss, norm of the gradient and held-out loss of each line of a run's metrics; `name=…` is among the
    overrides."""
    command = [sys.executable, "-m", "farspan.launch.cli", "train", "--config", str(config), *overrides]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    name = next(override.removeprefix("name=") for override in overrides if override.startswith("name="))
    lines = metrics.read(folder / "runs" / name)
    return [tuple(line.get(key) for key in ("step", "loss", "grad_norm", "eval_loss")) for line in lines]


def refusal(config: Path, *overrides: str, capfd: pytest.CaptureFixture[str]) -> str:
    """What a dry run here says of a configuration that it refuses."""
    assert cli.main(["train", "--config", str(config), *overrides, "--dry-run"]) == 2
    return capfd.readouterr().err
