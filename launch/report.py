"""One page that shows what runs have done: self-contained, so that it can be sent, kept and opened anywhere."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from statistics import median

from farspan.launch import pulse
from farspan.launch.chart import CROWDED, SCRIPT, STYLE, Chart, Curve, draw, look
from farspan.launch.heat import picture
from farspan.platform import loads
from farspan.platform.metrics import FILE, Line, attempt_of, is_evaluation, latest, read, step_of

CHARTS = (
    # key, title, unit, whether the axis begins at zero, whether steps scatter
    ("loss", "Training loss", "mean over the step", False, True),
    ("eval_loss", "Held-out loss", "mean over the evaluation", False, False),
    ("rate", "Learning rate", "of each step", True, False),
    ("grad_norm", "Gradient norm", "before clipping", False, True),
    ("tokens_per_second", "Throughput", "tokens per second", True, True),
    ("mfu", "Model FLOPs utilisation (MFU)", "% of peak", True, True),
    ("memory_gb", "Memory", "GB", True, False),
)
ROUTED = (
    ("load_max", "Fullest expert", "tokens over the mean, in the worst layer", False, True),
    ("load_entropy", "Evenness of loads", "entropy over that of even loads, in the worst layer", False, True),
    ("router_cost", "Router losses", "added to the loss", True, True),
    ("router_z", "Router logits", "mean squared log-sum-exp", True, True),
    ("active", "Experts a token", "mean over tokens and layers", True, True),
    ("dropped", "Dropped visits", "share of all", True, True),
    ("unmet", "Tokens without an expert", "share of all", True, True),
    ("exchange_seconds", "Waiting for tokens", "seconds a step, of the first rank", True, True),
)
"""Of models with experts; whoever has none is not missing them."""

COLUMNS = (
    ("State", ""),
    ("Exit", "exit code"),
    ("Steps", "the last step recorded"),
    ("Last loss", "training loss at the last step"),
    ("Best held-out", "lowest held-out loss, and its step"),
    ("Tokens/s", "median over the steps after the first of each attempt"),
    ("Tokens", "seen since the start of the run"),
    ("Time in steps", "sum over all steps, repeated ones included; starts, evaluations and waits are not in it"),
    ("Attempts", "starts of the job; more than one means restarts or a resume"),
)


@dataclass(frozen=True, kw_only=True)
class _Run:
    """What a run folder holds. `written` are all lines, `lines` those that count after restarts."""

    folder: Path
    name: str
    style: int
    status: dict[str, object]
    config: str | None
    written: list[Line]
    lines: list[Line]

    def series(self, key: str) -> list[tuple[int, float]]:
        found = ((step_of(line), line.get(key)) for line in self.lines)
        return [(step, float(value)) for step, value in found if value is not None]

    def restarts(self) -> list[tuple[int, str]]:
        """(first step, words) of every attempt but the first."""
        first: dict[int, int] = {}
        for line in self.written:
            if not is_evaluation(line):
                first.setdefault(attempt_of(line), step_of(line))
        return [(first[a], f"attempt {a} begins at step {first[a]}") for a in sorted(first)[1:]]


def report(folders: Sequence[Path], out: Path | None = None) -> Path:
    """Write the page of one or more run folders to `out` (default: report.html in the first) and return where it is.

    Raises ValueError for a folder that is no run and for damaged metrics.
    """
    runs = _all(folders)
    target = folders[0] / "report.html" if out is None else out
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(_page(runs), encoding="utf-8")
    return target


def pictures(folders: Sequence[Path], inside: Path | None = None) -> list[Path]:
    """Write a PNG of each chart and one of all together, `overview.png`, and return where they are, that one first.

    They go into the folder `inside` (default: plots in the first run folder). Raises ValueError like `report`, where
    matplotlib is missing, and where there is nothing to draw.
    """
    runs = _all(folders)
    inside = folders[0] / "plots" if inside is None else inside
    if any((inside / part).is_file() for part in ("config.yaml", FILE)):
        raise ValueError(f"--png {inside}: is a run folder; write --png after the runs, or --png=DIR")
    try:
        from farspan.launch import plot  # matplotlib takes a second: only who wants pictures waits
    except ImportError as error:
        raise ValueError(f"--png: {error}; pip install farspan[report]") from error
    charts = _quantities(runs)
    if not charts:
        raise ValueError(f"--png: no metrics to draw yet in {', '.join(map(str, folders))}; train first")
    return plot.write(charts, inside)


def _all(folders: Sequence[Path]) -> list[_Run]:
    if not folders:
        raise ValueError("report: no run folder given; name at least one, such as runs/quickstart")
    names = _names(folders)
    return [_load(folder, names[style], style) for style, folder in enumerate(folders)]


def _load(folder: Path, name: str, style: int) -> _Run:
    if not any((folder / part).is_file() for part in ("config.yaml", FILE, "status.json")):
        raise ValueError(
            f"{folder}: no run folder (it has none of config.yaml, {FILE}, status.json); "
            "give the folder that training wrote, runs/<name>"
        )
    written = read(folder)
    config = folder / "config.yaml"
    return _Run(
        folder=folder,
        name=name,
        style=style,
        status=pulse.read(folder / "status.json"),
        config=config.read_text(encoding="utf-8", errors="replace") if config.is_file() else None,
        written=written,
        lines=latest(written),
    )


def _names(folders: Sequence[Path]) -> list[str]:
    """Folder names, and whole paths where two would be equal."""
    names = [folder.resolve().name for folder in folders]
    return [name if names.count(name) == 1 else str(folder) for name, folder in zip(names, folders, strict=True)]


def _page(runs: Sequence[_Run]) -> str:
    title = escape(", ".join(run.name for run in runs))
    body = "\n".join([_table(runs), *_notices(runs), *_legend(runs), _charts(runs), *_configs(runs)])
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{STYLE}{_STYLE}</style></head>
<body><main><header><p>farspan report</p><h1>{title}</h1></header>
{body}
</main>
<script>{SCRIPT}</script></body></html>
"""


