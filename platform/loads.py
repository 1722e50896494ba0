"""How full experts were, layer by layer: a row in `loads.jsonl` wherever metrics are read, drawn by the report."""

import base64
import json
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

import numpy as np

FILE = "loads.jsonl"
_UNIT = 256
"""Parts of the mean that a load is kept in; what is more than 2¹⁶ of them is so many."""


@dataclass(frozen=True, kw_only=True)
class Loads:
    """What experts were given in the steps from `first` to `step`, as multiples of their layer's mean."""

    first: int
    step: int
    layers: Sequence[np.ndarray]
    """Of each layer with experts, E in fp32."""

    def encode(self) -> bytes:
        parts = [np.clip(np.rint(layer * _UNIT), 0, 65535).astype("<u2") for layer in self.layers]
        packed = base64.b64encode(zlib.compress(np.concatenate(parts).tobytes())).decode()
        row = {"first": self.first, "step": self.step, "experts": [len(part) for part in parts], "loads": packed}
        return json.dumps(row).encode() + b"\n"

    @staticmethod
    def decode(row: bytes) -> "Loads | None":
        """None: the row is torn or damaged."""
        try:
            found = json.loads(row)
            numbers = np.frombuffer(zlib.decompress(base64.b64decode(found["loads"])), "<u2").astype(np.float32)
            ends = np.cumsum(found["experts"])
            if len(numbers) != ends[-1]:
                return None
            return Loads(first=found["first"], step=found["step"], layers=np.split(numbers / _UNIT, ends[:-1]))
        except (ValueError, KeyError, TypeError, IndexError, zlib.error):
            return None


@final
class LoadJournal:
    """The writer of `RUN/loads.jsonl`, on rank 0 only; without experts nothing is written, and there is no file."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / FILE

    def write(self, loads: Loads) -> None:
        """Append one row; it is with the operating system on return. What a crash has torn becomes a row of its own,
        which `read` passes over."""
        with self._path.open("ab+") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                file.write(b"" if file.read() == b"\n" else b"\n")
            file.write(loads.encode())

    def sync(self) -> None:
        """Wait until all rows are on the disk."""
        if self._path.exists():
            with self._path.open("rb") as file:
                os.fsync(file.fileno())


def read(folder: Path) -> list[Loads]:
    """The rows that count, by rising step: what was trained again after a restart supersedes what was there."""
    kept: list[Loads] = []
    path = folder / FILE
    for row in path.read_bytes().splitlines() if path.is_file() else []:
        if (found := Loads.decode(row)) is not None:
            kept = [earlier for earlier in kept if earlier.step < found.first]
            kept.append(found)
    return kept
