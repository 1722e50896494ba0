"""Documents laid end to end in one file and cut into rows: any row is found by its number alone."""

import hashlib
import json
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import BinaryIO, final

import numpy as np
import torch
from numpy.typing import NDArray

from farspan.parallel.context.shard import IGNORE, Batch

FORMAT = b"farspan1"
HASH = 16
"""Bytes of a document's content hash."""
TRAILER = struct.Struct("<8sQQQ32s")
"""FORMAT, tokens, documents, bytes of the record, checksum of the index and these counts."""


@dataclass(frozen=True, kw_only=True)
class Packed:
    """A tokenized corpus: the flat tokens stay on disk, the index is in memory."""

    tokens: NDArray[np.uint16]
    """All documents end to end in the order they were read, each closed by the end token; memory-mapped."""
    offsets: NDArray[np.int64]
    """Where each document begins, and the end of the last: documents + 1."""
    hashes: NDArray[np.uint8]
    """documents × 16: content hashes."""
    record: dict[str, list[str]]
    """What was left out: reason → paths."""


def finish(file: BinaryIO, offsets: list[int], hashes: list[bytes], record: dict[str, list[str]]) -> None:
    """Append the index to a file that holds `offsets[-1]` uint16 tokens, and bring it to the disk."""
    text = json.dumps(record).encode()
    counts = struct.pack("<QQQ", offsets[-1], len(hashes), len(text))
    index = np.array(offsets, dtype="<i8").tobytes() + b"".join(hashes) + text
    file.write(index)
    file.write(FORMAT + counts + _checksum(index, counts))
    file.flush()
    os.fsync(file.fileno())