def _table(runs: Sequence[_Run]) -> str:
    head = "".join(f'<th title="{escape(hint)}">{name}</th>' for name, hint in COLUMNS)
    rows = "".join(_row(run) for run in runs)
    return f'<div class="wide"><table><thead><tr><th>Run</th>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def _row(run: _Run) -> str:
    """The table row of a run, and below it the reason of its state where one is given."""
    cells = "".join(f"<td>{cell}</td>" for cell in _cells(run))
    row = f"<tr><th>{_swatch(run)}{escape(run.name)}</th>{cells}</tr>\n"
    reason = _known(run.status.get("reason"))
    return row if reason == "–" else f'{row}<tr class="reason"><td colspan="{1 + len(COLUMNS)}">{reason}</td></tr>\n'


def _cells(run: _Run) -> list[str]:
    """The table row of a run as HTML, in the order of COLUMNS."""
    state = escape(str(run.status.get("state", "unknown")))
    losses, tokens = run.series("loss"), run.series("tokens")
    held_out = [point for point in run.series("eval_loss") if math.isfinite(point[1])]
    best = min(held_out, key=lambda point: point[1], default=None)
    seconds = [float(line.get("step_seconds") or 0) for line in run.written]
    rates = list(_steady(run))
    attempts = {attempt_of(line) for line in run.written}
    return [
        f'<span class="state {state}">{state}</span>',
        _known(run.status.get("exit_code")),
        f"{step_of(run.lines[-1]):,}" if run.lines else "–",
        f"{losses[-1][1]:.4f}" if losses else "–",
        f"{best[1]:.4f} <small>at {best[0]:,}</small>" if best else "–",
        f"{median(rates):,.0f}" if rates else "–",
        _amount(tokens[-1][1]) if tokens else "–",
        _duration(sum(seconds)) if any(seconds) else "–",
        str(len(attempts)) if attempts else "–",
    ]


def _steady(run: _Run) -> Iterator[float]:
    """Tokens per second of the steps that neither compile nor warm up: all but the first of each attempt."""
    begun: set[int] = set()
    for line in run.lines:
        value = line.get("tokens_per_second")
        if not is_evaluation(line) and attempt_of(line) not in begun:
            begun.add(attempt_of(line))
        elif value is not None and math.isfinite(value):
            yield float(value)


def _known(value: object) -> str:
    return "–" if value is None or value == "" else escape(str(value))


def _amount(value: float) -> str:
    for unit, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if value >= unit:
            return f"{value / unit:.3g} {suffix}"
    return f"{value:.0f}"


def _duration(seconds: float) -> str:
    if not math.isfinite(seconds) or seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def _notices(runs: Sequence[_Run]) -> Iterator[str]:
    for run in runs:
        if not run.lines:
            path = run.folder / FILE
            why = f"{escape(str(path))} {'is empty' if path.is_file() else 'does not exist'}"
            yield f'<p class="notice"><b>{escape(run.name)}</b> has no metrics yet: {why}.</p>'
    missing = [title for key, title, *_ in CHARTS if not any(run.series(key) for run in runs)]
    if missing and any(run.lines for run in runs):
        yield f'<p class="aside">Not recorded: {", ".join(missing)}.</p>'


def _legend(runs: Sequence[_Run]) -> Iterator[str]:
    words = [f"<li>{_swatch(run)}{escape(run.name)}</li>" for run in runs if run.lines]
    if any(run.restarts() for run in runs):
        words.append(f"<li>{_key('mark', 'M9 0v12')}restart</li>")
    if any(not math.isfinite(value) for run in runs for key, *_ in CHARTS for _, value in run.series(key)):
        words.append(f"<li>{_key('broken', 'M5 2l8 8m0-8l-8 8')}not finite</li>")
    if any(len(run.series(key)) > CROWDED for run in runs for key, *_, noisy in CHARTS if noisy):
        words.append("<li>faint: every step; bold: median of neighbouring steps</li>")
    if words:
        yield f'<ul class="legend">{"".join(words)}</ul>'


