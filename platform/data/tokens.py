"""Tokens that others have made: Megatron's .bin and .idx, mapped into memory and trained on where they lie."""

import glob
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

import numpy as np
from numpy.typing import NDArray

import farspan.platform.data.index as index
from farspan.platform.data.buckets import Packing
from farspan.platform.data.corpus import Corpus
from farspan.platform.data.draws import hashed
from farspan.platform.data.index import Indexed
from farspan.platform.data.objective import Causal, Objective, Sentinels, examined, pursue
from farspan.platform.data.pack import Packed
from farspan.platform.data.row import Rows
from farspan.platform.data.text import Tokenized, check_rows, held_out_count
from farspan.platform.data.tokenizer import Tokenizer, open_tokenizer

BLOCKS = 256
BLOCK = 4096
"""So many blocks of so many bytes, evenly spaced, are read of a .bin to know it and to check its tokens."""


@dataclass(frozen=True, kw_only=True)
class Tokens(Tokenized):
    """Megatron's indexed datasets, one after the other. Nothing is copied, and nothing is dropped as a duplicate."""

    paths: tuple[str, ...]
    """Prefixes, with .bin, .idx or neither; globs of such files; `~`."""
    sequence_length: int
    """Tokens a row."""
    tokenizer: str
    """What wrote the tokens: bytes, a tokenizer.json, or a folder that holds one."""
    end: str | None = None
    """Name of the token that ends a document; null: the first known name that the tokenizer.json has."""
    held_out: float = 0.01
    """Share of the documents kept for evaluation, chosen by a hash of their number and of the index."""

    packing: Packing = Packed()
    """Full rows of documents end to end, or a row for each document."""
    objective: Objective = Causal()
    """What a training document asks of the model; held-out ones are causal, but for kind: masked."""

    def __post_init__(self) -> None:
        if not self.paths or not all(self.paths):
            raise ValueError(f"paths={self.paths!r}: no data, or an empty path; name prefixes of .bin and .idx files")
        check_rows(self.sequence_length, self.held_out)

    def find(self) -> None:
        """Looks for every file and the tokenizer. ValueError: one that is missing, or not what its sidecar says."""
        tokenizer = open_tokenizer(self.tokenizer, self.end)
        for prefix in _expand(self.paths):
            _agree(prefix, tokenizer, self.tokenizer)

    def build(self, seed: int, sentinels: Sequence[str] | None = None) -> Corpus:
        """Map the files; `seed` orders the training rows.

        `sentinels`: the names that get ids, in order, where this is one of several sources; None: its own.
        ValueError: a path that leads nowhere, a damaged file, another tokenizer than the files', or no document.
        """
        tokenizer = open_tokenizer(self.tokenizer, self.end)
        prefixes = _expand(self.paths)
        for prefix in prefixes:
            _agree(prefix, tokenizer, self.tokenizer)
        sets = [index.read(prefix) for prefix in prefixes]
        maps = Maps([one.tokens for one in sets], [f"{prefix}.bin" for prefix in prefixes], tokenizer.vocabulary)
        hashes = [_digest(index.files(prefix)[1]) for prefix in prefixes]
        starts, lengths, draws = _documents(sets, hashes)
        if not len(starts):
            raise ValueError(f"data.paths={self.paths!r}: no token in {len(sets)} datasets; name others")
        identity = hashlib.blake2b(f"{tokenizer.name} {float(self.held_out)!r} ".encode(), digest_size=16)
        identity.update(b"".join(hashes) + maps.sample())
        order = np.argsort(draws, kind="stable")
        kept = held_out_count(draws, self.held_out)
        marks = Sentinels.of(tokenizer, self.sentinels if sentinels is None else sentinels)
        train = self._rows(maps, starts, lengths, np.sort(order[kept:]), tokenizer.end, seed)
        train = pursue(train, self.objective, marks, seed)
        held_out = self._rows(maps, starts, lengths, np.sort(order[:kept]), tokenizer.end, None)
        held_out = examined(held_out, self.objective, marks)
        notes = (
            f"{len(sets):,} datasets, {len(starts):,} documents, {lengths.sum():,} tokens",
            _ends(maps, starts + lengths - 1, tokenizer.end),
            *marks.notes(tokenizer),
            f"{len(train):,} training rows and {len(held_out):,} held-out rows of {self.sequence_length:,} tokens, "
            f"from {len(order) - kept:,} and {kept:,} documents",
        )
        return Corpus(train, held_out, tokenizer, identity.hexdigest(), notes)

    def _rows(
        self,
        maps: "Maps",
        starts: NDArray[np.int64],
        lengths: NDArray[np.int64],
        chosen: NDArray[np.intp],
        end: int,
        seed: int | None,
    ) -> Rows:
        return self.packing.build(
            maps, starts[chosen], lengths[chosen], sequence_length=self.sequence_length, end=end, seed=seed
        )


