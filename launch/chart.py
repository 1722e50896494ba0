"""Line charts as SVG text: what a browser shows without a library, a network or a script."""

import itertools
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from html import escape
from statistics import median

WIDTH, HEIGHT = 600, 260
LEFT, RIGHT, TOP, BOTTOM = 58, 12, 14, 34
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#b8558f", "#c98a00", "#3fa3dc", "#4a4a4a")
"""Okabe and Ito's, which stays apart under the common colour blindnesses, a little darker for thin lines on white."""
CROWDED = 600
"""A noisy curve of more points is drawn faintly under its trend."""


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One series; `style` picks colour and dash, equal over charts for equal runs."""

    name: str
    style: int
    points: Sequence[tuple[int, float]]
    """(step, value) by rising step; a value that is not finite makes a gap and a mark."""
    marks: Sequence[tuple[int, str]] = ()
    """(step, what happened there): thin vertical lines."""


@dataclass(frozen=True, kw_only=True)
class Chart:
    """One quantity over the steps of some runs."""

    key: str
    title: str
    unit: str
    zero: bool
    """The vertical axis begins at zero."""
    noisy: bool
    """Steps scatter: crowded curves get a trend."""
    curves: Sequence[Curve]
    """At least one, each of at least one point."""


@dataclass(frozen=True, kw_only=True)
class Axis:
    """A linear or logarithmic scale from values to pixels."""

    low: float
    high: float
    start: float
    end: float
    logarithmic: bool = False

    def place(self, value: float) -> float:
        """The pixel of a value."""
        low, high, value = (math.log10(v) if self.logarithmic else v for v in (self.low, self.high, value))
        return self.start + (self.end - self.start) * (value - low) / (high - low)


def draw(chart: Chart) -> str:
    """The chart as SVG.

    Where its vertical axis does not begin at zero it fits most values, and says so where it is logarithmic or leaves
    the highest out.
    """
    curves, noisy, label = [tame(curve) for curve in chart.curves], chart.noisy, f"{chart.title} over steps"
    x, y, remarks = axes(curves, chart.zero)
    inner = HEIGHT - BOTTOM - TOP + 12  # the inner picture cuts off what is beyond the vertical axis
    scale = json.dumps([x.low, x.high, x.start, x.end, y.low, y.high, y.start, y.end, y.logarithmic])
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}" data-scale="{scale}">',
        *_grid(x, y),
        *([f'<text class="tick" x="{LEFT}" y="{HEIGHT - 3}">{remarks}</text>'] if remarks else []),
        f'<svg y="{TOP - 6}" height="{inner}" width="{WIDTH}" viewBox="0 {TOP - 6} {WIDTH} {inner}">',
        *itertools.chain.from_iterable(_curve(curve, x, y, noisy) for curve in curves),
        *(_trend(curve, x, y) for curve in curves if crowded(curve, noisy)),
        '</svg><g class="hover"></g></svg>',
    ]
    return "\n".join(parts)


def downsample(points: Sequence[tuple[int, float]], limit: int = 2000) -> list[tuple[int, float]]:
    """At most `limit` points: of each of equal slices the lowest, the highest and one that is not finite, besides the
    first and the last of all."""
    if len(points) <= limit:
        return list(points)
    slices = (limit - 2) // 3
    kept = {0, len(points) - 1}
    for index in range(slices):
        part = range(index * len(points) // slices, (index + 1) * len(points) // slices)
        finite = [i for i in part if math.isfinite(points[i][1])]
        if finite:
            kept |= {min(finite, key=lambda i: points[i][1]), max(finite, key=lambda i: points[i][1])}
        if len(finite) < len(part):
            kept.add(next(i for i in part if not math.isfinite(points[i][1])))
    return [points[i] for i in sorted(kept)]


def trend(points: Sequence[tuple[int, float]], slices: int = 150) -> list[tuple[int, float]]:
    """The median of each of equal slices at the middle step of the slice, nan where nothing in it is finite."""
    found, slices = [], min(slices, len(points))
    for index in range(slices):
        part = points[index * len(points) // slices : (index + 1) * len(points) // slices]
        finite = [value for _, value in part if math.isfinite(value)]
        found.append((part[len(part) // 2][0], median(finite) if finite else math.nan))
    return found


def look(style: int) -> str:
    """The CSS classes of a style: the colours in turn, dashed from the second round on."""
    return f"c{style % len(PALETTE)}" + (" dashed" if style >= len(PALETTE) else "")


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers within [low, high], steps of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12 - math.floor(math.log10(step))) for i in range(first, last + 1)]


def short(value: float) -> str:
    """A number for an axis: 0.05, 2e-3, 1.5k, 20M."""
    size = abs(value)
    if size != 0 and (size < 0.01 or size >= 1e15):
        mantissa, exponent = f"{value:.3e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    for unit, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size >= unit:
            return f"{value / unit:.6g}{suffix}"
    return f"{value:.6g}"


def axes(curves: Sequence[Curve], zero: bool) -> tuple[Axis, Axis, str]:
    """The scales of one chart for all its curves, and what a reader must know about the vertical one, if anything."""
    finite = sorted(value for curve in curves for _, value in curve.points if math.isfinite(value))
    steps = [step for curve in curves for step, _ in curve.points]
    y = _vertical(finite, zero)
    words = ["logarithmic scale"] if y.logarithmic else []
    if finite and finite[-1] > y.high:
        words.append(f"the axis ends below the highest value, {finite[-1]:.4g}")
    return _span(min(steps), max(steps), LEFT, WIDTH - RIGHT), y, "; ".join(words)


def crowded(curve: Curve, noisy: bool) -> bool:
    """Whether a curve is drawn faintly under its trend."""
    return noisy and len(curve.points) > CROWDED


def tame(curve: Curve) -> Curve:
    """The curve with values that arithmetic on axes can stand."""
    return replace(curve, points=[(step, _tame(value)) for step, value in curve.points])


def _tame(value: float) -> float:
    """The value, or infinity or zero where arithmetic on axes would overflow."""
    if abs(value) > 1e300:
        return math.copysign(math.inf, value)
    return 0.0 if abs(value) < 1e-300 else value


def _span(low: float, high: float, start: float, end: float) -> Axis:
    """A linear axis of some extent, even for a single value."""
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        pad = abs(low) * 0.05 or 1.0
        low, high = low - pad, high + pad
    return Axis(low=low, high=high, start=start, end=end)


def _vertical(finite: Sequence[float], zero: bool) -> Axis:
    """The scale for sorted values: a few very high ones, as at the start of a training, must not flatten the rest."""
    start, end = HEIGHT - BOTTOM, TOP
    if not finite:
        return Axis(low=0.0, high=1.0, start=start, end=end)
    low, high = finite[0], finite[-1]
    if not zero and low > 0 and high > 20 * finite[len(finite) // 2]:
        return Axis(low=low / 1.2, high=high * 1.2, start=start, end=end, logarithmic=True)
    if zero and low >= 0:
        return Axis(low=0.0, high=high * 1.08 or 1.0, start=start, end=end)
    most = finite[int(0.95 * (len(finite) - 1))]
    if len(finite) >= 100 and 0 < 2.5 * (most - low) < high - low:
        high = low + 1.3 * (most - low)
    axis = _span(low, high, start, end)
    pad = 0.06 * (axis.high - axis.low)
    return Axis(low=axis.low - pad, high=axis.high + pad, start=start, end=end)


def _grid(x: Axis, y: Axis) -> Iterator[str]:
    for value in levels(y):
        at = y.place(value)
        yield f'<path class="grid" d="M{LEFT} {at:.1f}H{WIDTH - RIGHT}"/>'
        yield f'<text class="tick" x="{LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{short(value)}</text>'
    floor = HEIGHT - BOTTOM
    for value in ticks(x.low, x.high, 6):
        if value == int(value):
            at = x.place(value)
            yield f'<path class="axis" d="M{at:.1f} {floor}v4"/>'
            yield f'<text class="tick" x="{at:.1f}" y="{floor + 17}" text-anchor="middle">{short(value)}</text>'
    yield f'<path class="axis" d="M{LEFT} {floor}H{WIDTH - RIGHT}"/>'
    yield f'<text class="tick" x="{WIDTH - RIGHT}" y="{HEIGHT - 3}" text-anchor="end">step</text>'


def levels(y: Axis) -> list[float]:
    """The values at which a vertical axis has its ticks, at most about eight."""
    if not y.logarithmic:
        return ticks(y.low, y.high)
    powers = range(math.floor(math.log10(y.low)), math.ceil(math.log10(y.high)) + 1)
    for factors in ((1,), (1, 3), (1, 2, 5)):
        levels = [f * 10.0**p for p in powers for f in factors if y.low <= f * 10.0**p <= y.high]
        if len(levels) >= 3:
            break
    return levels[:: 1 + len(levels) // 8]


def _trend(curve: Curve, x: Axis, y: Axis) -> str:
    return f'<path class="curve {look(curve.style)} bold" d="{"".join(_strokes(trend(curve.points), x, y))}"/>'


def _curve(curve: Curve, x: Axis, y: Axis, noisy: bool) -> Iterator[str]:
    style, points = look(curve.style), downsample(curve.points)
    faint = " faint" if crowded(curve, noisy) else ""
    for step, what in curve.marks:
        if x.low <= step <= x.high:
            title = f"<title>{escape(curve.name)}: {escape(what)}</title>"
            yield f'<path class="mark {style}" d="M{x.place(step):.1f} {TOP}V{HEIGHT - BOTTOM}">{title}</path>'
    finite = [(step, value) for step, value in points if math.isfinite(value)]
    data = " ".join(f"{step},{value:.6g}" for step, value in finite)
    line = "".join(_strokes(points, x, y))
    yield f'<path class="curve {style}{faint}" data-name="{escape(curve.name)}" data-points="{data}" d="{line}"/>'
    if len(finite) <= 40:
        for step, value in finite:
            yield f'<circle class="dot {style}" cx="{x.place(step):.1f}" cy="{_height(y, value):.1f}" r="2.6"/>'
    for step, value in points:
        if not math.isfinite(value):
            title = f"<title>{escape(curve.name)}: {value} at step {step}</title>"
            at = x.place(step)
            yield f'<path class="broken {style}" d="M{at - 4:.1f} {TOP}l8 8m0-8l-8 8">{title}</path>'


def _height(y: Axis, value: float) -> float:
    """The pixel of a value, kept to what renderers can count on: those beyond the axis are cut off anyway."""
    return max(y.place(value), -9999.0)


def _strokes(points: Sequence[tuple[int, float]], x: Axis, y: Axis) -> Iterator[str]:
    """Path commands; a gap lifts the pen, and `h0` leaves a dot where a point stands alone."""
    down = False
    for step, value in points:
        if math.isfinite(value):
            at = f"{x.place(step):.1f} {_height(y, value):.1f}"
            yield f"L{at}" if down else f"M{at}h0"
        down = math.isfinite(value)


_LIGHT = " ".join(f"--c{number}: {colour};" for number, colour in enumerate(PALETTE))

STYLE = (
    f"""
