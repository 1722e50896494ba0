"""What a run says about itself: one line a step in `metrics.jsonl`, which is the truth, and sinks that may fail."""

import contextlib
import importlib.util
import json
import math
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, final

FILE = "metrics.jsonl"

Line = dict[str, float | int | None]
"""A training line: `step loss grad_norm rate tokens tokens_per_second step_seconds mfu memory_gb attempt`, where tokens
are counted from the start of the run and mfu is None where no peak is known; of models with experts also `router_cost
load_max load_entropy active dropped unmet router_z`, and `exchange_seconds` where tokens travel, see docs/moe.md. An
evaluation line: `step eval_loss attempt`."""

_NOT_FINITE = ("nan", "inf", "-inf")

_FORMS = {
    "loss": "loss {:.4f}",
    "eval_loss": "held-out loss {:.4f}",
    "grad_norm": "norm {:.2f}",
    "rate": "rate {:.1e}",
    "tokens_per_second": "{:,.0f} tok/s",
    "mfu": "mfu {:.1%}",
    "memory_gb": "{:.1f} GB",
}


@dataclass(frozen=True, kw_only=True)
class Wandb:
    """Copies of the metrics for Weights & Biases; offline runs wait in `RUN/wandb` for `wandb sync`."""

    project: str = "farspan"
    """The project there; a run keeps its id, written once to `RUN/wandb_id`, over restarts and resumes."""
    mode: Literal["offline", "online"] = "offline"
    """online: sends while training, and needs a network and `wandb login`."""


@dataclass(frozen=True, kw_only=True)
class Trace:
    """A profile of a few steps in `RUN/traces`: a Chrome trace for Perfetto, and where the time of the steps went."""

    first: int = 10
    """The first step traced, by the number it has in the metrics; a run resumed beyond it traces only what is left."""
    steps: int = 3
    """How many steps in a row; each is slower than usual, and the file grows by megabytes a step."""
    memory: bool = False
    """Also a snapshot of the GPU's allocations over these steps, for pytorch.org/memory_viz."""
    ranks: tuple[int, ...] = (0,)
    """The ranks that trace, each into files of its own."""

    def __post_init__(self) -> None:
        if self.first < 1 or self.steps < 1:
            raise ValueError(f"first={self.first}, steps={self.steps}: steps count from 1; trace: null for none")
        if not self.ranks or min(self.ranks) < 0 or len(set(self.ranks)) < len(self.ranks):
            raise ValueError(f"ranks={list(self.ranks)}: name each rank once, from 0; trace: null for none")

    @property
    def last(self) -> int:
        return self.first + self.steps - 1


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """How often metrics are read, and who gets a copy."""

    every: int = 10
    """Steps between reads of the device: each read waits for the device once."""
    wandb: Wandb | None = None
    """Copies for Weights & Biases; null: none."""
    tensorboard: bool = False
    """Copies for TensorBoard, in `RUN/tensorboard`."""
    trace: Trace | None = None
    """A profile of a few steps; null: none."""

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"every={self.every}: steps between reads; set it to 1 or more")
        if self.tensorboard and importlib.util.find_spec("tensorboard") is None:
            raise ValueError("tensorboard=true: the package tensorboard is not here; pip install farspan[report]")


