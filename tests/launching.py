"""Runs of `launch train` in a folder, and the numbers they leave."""

from contextlib import chdir, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import pytest

from farspan.launch import cli
from farspan.platform import metrics


def said(folder: Path, *arguments: str, code: int = 0) -> str:
    """What `launch` with these arguments prints in a folder. The launcher is this process, which has long imported what
    it needs; ranks have processes of their own."""
    text = StringIO()
    with chdir(folder), redirect_stdout(text), redirect_stderr(text):
        found = cli.main(arguments)
    assert found == code, text.getvalue()
    return text.getvalue()


def numbers(config: Path, folder: Path, *overrides: str) -> list[tuple[float, ...]]:
    """Step, loss, norm of the gradient and held-out loss of each line of a run's metrics; `name=…` is among the
    overrides."""
    said(folder, "train", "--config", str(config), *overrides)
    name = next(override.removeprefix("name=") for override in overrides if override.startswith("name="))
    lines = metrics.read(folder / "runs" / name)
    return [tuple(line.get(key) for key in ("step", "loss", "grad_norm", "eval_loss")) for line in lines]


def refusal(config: Path, *overrides: str, capfd: pytest.CaptureFixture[str]) -> str:
    """What a dry run here says of a configuration that it refuses."""
    assert cli.main(["train", "--config", str(config), *overrides, "--dry-run"]) == 2
    return capfd.readouterr().err
