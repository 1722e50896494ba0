"""Files become documents: found, opened whatever they are packed in, and cut where one document ends."""

import codecs
import glob
import gzip
import importlib.util
import json
import os
import stat
import sysconfig
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

STDLIB = "python-stdlib"
PIECE = 1 << 24
"""Bytes read at once: the memory that a long text needs, however long it is."""
UNREADABLE = "unreadable"
DUPLICATE = "duplicate"
SUFFIXES = (".txt", ".md", ".py", ".rst", ".txt.gz", ".txt.zst", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
"""Which files of a folder are documents unless told otherwise."""


class Part(NamedTuple):
    """A piece of a document; the pieces of one document follow each other."""

    text: str
    place: str
    last: bool
    """Whether the document ends here."""


class Bad(NamedTuple):
    """Something that is no document; where pieces came before it without a last one, they are none either."""

    reason: str
    place: str


@dataclass
class LeftOut:
    """What is no document, or a second copy of one: how many for each reason, and where."""

    counts: dict[str, int] = field(default_factory=dict)
    places: dict[str, list[str]] = field(default_factory=dict)
    """The first hundred of each reason; of unreadable files all, since the cache asks for them again."""

    def note(self, reason: str, place: str) -> None:
        self.counts[reason] = self.counts.get(reason, 0) + 1
        places = self.places.setdefault(reason, [])
        if len(places) < 100 or reason == UNREADABLE:
            places.append(place)

    def lines(self) -> list[str]:
        """A line for every reason, for a person."""
        lines = []
        for reason, count in sorted(self.counts.items()):
            shown = ", ".join(show(place) for place in self.places[reason][:3])
            lines.append(f"left out {count:,} {reason}: {shown}" + (f" and {count - 3:,} more" if count > 3 else ""))
        return lines


@dataclass(frozen=True, kw_only=True)
class Listing:
    """The files of a corpus as they stand on the disk."""

    files: list[tuple[str, int, int]]
    """Absolute path, bytes, mtime in nanoseconds; sorted."""
    bad: list[Bad] = field(default_factory=list)
    """Paths that cannot be listed."""


def find(paths: Sequence[str], suffixes: tuple[str, ...]) -> Listing:
    """Every file that `paths` name, once. ValueError: a path that leads nowhere, or a file that needs a library."""
    listing = Listing(files=[])
    found: set[str] = set()
    for i, given in enumerate(paths):
        names = _expand(i, given, suffixes, listing.bad)
        found.update(os.path.abspath(name) for name in names)  # noqa: PTH100 (a link keeps its own name)
    for name in sorted(found):
        try:
            status = Path(name).stat()
        except OSError:
            listing.bad.append(Bad(UNREADABLE, name))
            continue
        if stat.S_ISREG(status.st_mode):
            listing.files.append((name, status.st_size, status.st_mtime_ns))
        else:  # opening a pipe would wait for ever
            listing.bad.append(Bad("not a regular file", name))
    for suffix, library in ((".zst", "zstandard"), (".parquet", "pyarrow")):
        needing = [name for name, _, _ in listing.files if name.lower().endswith(suffix)]
        if needing and importlib.util.find_spec(library) is None:
            raise ValueError(f"{show(needing[0])}: {suffix} files need {library}; pip install farspan[data]")
    return listing


def _expand(i: int, given: str, suffixes: tuple[str, ...], bad: list[Bad]) -> Iterator[str]:
    if given == STDLIB:
        yield from _walk(sysconfig.get_path("stdlib"), (".py",), {"site-packages", "dist-packages", "__pycache__"}, bad)
        return
    # Not by Path: its globs refuse absolute patterns, and its exists() raises where a parent folder is forbidden.
    path = os.path.expanduser(given)  # noqa: PTH111
    matches = [path] if os.path.exists(path) else glob.glob(path, recursive=True)  # noqa: PTH110, PTH207
    if not matches:
        fault = "matches no file" if glob.has_magic(path) else "no such file or folder"
        raise ValueError(f"data.paths[{i}]={given!r}: {fault}, seen from {Path.cwd()}; mend the path or remove it")
    for match in matches:
        if Path(match).is_dir():
            yield from _walk(match, suffixes, set(), bad)
        else:
            yield match


def _walk(root: str, suffixes: tuple[str, ...], without: set[str], bad: list[Bad]) -> Iterator[str]:
    def note(error: OSError) -> None:
        bad.append(Bad(UNREADABLE, str(error.filename)))

    for folder, folders, names in os.walk(root, onerror=note):
        folders[:] = [name for name in folders if name not in without]
        yield from (f"{folder}/{name}" for name in names if name.endswith(suffixes))


def read(path: str, *, key: str, separator: str | None) -> Iterator[Part | Bad]:
    """The documents of one file, in order.

    The suffix decides: .jsonl (or .ndjson) is a document a line, .parquet a document a row, both under `key`, dotted
    to go inside; all else is UTF-8 text, cut wherever `separator` occurs, from left to right and not overlapping, or
    whole where it is None. .gz or .zst may follow. Blank lines of .jsonl, and nothing between two separators, are
    passed over. A fault of a line or row costs that one; damage to the file costs the document that it hits and what
    follows. A byte order mark at the beginning is dropped.
    """
    name = path.lower()
    if name.endswith(".parquet"):
        return _rows(path, key)
    name = name.removesuffix(".gz").removesuffix(".zst")
    return _records(path, key) if name.endswith((".jsonl", ".ndjson")) else _texts(path, separator)


class _Damage(Exception):  # noqa: N818 (a finding, caught in this file)
    """A file that cannot be read on."""


def _blocks(path: str) -> Iterator[bytes]:
    """The content of a file, unpacked, in blocks of bounded size."""
    try:
        with Path(path).open("rb") as file:
            if path.lower().endswith(".zst"):
                yield from _unpacked(iter(lambda: file.read(1 << 12), b""))  # small: it may grow ten-thousandfold
            elif path.lower().endswith(".gz"):
                with gzip.open(file) as inside:
                    yield from iter(lambda: inside.read1(PIECE), b"")  # read() would drop what precedes damage
            else:
                yield from iter(lambda: file.read(PIECE), b"")
    except EOFError as error:
        raise _Damage("cut short") from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise _Damage("damaged") from error
    except OSError as error:
        raise _Damage(UNREADABLE) from error


def _unpacked(packed: Iterator[bytes]) -> Iterator[bytes]:
    """The content of Zstandard frames laid end to end. The library's own file reader takes a cut file for a whole."""
    import zstandard

    frame = None
    for block in packed:
        while block:
            frame = frame or zstandard.ZstdDecompressor().decompressobj()
            try:
                content = frame.decompress(block)
            except zstandard.ZstdError as error:
                raise _Damage("damaged") from error
            if content:
                yield content
            block = frame.unused_data if frame.eof else b""
            frame = None if frame.eof else frame
    if frame:
        raise _Damage("cut short")


def _texts(path: str, separator: str | None) -> Iterator[Part | Bad]:
    number, place, filled = 1, path, False
    pieces = _decoded(path)
    try:
        for text, last in ((text, False) for text in pieces) if separator is None else _cut(pieces, separator):
            if separator is not None:
                place = f"{path} (document {number})"
            filled = filled or bool(text)
            if text or (last and filled):
                yield Part(text, place, last)
            if last and filled:
                number, filled = number + 1, False
    except _Damage as error:
        yield Bad(str(error), place)
        return
    if separator is None and filled:
        yield Part("", place, last=True)
    elif number == 1:
        yield Bad("empty", path)


def _decoded(path: str) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8-sig")("strict")
    try:
        for block in _blocks(path):
            if text := decoder.decode(block):
                yield text
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise _Damage("not UTF-8") from error


def _cut(pieces: Iterator[str], separator: str) -> Iterator[tuple[str, bool]]:
    """Pieces cut at each separator, and whether one ended there: the end of the text ends one too."""
    held = ""
    for piece in pieces:
        *whole, held = (held + piece).split(separator)
        for text in whole:
            yield text, True
        sure = len(held) - len(separator) + 1  # a separator may begin in what remains
        if sure > 0:
            yield held[:sure], False
            held = held[sure:]
    yield held, True


def _records(path: str, key: str) -> Iterator[Part | Bad]:
    blank = True
    try:
        for number, line in enumerate(_lines(_blocks(path)), 1):
            place = f"{path}:{number}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                if text and not text.isspace():
                    blank = False
                    yield _checked(json.loads(text), key, place)
            except UnicodeDecodeError:
                blank = False
                yield Bad("not UTF-8", place)
            except (ValueError, RecursionError):
                yield Bad("not JSON", place)
    except _Damage as error:
        yield Bad(str(error), path)
        return
    if blank:
        yield Bad("empty", path)


def _lines(blocks: Iterator[bytes]) -> Iterator[bytes]:
    held: list[bytes] = []
    for block in blocks:
        *whole, rest = block.split(b"\n")
        for line in whole:
            yield b"".join([*held, line])
            held.clear()
        held.append(rest)
    yield b"".join(held)


def _checked(record: Any, key: str, place: str) -> Part | Bad:
    """The text under `key`, or what is wrong with it; a key that holds a dot itself goes first."""
    for name in [key] if isinstance(record, dict) and key in record else key.split("."):
        if not isinstance(record, dict) or name not in record:
            return Bad(f"without the field {key!r}", place)
        record = record[name]
    if not isinstance(record, str):
        return Bad(f"not a string in the field {key!r}", place)
    if not record:
        return Bad("empty", place)
    try:
        record.encode()
    except UnicodeEncodeError:  # JSON can escape half of a surrogate pair
        return Bad("not Unicode (half a surrogate pair)", place)
    return Part(record, place, last=True)


def _rows(path: str, key: str) -> Iterator[Part | Bad]:
    """One row group after the other, a few rows at a time."""
    import pyarrow  # takes a third of a second: who reads no parquet does not wait
    from pyarrow import parquet

    number = 0
    try:
        Path(path).open("rb").close()
    except OSError:
        yield Bad(UNREADABLE, path)
        return
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            column = key if key in names else key.partition(".")[0]
            if column not in names:
                yield Bad(f"without the field {key!r}", path)
                return
            for group in range(file.num_row_groups):
                for batch in file.iter_batches(256, row_groups=[group], columns=[key], use_threads=False):
                    for value in batch.column(0) if batch.num_columns else [None] * batch.num_rows:
                        number += 1
                        yield _value(value, column, key, f"{path}:{number}")
    except (pyarrow.ArrowException, OSError):  # damage inside comes as either
        yield Bad("not parquet, or damaged", path)
        return
    if not number:
        yield Bad("empty", path)


def _value(scalar: Any, column: str, key: str, place: str) -> Part | Bad:
    try:
        return _checked({column: None if scalar is None else scalar.as_py()}, key, place)
    except UnicodeDecodeError:
        return Bad("not UTF-8", place)


def show(path: str) -> str:
    """A path that any terminal and file can print."""
    return os.fsencode(path).decode(errors="replace")
