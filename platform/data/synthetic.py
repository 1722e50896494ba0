"""Tasks made up row by row: what a model of long sequences must do, with nothing to download or store."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
from numpy.typing import NDArray

from farspan.parallel.context.shard import IGNORE
from farspan.platform.data.corpus import Corpus
from farspan.platform.data.draws import Draws
from farspan.platform.data.row import Row


@final
class Symbols:
    """A tokenizer of named symbols, written with spaces between them."""

    def __init__(self, name: str, symbols: Sequence[str]) -> None:
        self.name = name
        self._symbols = (*symbols, "<end>")
        self._ids = {symbol: i for i, symbol in enumerate(self._symbols)}
        self.vocabulary = len(self._symbols)
        self.end = self.vocabulary - 1

    def encode(self, text: str) -> NDArray[np.uint32]:
        """The ids of the symbols in `text`. ValueError: a word that is no symbol."""
        for word in text.split():
            if word not in self._ids:
                known = f"{self._symbols[0]} … {self._symbols[-2]}"
                raise ValueError(
                    f"{word!r}: no symbol of {self.name}; write symbols such as {known} with spaces between"
                )
        return np.array([self._ids[word] for word in text.split()], np.uint32)

    def decode(self, ids: Sequence[int] | NDArray[np.integer]) -> str:
        """The symbols of `ids`; end tokens vanish."""
        return "".join(f" {self._symbols[int(token)]}" for token in ids if token != self.end)

    def token(self, name: str) -> int | None:
        """The id of the symbol of this name, None where there is none."""
        return self._ids.get(name)


@dataclass(frozen=True, kw_only=True)
class Copy:
    """Random symbols, a separator, and the same symbols again; only these are predicted."""

    symbols: int = 64
    """How many different ones there are."""

    def __post_init__(self) -> None:
        if self.symbols < 2:
            raise ValueError(f"symbols={self.symbols}: must be at least 2; try 64")

    def problem(self, sequence_length: int) -> str | None:
        return None if sequence_length >= 3 else f"sequence_length={sequence_length}: a copy needs at least 3 tokens"

    def tokenizer(self) -> Symbols:
        return Symbols(f"copy {self.symbols}", [*(f"s{i}" for i in range(self.symbols)), "<copy>"])

    def document(self, sequence_length: int, number: int, draws: Draws) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Tokens and labels: as many symbols as fit twice."""
        size = (sequence_length - 1) // 2
        said = draws.integers(self.symbols, size)
        tokens = np.concatenate([said, [self.symbols], said])
        labels = np.append(tokens[1:], IGNORE)
        labels[:size] = IGNORE
        return tokens, labels


