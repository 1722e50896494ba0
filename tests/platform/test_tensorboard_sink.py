"""TensorBoard shows every step once, whatever restarts lay between."""

import math
from pathlib import Path

import pytest

from farspan.platform.metrics import Line, Sinks

pytest.importorskip("tensorboard")

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from farspan.platform.tensorboard_sink import TensorboardSink


def attempt(folder: Path, *lines: Line) -> None:
    said: list[str] = []
    sinks = Sinks({"metrics.tensorboard": lambda: TensorboardSink(folder)}, said.append)
    for line in lines:
        sinks.write(line)
    sinks.close()
    assert said == []


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    found = EventAccumulator(str(folder / "tensorboard"))
    found.Reload()
    return {key: [(point.step, point.value) for point in found.Scalars(key)] for key in found.Tags()["scalars"]}


def test_keys_become_scalars_and_what_is_unknown_is_left_out(tmp_path: Path) -> None:
    attempt(tmp_path, {"step": 1, "loss": 2.5, "mfu": None, "tokens": 512, "attempt": 0}, {"step": 1, "eval_loss": 3.0})
    assert scalars(tmp_path) == {
        "loss": [(1, 2.5)],
        "tokens": [(1, 512.0)],
        "attempt": [(1, 0.0)],
        "eval_loss": [(1, 3.0)],
    }


def test_a_restart_replaces_the_steps_it_repeats(tmp_path: Path) -> None:
    attempt(tmp_path, *({"step": step, "loss": 1.0} for step in range(1, 9)), {"step": 8, "eval_loss": 1.0})
    attempt(tmp_path, {"step": 5, "loss": 2.0}, {"step": 6, "loss": math.nan})
    found = scalars(tmp_path)
    assert [step for step, _ in found["loss"]] == [1, 2, 3, 4, 5, 6]
    assert [value for _, value in found["loss"][:5]] == [1.0] * 4 + [2.0] and math.isnan(found["loss"][5][1])
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2 and not found.get("eval_loss")


def test_an_evaluation_that_comes_first_forgets_no_training_of_its_step(tmp_path: Path) -> None:
    attempt(tmp_path, *({"step": step, "loss": 1.0} for step in range(1, 4)))
    attempt(tmp_path, {"step": 2, "eval_loss": 5.0})
    assert scalars(tmp_path) == {"loss": [(1, 1.0), (2, 1.0)], "eval_loss": [(2, 5.0)]}


def test_a_run_without_lines_leaves_no_file(tmp_path: Path) -> None:
    attempt(tmp_path)
    assert not (tmp_path / "tensorboard").exists()
