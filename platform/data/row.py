"""A row is a function of its number: what every kind of data gives, and how rows become a batch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from farspan.parallel.context.shard import IGNORE, Batch, entries

MULTIPLE = 64
"""Lengths of rows that are not all alike are multiples of this: few shapes, so few compilations."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """T tokens and what each predicts; documents in them never see each other."""

    tokens: NDArray[np.int64]
    labels: NDArray[np.int64]
    """`IGNORE` where nothing is predicted."""
    lengths: tuple[int, ...]
    """Of the documents, which sum to T."""
    padding: int = 0
    """How many tokens only fill up: the last document, where there are any."""
    prefixes: tuple[int, ...] | None = None
    """How many tokens at the beginning of each document see each other both ways; None: none anywhere."""


class Rows(Protocol):
    """Rows without end: numbers count on for ever, and a number is the same row on every machine."""

    @property
    def sequence_length(self) -> int:
        """Tokens a row, at most."""

    def __len__(self) -> int:
        """Rows of one epoch."""

    def row(self, number: int) -> Row: ...

    def documents(self) -> NDArray[np.int64]:
        """Tokens of every document, before any cut; none where rows are computed."""


class Tokens(Protocol):
    """Tokens laid end to end: an array, or a view that concatenates some."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: NDArray[np.int64], /) -> NDArray[Any]: ...


def placed(number: int, count: int, order: Callable[[int], NDArray[np.int64]] | None) -> int:
    """Which of an epoch's `count` rows number `number` is: `order` permutes each epoch; None: as they stand.

    ValueError: there are no rows.
    """
    if not count:
        raise ValueError(f"row {number} of 0: nothing to read; ask for rows of a side with documents")
    epoch, place = divmod(number, count)
    return place if order is None else int(order(epoch)[place])


def collate(rows: Sequence[Row], end: int) -> Batch:
    """B rows as a batch on the CPU, filled up with `end` to the longest. ValueError: no rows.

    Where their lengths differ, T is the longest, rounded up to a multiple of 64.
    """
    if not rows:
        raise ValueError("rows=[]: a batch needs at least one row")
    sizes = {len(row.tokens) for row in rows}
    length = max(sizes) if len(sizes) == 1 else -(-max(sizes) // MULTIPLE) * MULTIPLE
    rows = [_filled_up(row, length, end) for row in rows]
    labels = np.stack([row.labels for row in rows])
    lengths = [size for row in rows for size in row.lengths]
    prefix, prefix_bounds = _prefixes(rows, length)
    padding = sum(row.padding for row in rows)
    return Batch(
        tokens=torch.from_numpy(np.stack([row.tokens for row in rows])),
        labels=torch.from_numpy(labels),
        positions=torch.from_numpy(_counted(lengths).reshape(labels.shape)),
        cu_seqlens=None if len(lengths) == len(rows) else torch.from_numpy(_bounds(lengths)),
        lengths=tuple(size for row in rows for size in (row.lengths[:-1] if row.padding else row.lengths)),
        valid=int(np.count_nonzero(labels != IGNORE)),
        padding=padding,
        prefix=prefix,
        prefix_cu_seqlens=prefix_bounds,
        places=_numbered(rows, length) if padding else None,
    )


def _numbered(rows: Sequence[Row], length: int) -> torch.Tensor:
    """B T int32: each token's place among all, -1 for what only fills up a row."""
    numbers = np.arange(len(rows) * length, dtype=np.int32).reshape(len(rows), length)
    for number, row in enumerate(rows):
        numbers[number, length - row.padding :] = -1
    return torch.from_numpy(numbers)


def _filled_up(row: Row, length: int, end: int) -> Row:
    """The row with padding as its last document, which grows where there is one."""
    missing = length - len(row.tokens)
    if not missing:
        return row
    kept = row.lengths[:-1] if row.padding else row.lengths
    return Row(
        tokens=np.append(row.tokens, np.full(missing, end, np.int64)),
        labels=np.append(row.labels, np.full(missing, IGNORE, np.int64)),
        lengths=(*kept, row.padding + missing),
        padding=row.padding + missing,
        prefixes=None if row.prefixes is None else (*row.prefixes[: len(kept)], 0),
    )


def _prefixes(rows: Sequence[Row], length: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The places of all prefixes among the B·T tokens, and their bounds; None where no document has one."""
    starts: list[int] = []
    sizes: list[int] = []
    for number, row in enumerate(rows):
        begin = number * length
        for size, prefix in zip(row.lengths, row.prefixes or (), strict=False):
            if prefix:
                starts.append(begin)
                sizes.append(prefix)
            begin += size
    if not sizes:
        return None, None
    places = _counted(sizes) + np.repeat(np.array(starts, np.int64), sizes)
    return torch.from_numpy(places), torch.from_numpy(_bounds(sizes))


def _counted(lengths: Sequence[int]) -> NDArray[np.int64]:
    """0, 1, 2 … anew for every length."""
    sizes = np.array(lengths, np.int64)
    ends = np.cumsum(sizes)
    return np.arange(ends[-1]) - np.repeat(ends - sizes, sizes)


def _bounds(lengths: Sequence[int]) -> NDArray[np.int32]:
    """cu_seqlens of these lengths; the last bound repeats up to a power of two of at least 16 entries."""
    bounds = np.cumsum([0, *lengths], dtype=np.int32)
    return np.pad(bounds, (0, entries(len(bounds)) - len(bounds)), mode="edge")
