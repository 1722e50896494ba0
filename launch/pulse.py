"""A rank's signs of life: a heartbeat at every step and a few last words, left as files that its agent reads."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HEARTBEAT = "FARSPAN_HEARTBEAT"
FAREWELL = "FARSPAN_EXIT"


@dataclass(frozen=True, kw_only=True)
class Beat:
    """The step a rank was at, and when (seconds since the epoch)."""

    step: int
    time: float


@dataclass(frozen=True, kw_only=True)
class Farewell:
    """What a rank said about its own end; the exit status of its process is the authority on the code."""

    code: int
    step: int | None
    reason: str


def beat(step: int) -> None:
    """Say that this rank lives and is at `step`; does nothing where no agent listens (plain torchrun, tests)."""
    if path := os.environ.get(HEARTBEAT):
        with contextlib.suppress(OSError):  # a full disk ends no training
            publish(Path(path), {"step": step, "time": time.time()})


def farewell(code: int, step: int | None, reason: str = "") -> None:
    """Say why this rank is about to end with `code`; does nothing where no agent listens."""
    if path := os.environ.get(FAREWELL):
        with contextlib.suppress(OSError):
            publish(Path(path), {"code": int(code), "step": step, "reason": reason})


def last_beat(path: Path) -> Beat | None:
    message = read(path)
    with contextlib.suppress(KeyError, TypeError, ValueError):
        return Beat(step=int(message["step"]), time=float(message["time"]))
    return None


def last_words(path: Path) -> Farewell | None:
    message = read(path)
    with contextlib.suppress(KeyError, TypeError, ValueError):
        step = message["step"]
        return Farewell(
            code=int(message["code"]), step=None if step is None else int(step), reason=str(message["reason"])
        )
    return None


def publish(path: Path, message: Mapping[str, Any]) -> None:
    """Replace the JSON file at `path` at once, so that a reader sees the old message or the new one, never half."""
    draft = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        draft.write_text(json.dumps(message))
        draft.replace(path)
    except OSError:
        draft.unlink(missing_ok=True)
        raise


def read(path: Path) -> dict[str, Any]:
    """The message at `path`; empty when there is none or it is no JSON object."""
    try:
        message = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return message if isinstance(message, dict) else {}
