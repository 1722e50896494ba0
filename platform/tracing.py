"""A look inside a few steps: what each kernel took, and how much of the time a device computed, waited or copied."""

import contextlib
import gzip
import json
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, final

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile, record_function

from farspan.platform.metrics import Trace

FOLDER = "traces"

Event = dict[str, Any]
"""An event of a Chrome trace: `name cat ts dur pid tid`, times in microseconds."""

Span = tuple[float, float]
"""(begin, end) in microseconds."""

EXCHANGES = ("nccl", "gloo:", "c10d::", "c10d_functional", "record_param_comms", "symm_mem", "multimem", "nvshmem")
"""What the names of communication contain, in lower case."""

_COPIES = ("gpu_memcpy", "gpu_memset")
_ROWS = 25


@final
class Tracer:
    """Profiles the steps that `config` names and writes them to `folder`/traces; idle on other ranks and for null.

    `before` and `after` surround every step, with the number that the step has in the metrics. Whatever goes wrong is
    said and ends the tracing, never the training.
    """

    def __init__(
        self, config: Trace | None, folder: Path, rank: int, device: torch.device, say: Callable[[str], None]
    ) -> None:
        self._folder, self._rank, self._device, self._say = folder / FOLDER, rank, device, say
        self._wanted = config if config is not None and rank in config.ranks else None
        self._profile: profile | None = None
        self._mark: record_function | None = None
        self._first: int | None = None
        """The first step that is in the trace; None before it began."""
        self._last = 0
        self._memory = config is not None and config.memory and device.type == "cuda"
        if config is not None and rank == 0:
            self._doubts(config)

    def before(self, step: int) -> None:
        """Called before everything that belongs to the step, the wait for its data included."""
        if self._wanted is None or not self._wanted.first - 1 <= step <= self._wanted.last:
            return
        with _Guard(self):
            if self._profile is None:
                self._profile = self._prepared()
            if step < self._wanted.first:
                return  # one step to warm up: the profiler's own start would be the heaviest thing in the trace
            if self._first is None:
                self._begin(step)
            self._mark = record_function(f"step {step}")
            self._mark.__enter__()

    def after(self, step: int) -> None:
        if self._mark is None:
            return
        with _Guard(self):
            self._mark.__exit__(None, None, None)
            self._mark, self._last = None, step
            if self._wanted is not None and step == self._wanted.last:
                self.close()

    def close(self) -> None:
        """Writes the trace; at the end of the run, whatever there is of one."""
        profiled, self._profile, self._wanted = self._profile, None, None
        if profiled is None:
            return
        with _Guard(self):
            if self._mark is not None:
                self._mark.__exit__(None, None, None)
                self._mark = None
            if self._first is None:
                profiled.start_trace()  # prepared in vain: only a trace that began can be put down
            self._settle()
            profiled.stop_trace()
            if self._first is not None and self._last:
                self._write(profiled, f"step-{self._first}-{self._last}-rank-{self._rank}")

    def drop(self, error: Exception) -> None:
        """Gives up on tracing, and says why; the messages of other ranks than 0 go to their logs."""
        profiled, self._profile = self._profile, None
        self._wanted = self._mark = None
        with contextlib.suppress(Exception):
            if profiled is not None:
                profiled.stop_trace()
        with contextlib.suppress(Exception):
            if self._memory:
                torch.cuda.memory._record_memory_history(enabled=None)
        text = f"metrics.trace: given up on rank {self._rank} ({type(error).__name__}: {error}); training goes on"
        if self._rank == 0:
            self._say(text)
        else:
            warnings.warn(text, stacklevel=2)

    def _doubts(self, config: Trace) -> None:
        if config.memory and self._device.type != "cuda":
            self._say("metrics.trace.memory: a memory snapshot needs a GPU; tracing without it")
        world = dist.get_world_size() if dist.is_initialized() else 1
        if missing := [str(rank) for rank in config.ranks if rank >= world]:
            self._say(f"metrics.trace.ranks: no rank {', '.join(missing)} here; ranks are 0 to {world - 1}")

    def _prepared(self) -> profile:
        activities = [ProfilerActivity.CPU]
        if self._device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        prepared = profile(activities=activities, acc_events=True)  # one cycle: else torch warns of more
        prepared.prepare_trace()
        return prepared

    def _begin(self, step: int) -> None:
        assert self._profile is not None
        self._settle()  # what earlier steps left in the queue is theirs
        if self._memory:
            torch.cuda.memory._record_memory_history(max_entries=1_000_000)
        self._profile.start_trace()
        self._first = step

    def _settle(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _write(self, profiled: profile, stem: str) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        if self._memory:
            torch.cuda.memory._dump_snapshot(str(self._folder / f"{stem}.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)
        aside = self._folder / f".{stem}.json"
        profiled.export_chrome_trace(str(aside))
        text = aside.read_bytes()
        aside.write_bytes(gzip.compress(text, 5))
        aside.replace(self._folder / f"{stem}.json.gz")
        told = summary(json.loads(text)["traceEvents"], f"steps {self._first} to {self._last}, rank {self._rank}")
        (self._folder / f"{stem}.txt").write_text(told, encoding="utf-8")
        self._say(f"traced steps {self._first} to {self._last}: {self._folder / stem}.txt and .json.gz (Perfetto)")


@final
class _Guard:
    """Turns an error inside into the end of the tracing."""

    def __init__(self, tracer: Tracer) -> None:
        self._tracer = tracer

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if not isinstance(error, Exception):
            return False
        self._tracer.drop(error)
        return True


def summary(events: Sequence[Event], title: str) -> str:
    """Where the time of the traced steps went, as text: an account that sums to all of it, and the heaviest parts.

    The time runs from the beginning of the first event named `step N` to the end of the last, or of the device's last
    work. Time in which several things happen counts once: as compute, else as communication, else as a copy.
    """
    timed = [event for event in events if event.get("ph") == "X" and "dur" in event]
    steps = [e for e in timed if e.get("cat") == "user_annotation" and str(e["name"]).startswith("step ")]
    device = [e for e in timed if e.get("cat") in ("kernel", *_COPIES)]
    host = [e for e in timed if e.get("cat") == "cpu_op"]
    if not steps:
        return f"{title}: the profiler recorded no step\n"
    window = min(e["ts"] for e in steps), max(_span(e)[1] for e in [*steps, *device])
    total = window[1] - window[0]
    owned = [part for thread in _threads(host) for part in _own(thread)]
    lines = [f"{title}: {total / 1e3:,.1f} ms, {total / 1e3 / len(steps):,.1f} ms a step", ""]
    if device:
        copies = [_span(e) for e in device if e["cat"] in _COPIES]
        gpu = [(str(e["name"]), _span(e)) for e in device]
        kernels = [(str(e["name"]), _span(e)) for e in device if e["cat"] not in _COPIES]
        lines += ["Time of the GPU, all streams together", *_account(kernels, copies, window, "idle"), ""]
        lines += [*_table("Heaviest on the GPU", gpu, device, total, _ROWS), ""]
        lines += _table("Heaviest on the host, without what they call", owned, host, total, 10)
    else:
        # An autograd node calls operators; what it takes itself is Python, which waits for exchanges there.
        work = [(name, span) for name, span in owned if "::" in name and "autograd::" not in name]
        work += [(e["name"], _span(e)) for e in timed if str(e["name"]).startswith("gloo:")]
        lines += ["Time of the CPU, all threads together", *_account(work, [], window, "no operator"), ""]
        lines += _table("Heaviest operators, without what they call", owned, host, total, _ROWS)
    return "\n".join(lines) + "\n"


def _account(work: Sequence[tuple[str, Span]], copies: Sequence[Span], window: Span, idle: str) -> Iterator[str]:
    """Compute, communication, copies and the rest, named `idle`, as lines that sum to the window."""
    total = window[1] - window[0]
    compute = [span for name, span in work if not _exchanges(name)]
    exchange = [span for name, span in work if _exchanges(name)]
    busy = _covered(compute, window)
    talking = _covered([*compute, *exchange], window)
    copying = _covered([*compute, *exchange, *copies], window)
    parts = [("compute", busy, ""), ("communication", talking - busy, _hidden(exchange, talking - busy, window))]
    if copies:
        parts.append(("copies", copying - talking, _hidden(copies, copying - talking, window)))
    parts.append((idle, total - copying, ""))
    for name, time, remark in parts:
        yield f"  {name:<15}{time / 1e3:>12,.2f} ms {time / max(total, 1e-9):>7.1%}{remark}"


def _hidden(spans: Sequence[Span], alone: float, window: Span) -> str:
    """How much of these spans lies behind something that counts before them."""
    whole = _covered(spans, window)
    return f"   and {(whole - alone) / 1e3:,.2f} ms behind other work" if whole - alone > 0.5 else ""


def _table(
    title: str, work: Iterable[tuple[str, Span]], events: Iterable[Event], total: float, rows: int
) -> Iterator[str]:
    """Sums by name, the heaviest first; a share is of the whole time. `events`: what is counted as calls."""
    spent: dict[str, float] = defaultdict(float)
    for name, (begin, end) in work:
        spent[name] += end - begin
    calls = Counter(str(event["name"]) for event in events)
    yield title
    yield f"  {'ms':>10} {'share':>7} {'calls':>8} {'mean µs':>10}  name"
    for name, time in sorted(spent.items(), key=lambda item: -item[1])[:rows]:
        short = name if len(name) <= 100 else f"{name[:97]}..."
        mean = time / max(1, calls[name])
        yield f"  {time / 1e3:>10,.2f} {time / max(total, 1e-9):>7.1%} {calls[name]:>8,} {mean:>10,.1f}  {short}"


def _exchanges(name: str) -> bool:
    return any(word in name.lower() for word in EXCHANGES)


def _span(event: Event) -> Span:
    return float(event["ts"]), float(event["ts"]) + float(event["dur"])


def _covered(spans: Iterable[Span], window: Span) -> float:
    """Microseconds of the window in which at least one span runs."""
    covered, reached = 0.0, window[0]
    for begin, end in sorted(spans):
        begin, end = max(begin, reached), min(end, window[1])
        if end > begin:
            covered, reached = covered + end - begin, end
    return covered


def _threads(events: Iterable[Event]) -> Iterable[list[Event]]:
    found: dict[tuple[Any, Any], list[Event]] = defaultdict(list)
    for event in events:
        found[event.get("pid"), event.get("tid")].append(event)
    return found.values()


def _own(events: Iterable[Event]) -> Iterator[tuple[str, Span]]:
    """The times of one thread in which each operator runs and none that it called."""
    open_: list[tuple[str, float]] = []
    now = 0.0

    def until(time: float) -> Iterator[tuple[str, Span]]:
        """What runs from `now` to `time`."""
        nonlocal now
        while open_ and now < time:
            name, end = open_[-1]
            if min(end, time) > now:
                yield name, (now, min(end, time))
                now = min(end, time)
            if end <= time:
                open_.pop()
        now = time

    for event in sorted(events, key=lambda e: (e["ts"], -e["dur"])):
        begin, end = _span(event)
        yield from until(begin)
        open_.append((str(event["name"]), end))
    yield from until(max((end for _, end in open_), default=now))
