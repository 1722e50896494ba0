"""Points in the time of a device, and how long a rank waits for what others send: counted where it waits, so that what
work hides is not in it."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Mark = float | torch.cuda.Event
"""When a device had done all that it was told before."""


def now(device: torch.device) -> Mark:
    """A mark; nobody waits for it."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def between(begin: Mark, end: Mark) -> float:
    """Seconds; the host waits until the device is there."""
    if isinstance(begin, float) or isinstance(end, float):
        assert isinstance(begin, float) and isinstance(end, float)
        return end - begin
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


@dataclass(frozen=True)
class Waits:
    """Spans of waiting; on a GPU they may lie ahead still."""

    spans: Sequence[tuple[Mark, Mark]] = ()

    def seconds(self) -> float:
        """Their sum, once the device has come so far."""
        return sum(between(begin, end) for begin, end in self.spans)


class Clock:
    """Waits for exchanges and notes how long; a GPU's stream waits, and its host does not."""

    def __init__(self) -> None:
        self._spans: list[tuple[Mark, Mark]] = []

    def wait(self, pending: Tensor) -> Tensor:
        """What an exchange of functional collectives brings, when it is there."""
        begin = now(pending.device)
        here: Tensor = torch.ops._c10d_functional.wait_tensor(pending)
        self._spans.append((begin, now(pending.device)))
        return here

    def take(self) -> Waits:
        """The spans since they were taken last."""
        spans, self._spans = self._spans, []
        return Waits(spans)
