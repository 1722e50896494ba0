"""What the person who launched sees of ranks that write elsewhere: a bar and their words, or their words alone."""

import contextlib
import math
import os
import sys
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import TextIO, final

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from farspan.platform.metrics import FILE, Line, decode, is_evaluation, step_of

LOG = Path("logs") / "rank-0.log"

_GONE = (OSError, ValueError, SystemExit)
"""What writing raises when the terminal has gone or `out` is closed; rich turns a broken pipe into SystemExit."""


@final
class View:
    """Shows what is new in `logs/rank-0.log` and `metrics.jsonl` of a run folder since this view was made.

    In a terminal there is a bar with the last metrics, and lines appear above it; the worker's own metric lines, which
    begin with "step ", are then left out. Into a pipe or a file every line passes as it is. A terminal that is gone
    ends the showing, never the run.
    """

    def __init__(self, folder: Path, steps: int | None, out: TextIO | None = None) -> None:
        out = sys.stdout if out is None else out
        self._encoding = out.encoding or "utf-8"
        self._log = _Tail(folder / LOG)
        self._metrics = _Tail(folder / FILE, at_line=True)
        self._screen = _Bar(folder.resolve().name, steps, out) if _draws(out) else _Pipe(out)

    def poll(self) -> None:
        """Show what is new; cheap, and quiet about files that come, go or change meanwhile."""
        metrics = [line for line in map(decode, self._metrics.lines()) if line is not None]
        self._screen.show([self._text(row) for row in self._log.lines()], metrics)

    def say(self, text: str) -> None:
        """A line of the launcher's own."""
        self._screen.say(self._text(text.encode()))

    def close(self) -> None:
        """Show the rest, unfinished last line included, and leave the terminal in order."""
        self.poll()
        rest = self._log.rest()
        if rest:
            self._screen.show([self._text(rest)], [])
        self._screen.close()

    def _text(self, row: bytes) -> str:
        """What the bytes say, in characters that the output can show."""
        return row.decode("utf-8", "replace").encode(self._encoding, "backslashreplace").decode(self._encoding)


@final
class _Tail:
    """New lines of a growing file. What has no end yet is read again next time: so a repair that cuts it loses nothing.

    `at_line`: begin after the last whole line rather than at the very end.
    """

    def __init__(self, path: Path, at_line: bool = False) -> None:
        self._path = path
        self._offset = path.stat().st_size if path.exists() else 0
        if at_line:
            self._offset = max(0, self._offset - 65536)  # longer than any line
            self._offset += self._new().rfind(b"\n") + 1

    def lines(self) -> list[bytes]:
        """The whole lines since the last call, without their ends."""
        content = self._new()
        end = content.rfind(b"\n") + 1
        self._offset += end
        return content[:end].split(b"\n")[:-1]

    def rest(self) -> bytes:
        """What stands after the last whole line."""
        content = self._new()
        self._offset += len(content)
        return content

    def _new(self) -> bytes:
        try:
            with self._path.open("rb") as file:
                if os.fstat(file.fileno()).st_size < self._offset:
                    self._offset = 0  # begun anew by another writer
                file.seek(self._offset)
                return file.read()
        except OSError:
            return b""


@final
class _Pipe:
    """Lines and nothing else."""

    def __init__(self, out: TextIO) -> None:
        self._out = out

    def show(self, rows: list[str], metrics: list[Line]) -> None:
        for row in rows:
            self.say(row)

    def say(self, text: str) -> None:
        with contextlib.suppress(*_GONE):
            try:
                self._out.write(text + "\n")
                self._out.flush()
            except BrokenPipeError:  # Python would flush the rest when it exits, fail, and spoil the exit code
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self._out.fileno())
                os.close(nowhere)

    def close(self) -> None:
        pass


@final
class _Bar:
    """A bar of steps, a row of metrics below it, and lines above."""

    def __init__(self, name: str, steps: int | None, out: TextIO) -> None:
        self._steps = steps
        self._seconds: deque[float] = deque(maxlen=20)
        self._last: Line = {}
        self._held_out: float | None = None
        console = Console(file=out, force_terminal=True, highlight=False)
        title = TextColumn("{task.description}", markup=False)
        columns = (title, BarColumn(None), MofNCompleteColumn(), TimeElapsedColumn())
        self._progress = Progress(*columns, console=console, auto_refresh=False, expand=True)
        self._task = self._progress.add_task(name, total=steps)
        redirect = out is sys.stdout
        self._live = Live(
            self._picture(), console=console, auto_refresh=False, redirect_stdout=redirect, redirect_stderr=redirect
        )
        with contextlib.suppress(*_GONE):
            self._live.start(refresh=True)

    def show(self, rows: list[str], metrics: list[Line]) -> None:
        for line in metrics:
            self._take(line)
        for row in rows:
            if not row.startswith("step "):
                self._print(Text.from_ansi(row.rstrip("\r").rsplit("\r", 1)[-1]))
        with contextlib.suppress(*_GONE):
            self._live.update(self._picture(), refresh=True)

    def say(self, text: str) -> None:
        self._print(Text(text, style="bold"))

    def close(self) -> None:
        with contextlib.suppress(*_GONE):
            self._live.stop()

    def _print(self, text: Text) -> None:
        with contextlib.suppress(*_GONE):
            self._live.console.print(text, soft_wrap=True)

    def _take(self, line: Line) -> None:
        if is_evaluation(line):
            self._held_out = line["eval_loss"]
            return
        self._last = line
        seconds = line.get("step_seconds")
        if seconds is not None and math.isfinite(seconds):
            self._seconds.append(float(seconds))
        self._progress.update(self._task, completed=step_of(line))

    def _picture(self) -> Group:
        words = "  ".join(self._words()) if self._last else "starting"
        return Group(self._progress, Text(words, style="dim", no_wrap=True, overflow="ellipsis"))

    def _words(self) -> Iterator[str]:
        """The last metrics, those that are known."""
        forms = (("loss", "loss {:.4f}"), ("tokens_per_second", "{:,.0f} tok/s"), ("mfu", "mfu {:.1%}"))
        for key, form in forms:
            value = self._last.get(key)
            if value is not None:
                yield form.format(value)
        if self._held_out is not None:
            yield f"held-out {self._held_out:.4f}"
        if self._steps is not None and self._seconds:
            yield f"{_clock(median(self._seconds) * max(0, self._steps - step_of(self._last)))} left"


def _draws(out: TextIO) -> bool:
    """Whether `out` is a terminal that can redraw."""
    return out.isatty() and not Console(file=out, force_terminal=True).is_dumb_terminal


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