def load(path: Path) -> Packed:
    """Map a finished file. ValueError: it is cut short, altered or not ours; the message says which."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        if size < TRAILER.size:
            raise ValueError(f"only {size} bytes")
        file.seek(-TRAILER.size, os.SEEK_END)
        magic, tokens, documents, record, checksum = TRAILER.unpack(file.read(TRAILER.size))
        if magic != FORMAT:
            raise ValueError("bad trailer")
        index_size = 8 * (documents + 1) + HASH * documents + record
        if size != 2 * tokens + index_size + TRAILER.size:
            raise ValueError(f"wrong size of {size} bytes")
        file.seek(2 * tokens)
        index = file.read(index_size)
        if checksum != _checksum(index, struct.pack("<QQQ", tokens, documents, record)):
            raise ValueError("index does not match its checksum")
        # Mapped from the open file, not by its name: the name may meanwhile stand for a newer file.
        mapped = np.asarray(np.memmap(file, dtype="<u2", mode="r", shape=(tokens,)))
    split = 8 * (documents + 1)
    return Packed(
        tokens=mapped,
        offsets=np.frombuffer(index, dtype="<i8", count=documents + 1),
        hashes=np.frombuffer(index, dtype=np.uint8, count=HASH * documents, offset=split).reshape(documents, HASH),
        record=json.loads(index[split + HASH * documents :]),
    )


def _checksum(index: bytes, counts: bytes) -> bytes:
    return hashlib.blake2b(index + counts, digest_size=32).digest()


@final
class Rows:
    """Rows of `sequence_length` tokens cut from a stream of documents.

    The stream holds whole documents, end tokens included, in the order of `starts`; row i is its positions
    [i·S, (i+1)·S), and the last row is padded with a document of end tokens. Row numbers count on for ever: number n
    is row π(n mod len) of epoch n // len, where π is a permutation of its own for every seed and epoch, or the
    identity where `seed` is None. A document never sees another: labels stop at its end, and go on across a row's end.
    """

    def __init__(
        self,
        tokens: NDArray[np.uint16],
        starts: NDArray[np.int64],
        lengths: NDArray[np.int64],
        *,
        sequence_length: int,
        end: int,
        seed: int | None,
    ) -> None:
        self.sequence_length = sequence_length
        self._tokens = tokens
        self._end = end
        self._bounds = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])
        self._shift = starts - self._bounds[:-1]  # position in the stream → position in the file
        self._order = None if seed is None else lru_cache(maxsize=2)(partial(permutation, len(self), seed))

    def __len__(self) -> int:
        """Rows of one epoch."""
        return -(-int(self._bounds[-1]) // self.sequence_length)

    def batch(self, numbers: Sequence[int]) -> Batch:
        """The rows of these numbers, B = len(numbers), T = sequence_length, on the CPU.

        ValueError: no numbers, or no rows to draw from.
        """
        if not numbers or not len(self):
            raise ValueError(f"rows {numbers} of {len(self)}: nothing to read; ask for rows of a side with documents")
        shape = len(numbers), self.sequence_length
        tokens = np.full(shape, self._end, np.int64)
        labels = np.full(shape, IGNORE, np.int64)
        lengths: list[int] = []
        padding = 0
        for number, row_tokens, row_labels in zip(numbers, tokens, labels, strict=True):
            row = self._row(number)
            padding += max(0, (row + 1) * self.sequence_length - int(self._bounds[-1]))
            lengths += self._fill(row, row_tokens, row_labels)
        return Batch(
            tokens=torch.from_numpy(tokens),
            labels=torch.from_numpy(labels),
            positions=torch.from_numpy(_positions(lengths).reshape(shape)),
            cu_seqlens=None if len(lengths) == len(numbers) else torch.from_numpy(_bounds(lengths)),
            lengths=tuple(lengths),
            valid=int(np.count_nonzero(labels != IGNORE)),
            padding=padding,
        )

    def _row(self, number: int) -> int:
        epoch, place = divmod(number, len(self))
        return place if self._order is None else int(self._order(epoch)[place])

    def _fill(self, row: int, tokens: NDArray[np.int64], labels: NDArray[np.int64]) -> list[int]:
        """Write one row, S tokens and S labels, and return the lengths of its fragments, padding included."""
        begin = row * self.sequence_length
        stop = min(begin + self.sequence_length, int(self._bounds[-1]))
        first = int(np.searchsorted(self._bounds, begin, side="right")) - 1
        last = int(np.searchsorted(self._bounds, stop, side="left"))
        lengths = np.diff(self._bounds[first + 1 : last], prepend=begin, append=stop)
        source = np.arange(begin, stop) + np.repeat(self._shift[first:last], lengths)
        read = self._tokens[source]
        # A document's successor in the file is its own next token, save after the end token, which predicts nothing.
        following = self._tokens[np.minimum(source + 1, len(self._tokens) - 1)]
        filled = stop - begin
        tokens[:filled] = read
        labels[:filled] = np.where(read == self._end, IGNORE, following.astype(np.int64))
        padding = [len(tokens) - filled] if filled < len(tokens) else []
        return lengths.tolist() + padding


def permutation(count: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """A permutation of range(count), the same on every machine and version: indices sorted by splitmix64 keys.

    Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014.
    """
    label = hashlib.blake2b(f"{seed} {epoch}".encode(), digest_size=8).digest()
    keys = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    keys += np.frombuffer(label, dtype="<u8")
    keys = (keys ^ (keys >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    keys = (keys ^ (keys >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    keys ^= keys >> np.uint64(31)
    return np.argsort(keys, kind="stable")


def _positions(lengths: list[int]) -> NDArray[np.int64]:
    """0, 1, 2 … anew for every length."""
    sizes = np.array(lengths, np.int64)
    ends = np.cumsum(sizes)
    return np.arange(ends[-1]) - np.repeat(ends - sizes, sizes)


def _bounds(lengths: list[int]) -> NDArray[np.int32]:
    """cu_seqlens of these lengths; the last bound repeats up to a power of two of at least 16 entries."""
    bounds = np.cumsum([0, *lengths], dtype=np.int32)
    entries = max(16, 1 << (len(bounds) - 1).bit_length())
    return np.pad(bounds, (0, entries - len(bounds)), mode="edge")
