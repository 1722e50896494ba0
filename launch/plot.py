"""The report's charts as PNG files, for slides and papers: same curves, same colours, same axes."""

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib import rc_context, rcParamsDefault
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from farspan.launch.chart import PALETTE, Chart, Curve, axes, crowded, downsample, levels, short, tame, ticks, trend

OVERVIEW = "overview"

_CELL = (6.6, 3.5)
"""Width and height of a chart with all around it, in inches; the space on its sides follows."""
_LEFT, _RIGHT, _TOP, _BOTTOM = 0.85, 0.3, 0.62, 0.55

_SOFT = "#666a73"
_DOTS = (0, (1, 2))

_LOOK = {
    "axes.edgecolor": "#9a9ea8",
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.size": 10,
    "grid.color": "#e4e4e0",
    "lines.linewidth": 1.5,
    "lines.solid_capstyle": "round",
    "lines.solid_joinstyle": "round",
    "savefig.dpi": 150,
    "text.color": "#1c1d20",
    "text.parse_math": False,  # a run may have a $ in its name
    "xtick.color": _SOFT,
    "ytick.color": _SOFT,
    "ytick.major.size": 0,
}


def write(charts: Sequence[Chart], folder: Path) -> list[Path]:
    """Writes overview.png and a PNG for each of the charts (at least one) into `folder`; where they are."""
    folder.mkdir(parents=True, exist_ok=True)
    ours = {key: value for key, value in rcParamsDefault.items() if "backend" not in key} | _LOOK
    with rc_context(ours):  # and nobody's matplotlibrc
        written = [_save(_picture(charts), folder / f"{OVERVIEW}.png")]
        written += [_save(_picture([chart]), folder / f"{chart.key}.png") for chart in charts]
    return written


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path)
    return path


def _picture(charts: Sequence[Chart]) -> Figure:
    """All of the charts in one picture, two in a row, over one legend."""
    columns = min(2, len(charts))
    rows = -(-len(charts) // columns)
    keys = _legend(charts)
    beside = _beside([str(key.get_label()) for key in keys], columns * _CELL[0])
    below = 0.25 + 0.21 * -(-len(keys) // beside)
    width, height = columns * _CELL[0], rows * _CELL[1] + below
    figure = Figure(figsize=(width, height))
    for place, chart in enumerate(charts):
        left, bottom = place % columns * _CELL[0] + _LEFT, height - (place // columns + 1) * _CELL[1] + _BOTTOM
        inner = (_CELL[0] - _LEFT - _RIGHT, _CELL[1] - _BOTTOM - _TOP)
        box = (left / width, bottom / height, inner[0] / width, inner[1] / height)
        _chart(figure.add_axes(box), chart)
    legend = figure.legend(handles=keys, ncols=beside, fontsize=9, frameon=False, borderpad=0, borderaxespad=0)
    legend.set_loc("lower left")
    legend.set_bbox_to_anchor((_LEFT / width, 0.08 / height))
    return figure


def _beside(names: Sequence[str], width: float) -> int:
    """How many legend entries fit beside each other: about 0.08 inches a letter."""
    room = width - _LEFT - _RIGHT
    return max(1, min(len(names), int(room / (0.08 * max(map(len, names)) + 0.65))))


def _chart(plot: Axes, chart: Chart) -> None:
    curves = [tame(curve) for curve in chart.curves]
    x, y, remarks = axes(curves, chart.zero)
    plot.set_title(chart.title, loc="left", fontweight="bold", fontsize=11, pad=20)
    words = "; ".join(filter(None, (chart.unit, remarks)))
    plot.annotate(words, (0, 1), (0, 8), "axes fraction", "offset points", fontsize=8.5, color=_SOFT)
    plot.set_xlabel("step", fontsize=9, color=_SOFT, loc="right")
    if y.logarithmic:
        plot.set_yscale("log")
    pad = 0.01 * (x.high - x.low)
    plot.set_xlim(x.low - pad, x.high + pad)
    plot.set_ylim(y.low, y.high)
    for axis, at in ((plot.xaxis, [v for v in ticks(x.low, x.high, 6) if v == int(v)]), (plot.yaxis, levels(y))):
        axis.set_ticks(at, [_number(value) for value in at])
    plot.minorticks_off()
    for curve in curves:
        _draw(plot, curve, faint=crowded(curve, chart.noisy))


def _draw(plot: Axes, curve: Curve, faint: bool) -> None:
    colour, dash = _colour(curve.style), _dash(curve.style)
    for step, _ in curve.marks:
        plot.axvline(step, color=colour, linestyle=_DOTS, linewidth=1.2, zorder=1.5)
    points = downsample(curve.points)
    steps, values = zip(*((s, v if math.isfinite(v) else math.nan) for s, v in points), strict=True)
    if faint:
        plot.plot(steps, values, color=colour, linewidth=0.7, alpha=0.3)
        plot.plot(*zip(*trend(curve.points), strict=True), color=colour, linestyle=dash, linewidth=1.8, zorder=2.5)
    else:
        few = sum(map(math.isfinite, values)) <= 40
        plot.plot(steps, values, color=colour, linestyle=dash, marker="o" if few else None, markersize=3.5)
        lonely = _lonely(values)
        plot.plot([steps[i] for i in lonely], [values[i] for i in lonely], "o", color=colour, markersize=2)
    broken = [step for step, value in points if not math.isfinite(value)]
    plot.plot(broken, [0.97] * len(broken), "x", color=colour, markersize=6, transform=plot.get_xaxis_transform())


def _lonely(values: Sequence[float]) -> list[int]:
    """Finite values between gaps, which no line would show."""
    there = [False, *map(math.isfinite, values), False]
    return [i for i in range(len(values)) if there[i + 1] and not there[i] and not there[i + 2]]


def _legend(charts: Sequence[Chart]) -> list[Line2D]:
    """A key for each run, and for each sign that the charts hold."""
    curves = [curve for chart in charts for curve in chart.curves]
    keys = [
        Line2D([], [], color=_colour(style), linestyle=_dash(style), linewidth=2.5, label=_plain(name))
        for style, name in sorted({curve.style: curve.name for curve in curves}.items())
    ]
    if any(curve.marks for curve in curves):
        keys.append(Line2D([], [], color=_SOFT, linestyle=_DOTS, label="restart"))
    if any(not math.isfinite(value) for curve in curves for _, value in curve.points):
        keys.append(Line2D([], [], color=_SOFT, linestyle="none", marker="x", label="not finite"))
    if any(crowded(curve, chart.noisy) for chart in charts for curve in chart.curves):
        keys.append(Line2D([], [], color=_SOFT, alpha=0.6, linewidth=0.8, label="every step (bold: median)"))
    return keys


def _plain(name: str) -> str:
    """The name as a label: matplotlib hides those that begin with an underscore."""
    return f" {name}" if name.startswith("_") else name


def _colour(style: int) -> str:
    return PALETTE[style % len(PALETTE)]


def _dash(style: int) -> str:
    """Dashed from the second round of colours on, as on the page."""
    return "-" if style < len(PALETTE) else "--"


def _number(value: float) -> str:
    """1,500,000 for a tick; `short` for what needs no separator or would be too long."""
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e7 and value == round(value) else short(value)
