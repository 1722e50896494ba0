"""Text files become a corpus: read once, cut off from their names and places, split by what they say."""

import codecs
import fcntl
import glob
import hashlib
import json
import os
import secrets
import stat
import sysconfig
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray

from farspan.platform.data.pack import FORMAT, HASH, Packed, Rows, finish, load
from farspan.platform.data.tokenizer import Bytes, Tokenizer

STDLIB = "python-stdlib"
PIECE = 1 << 24
"""Bytes read at once: the memory that building needs, however long the files."""
UNREADABLE = "unreadable"


@dataclass(frozen=True)
class Corpus:
    """Documents ready to train on. The same contents give the same corpus wherever and whenever they are read."""

    train: Rows
    held_out: Rows
    tokenizer: Tokenizer
    fingerprint: str
    """Hash of the documents' contents, the tokenizer and the held-out share: alike on every machine that may resume."""
    notes: tuple[str, ...]
    """What was read, skipped and cached, for a person."""


@dataclass(frozen=True, kw_only=True)
class Text:
    """UTF-8 files, one document each; equal documents are kept once."""

    paths: tuple[str, ...]
    """Files, folders (all below them, not through links), globs, `~`.

    "python-stdlib" is the running interpreter's standard library.
    """
    sequence_length: int
    """Tokens a row."""
    tokenizer: Literal["bytes"] = "bytes"
    suffixes: tuple[str, ...] = (".txt", ".md", ".py", ".rst")
    """Which files of a folder are taken; a file named outright or matched by a glob always is."""
    held_out: float = 0.01
    """Share of the documents kept for evaluation, chosen by a hash of their content."""
    bad_files: Literal["skip", "stop"] = "skip"
    """What to do about files that are unreadable, empty or not UTF-8."""
    cache: str | None = None
    """Folder of the token cache; None: farspan in $XDG_CACHE_HOME, or in ~/.cache."""

    def __post_init__(self) -> None:
        if not self.paths:
            raise ValueError(f"paths=(): no data; name files, folders or globs, or {STDLIB}")
        for i, path in enumerate(self.paths):
            if not path:
                raise ValueError(f"paths[{i}]='': an empty path; name a file, folder or glob ('.' is this folder)")
        if self.sequence_length < 1:
            raise ValueError(f"sequence_length={self.sequence_length}: must be at least 1; try 512")
        if not 0 <= self.held_out < 1:
            raise ValueError(f"held_out={self.held_out}: must be a share in [0, 1); try 0.01, or 0 to hold out nothing")

    @property
    def vocabulary(self) -> int:
        """Tokens that the tokenizer can write, known without reading any file."""
        return Bytes.vocabulary

    def find(self) -> None:
        """Looks for every path without reading any file. ValueError: one that leads nowhere from here."""
        _list(self.paths, self.suffixes)

    def build(self, seed: int) -> Corpus:
        """Read, tokenize or take from the cache; `seed` orders the training rows.

        ValueError: a path that does not exist, no document at all, a bad file under `bad_files: stop`, or a cache
        folder that cannot be written.
        """
        tokenizer = Bytes()
        listing = _list(self.paths, self.suffixes)
        if self.bad_files == "stop":
            for reason, names in listing.bad.items():
                raise _refusal(names[0], reason)
        packed, origin = self._packed(listing, tokenizer)
        words = packed.hashes.view(">u8").astype(np.uint64)  # documents × 2
        order = np.lexsort((words[:, 1], words[:, 0]))
        kept = _held_out(words[order, 0], self.held_out)
        identity = hashlib.blake2b(f"{tokenizer.name} {float(self.held_out)!r} ".encode(), digest_size=HASH)
        identity.update(packed.hashes[order].tobytes())
        train = self._rows(packed, order[kept:], tokenizer, seed)
        held_out = self._rows(packed, order[:kept], tokenizer, None)
        notes = (
            *_describe(listing, packed),
            f"{len(train):,} training rows and {len(held_out):,} held-out rows of {self.sequence_length:,} tokens, "
            f"from {len(order) - kept:,} and {kept:,} documents",
            origin,
        )
        return Corpus(train, held_out, tokenizer, identity.hexdigest(), notes)

    def _rows(self, packed: Packed, documents: NDArray[np.intp], tokenizer: Tokenizer, seed: int | None) -> Rows:
        return Rows(
            packed.tokens,
            packed.offsets[documents],
            np.diff(packed.offsets)[documents],
            sequence_length=self.sequence_length,
            end=tokenizer.end,
            seed=seed,
        )

    def _packed(self, listing: "_Listing", tokenizer: Tokenizer) -> tuple[Packed, str]:
        """The tokens of these files, and a line that says whether they were read or found in the cache."""
        key = [FORMAT.decode(), tokenizer.name, self.suffixes, self.bad_files, listing.files]
        name = hashlib.blake2b(json.dumps(key).encode(), digest_size=HASH).hexdigest()
        home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        target = Path(self.cache or f"{home}/farspan").expanduser() / f"{name}.tokens"
        packed, fault = _open(target)
        if packed:
            return packed, f"tokens reused from {target}"
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with _lock(target) as alone:
                packed, fault = _open(target)  # another rank may have built it while this one waited
                if packed:
                    return packed, f"tokens reused from {target}"
                started = time.monotonic()
                self._write(target, listing, tokenizer, alone)
                packed = load(target)
        except OSError as error:
            raise ValueError(
                f"data.cache={self.cache!r}: cannot keep tokens in {target.parent} ({error}); "
                "set data.cache to a folder on a disk with room that you may write to"
            ) from error
        because = f" again, because {target} {fault}" if fault else ""
        return packed, f"tokens read{because} in {time.monotonic() - started:.1f} s, and kept in {target}"

    def _write(self, target: Path, listing: "_Listing", tokenizer: Tokenizer, alone: bool) -> None:
        """Tokenize into a temporary file and rename it: a reader, or a kill, meets the whole file or none."""
        if alone:
            for left in target.parent.glob(f"{target.stem}.*.partial"):  # of a process killed while it built
                left.unlink(missing_ok=True)
        partial = target.with_suffix(f".{secrets.token_hex(8)}.partial")
        try:
            with partial.open("xb") as file:
                offsets, hashes, record = _tokenize(file, listing, tokenizer, stop=self.bad_files == "stop")
                if not hashes:
                    raise ValueError(self._nothing(listing, record))
                finish(file, offsets, hashes, record)
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)

    def _nothing(self, listing: "_Listing", record: dict[str, list[str]]) -> str:
        left_out = "".join(f"; {line}" for line in _left_out(listing.bad, record))
        return (
            f"data.paths={self.paths!r}: no document in {len(listing.files)} files (of folders, those that end in "
            f"{', '.join(self.suffixes)}){left_out}; name other paths, or widen data.suffixes"
        )