@dataclass(frozen=True, kw_only=True)
class Needle:
    """Keys with values, hidden among filler, and questions for some of them at the end; only answers are predicted.

    A pair is two symbols, a key and its value; a question is three: <ask>, a key, the value to tell. Each row has its
    pairs in equal parts of the filler, one at a random place in each, and over the rows every part is asked for equally
    often: needles lie at all depths. (The form of many needle tests; multi-query associative recall is its short
    relative: Arora et al., 2023, arXiv 2312.04927.)
    """

    pairs: int = 8
    """Keys with values in a row."""
    questions: int = 4
    """How many of the pairs are asked for."""
    keys: int = 64
    """Different keys; no row has one twice."""
    values: int = 64
    """Different values; a row may have one twice."""
    filler: int = 64
    """Different symbols of filler."""

    def __post_init__(self) -> None:
        for name in ("pairs", "questions", "keys", "values", "filler"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        if self.pairs > self.keys:
            raise ValueError(f"pairs={self.pairs}: a row's keys differ, and there are keys={self.keys}; lower pairs")
        if self.questions > self.pairs:
            raise ValueError(f"questions={self.questions}: only pairs={self.pairs} can be asked for; lower questions")

    def problem(self, sequence_length: int) -> str | None:
        least = 2 * self.pairs + 3 * self.questions
        if sequence_length >= least:
            return None
        return f"sequence_length={sequence_length}: pairs and questions take {least} tokens; raise it or ask for fewer"

    def tokenizer(self) -> Symbols:
        kinds = (("k", self.keys), ("v", self.values), ("f", self.filler))
        name = f"needle {self.keys} {self.values} {self.filler}"
        return Symbols(name, [*(f"{kind}{i}" for kind, count in kinds for i in range(count)), "<ask>"])

    def document(self, sequence_length: int, number: int, draws: Draws) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Tokens and labels, S each."""
        keys = draws.order(self.keys)[: self.pairs]
        values = self.keys + draws.integers(self.values, self.pairs)
        asked = (number * self.questions + draws.order(self.questions)) % self.pairs
        haystack = sequence_length - 3 * self.questions
        tokens = self.keys + self.values + draws.integers(self.filler, sequence_length)
        bounds = np.arange(self.pairs + 1) * haystack // self.pairs
        free = np.diff(bounds) - 2  # filler beside each pair: the pair may begin after any of it
        places = bounds[:-1] + np.array([draws.below(int(room) + 1) for room in free])
        tokens[places], tokens[places + 1] = keys, values
        questions = tokens[haystack:].reshape(-1, 3)
        questions[:, 0] = self.keys + self.values + self.filler
        questions[:, 1], questions[:, 2] = keys[asked], values[asked]
        labels = np.full(sequence_length, IGNORE, np.int64)
        labels[haystack + 1 :: 3] = values[asked]
        return tokens, labels


Task = Copy | Needle


@dataclass(frozen=True, kw_only=True)
class Synthetic:
    """Rows that are computed from their number: the same task, seed and number give the same row everywhere."""

    task: Task
    """What a row asks."""
    sequence_length: int
    """Tokens a row."""
    rows: int = 1 << 30
    """Different training rows; after these they come again."""
    held_out_rows: int = 256
    """Different rows kept for evaluation."""

    def __post_init__(self) -> None:
        for name in ("sequence_length", "rows", "held_out_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        if problem := self.task.problem(self.sequence_length):
            raise ValueError(problem)

    @property
    def held_out(self) -> float:
        """Share of the rows kept for evaluation."""
        return self.held_out_rows / (self.rows + self.held_out_rows)

    @property
    def tokenizer(self) -> str:
        """Name of the tokenizer."""
        return self.task.tokenizer().name

    @property
    def vocabulary(self) -> int:
        """Symbols of the task."""
        return self.task.tokenizer().vocabulary

    @property
    def sentinels(self) -> tuple[str, ...]:
        return ()

    @property
    def both_ways(self) -> bool:
        return False

    @property
    def causal(self) -> bool:
        return True

    def find(self) -> None:
        """There is nothing to look for."""

    def build(self, seed: int, sentinels: Sequence[str] | None = None) -> Corpus:
        """Nothing is read: rows are computed when they are asked for."""
        tokenizer = self.task.tokenizer()
        train = SyntheticRows(self.task, self.sequence_length, self.rows, tokenizer.end, seed, "train")
        held_out = SyntheticRows(self.task, self.sequence_length, self.held_out_rows, tokenizer.end, seed, "held out")
        identity = hashlib.blake2b(f"{self.task} {self.rows}".encode(), digest_size=16).hexdigest()
        notes = (f"{self.rows:,} training rows and {self.held_out_rows:,} held-out rows of {tokenizer.name}, computed",)
        return Corpus(train, held_out, tokenizer, identity, notes)


@final
class SyntheticRows:
    """Rows of one task."""

    def __init__(self, task: Task, sequence_length: int, rows: int, end: int, seed: int, side: str) -> None:
        self.sequence_length = sequence_length
        self._task, self._rows, self._end, self._seed, self._side = task, rows, end, seed, side

    def __len__(self) -> int:
        return self._rows

    def documents(self) -> NDArray[np.int64]:
        """None: rows are computed."""
        return np.empty(0, np.int64)

    def row(self, number: int) -> Row:
        """The row of this number: one document, filled up where the task leaves a token over."""
        number %= self._rows
        draws = Draws(self._seed, "synthetic", self._side, number)
        tokens, labels = self._task.document(self.sequence_length, number, draws)
        padding = self.sequence_length - len(tokens)
        return Row(
            tokens=np.append(tokens, np.full(padding, self._end, np.int64)),
            labels=np.append(labels, np.full(padding, IGNORE, np.int64)),
            lengths=(len(tokens), padding) if padding else (len(tokens),),
            padding=padding,
        )