@final
class Journal:
    """The writer of `RUN/metrics.jsonl`, on rank 0 only.

    Opening repairs what a crash has left: a last line without its end is completed if it is whole JSON and cut away
    otherwise; `note` then says so.
    """

    def __init__(self, folder: Path, attempt: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / FILE
        self.note = _repair(self.path)
        self._attempt = attempt
        self._file = self.path.open("ab")

    def write(self, line: Mapping[str, float | int | None]) -> None:
        """Append one line with the attempt added; it is with the operating system on return, and so survives this
        process though not the machine."""
        self._file.write(_encode({**line, "attempt": self._attempt}))
        self._file.flush()

    def sync(self) -> None:
        """Wait until all lines are on the disk: what a checkpoint counts on must not be younger than the checkpoint."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def read(folder: Path) -> list[Line]:
    """All lines of a run in the order of writing, of every attempt; a torn last line is left out.

    Raises ValueError for a damaged line that others follow: no crash of ours leaves one.
    """
    lines = []
    rows = _rows(folder / FILE)
    for number, row in enumerate(rows, start=1):
        line = decode(row)
        if line is not None:
            lines.append(line)
        elif number < len(rows):
            raise ValueError(f"{folder / FILE}, line {number}: {row[:60]!r} is no metrics line; delete that line")
    return lines


def decode(row: bytes) -> Line | None:
    """One row of the file as a line; None if it is torn or damaged."""
    try:
        found = json.loads(row)
    except ValueError:
        return None
    if not isinstance(found, dict) or not all(isinstance(found.get(key), int) for key in ("step", "attempt")):
        return None
    return {key: float(value) if value in _NOT_FINITE else value for key, value in found.items()}


def latest(lines: Sequence[Line]) -> list[Line]:
    """What the run is after its restarts, by step: training and evaluation lines are superseded each by their own kind.

    An attempt that trains from step s or evaluates at s - 1 started from s - 1 at the latest, and all that earlier
    attempts did beyond that is history, whether or not it has been done again yet.
    """
    starts: dict[int, int] = {}
    for line in lines:
        attempt, start = attempt_of(line), step_of(line) - (not is_evaluation(line))
        starts[attempt] = min(starts.get(attempt, start), start)
    ends = {a: min((start for later, start in starts.items() if later > a), default=math.inf) for a in starts}
    kept: dict[tuple[int, bool], Line] = {}
    for line in sorted(lines, key=attempt_of):
        if step_of(line) <= ends[attempt_of(line)]:
            kept[step_of(line), is_evaluation(line)] = line
    return [kept[key] for key in sorted(kept)]


def next_attempt(folder: Path) -> int:
    """0 for a new run, else one more than the highest attempt that has written a line."""
    found = [attempt_of(line) for line in map(decode, _rows(folder / FILE)) if line is not None]
    return max(found, default=-1) + 1


def step_of(line: Line) -> int:
    return int(line["step"] or 0)


def attempt_of(line: Line) -> int:
    return int(line["attempt"] or 0)


def is_evaluation(line: Mapping[str, float | int | None]) -> bool:
    return "eval_loss" in line


def plain(line: Mapping[str, float | int | None]) -> str:
    """A line for a log; it begins with the word step."""
    return "  ".join([f"step {line['step']:>6}", *_words(line)])


def _words(line: Mapping[str, float | int | None]) -> Iterator[str]:
    known = {key: value for key, value in line.items() if value is not None}
    for key, form in _FORMS.items():
        if key in known:
            yield form.format(known[key])


class Sink(Protocol):
    """A place that gets copies of the lines. Its methods may raise and may be slow; they run in threads of `Sinks`."""

    def write(self, line: Line) -> None: ...
    def close(self) -> None: ...
    def abandon(self) -> None:
        """Let go of what would keep the process from ending. Called after a failure, or from a second thread while
        another method hangs."""


@final
class Sinks:
    """Hands lines to sinks without ever delaying or ending the training: each sink has a thread and a bounded queue.

    A sink is opened in its thread, imports included. One that raises is reported once through `say` and dropped; one
    that falls `depth` lines behind misses lines until it catches up, which is said when it begins and counted at the
    end.
    """

    def __init__(
        self, sinks: Mapping[str, Callable[[], Sink]], say: Callable[[str], None], depth: int = 10_000
    ) -> None:
        """`sinks`: how to open each, by the name to report it under."""
        self._feeds = [_Feed(name, opening, say, depth) for name, opening in sinks.items()]

    def write(self, line: Line) -> None:
        for feed in self._feeds:
            feed.put(dict(line))

    def close(self, timeout: float = 30.0) -> None:
        """Let every sink finish, and wait at most `timeout` seconds for all of them together."""
        deadline = time.monotonic() + timeout
        for feed in self._feeds:
            feed.end()
        for feed in self._feeds:
            feed.wait(deadline, timeout)


@final
class _Feed:
    """One sink, its queue and its thread; None in the queue ends it."""

    def __init__(self, name: str, opening: Callable[[], Sink], say: Callable[[str], None], depth: int) -> None:
        self._name, self._opening, self._say, self._depth = name, opening, say, depth
        self._queue: queue.SimpleQueue[Line | None] = queue.SimpleQueue()
        self._sink: Sink | None = None
        self._missed = 0
        self._dropped = False
        self._lock = threading.Lock()
        self._thread = self._start(self._work)

    def put(self, line: Line) -> None:
        if self._dropped:
            return
        if self._queue.qsize() < self._depth:
            self._queue.put(line)
            return
        self._missed += 1
        if self._missed == 1:
            self._say(
                f"metrics: {self._name} is {self._depth:,} lines behind at step {line['step']} and misses lines "
                f"until it catches up; {FILE} has them all"
            )

    def end(self) -> None:
        self._queue.put(None)

    def wait(self, deadline: float, timeout: float) -> None:
        """Join the thread; one that hangs is left behind, and dies with the process."""
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            lost = self._missed + max(0, self._queue.qsize() - 1)
            count = f"; at least {lost:,} lines did not reach it" if lost else ""
            self._drop(f"it did not finish within {timeout:g} s{count}")
            self._start(self._abandon).join(2.0)
        elif self._missed and not self._dropped:
            self._say(f"metrics: {self._name} missed {self._missed:,} lines; {FILE} has them all")

    def _work(self) -> None:
        try:
            self._sink = self._opening()
            while (line := self._queue.get()) is not None:
                self._sink.write(line)
            self._sink.close()
        except BaseException as error:  # a library of another house, SystemExit too: whatever it raises, we go on
            self._drop(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
            self._abandon()

    def _abandon(self) -> None:
        with contextlib.suppress(BaseException):
            if self._sink is not None:
                self._sink.abandon()

    def _start(self, work: Callable[[], None]) -> threading.Thread:
        thread = threading.Thread(target=work, name=self._name, daemon=True)  # never holds up the end of the process
        thread.start()
        return thread

    def _drop(self, reason: str) -> None:
        with self._lock:
            if self._dropped:
                return
            self._dropped = True
        self._say(f"metrics: {self._name} gets no more lines ({reason}); {FILE} has them all")


def _encode(line: Mapping[str, float | int | None]) -> bytes:
    """JSON has no word for what is not finite: such floats become strings that `float` reads back."""
    safe = {key: str(float(v)) if v is not None and not math.isfinite(v) else v for key, v in line.items()}
    return json.dumps(safe, allow_nan=False).encode() + b"\n"


def _rows(path: Path) -> list[bytes]:
    try:
        return path.read_bytes().splitlines()
    except FileNotFoundError:
        return []


def _repair(path: Path) -> str | None:
    """Complete or cut a last line without its end; what was done, or None if nothing was wrong."""
    if not path.exists():
        return None
    with path.open("rb+") as file:
        content = file.read()
        whole = content.rfind(b"\n") + 1
        torn = content[whole:]
        if not torn:
            return None
        if decode(torn) is not None:
            file.write(b"\n")
            return f"{path}: the last line lacked its end; completed"
        file.truncate(whole)
        return f"{path}: the last line was torn; cut its {len(torn)} bytes"
