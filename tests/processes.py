"""Which processes live, and waiting for what must come true: what the tests of launching ask all the time."""

import os
import time
from collections.abc import Callable
from pathlib import Path


def alive(marker: str) -> list[int]:
    """Processes other than this one with `marker` in their command line."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if marker.encode() in (entry / "cmdline").read_bytes() and int(entry.name) != os.getpid():
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def within(limit: float, claim: Callable[[], bool]) -> None:
    """Waits until `claim` is true, at most `limit` seconds; files that are not there yet make it false."""
    deadline = time.monotonic() + limit
    while True:
        try:
            if claim():
                return
        except OSError:
            pass
        assert time.monotonic() < deadline, "did not come true in time"
        time.sleep(0.02)
