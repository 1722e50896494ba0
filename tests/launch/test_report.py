"""The page shows every curve that was recorded, hides no restart and no nan, and needs nothing from outside."""

import json
import math
import random
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path

import pytest

from farspan.launch.chart import Chart, Curve, axes, downsample, draw, short, ticks, trend
from farspan.launch.report import CHARTS, report
from farspan.platform.metrics import Journal, Line

VOID = {"meta", "br", "hr", "link", "img", "input"}


class Page(HTMLParser):
    """Elements with their attributes and texts; fails where tags do not nest."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.words: list[str] = []
        self.feed(self.source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {key: value or "" for key, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {key: value or "" for key, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data.strip())

    @property
    def text(self) -> str:
        return " ".join(word for word in self.words if word)

    def figures(self) -> list[str]:
        return [found["id"] for tag, found in self.elements if tag == "figure"]

    def curves(self) -> list[dict[str, str]]:
        return [found for _, found in self.elements if "data-points" in found]

    def of_class(self, name: str) -> int:
        return sum(name in found.get("class", "").split() for tag, found in self.elements if tag == "path")


def train(step: int, **changes: float | None) -> Line:
    line: Line = {
        "step": step, "loss": 5.0 / step, "grad_norm": 1.0 + step % 3, "rate": 1e-3, "tokens": 1000 * step,
        "tokens_per_second": 10.0 if step == 1 else 2000.0, "step_seconds": 0.5, "mfu": 0.4, "memory_gb": 2.0,
    }  # fmt: skip
    return {**line, **changes}


def run(folder: Path, *attempts: list[Line], status: Mapping[str, object] | None = None) -> Path:
    for number, lines in enumerate(attempts):
        journal = Journal(folder, number)
        for line in lines:
            journal.write(line)
        journal.close()
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text("name: x\nnote: a < b & <script>alert(1)</script>\n")
    if status is not None:
        (folder / "status.json").write_text(json.dumps(status))
    return folder


def test_every_recorded_key_has_its_curve_and_its_numbers(tmp_path: Path) -> None:
    held_out: list[Line] = [{"step": 10, "eval_loss": 3.25}, {"step": 20, "eval_loss": 2.75}]
    lines = [*(train(step) for step in range(1, 31)), *held_out]
    status = {"state": "failed", "exit_code": 76, "step": 30, "reason": "the loss is not finite"}
    target = report([run(tmp_path / "alpha", lines, status=status)])
    assert target == tmp_path / "alpha" / "report.html"
    page = Page(target)
    assert page.figures() == [key for key, *_ in CHARTS]
    points = {key: curve["data-points"].split() for key, curve in zip(page.figures(), page.curves(), strict=True)}
    assert points["loss"][0] == "1,5" and len(points["loss"]) == 30
    assert points["eval_loss"] == ["10,3.25", "20,2.75"]
    assert points["mfu"][3] == "4,40"  # per cent
    for expected in ("alpha", "failed", "76", "the loss is not finite", "30", "0.1667", "2.7500", "2,000", "15.0 s"):
        assert expected in page.words, expected
    assert "30 K" in page.words  # tokens


def test_the_page_needs_nothing_from_outside(tmp_path: Path) -> None:
    page = Page(report([run(tmp_path / "a", [train(1), train(2)])]))
    assert "http" not in page.source and "@import" not in page.source and "url(" not in page.source
    assert not [found for _, found in page.elements if {"src", "href", "srcset"} & found.keys()]


def test_names_reasons_and_configs_cannot_inject(tmp_path: Path) -> None:
    status = {"state": '"><img src=x>', "reason": "<script>alert(2)</script>"}
    page = Page(report([run(tmp_path / '<script>"evil"&', [train(1), train(2)], status=status)]))
    assert [tag for tag, _ in page.elements].count("script") == 1
    assert not [tag for tag, _ in page.elements if tag == "img"]
    assert {curve["data-name"] for curve in page.curves()} == {'<script>"evil"&'}
    assert "<script>alert(1)</script>" in page.text


def test_several_runs_share_charts_and_keep_their_colours(tmp_path: Path) -> None:
    runs = [run(tmp_path / str(i) / "same", [train(1, mfu=None), train(2, mfu=None)]) for i in range(9)]
    page = Page(report(runs, out=tmp_path / "deep" / "all.html"))
    assert "mfu" not in page.figures() and "Not recorded: Held-out loss, Model FLOPs utilisation (MFU)." in page.text
    curves = page.curves()
    assert len(curves) == 9 * len(page.figures())
    looks = {curve["data-name"]: curve["class"] for curve in curves}
    assert list(looks) == [str(folder) for folder in runs]  # equal names give way to paths
    assert len(set(looks.values())) == 9


def test_a_restart_is_marked_and_what_it_undid_is_not_drawn(tmp_path: Path) -> None:
    first = [train(step, loss=9.0) for step in range(1, 11)]
    page = Page(report([run(tmp_path / "a", first, [train(6, loss=1.0), train(7, loss=1.0)])]))
    (loss,) = [curve for curve, key in zip(page.curves(), page.figures(), strict=True) if key == "loss"]
    assert loss["data-points"] == "1,9 2,9 3,9 4,9 5,9 6,1 7,1"
    assert page.of_class("mark") == 2  # one in the chart, one in the legend
    assert "a: attempt 1 begins at step 6" in page.words
    assert "6.0 s" in page.words  # twelve steps of half a second were done in all


def test_what_is_not_finite_is_a_gap_with_a_mark(tmp_path: Path) -> None:
    lines = [train(1), train(2), train(3, loss=math.nan), train(4, loss=math.inf), train(5), train(6, loss=1e308)]
    page = Page(report([run(tmp_path / "a", lines)]))
    loss = page.curves()[0]
    assert [pair.split(",")[0] for pair in loss["data-points"].split()] == ["1", "2", "5"]
    assert loss["d"].count("M") == 2 and "nan" not in loss["d"] and "inf" not in loss["d"]
    assert page.of_class("broken") == 3 + 1  # and the legend
    assert "a: nan at step 3" in page.words


@pytest.mark.parametrize("value", [math.nan, 0.0, 5e-324, -1e308, 3.0])
def test_extreme_values_still_make_a_page(tmp_path: Path, value: float) -> None:
    changes = dict.fromkeys(train(1).keys() - {"step", "tokens"}, value)
    page = Page(report([run(tmp_path / "a", [train(1, **changes), train(2, **changes)], [train(2, **changes)])]))
    assert "loss" in page.figures()
    assert all("nan" not in curve["d"] and "inf" not in curve["d"] for curve in page.curves())


def test_missing_and_empty_metrics_are_said(tmp_path: Path) -> None:
    missing, empty = run(tmp_path / "missing"), run(tmp_path / "empty", [])
    page = Page(report([missing, empty]))
    assert "missing" in page.words and f"has no metrics yet: {missing / 'metrics.jsonl'} does not exist." in page.text
    assert f"has no metrics yet: {empty / 'metrics.jsonl'} is empty." in page.text
    assert page.figures() == [] and "unknown" in page.words


def test_evaluations_alone_and_a_half_written_status_make_a_page(tmp_path: Path) -> None:
    folder = run(tmp_path / "a", [{"step": 0, "eval_loss": 4.0}])
    (folder / "status.json").write_text('{"state": "run')
    assert Page(report([folder])).figures() == ["eval_loss"]


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"{tmp_path}: no run folder .*runs/<name>"):
        report([tmp_path])
    with pytest.raises(ValueError, match="no run folder given"):
        report([])


def test_downsampling_keeps_extremes_gaps_and_ends() -> None:
    rng = random.Random(0)
    points = [(step, rng.random()) for step in range(1, 100_001)]
    points[31_337], points[70_001], points[50_000] = (31_338, 99.0), (70_002, -99.0), (50_001, math.nan)
    thin = downsample(points)
    assert len(thin) <= 2000 and thin == sorted(thin)
    assert thin[0] == points[0] and thin[-1] == points[-1]
    assert {points[31_337], points[70_001]} <= set(thin) and sum(math.isnan(value) for _, value in thin) == 1
    assert downsample(points[:2000]) == points[:2000]
    all_lost = [(step, math.nan) for step in range(5000)]
    assert 0 < len(downsample(all_lost)) <= 2000


def test_a_trend_is_deaf_to_single_spikes_and_lost_values() -> None:
    points = [(step, 1e9 if step % 7 == 0 else math.nan if step % 11 == 0 else 2.0) for step in range(10_000)]
    assert {value for _, value in trend(points)} == {2.0}
    assert [step for step, _ in trend(points[:3])] == [0, 1, 2]


def test_an_axis_tells_when_it_is_logarithmic_or_cut() -> None:
    def picture(*spikes: float) -> str:
        values = [*(2.0 + 0.1 * (step % 5) for step in range(200)), *spikes]
        curve = Curve(name="a", style=0, points=list(enumerate(values)))
        return draw(Chart(key="x", title="x", unit="", zero=False, noisy=False, curves=[curve]))

    assert "the axis" not in picture() and "logarithmic" not in picture()
    assert "the axis ends below the highest value, 9.5" in picture(9.5)
    assert "logarithmic scale" in picture(950.0) and "the axis" not in picture(950.0)


def test_ticks_are_round_and_inside() -> None:
    assert ticks(0, 10) == [0, 2, 4, 6, 8, 10]
    assert ticks(1.63, 2.41) == [1.8, 2.0, 2.2, 2.4]
    assert ticks(0, 2.1e-3) == [0, 5e-4, 1e-3, 1.5e-3, 2e-3]
    assert [short(value) for value in (0, 0.05, 2e-3, 1500, 2e7, -3e9)] == ["0", "0.05", "2e-3", "1.5k", "20M", "-3G"]


def test_the_axes_of_a_crowd_are_those_of_its_members() -> None:
    def curve(style: int, *values: float) -> Curve:
        return Curve(name=str(style), style=style, points=list(enumerate(values, start=1)))

    x, y, remarks = axes([curve(0, 5.0, 4.0), curve(1, 3.0, 2.0, 1.0)], zero=False)
    assert (x.low, x.high) == (1, 3) and y.low < 1.0 and y.high > 5.0 and remarks == ""
    assert axes([curve(0, math.nan), curve(1, math.inf)], zero=True)[1].high == 1.0
