"""Text becomes a corpus: read once, cut off from its names and places, split by what it says."""

import hashlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

import farspan.platform.data.documents as documents
from farspan.platform.data.buckets import Packing
from farspan.platform.data.corpus import Corpus
from farspan.platform.data.documents import STDLIB, SUFFIXES, UNREADABLE, Bad, LeftOut, Listing, Part
from farspan.platform.data.objective import Causal, Objective, Sentinels, examined, pursue
from farspan.platform.data.pack import Packed
from farspan.platform.data.row import Rows
from farspan.platform.data.store import FORMAT, HASH, Stored, Tape, build_once, finish, load, refusal
from farspan.platform.data.tokenizer import Tokenizer, open_tokenizer, token_type


class Tokenized:
    """What every kind of documents has by its tokenizer and its objective."""

    tokenizer: str
    end: str | None
    objective: Objective

    @property
    def vocabulary(self) -> int:
        """Tokens of the tokenizer and the objective. ValueError: there is no such tokenizer."""
        return Sentinels.of(open_tokenizer(self.tokenizer, self.end), self.sentinels).vocabulary

    @property
    def sentinels(self) -> tuple[str, ...]:
        """Names of the tokens that the objective marks with."""
        return self.objective.sentinels

    @property
    def both_ways(self) -> bool:
        """Whether tokens of a prefix see each other both ways."""
        return self.objective.both_ways

    @property
    def causal(self) -> bool:
        """Whether tokens are told from those before them."""
        return self.objective.causal


