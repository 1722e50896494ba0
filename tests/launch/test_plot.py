"""The pictures show what the page shows, in its colours, whatever the numbers and names are."""

import importlib
import json
import math
import random
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from farspan.launch import cli
from farspan.launch.chart import PALETTE
from farspan.launch.report import pictures
from farspan.platform.metrics import Journal, Line

pytest.importorskip("matplotlib")

from matplotlib.image import imread


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """What matplotlib warns of would be seen in the picture."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def run(folder: Path, *attempts: list[Line]) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("name: x\n")
    for number, lines in enumerate(attempts):
        journal = Journal(folder, number)
        for line in lines:
            journal.write(line)
        journal.close()
    return folder


def losses(first: int, last: int, level: float = 2.0) -> list[Line]:
    rng = random.Random(first)
    return [{"step": step, "loss": level + 3 / step + rng.random() / 10} for step in range(first, last + 1)]


def shows(picture: Path, colour: str) -> bool:
    """Whether at least a line's worth of pixels has the colour, give or take what smoothing does."""
    pixels = imread(picture)[..., :3]
    wanted = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    return int((abs(pixels - wanted).max(axis=-1) < 0.02).sum()) > 30


def test_runs_of_different_lengths_share_pictures_in_the_colours_of_the_page(tmp_path: Path) -> None:
    long = [*losses(1, 900), {"step": 600, "eval_loss": 2.5}]
    folders = [
        run(tmp_path / "long", long, losses(700, 1000)),
        run(tmp_path / "short", losses(1, 30, 4.0)),
        run(tmp_path / "none"),
    ]
    paths = pictures(folders, tmp_path / "png")
    assert [path.name for path in paths] == ["overview.png", "loss.png", "eval_loss.png"]
    assert all(path.parent == tmp_path / "png" and path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" for path in paths)
    overview, loss, held_out = paths
    for picture in (overview, loss):
        assert [shows(picture, colour) for colour in PALETTE[:3]] == [True, True, False]
    assert [shows(held_out, colour) for colour in PALETTE[:2]] == [True, False]


@pytest.mark.parametrize("value", [math.nan, math.inf, 0.0, 5e-324, -1e308, 3.0])
def test_extreme_values_still_make_pictures(tmp_path: Path, value: float) -> None:
    line: Line = {"loss": value, "rate": value, "grad_norm": value, "tokens_per_second": value}
    folder = run(tmp_path / "a", [{"step": 1, **line}, {"step": 2, **line}], [{"step": 2, **line}])
    assert len(pictures([folder])) == 5
    assert (folder / "plots" / "overview.png").is_file()


def test_a_single_step_and_a_value_between_gaps_can_be_seen(tmp_path: Path) -> None:
    (_, single) = pictures([run(tmp_path / "a", [{"step": 1, "loss": 2.0}])])
    assert shows(single, PALETTE[0])
    many: list[Line] = [{"step": step, "loss": 2.0 if step % 2 else math.nan} for step in range(1, 100)]
    (_, gaps) = pictures([run(tmp_path / "b", many)])
    assert shows(gaps, PALETTE[0])


def test_names_are_taken_as_they_are(tmp_path: Path) -> None:
    names = ["_hidden", "$x^2$_{", "100%", "a" * 120, *(f"r{number}" for number in range(6))]
    folders = [run(tmp_path / name, losses(1, 3)) for name in names]
    assert len(pictures(folders, tmp_path / "png")) == 2


def test_nothing_to_draw_and_a_run_as_the_target_are_refused(tmp_path: Path) -> None:
    empty, full = run(tmp_path / "empty"), run(tmp_path / "full", losses(1, 3))
    with pytest.raises(ValueError, match=r"no metrics to draw yet in .*empty"):
        pictures([empty])
    with pytest.raises(ValueError, match=r"--png .*full: is a run folder; write --png after the runs"):
        pictures([empty], full)


def test_matplotlib_that_is_not_installed_is_said_with_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = run(tmp_path / "a", losses(1, 3))
    launch = importlib.import_module("farspan.launch")
    monkeypatch.delattr(launch, "plot", raising=False)
    monkeypatch.delitem(sys.modules, "farspan.launch.plot", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match=r"--png: .*matplotlib.*; pip install farspan\[report\]"):
        pictures([folder])


def test_the_command_writes_page_and_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run(tmp_path / "a", losses(1, 3))
    (folder / "status.json").write_text(json.dumps({"state": "done"}))
    assert cli.main(["report", str(folder), "--png"]) == 0
    page, overview, loss = map(Path, capsys.readouterr().out.split())
    assert page == folder / "report.html" and [overview, loss] == [
        folder / "plots" / "overview.png",
        folder / "plots" / "loss.png",
    ]
    assert cli.main(["report", str(folder), "--png", str(tmp_path / "there")]) == 0
    assert (tmp_path / "there" / "overview.png").is_file()