def _swatch(run: _Run) -> str:
    return _key(f"curve {look(run.style)}", "M1 6H17")


def _key(kind: str, line: str) -> str:
    return f'<svg class="key" viewBox="0 0 18 12"><path class="{kind}" d="{line}"/></svg>'


def _charts(runs: Sequence[_Run]) -> str:
    parts = []
    for chart in _quantities(runs):
        title = f"{chart.title} <small>{chart.unit}</small>"
        parts.append(f'<figure id="{chart.key}"><figcaption>{title}</figcaption>{draw(chart)}</figure>')
    return f'<section class="charts">{"".join([*parts, *_loads(runs)])}</section>'


def _loads(runs: Sequence[_Run]) -> Iterator[str]:
    """How full each expert was, over time."""
    for run in runs:
        rows = loads.read(run.folder)
        rows = [row for row in rows if [len(x) for x in row.layers] == [len(x) for x in rows[-1].layers]]
        if rows:
            layers = f"{len(rows[0].layers)} layers from top to bottom, a line for each expert"
            unit = f"steps {rows[0].first:,} to {rows[-1].step:,}; {layers}; blue: none, white: mean, orange: twice it"
            title = f"Expert load of {escape(run.name)} <small>{unit}</small>"
            image = f'<img class="heat" alt="{escape(unit)}" src="{picture(rows)}">'
            yield f'<figure class="loads"><figcaption>{title}</figcaption>{image}</figure>'


def _quantities(runs: Sequence[_Run]) -> list[Chart]:
    """A chart for each quantity that at least one run has recorded."""
    found = []
    for key, title, unit, zero, noisy in CHARTS + ROUTED:
        scale = 100.0 if key == "mfu" else 1.0
        curves = [
            Curve(
                name=run.name,
                style=run.style,
                points=[(step, value * scale) for step, value in points],
                marks=run.restarts() if key == "loss" else (),
            )
            for run in runs
            if (points := run.series(key))
        ]
        if curves:
            found.append(Chart(key=key, title=title, unit=unit, zero=zero, noisy=noisy, curves=curves))
    return found


def _configs(runs: Sequence[_Run]) -> Iterator[str]:
    for run in runs:
        if run.config is None:
            yield f'<p class="aside">{escape(run.name)}: config.yaml does not exist.</p>'
        else:
            yield f"<details><summary>Config of {escape(run.name)}</summary><pre>{escape(run.config)}</pre></details>"


_STYLE = """
* { box-sizing: border-box }
body { margin: 0; background: var(--page); color: var(--text); font: 14px/1.5 system-ui, sans-serif }
main { max-width: 1280px; margin: 0 auto; padding: 28px 24px 56px }
header p { margin: 0; color: var(--soft); font-size: 12px; letter-spacing: .04em }
h1 { margin: 0 0 18px; font-size: 24px; font-weight: 650; line-height: 1.25; overflow-wrap: anywhere }
.wide, figure, details, .notice { background: var(--card); border: 1px solid var(--line); border-radius: 8px }
.wide { overflow-x: auto }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
th, td { padding: 9px 14px; text-align: left; vertical-align: top; white-space: nowrap }
tr + tr > * { border-top: 1px solid var(--line) }
tr.reason > td { border-top: 0; padding: 0 14px 10px 39px; color: var(--soft); white-space: normal }
thead th { color: var(--soft); font-size: 12px; font-weight: 500; border-bottom: 1px solid var(--line) }
tbody th { font-weight: 600 }
small { color: var(--soft); font-size: 12px; font-weight: 400 }
.state { --tone: var(--soft); color: var(--tone); font-weight: 600 }
.state::before { content: ""; display: inline-block; width: 8px; height: 8px; margin-right: 6px; border-radius: 50%;
  background: var(--tone) }
.state.done { --tone: var(--c2) } .state.running { --tone: var(--c0) }
.state.failed { --tone: var(--c1) } .state.preempted { --tone: var(--c4) }
.notice { margin: 16px 0 0; padding: 12px 16px; border-left: 4px solid var(--c4) }
.aside { margin: 14px 2px 0; color: var(--soft) }
.legend { display: flex; flex-wrap: wrap; gap: 4px 20px; list-style: none; margin: 20px 2px 0; padding: 0 }
.key { width: 18px; height: 12px; margin-right: 7px; vertical-align: -1px; stroke-width: 2.5; color: var(--soft) }
.key .curve { stroke-width: 3 }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 480px), 1fr)); gap: 16px;
  margin: 14px 0 20px }
figure { margin: 0; padding: 14px 16px 8px; min-width: 0 }
figcaption { font-weight: 600; margin-bottom: 4px } figcaption small { margin-left: 6px }
.heat { display: block; width: 100%; min-height: 160px; max-height: 480px; image-rendering: pixelated }
details { margin-top: 12px; padding: 10px 16px } summary { cursor: pointer; font-weight: 600 }
pre { overflow-x: auto; margin: 10px 0 4px; font: 12.5px/1.55 ui-monospace, monospace }
@media print { body { background: none } figure, tr { break-inside: avoid } }
"""