@dataclass(frozen=True, kw_only=True)
class Text(Tokenized):
    """Documents in files of text, .jsonl or .parquet; equal documents are kept once."""

    paths: tuple[str, ...]
    """Files, folders (all below them, not through links), globs, `~`.

    "python-stdlib" is the running interpreter's standard library.
    """
    sequence_length: int
    """Tokens a row."""
    tokenizer: str = "bytes"
    """bytes, a tokenizer.json, or a folder that holds one."""
    end: str | None = None
    """Name of the token that ends a document; null: the first known name that the tokenizer.json has."""
    field: str = "text"
    """Where the text of a .jsonl line or a .parquet row stands; a dot goes one level down."""
    separator: str | None = None
    """What lies between the documents of a text file, taken out wherever it occurs; null: a file is a document."""
    suffixes: tuple[str, ...] = SUFFIXES
    """Which files of a folder are taken; a file named outright or matched by a glob always is."""
    held_out: float = 0.01
    """Share of the documents kept for evaluation, chosen by a hash of their content."""
    bad_files: Literal["skip", "stop"] = "skip"
    """What to do about files and lines that are unreadable, empty, not UTF-8 or without the field."""
    cache: str | None = None
    """Folder of the token cache; null: farspan in $XDG_CACHE_HOME, or in ~/.cache."""

    packing: Packing = Packed()
    """Full rows of documents end to end, or a row for each document."""
    objective: Objective = Causal()
    """What a training document asks of the model; held-out ones are causal, but for kind: masked."""

    def __post_init__(self) -> None:
        if not self.paths:
            raise ValueError(f"paths=(): no data; name files, folders or globs, or {STDLIB}")
        for i, path in enumerate(self.paths):
            if not path:
                raise ValueError(f"paths[{i}]='': an empty path; name a file, folder or glob ('.' is this folder)")
        if not self.field:
            raise ValueError("field='': an empty name; name the key or column that holds the text")
        if self.separator == "":
            raise ValueError(r"separator='': nothing to look for; try '<|endoftext|>' or '\n\n\n', or null")
        check_rows(self.sequence_length, self.held_out)

    def find(self) -> None:
        """Looks for every path and the tokenizer without reading a document. ValueError: one that leads nowhere."""
        open_tokenizer(self.tokenizer, self.end)
        documents.find(self.paths, self.suffixes)

    def build(self, seed: int, sentinels: Sequence[str] | None = None) -> Corpus:
        """Read, tokenize or take from the cache; `seed` orders the training rows.

        `sentinels`: the names that get ids, in order, where this is one of several sources; None: its own.
        ValueError: a path that does not exist, no document at all, a bad file under `bad_files: stop`, or a cache
        folder that cannot be written.
        """
        tokenizer = open_tokenizer(self.tokenizer, self.end)
        listing = documents.find(self.paths, self.suffixes)
        packed, origin = self._packed(listing, tokenizer)
        words = packed.hashes.view(">u8").astype(np.uint64)  # documents × 2
        order = np.lexsort((words[:, 1], words[:, 0]))
        kept = held_out_count(words[order, 0], self.held_out)
        identity = hashlib.blake2b(f"{tokenizer.name} {float(self.held_out)!r} ".encode(), digest_size=HASH)
        identity.update(packed.hashes[order].tobytes())
        marks = Sentinels.of(tokenizer, self.sentinels if sentinels is None else sentinels)
        train = pursue(self._rows(packed, order[kept:], tokenizer, seed), self.objective, marks, seed)
        held_out = examined(self._rows(packed, order[:kept], tokenizer, None), self.objective, marks)
        notes = (
            f"{len(listing.files):,} files, {len(packed.hashes):,} documents, {len(packed.tokens):,} tokens",
            *packed.left_out.lines(),
            *marks.notes(tokenizer),
            f"{len(train):,} training rows and {len(held_out):,} held-out rows of {self.sequence_length:,} tokens, "
            f"from {len(order) - kept:,} and {kept:,} documents",
            origin,
        )
        return Corpus(train, held_out, tokenizer, identity.hexdigest(), notes)

    def parts(self, listing: Listing) -> Iterator[Part | Bad]:
        """Every document of these files, and what is none."""
        yield from listing.bad
        for path, _, _ in listing.files:
            yield from documents.read(path, key=self.field, separator=self.separator)

    def nothing(self, files: int, left_out: LeftOut) -> ValueError:
        """What to say of paths without a single document."""
        lines = "".join(f"; {line}" for line in left_out.lines())
        return ValueError(
            f"data.paths={self.paths!r}: no document in {files} files (of folders, those that end in "
            f"{', '.join(self.suffixes)}){lines}; name other paths, the right field, or wider data.suffixes"
        )

    def _rows(self, packed: Stored, chosen: NDArray[np.intp], tokenizer: Tokenizer, seed: int | None) -> Rows:
        return self.packing.build(
            packed.tokens,
            packed.offsets[chosen],
            np.diff(packed.offsets)[chosen],
            sequence_length=self.sequence_length,
            end=tokenizer.end,
            seed=seed,
        )

    def _packed(self, listing: Listing, tokenizer: Tokenizer) -> tuple[Stored, str]:
        """The tokens of these files, and a line that says whether they were read or found in the cache."""
        if self.bad_files == "stop" and listing.bad:  # a cached corpus knows nothing of what is bad today
            raise refusal(listing.bad[0])
        key = [FORMAT.decode(), tokenizer.name, self.field, self.separator, self.bad_files, listing.bad, listing.files]
        name = hashlib.blake2b(json.dumps(key).encode(), digest_size=HASH).hexdigest()
        home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        target = Path(self.cache or f"{home}/farspan").expanduser() / f"{name}.tokens"
        packed, fault = _cached(target)
        started = time.monotonic()
        try:
            packed = packed or build_once(
                target, lambda: _cached(target)[0], lambda path: self._write(path, listing, tokenizer)
            )
            if packed:
                return packed, f"tokens reused from {target}"
            packed = load(target)
        except OSError as error:
            raise ValueError(
                f"data.cache={self.cache!r}: cannot keep tokens in {target.parent} ({error}); "
                "set data.cache to a folder on a disk with room that you may write to"
            ) from error
        because = f" again, because {target} {fault}" if fault else ""
        return packed, f"tokens read{because} in {time.monotonic() - started:.1f} s, and kept in {target}"

    def _write(self, path: Path, listing: Listing, tokenizer: Tokenizer) -> None:
        with path.open("xb") as file:
            tape = Tape(file, tokenizer, stop=self.bad_files == "stop")
            tape.fill(self.parts(listing))
            if not tape.hashes:
                raise self.nothing(len(listing.files), tape.left_out)
            finish(file, tape, np.dtype(token_type(tokenizer.vocabulary)).itemsize)


def check_rows(sequence_length: int, held_out: float) -> None:
    """ValueError: rows of no length, or a share that is none."""
    if sequence_length < 1:
        raise ValueError(f"sequence_length={sequence_length}: must be at least 1; try 512")
    if not 0 <= held_out < 1:
        raise ValueError(f"held_out={held_out}: must be a share in [0, 1); try 0.01, or 0 to hold out nothing")


def held_out_count(hashes: NDArray[np.uint64], share: float) -> int:
    """How many of these hashes lie below `share`, with at least one document on each side where there are two."""
    if share == 0 or len(hashes) < 2:
        return 0
    below = int(np.count_nonzero(hashes.astype(np.float64) < share * 2.0**64))
    return min(max(below, 1), len(hashes) - 1)


def _cached(target: Path) -> tuple[Stored | None, str]:
    """The cached tokens, or None and what is wrong with them ("" where there are none)."""
    try:
        packed = load(target)
    except FileNotFoundError:
        return None, ""
    except (OSError, ValueError) as error:
        return None, f"was broken ({error})"
    # Permissions and network mounts change without a trace in a file's size or mtime.
    if any(_can_read(path) for path in packed.left_out.places.get(UNREADABLE, [])):
        return None, "lacks files that can be read now"
    return packed, ""


def _can_read(path: str) -> bool:
    try:
        with Path(path).open("rb") as file:
            file.read(1)
    except OSError:
        return False
    return True