@dataclass(frozen=True, kw_only=True)
class _Listing:
    """The files of a corpus as they stand on the disk."""

    files: list[tuple[str, int, int]]
    """Absolute path, bytes, mtime in nanoseconds; sorted."""
    bad: dict[str, list[str]] = field(default_factory=dict)
    """Reason → paths that cannot be listed."""


def _list(paths: tuple[str, ...], suffixes: tuple[str, ...]) -> _Listing:
    """Every file that `paths` name, once. ValueError: a path that leads nowhere."""
    listing = _Listing(files=[])
    found: set[str] = set()
    for i, given in enumerate(paths):
        names = _expand(i, given, suffixes, listing.bad)
        found.update(os.path.abspath(name) for name in names)  # noqa: PTH100 (a link keeps its own name)
    for name in sorted(found):
        try:
            status = Path(name).stat()
        except OSError:
            listing.bad.setdefault(UNREADABLE, []).append(name)
            continue
        if stat.S_ISREG(status.st_mode):
            listing.files.append((name, status.st_size, status.st_mtime_ns))
        else:  # opening a pipe would wait for ever
            listing.bad.setdefault("not a regular file", []).append(name)
    return listing


def _expand(i: int, given: str, suffixes: tuple[str, ...], bad: dict[str, list[str]]) -> Iterator[str]:
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


def _walk(root: str, suffixes: tuple[str, ...], without: set[str], bad: dict[str, list[str]]) -> Iterator[str]:
    def note(error: OSError) -> None:
        bad.setdefault(UNREADABLE, []).append(str(error.filename))

    for folder, folders, names in os.walk(root, onerror=note):
        folders[:] = [name for name in folders if name not in without]
        yield from (f"{folder}/{name}" for name in names if name.endswith(suffixes))