:root {{ color-scheme: light dark; --page: #f7f7f5; --card: #fff; --text: #1c1d20; --soft: #666a73; --line: #e4e4e0;
  {_LIGHT} }}
"""
    + """
@media (prefers-color-scheme: dark) {
  :root { --page: #131416; --card: #1b1d20; --text: #e8e8e6; --soft: #9a9ea8; --line: #2d3035;
    --c0: #4db1ea; --c1: #ff8a3d; --c2: #2fc79b; --c3: #e29cc6; --c4: #f0b93a; --c5: #9ad4f5; --c6: #c4c4c4; } }
figure > svg { display: block; width: 100%; height: auto; overflow: visible; touch-action: pan-y }
.tick { font-size: 11.5px; fill: var(--soft); font-variant-numeric: tabular-nums }
path { fill: none } .grid { stroke: var(--line) } .axis { stroke: var(--soft); stroke-opacity: .6 }
.c0 { color: var(--c0) } .c1 { color: var(--c1) } .c2 { color: var(--c2) } .c3 { color: var(--c3) }
.c4 { color: var(--c4) } .c5 { color: var(--c5) } .c6 { color: var(--c6) }
.curve { stroke: currentColor; stroke-width: 1.6; stroke-linejoin: round; stroke-linecap: round }
.curve.dashed { stroke-dasharray: 5 4 } .curve.faint { stroke-width: .7; stroke-opacity: .25 }
.curve.bold { stroke-width: 2.2 }
.dot { fill: currentColor } .broken { stroke: currentColor; stroke-width: 1.8 }
.mark { stroke: currentColor; stroke-width: 1.2; stroke-dasharray: 2 3; opacity: .8 }
.hover { pointer-events: none } .hover path { stroke: var(--soft); stroke-opacity: .6 }
.hover circle { fill: currentColor; stroke: var(--card); stroke-width: 1.5 }
#readout { position: fixed; pointer-events: none; background: var(--card); border: 1px solid var(--line);
  border-radius: 6px; padding: 6px 10px; font-size: 12.5px; box-shadow: 0 4px 16px #0003; max-width: 320px;
  font-variant-numeric: tabular-nums; white-space: pre-line; overflow-wrap: anywhere; z-index: 1 }
#readout span::before { content: "●"; margin-right: 6px }
"""
)

# Under the pointer: the nearest step of every curve, with the values as recorded (six digits), not as drawn.
SCRIPT = """
const readout = document.body.appendChild(document.createElement("div"));
readout.id = "readout";
readout.hidden = true;
for (const svg of document.querySelectorAll("svg[data-scale]")) {
  const [xl, xh, xs, xe, yl, yh, ys, ye, log] = JSON.parse(svg.dataset.scale), f = log ? Math.log10 : v => v;
  const curves = [...svg.querySelectorAll("path[data-points]")].map(path => ({
    name: path.dataset.name, style: path.classList[1],
    points: path.dataset.points.split(" ").filter(Boolean).map(pair => pair.split(",").map(Number)) }));
  const x = step => xs + (xe - xs) * (step - xl) / (xh - xl);
  const y = value => ys + (ye - ys) * (f(value) - f(yl)) / (f(yh) - f(yl));
  const hover = svg.querySelector(".hover");
  const leave = () => { hover.replaceChildren(); readout.hidden = true; };
  const draw = (name, attributes) => {
    const node = document.createElementNS(svg.namespaceURI, name);
    for (const key in attributes) node.setAttribute(key, attributes[key]);
    hover.append(node);
  };
  svg.addEventListener("pointerleave", leave);
  svg.addEventListener("pointermove", event => {
    const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse()).x;
    const wanted = xl + (xh - xl) * (at - xs) / (xe - xs);
    const near = curves.filter(c => c.points.length).map(c => ({ ...c, point: c.points.reduce((a, b) =>
      Math.abs(b[0] - wanted) < Math.abs(a[0] - wanted) ? b : a) }));
    leave();
    if (!near.length || at < xs - 8 || at > xe + 8) return;
    const best = near.reduce((a, b) => Math.abs(b.point[0] - wanted) < Math.abs(a.point[0] - wanted) ? b : a).point[0];
    draw("path", { d: `M${x(best)} ${ye}V${ys}` });
    readout.replaceChildren(`step ${best.toLocaleString("en")}`);
    for (const { name, style, point } of near) {
      draw("circle", { class: style, cx: x(point[0]), cy: Math.max(y(point[1]), ye - 6), r: 4 });
      const row = document.createElement("span");
      row.className = style;
      const value = Math.abs(point[1]) >= 1000 ? point[1].toLocaleString("en") : String(point[1]);
      row.textContent = name + "  " + value + (point[0] === best ? "" : `  (step ${point[0].toLocaleString("en")})`);
      readout.append("\\n", row);
    }
    readout.hidden = false;
    const right = event.clientX + 16 + readout.offsetWidth < innerWidth;
    readout.style.left = (right ? event.clientX + 16 : event.clientX - 16 - readout.offsetWidth) + "px";
    readout.style.top = Math.min(event.clientY + 12, innerHeight - readout.offsetHeight - 8) + "px";
  });
}
"""
