"""Megatron's indexed datasets: tokens in a .bin, and in the .idx beside it where sequences and documents begin.

The .idx is little-endian: magic, version, type code, sequences, documents + 1, then the length (int32) and first byte
(int64) of every sequence, and the bounds of the documents in sequences (int64). Multimodal sets add a byte a sequence.
"""

import os
import secrets
import struct
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

HEAD = struct.Struct("<9sQBQQ")
MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
TYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f8", 7: "<f4", 8: "<u2"}
"""Type codes; tokens are never of the floating ones."""
LONGEST = 2**31 - 1
"""Tokens a sequence may hold: a longer document is several."""


@dataclass(frozen=True, kw_only=True)
class Indexed:
    """A dataset on the disk; all arrays are memory-mapped."""

    tokens: NDArray[np.integer]
    """All sequences."""
    starts: NDArray[np.int64]
    """Where each sequence begins in `tokens`."""
    lengths: NDArray[np.int32]
    """Tokens of each sequence."""
    bounds: NDArray[np.int64]
    """The first sequence of each document, and the number of sequences: documents + 1."""

    def documents(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Where each document begins in `tokens`, and its length: its sequences lie end to end."""
        ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(self.lengths, dtype=np.int64)])
        lengths = np.diff(ends[self.bounds])
        # A document without sequences may be the last, behind every start.
        return np.append(self.starts, len(self.tokens))[self.bounds[:-1]], lengths


def token_type(vocabulary: int) -> np.dtype[Any]:
    """The type in which tokens of this vocabulary are written: the format knows no unsigned type of 32 bits."""
    return np.dtype("<u2" if vocabulary <= 1 << 16 else "<i4")


def files(prefix: str) -> tuple[Path, Path]:
    """The .bin and the .idx of a prefix."""
    return Path(f"{prefix}.bin"), Path(f"{prefix}.idx")


def write(prefix: str, documents: Iterator[NDArray[np.integer]], dtype: np.dtype[Any]) -> None:
    """Write documents, a sequence each, as `dtype`; memory: one document, and 8 bytes for each.

    ValueError: a token that `dtype` does not hold, a type that the format does not know, or files that exist.
    """
    with create(prefix, dtype) as (file, lengths):
        bounds = np.iinfo(dtype)
        for number, document in enumerate(documents):
            if document.size and not (bounds.min <= document.min() and document.max() <= bounds.max):
                worst = document.max() if document.max() > bounds.max else document.min()
                raise ValueError(f"{prefix}.bin: token {worst} of document {number} does not fit {dtype}; take another")
            file.write(np.ascontiguousarray(document, dtype).data)
            lengths.append(document.size)


@contextmanager
def create(prefix: str, dtype: np.dtype[Any]) -> Iterator[tuple[BinaryIO, "array[int]"]]:
    """A new dataset: write tokens to the file, and append the length of each document to the array.

    The files appear under their names when all is written, the .idx last; after an error neither does. ValueError: a
    type that the format does not know, or files that exist.
    """
    code = next((code for code, name in TYPES.items() if np.dtype(name) == dtype and dtype.kind != "f"), None)
    if code is None:
        raise ValueError(f"{prefix}.idx: the format has no code for tokens of type {dtype}; take uint16 or int32")
    for path in files(prefix):
        if path.exists():
            raise ValueError(f"{path} exists; remove it or name another prefix")
    lengths = array("q")
    partial = [path.with_name(f"{path.name}.{secrets.token_hex(8)}.partial") for path in files(prefix)]
    try:
        with partial[0].open("xb") as file:
            yield file, lengths
            _settle(file)
        with partial[1].open("xb") as index:
            _write_index(index, np.frombuffer(lengths, np.int64) if lengths else np.empty(0, np.int64), dtype, code)
            _settle(index)
        for path, name in zip(partial, files(prefix), strict=True):
            _publish(path, name)
    finally:
        for path in partial:
            path.unlink(missing_ok=True)


def _publish(path: Path, name: Path) -> None:
    """Gives a finished file its name. ValueError: another build took the name meanwhile; nothing is replaced."""
    try:
        name.hardlink_to(path)
    except FileExistsError as error:
        raise ValueError(f"{name} exists; remove it or name another prefix") from error
    except OSError:  # a file system without links
        path.replace(name)


def _settle(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _write_index(file: BinaryIO, documents: NDArray[np.int64], dtype: np.dtype[Any], code: int) -> None:
    """The .idx of documents of these lengths, laid end to end."""
    sequences = np.maximum(1, -(-documents // LONGEST))
    bounds = np.concatenate([np.zeros(1, np.int64), np.cumsum(sequences)])
    lengths = np.full(bounds[-1], LONGEST, np.int64)
    lengths[bounds[1:] - 1] = documents - LONGEST * (sequences - 1)
    pointers = dtype.itemsize * (np.cumsum(lengths) - lengths)
    file.write(HEAD.pack(MAGIC, VERSION, code, len(lengths), len(bounds)))
    for part, name in ((lengths, "<i4"), (pointers, "<i8"), (bounds, "<i8")):
        file.write(part.astype(name).data)


def read(prefix: str) -> Indexed:
    """Map a dataset. ValueError: a file is missing, cut short, no such file, or does not fit the other."""
    data, index = files(prefix)
    for path, other in ((index, data), (data, index)):
        if not path.is_file():
            raise ValueError(f"{path}: no such file; {other.name} needs it beside it, so copy it there or build again")
    with index.open("rb") as file:
        dtype, sequences, bounds = _head(index, file.read(HEAD.size), index.stat().st_size)
    content = _map(index, np.dtype("u1"))
    split = HEAD.size + 4 * sequences, HEAD.size + 12 * sequences
    size = data.stat().st_size
    found = Indexed(
        tokens=_map(data, dtype),
        lengths=content[HEAD.size : split[0]].view("<i4"),
        starts=_starts(index, content[split[0] : split[1]].view("<i8"), dtype.itemsize),
        bounds=content[split[1] : split[1] + 8 * bounds].view("<i8"),
    )
    _check(index, found, data, size, dtype.itemsize)
    return found


def _map(path: Path, dtype: np.dtype[Any]) -> NDArray[Any]:
    """The whole items of a file; an empty file cannot be mapped."""
    count = path.stat().st_size // dtype.itemsize
    return np.asarray(np.memmap(path, dtype, mode="r", shape=(count,))) if count else np.empty(0, dtype)


def _head(path: Path, head: bytes, size: int) -> tuple[np.dtype[Any], int, int]:
    """Type, sequences and bounds."""
    if len(head) < HEAD.size:
        raise ValueError(f"{path}: only {size} bytes, cut short; copy it again or build it again")
    magic, version, code, sequences, bounds = HEAD.unpack(head)
    if magic != MAGIC:
        raise ValueError(f"{path}: begins with {magic!r}, not {MAGIC!r}: no Megatron index; name the prefix of one")
    if version != VERSION:
        raise ValueError(f"{path}: version {version}, and only {VERSION} is known; build it again with Megatron-core")
    if code not in TYPES or np.dtype(TYPES[code]).kind == "f":
        known = ", ".join(f"{code} {np.dtype(name)}" for code, name in TYPES.items() if np.dtype(name).kind != "f")
        raise ValueError(f"{path}: tokens of type code {code}; readable are {known}: build it again")
    if not bounds:
        raise ValueError(f"{path}: 0 document bounds, where even no documents have one; build it again")
    whole = HEAD.size + 12 * sequences + 8 * bounds
    if size < whole:
        raise ValueError(f"{path}: {size} bytes of {whole}, cut short; copy it again or build it again")
    if sequences and size == whole + sequences:
        raise ValueError(f"{path}: holds a mode for each sequence: multimodal sets are not supported; build without")
    if size > whole:
        raise ValueError(f"{path}: {size} bytes, where its counts make {whole}; copy it again or build it again")
    return np.dtype(TYPES[code]), sequences, bounds


def _starts(path: Path, pointers: NDArray[np.int64], width: int) -> NDArray[np.int64]:
    if (uneven := np.flatnonzero(pointers % width)).size:
        at = pointers[uneven[0]]
        raise _wrong(path, f"sequence {uneven[0]} begins at byte {at}, inside a token of {width} bytes")
    return pointers // width


def _check(path: Path, found: Indexed, data: Path, size: int, width: int) -> None:
    """ValueError: the parts of the index contradict each other or the .bin."""
    starts, lengths, bounds = found.starts, found.lengths, found.bounds
    if (bad := np.flatnonzero((starts < 0) | (lengths < 0))).size:
        raise _wrong(path, f"sequence {bad[0]} begins at token {starts[bad[0]]} and has {lengths[bad[0]]}")
    if bounds[0] != 0 or bounds[-1] != len(starts) or np.any(np.diff(bounds) < 0):
        span = f"{bounds[0]} … {bounds[-1]}"
        raise _wrong(path, f"documents of {len(starts)} sequences have the bounds {span}, or bounds that fall")
    ends = starts + lengths
    last = int(ends.max(initial=0))
    if last * width != size:
        raise ValueError(
            f"{data}: {size} bytes, and {path.name} ends at byte {last * width}: one is cut short, or they are not of "
            "one build; copy both again or build again"
        )
    inside = np.ones(max(len(starts) - 1, 0), np.bool_)  # sequences with a predecessor in their document
    inside[bounds[(bounds > 0) & (bounds < len(starts))] - 1] = False
    if (torn := np.flatnonzero(inside & (ends[:-1] != starts[1:]))).size:
        raise _wrong(path, f"sequences {torn[0]} and {torn[0] + 1} are of one document and do not lie end to end")


def _wrong(path: Path, fault: str) -> ValueError:
    return ValueError(f"{path}: {fault}; the file is damaged: copy it again or build it again")