class _NoDocument(Exception):  # noqa: N818 (a finding, caught in this file)
    """A file that is no document."""


def _pieces(path: str) -> Iterator[str]:
    """The text of a file, without a byte order mark, in pieces of bounded size."""
    decoder = codecs.getincrementaldecoder("utf-8")("strict")
    try:
        with Path(path).open("rb") as file:
            yield decoder.decode(file.read(PIECE)).removeprefix("\ufeff")
            while piece := file.read(PIECE):
                yield decoder.decode(piece)
            decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise _NoDocument("not UTF-8") from error
    except OSError as error:
        raise _NoDocument(UNREADABLE) from error


def _tokenize(
    out: BinaryIO, listing: _Listing, tokenizer: Tokenizer, *, stop: bool
) -> tuple[list[int], list[bytes], dict[str, list[str]]]:
    """Stream every document to `out`; returns offsets, content hashes, and what was left out: reason → paths."""
    offsets, hashes, record = [0], dict[bytes, None](), dict[str, list[str]]()
    end = np.array([tokenizer.end], "<u2").tobytes()
    for path, _, _ in listing.files:
        digest = hashlib.blake2b(digest_size=HASH)
        try:
            for text in _pieces(path):
                digest.update(text.encode())
                out.write(tokenizer.encode(text).astype("<u2", copy=False).data)
            if out.tell() == 2 * offsets[-1]:
                raise _NoDocument("empty")
            if digest.digest() in hashes:
                raise _NoDocument("duplicate")
        except _NoDocument as error:
            reason = str(error)
            if stop and reason != "duplicate":
                raise _refusal(path, reason) from error
            record.setdefault(reason, []).append(path)
            out.seek(2 * offsets[-1])
            out.truncate()
            continue
        out.write(end)
        hashes[digest.digest()] = None
        offsets.append(out.tell() // 2)
    return offsets, list(hashes), record


def _refusal(path: str, reason: str) -> ValueError:
    way_out = "mend or remove it, or set data.bad_files=skip"
    return ValueError(f"data.bad_files='stop': {_show(path)} is {reason}; {way_out}")


def _open(target: Path) -> tuple[Packed | None, str]:
    """The cached tokens, or None and what is wrong with them ("" where there are none)."""
    try:
        packed = load(target)
    except FileNotFoundError:
        return None, ""
    except (OSError, ValueError) as error:
        return None, f"was broken ({error})"
    # Permissions and network mounts change without a trace in a file's size or mtime.
    if any(_can_read(path) for path in packed.record.get(UNREADABLE, [])):
        return None, "lacks files that can be read now"
    return packed, ""


def _can_read(path: str) -> bool:
    try:
        with Path(path).open("rb") as file:
            file.read(1)
    except OSError:
        return False
    return True


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


def _held_out(hashes: NDArray[np.uint64], share: float) -> int:
    """How many of the sorted hashes lie below `share`, with at least one document on each side where there are two."""
    if share == 0 or len(hashes) < 2:
        return 0
    below = int(np.count_nonzero(hashes.astype(np.float64) < share * 2.0**64))
    return min(max(below, 1), len(hashes) - 1)


def _describe(listing: _Listing, packed: Packed) -> list[str]:
    files = len(listing.files) + sum(len(names) for names in listing.bad.values())
    kept = f"{files:,} files, {len(packed.hashes):,} documents, {len(packed.tokens):,} tokens"
    return [kept, *_left_out(listing.bad, packed.record)]


def _left_out(listed: dict[str, list[str]], read: dict[str, list[str]]) -> list[str]:
    """A line for every reason, whether it showed when the files were listed or when they were read."""
    lines = []
    for reason in sorted(listed.keys() | read.keys()):
        paths = listed.get(reason, []) + read.get(reason, [])
        more = f" and {len(paths) - 3:,} more" if len(paths) > 3 else ""
        lines.append(f"left out {len(paths):,} {reason}: {', '.join(_show(path) for path in paths[:3])}{more}")
    return lines


def _show(path: str) -> str:
    """A path that any terminal and file can print."""
    return os.fsencode(path).decode(errors="replace")
