"""A tokenized corpus in one file: flat tokens to map, and behind them the index that says where documents begin."""

import fcntl
import hashlib
import json
import os
import secrets
import struct
from array import array
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, final

import numpy as np
from numpy.typing import NDArray

import farspan.platform.data.documents as documents
from farspan.platform.data.documents import DUPLICATE, Bad, LeftOut, Part, show
from farspan.platform.data.tokenizer import Ids, Tokenizer, token_type

FORMAT = b"farspan2"
HASH = 16
"""Bytes of a document's content hash."""
TRAILER = struct.Struct("<8sQQQQ32s")
"""FORMAT, bytes a token, tokens, documents, bytes of the record, checksum of the index and these counts."""
BATCH = 1 << 22
"""Characters that are tokenized at once, where documents are tokenized whole."""


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A tokenized corpus: the flat tokens stay on disk, the index is in memory."""

    tokens: Ids
    """All documents end to end in the order they were read, each closed by the end token; memory-mapped."""
    offsets: NDArray[np.int64]
    """Where each document begins, and the end of the last: documents + 1."""
    hashes: NDArray[np.uint8]
    """documents × 16: content hashes."""
    left_out: LeftOut


@final
class Tape:
    """Documents written end to end as tokens, each closed by the end token where `close` is set; equal ones once.

    A text in pieces is written as it comes where the tokenizer allows that; otherwise documents are tokenized whole,
    many at a time, so that the library's threads have work. Memory: a piece or `BATCH`, and the longest document of a
    tokenizer that needs it whole.
    """

    def __init__(self, file: BinaryIO, tokenizer: Tokenizer, *, close: bool = True, stop: bool = False) -> None:
        self._file, self._tokenizer, self._stop = file, tokenizer, stop
        self._type = np.dtype(token_type(tokenizer.vocabulary)).newbyteorder("<")
        self._end = np.array([tokenizer.end] if close else [], self._type).tobytes()
        self.offsets = array("q", [0])
        """Where each document begins in the file, in tokens, and the end of the last."""
        self.hashes: dict[bytes, None] = {}
        """Of each document, in order."""
        self.left_out = LeftOut()
        self._waiting: list[tuple[str, bytes, str]] = []  # text, hash and place of whole documents
        self._size = 0  # characters that wait
        self._open()

    def fill(self, parts: Iterable[Part | Bad]) -> None:
        """Writes documents. ValueError: something is none, and `stop` is set."""
        for part in parts:
            if isinstance(part, Part):
                self._add(part.text)
                if part.last:
                    self._finish(part.place)
            else:
                self._leave_out(part)
                self._drop()
        self._flush()

    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each document."""
        offsets: NDArray[np.int64] = np.array(self.offsets, np.int64)
        return offsets[1:] - offsets[:-1]

    def _open(self) -> None:
        self._pieces: list[str] = []
        self._length = 0  # characters in `pieces`
        self._written = 0  # tokens of the open document in the file
        self._hash = hashlib.blake2b(digest_size=HASH)

    def _leave_out(self, bad: Bad) -> None:
        if self._stop:
            raise refusal(bad)
        self.left_out.note(*bad)

    def _drop(self) -> None:
        """Forgets the open document."""
        if self._written:
            self._file.seek(self._type.itemsize * self.offsets[-1])
            self._file.truncate()
        self._open()

    def _add(self, text: str) -> None:
        self._hash.update(text.encode())
        self._pieces.append(text)
        self._length += len(text)
        if self._tokenizer.piecewise and self._length >= documents.PIECE:
            self._write_pieces()

    def _write_pieces(self) -> None:
        self._written += self._write(self._tokenizer.encode("".join(self._pieces)))
        self._pieces, self._length = [], 0

    def _finish(self, place: str) -> None:
        """Closes the open document."""
        digest = self._hash.digest()
        if digest in self.hashes:
            self.left_out.note(DUPLICATE, place)
            self._drop()
            return
        self.hashes[digest] = None
        if self._tokenizer.piecewise:
            self._write_pieces()
            self._close(self._written)
        else:
            self._waiting.append(("".join(self._pieces), digest, place))
            self._size += self._length
            if self._size >= BATCH:
                self._flush()
        self._open()

    def _flush(self) -> None:
        """Tokenizes the documents that wait."""
        encoded = self._tokenizer.encode_batch([text for text, _, _ in self._waiting]) if self._waiting else []
        for ids, (_, digest, place) in zip(encoded, self._waiting, strict=True):
            if ids.size:
                self._close(self._write(ids))
            else:
                del self.hashes[digest]
                self._leave_out(Bad("without a single token", place))
        self._waiting, self._size = [], 0

    def _write(self, ids: Ids) -> int:
        self._file.write(ids.astype(self._type, copy=False).data)
        return len(ids)

    def _close(self, length: int) -> None:
        self._file.write(self._end)
        self.offsets.append(self.offsets[-1] + length + len(self._end) // self._type.itemsize)


def refusal(bad: Bad) -> ValueError:
    """What `bad_files: stop` says."""
    way_out = "mend or remove it, or set data.bad_files=skip"
    return ValueError(f"data.bad_files='stop': {show(bad.place)} is {bad.reason}; {way_out}")


def finish(file: BinaryIO, tape: Tape, width: int) -> None:
    """Append the index to a file that holds the tokens of `tape`, `width` bytes each, and bring it to the disk."""
    record = json.dumps(vars(tape.left_out)).encode()
    counts = struct.pack("<QQQQ", width, tape.offsets[-1], len(tape.hashes), len(record))
    index = np.array(tape.offsets, dtype="<i8").tobytes() + b"".join(tape.hashes) + record
    file.write(index)
    file.write(FORMAT + counts + _checksum(index, counts))
    file.flush()
    os.fsync(file.fileno())


def load(path: Path) -> Stored:
    """Map a finished file. ValueError: it is cut short, altered or not ours; the message says which."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        if size < TRAILER.size:
            raise ValueError(f"only {size} bytes")
        file.seek(-TRAILER.size, os.SEEK_END)
        magic, width, tokens, documents, record, checksum = TRAILER.unpack(file.read(TRAILER.size))
        if magic != FORMAT:
            raise ValueError("bad trailer")
        index_size = 8 * (documents + 1) + HASH * documents + record
        if width not in (2, 4) or size != width * tokens + index_size + TRAILER.size:
            raise ValueError(f"wrong size of {size} bytes")
        file.seek(width * tokens)
        index = file.read(index_size)
        if checksum != _checksum(index, struct.pack("<QQQQ", width, tokens, documents, record)):
            raise ValueError("index does not match its checksum")
        # Mapped from the open file, not by its name: the name may meanwhile stand for a newer file.
        mapped = np.asarray(np.memmap(file, dtype=f"<u{width}", mode="r", shape=(tokens,)))
    split = 8 * (documents + 1)
    return Stored(
        tokens=mapped,
        offsets=np.frombuffer(index, dtype="<i8", count=documents + 1),
        hashes=np.frombuffer(index, dtype=np.uint8, count=HASH * documents, offset=split).reshape(documents, HASH),
        left_out=LeftOut(**json.loads(index[split + HASH * documents :])),
    )


def _checksum(index: bytes, counts: bytes) -> bytes:
    return hashlib.blake2b(index + counts, digest_size=32).digest()


def build_once(target: Path, find: Callable[[], Stored | None], write: Callable[[Path], None]) -> Stored | None:
    """Write `target` unless another process does: to a temporary file that is renamed, so that a reader, or a kill,
    meets the whole file or none. `find` looks for it; returns what another process wrote meanwhile, None if this did.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with _lock(target) as alone:
        if stored := find():
            return stored
        if alone:
            for left in target.parent.glob(f"{target.stem}.*.partial"):  # of a process killed while it built
                left.unlink(missing_ok=True)
        partial = target.with_suffix(f".{secrets.token_hex(8)}.partial")
        try:
            write(partial)
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)
    return None


@contextmanager
def _lock(target: Path) -> Iterator[bool]:
    """Hold the lock beside `target`; False: this file system has none."""
    with target.with_suffix(".lock").open("w") as file:
        alone = True
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:  # the rename still keeps the cache whole; ranks may do the same work twice
            alone = False
        yield alone