@final
class Maps:
    """Arrays that lie apart, read as if they were one: `maps[places]` for int64 places in any order.

    ValueError at reading: a token outside the vocabulary; it names the file.
    """

    def __init__(self, arrays: Sequence[NDArray[np.integer]], names: Sequence[str], vocabulary: int) -> None:
        self._arrays, self._names, self._vocabulary = arrays, names, vocabulary
        self._bounds = np.cumsum([0, *map(len, arrays)], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._bounds[-1])

    def __getitem__(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        which = np.searchsorted(self._bounds, places, side="right") - 1
        read = np.empty(places.shape, np.int64)
        for i in np.unique(which):
            here = which == i
            read[here] = self._checked(i, places[here] - self._bounds[i])
        return read

    def _checked(self, i: int, places: NDArray[np.int64]) -> NDArray[np.integer]:
        read = self._arrays[i][places]
        if (bad := np.flatnonzero((read < 0) | (read >= self._vocabulary))).size:
            raise ValueError(
                f"{self._names[i]}: token {read[bad[0]]} at place {places[bad[0]]} is outside the tokenizer's "
                f"{self._vocabulary}; set data.tokenizer to the one that wrote the file"
            )
        return read

    def sample(self) -> bytes:
        """The sizes of the arrays and evenly spaced blocks of each, checked."""
        parts = []
        for i, tokens in enumerate(self._arrays):
            width = BLOCK // tokens.itemsize
            first = np.unique(np.linspace(0, max(len(tokens) - width, 0), BLOCKS, dtype=np.int64))
            blocks = [np.arange(start, min(start + width, len(tokens))) for start in first]
            parts += [f"{len(tokens)} {tokens.dtype.str} ".encode()]
            parts += [self._checked(i, block).tobytes() for block in blocks]
        return b"".join(parts)


def _expand(paths: tuple[str, ...]) -> list[str]:
    """The prefixes, in the order given and once each; those of a glob sorted. ValueError: one that leads nowhere."""
    prefixes: dict[str, None] = {}
    for i, given in enumerate(paths):
        path = str(Path(given).expanduser())
        named = {_prefix(name): None for name in _matches(path) if _exists(_prefix(name))}
        if not named:
            fault = "is a folder" if Path(path).is_dir() else "leads to no .bin and .idx"
            raise ValueError(
                f"data.paths[{i}]={given!r}: {fault}, seen from {Path.cwd()}; name a prefix, its .bin, or a glob "
                "such as folder/*.bin"
            )
        prefixes |= named
    return list(prefixes)


def _matches(path: str) -> list[str]:
    """The path itself, or what a glob finds: files, or prefixes."""
    if not glob.has_magic(path) or _exists(_prefix(path)):
        return [path]
    return sorted({name for end in ("", ".bin", ".idx") for name in glob.glob(path + end, recursive=True)})  # noqa: PTH207


def _prefix(name: str) -> str:
    return name.removesuffix(".bin").removesuffix(".idx")


def _exists(prefix: str) -> bool:
    """Whether either file is there: a lone one is an error of its own, not a path that leads nowhere."""
    return any(path.is_file() for path in index.files(prefix))


def _agree(prefix: str, tokenizer: Tokenizer, given: str) -> None:
    """ValueError: `launch data build` wrote the dataset with another tokenizer, as its sidecar says."""
    path = Path(f"{prefix}.json")
    if not path.is_file():
        return
    try:
        name = json.loads(path.read_text())["tokenizer"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: cannot be read as what launch data build writes ({error}); remove it") from error
    if name != tokenizer.name:
        raise ValueError(
            f"data.tokenizer={given}: is {tokenizer.name}, and {prefix} was written by {name}; "
            "name that one, with its data.end, or build again"
        )


def _digest(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).digest()


def _documents(
    sets: Sequence[Indexed], hashes: Sequence[bytes]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.uint64]]:
    """Start, length and a draw of 64 bits for every document that holds a token, over all datasets."""
    starts, lengths, draws, base = [], [], [], 0
    for one, digest in zip(sets, hashes, strict=True):
        begin, length = one.documents()
        held = np.flatnonzero(length)
        starts.append(begin[held] + base)
        lengths.append(length[held])
        draws.append(hashed(held, int.from_bytes(digest[:8], "little")))
        base += len(one.tokens)
    return np.concatenate(starts), np.concatenate(lengths), np.concatenate(draws)


def _ends(maps: Maps, last: NDArray[np.int64], end: int) -> str:
    """Whether documents close with the end token, seen on a thousand of them."""
    looked = last[np.unique(np.linspace(0, len(last) - 1, 1000, dtype=np.int64))]
    closed = int(np.count_nonzero(maps[looked] == end))
    if closed == len(looked):
        return f"documents close with the end token {end}"
    return (
        f"{len(looked) - closed:,} of {len(looked):,} documents looked at do not close with the end token {end}: their "
        "last token predicts nothing, so the model never learns to end them"
    )
