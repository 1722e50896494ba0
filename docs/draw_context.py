"""Draws the pictures of context-parallelism.md from the schedules themselves: python docs/draw_context.py"""

from collections.abc import Sequence
from pathlib import Path

import torch

from farspan.parallel.context import Gather, Grid, Ring, TokenRing, Ulysses
from farspan.parallel.context.attention import Call
from farspan.parallel.context.layout import layout
from farspan.parallel.context.pinned import Pinned
from farspan.parallel.context.sight import Sight
from farspan.parallel.context.simulate import Curve, Event, Machine, Timeline, Wire, simulate

RANKS, TOKENS, HEADS = 4, 32768, (32, 8)
KERNEL = Curve.line(1e-5, 600e12), Curve.line(2e-5, 500e12)
MACHINE = Machine(
    full=KERNEL,
    edge=KERNEL,
    memory=Curve.line(4e-6, 2.6e12),
    near=Wire(Curve.line(2e-5, 60e9), 100e9),
)
"""Fast kernels on slow links, so that both are seen."""
SCHEDULES: dict[str, Pinned] = {
    "gather": Gather(),
    "ring": Ring(),
    "token_ring": TokenRing(),
    "ulysses": Ulysses(groups=2),
    "grid": Grid(inner=2, outer=Ring()),
}

WIDTH, LEFT, RIGHT, TITLE, BAR, LINE, GAP = 860, 58, 16, 34, 20, 10, 9
STYLE = """
text { font: 11px system-ui, sans-serif; fill: #57606a } .small { font-size: 8px }
.on { font-size: 9px; fill: #ffffff } .title { font-size: 13px; font-weight: 600 }
.attend { fill: #2f6fdb } .sum { fill: #c4690f } .exchange { fill: #2a9164 } .axis { stroke: #8b949e }
@media (prefers-color-scheme: dark) { text { fill: #c9d1d9 } .on { fill: #ffffff } }
"""


def draw(name: str, spanning: Pinned) -> str:
    """Forward above backward, on one scale of time each."""
    body, top = [_legend()], 28
    for backward in (False, True):
        kind = "contiguous" if isinstance(spanning, Ulysses) else "zigzag"
        dealt = layout(kind, (TOKENS,), RANKS, spanning.within)
        call = Call(dealt, Sight(causal=True), *HEADS, 128, 128, torch.bfloat16, backward)
        timeline = simulate(spanning, call, MACHINE)
        panel, top = _panel(timeline, "backward" if backward else "forward", top)
        body += panel
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {top}" role="img" '
        f'aria-label="{name}: four ranks over time"><style>{STYLE}</style>{"".join(body)}</svg>\n'
    )


def _panel(timeline: Timeline, title: str, top: int) -> tuple[list[str], int]:
    scale = (WIDTH - LEFT - RIGHT) / timeline.seconds
    milli, exposed = timeline.seconds * 1e3, timeline.exposed * 1e3
    text = (
        f"{title}: {milli:.2f} ms, {exposed:.2f} of them waiting, at most {max(map(sum, timeline.sent)) / 1e6:.0f} MB"
    )
    out, at = [_text(LEFT, top + 18, f"{text} sent by a rank", "title")], top + TITLE
    for rank in range(RANKS):
        events = [event for event in timeline.events if event.rank == rank]
        out.append(_text(8, at + 14, f"rank {rank}"))
        out += [_bar(event, scale, at, BAR) for event in events if event.kind == "compute"]
        lines = _lines([event for event in events if event.kind == "exchange"])
        for i, line in enumerate(lines):
            out += [_bar(event, scale, at + BAR + 1 + i * LINE, LINE - 1) for event in line]
        at += BAR + 1 + max(1, len(lines)) * LINE + GAP
    return out, at + 4


def _lines(events: Sequence[Event]) -> list[list[Event]]:
    """The exchanges in as few lines as keep those apart that overlap."""
    lines: list[list[Event]] = []
    for event in sorted(events, key=lambda event: event.start):
        line = next((line for line in lines if line[-1].end <= event.start + 1e-9), None)
        if line is None:
            lines.append([event])
        else:
            line.append(event)
    return lines


def _bar(event: Event, scale: float, top: float, height: float) -> str:
    left, width = LEFT + event.start * scale, (event.end - event.start) * scale
    kind = "exchange" if event.kind == "exchange" else "attend" if event.what == "attend" else "sum"
    text = _sizes(event.label) if kind == "attend" else event.what.replace("_", " ")
    if kind == "exchange":
        text = f"from {event.source}, {event.size / 1e6:.0f} MB"
    drawn = f'<rect class="{kind}" x="{left:.1f}" y="{top:.1f}" width="{max(0.6, width - 0.5):.1f}" height="{height}"/>'
    fits = len(text) * 4.6 + 2 < width
    if kind == "exchange" and not fits:
        text, fits = str(event.source), width > 7
    if fits:
        place = left + width / 2, top + height / 2 + 3
        drawn += _text(*place, text, "on small" if kind == "exchange" else "on", "middle")
    return drawn


def _sizes(label: str) -> str:
    """Rows × keys in thousands, as 4k×8k."""
    return "×".join(f"{round(int(part) / 1024)}k" for part in label.split("×"))


def _text(x: float, y: float, text: str, style: str = "", anchor: str = "start") -> str:
    return f'<text class="{style}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{text}</text>'


def _legend() -> str:
    entries = (
        ("attend", "attention, queries×keys", 180),
        ("sum", "packs, merges and sums", 180),
        ("exchange", "arriving, and from which rank", 0),
    )
    out, at = "", LEFT
    for kind, text, step in entries:
        out += f'<rect class="{kind}" x="{at}" y="8" width="12" height="12"/>' + _text(at + 17, 18, text)
        at += step
    return out


def main() -> None:
    folder = Path(__file__).parent / "context"
    folder.mkdir(exist_ok=True)
    for name, spanning in SCHEDULES.items():
        (folder / f"{name}.svg").write_text(draw(name, spanning))


if __name__ == "__main__":
    main()
