"""Several sources in one stream: how much of each is exact at every moment, and which row comes when is drawn."""

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from math import ceil, floor, inf, sqrt
from threading import Lock
from typing import Annotated, final

import numpy as np
from numpy.typing import NDArray

from farspan.kernels.random import key
from farspan.platform.data.corpus import Corpus
from farspan.platform.data.draws import permutation
from farspan.platform.data.objective import Sentinels
from farspan.platform.data.row import Row, Rows
from farspan.platform.data.synthetic import Synthetic
from farspan.platform.data.text import Text
from farspan.platform.data.tokenizer import open_tokenizer
from farspan.platform.data.tokens import Tokens


@dataclass(frozen=True, kw_only=True)
class Source:
    """Data, and how much of it."""

    weight: float = 1.0
    """Share of the rows, relative to the other sources; with a schedule, the share at the first row."""
    data: Annotated[Text | Tokens | Synthetic, "choice"]
    """Where its rows come from."""

    def __post_init__(self) -> None:
        if not 0 <= self.weight < inf:
            raise ValueError(f"weight={self.weight}: must not be negative")


@dataclass(frozen=True, kw_only=True)
class Point:
    """The weights that are reached when so many rows have been read."""

    at: int
    """Rows: steps times train.batch."""
    weights: tuple[float, ...]
    """One for each source, in their order."""


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """Rows of several sources; within a row nothing is mixed."""

    sources: tuple[Source, ...]
    """What is mixed: all with one tokenizer and one sequence_length."""
    schedule: tuple[Point, ...] | None = None
    """Weights go straight from the sources' own, at the first row, to those of each point, and stay at the last.

    null: they never change.
    """

    def __post_init__(self) -> None:
        if not self.sources:
            raise ValueError("sources=[]: needs at least one, as {weight: 0.7, data: {kind: text, …}}")
        self._check_weights()
        first = self.sources[0].data
        for i, source in enumerate(self.sources):
            if source.data.causal != first.causal:
                raise ValueError(
                    f"sources.{i}.data.objective: masked goes with no other kind, whose mixers are causal; give all "
                    "sources that objective, or none"
                )
            for name in ("sequence_length", "tokenizer", "end"):  # symbols have no name for their end
                given, wanted = getattr(source.data, name, None), getattr(first, name, None)
                if given != wanted:
                    raise ValueError(
                        f"sources.{i}.data.{name}={given!r}: sources.0.data.{name} is {wanted!r}; "
                        "all sources of a mixture must have the same"
                    )

    def _check_weights(self) -> None:
        if not any(source.weight for source in self.sources):
            raise ValueError("sources: every weight is 0; give at least one that is positive")
        before = 0
        for i, point in enumerate(self.schedule or ()):
            if point.at <= before:
                raise ValueError(
                    f"schedule.{i}.at={point.at}: must be more than {before}; the sources' own weights stand at row 0, "
                    "and points follow in order"
                )
            if len(point.weights) != len(self.sources):
                raise ValueError(
                    f"schedule.{i}.weights={list(point.weights)}: there are {len(self.sources)} sources; "
                    "give each a weight, 0 for none"
                )
            if not all(0 <= weight < inf for weight in point.weights) or not any(point.weights):
                raise ValueError(
                    f"schedule.{i}.weights={list(point.weights)}: must not be negative, and at least one positive"
                )
            before = point.at

    @property
    def sequence_length(self) -> int:
        """Tokens a row, the same in every source."""
        return self.sources[0].data.sequence_length

    @property
    def tokenizer(self) -> str:
        return self.sources[0].data.tokenizer

    @property
    def held_out(self) -> float:
        """The largest share that a source keeps for evaluation."""
        return max(source.data.held_out for source in self.sources)

    @property
    def sentinels(self) -> tuple[str, ...]:
        """Names of the tokens that the objectives of any source mark with."""
        return tuple(dict.fromkeys(name for source in self.sources for name in source.data.sentinels))

    @property
    def both_ways(self) -> bool:
        """Whether tokens of a prefix see each other both ways in any source."""
        return any(source.data.both_ways for source in self.sources)

    @property
    def causal(self) -> bool:
        """Whether tokens are told from those before them, in every source."""
        return self.sources[0].data.causal

    @property
    def vocabulary(self) -> int:
        """Tokens of the tokenizer and of all objectives together."""
        first = self.sources[0].data
        if isinstance(first, Synthetic):
            return first.vocabulary
        return Sentinels.of(open_tokenizer(first.tokenizer, first.end), self.sentinels).vocabulary

    def find(self) -> None:
        """Looks for every source's files. ValueError: the first that leads nowhere."""
        for i, source in enumerate(self.sources):
            try:
                source.data.find()
            except ValueError as error:
                raise ValueError(f"data.sources.{i}: {error}") from error

    def build(self, seed: int) -> Corpus:
        """Every source, each under a seed of its own. ValueError: what a source refuses, or sources that do not fit."""
        built = [source.data.build(key(seed, "source", i), self.sentinels) for i, source in enumerate(self.sources)]
        weights = Weights([(0, [source.weight for source in self.sources]), *self._points()])
        for i, corpus in enumerate(built):
            one, other = corpus.tokenizer, built[0].tokenizer
            if (one.name, one.end) != (other.name, other.end):
                raise ValueError(
                    f"data.sources.{i}: its tokenizer is {one.name} and that of data.sources.0 is {other.name}; "
                    "all sources of a mixture must have the same"
                )
            if not len(corpus.train) and weights.ever(i):
                raise ValueError(f"data.sources.{i}: no row to train on; add documents, or set its weights to 0")
        identity = hashlib.blake2b(f"{weights.points}".encode(), digest_size=16)
        identity.update("\n".join(corpus.fingerprint for corpus in built).encode())
        return Corpus(
            MixedRows([corpus.train for corpus in built], weights, seed),
            InterleavedRows([corpus.held_out for corpus in built], weights.last),
            built[0].tokenizer,
            identity.hexdigest(),
            tuple(f"source {i}: {note}" for i, corpus in enumerate(built) for note in corpus.notes),
        )

    def _points(self) -> list[tuple[int, Sequence[float]]]:
        return [(point.at, point.weights) for point in self.schedule or ()]


@final
class Weights:
    """The share of each source as a function of the rows read, and its integral, exactly."""

    def __init__(self, points: Sequence[tuple[int, Sequence[float]]]) -> None:
        self.points = [(at, _shares(weights)) for at, weights in points]
        """(rows, shares that sum to 1); the first at 0 rows."""
        self.last = self.points[-1][1]
        self._sums = [[Fraction(0)] * len(self.last)]
        for (at, old), (then, new) in zip(self.points, self.points[1:], strict=False):
            areas = [(a + b) * (then - at) / 2 for a, b in zip(old, new, strict=True)]
            self._sums.append([total + area for total, area in zip(self._sums[-1], areas, strict=True)])

    def ever(self, source: int) -> bool:
        """Whether this source has a positive share anywhere."""
        return any(shares[source] for _, shares in self.points)

    def at(self, rows: int) -> list[Fraction]:
        """The shares when so many rows have been read."""
        segment, after = self._segment(rows)
        return [share + slope * after for share, slope in self._lines(segment)]

    def reached(self, rows: int) -> list[Fraction]:
        """How many of the first `rows` rows each source should have had: the integrals of the shares."""
        segment, after = self._segment(rows)
        lines = zip(self._sums[segment], self._lines(segment), strict=True)
        return [total + share * after + slope * after * after / 2 for total, (share, slope) in lines]

    def due(self, source: int, target: int, rows: int) -> float | Fraction:
        """After how many rows the integral of `source`, now less at `rows`, comes to `target`; inf for never."""
        for segment in range(self._segment(rows)[0], len(self.points)):
            share, slope = self._lines(segment)[source]
            missing = target - self._sums[segment][source]
            if segment + 1 < len(self.points) and self._sums[segment + 1][source] < target:
                continue
            start = self.points[segment][0]
            if not slope:
                return start + missing / share if share else inf
            root = sqrt(max(Fraction(0), share * share + 2 * slope * missing))
            return start + 2 * float(missing) / (float(share) + root)
        return inf

    def _segment(self, rows: int) -> tuple[int, int]:
        """Which point was passed last, and how many rows ago."""
        segment = bisect_right(self.points, rows, key=lambda point: point[0]) - 1
        return segment, rows - self.points[segment][0]

    def _lines(self, segment: int) -> list[tuple[Fraction, Fraction]]:
        """Share and slope of each source from this point on."""
        at, old = self.points[segment]
        if segment + 1 == len(self.points):
            return [(share, Fraction(0)) for share in old]
        then, new = self.points[segment + 1]
        return [(a, (b - a) / (then - at)) for a, b in zip(old, new, strict=True)]


@final
class Quotas:
    """How many rows of each source lie before each block of rows.

    Blocks are 256 rows, and from row 65,536 on a 256th of the power of two below, at most 262,144. At every bound a
    source has had its integral rounded down or up. Those rounded up are the ones whose next row is due first: then no
    quota is ever negative, since a schedule that meets all deadlines exists and earliest deadline first finds one (the
    chairman assignment problem; Tijdeman, 1980).
    """

    def __init__(self, weights: Weights) -> None:
        self._weights, self._lock = weights, Lock()
        self.starts = [0]
        self.counts = [[0] * len(weights.last)]

    def block(self, number: int) -> int:
        """The block that holds row `number`; what lies before it is kept from then on."""
        with self._lock:
            while self.starts[-1] <= number:
                self._extend()
        return bisect_right(self.starts, number) - 1

    def _extend(self) -> None:
        start = self.starts[-1]
        end = start + (1 << min(max(start.bit_length() - 9, 8), 18))
        reached = self._weights.reached(end)
        counts = [max(before, floor(wanted)) for before, wanted in zip(self.counts[-1], reached, strict=True)]
        missing = end - sum(counts)
        assert missing >= 0, "earliest deadline first keeps every quota"
        early = [i for i, wanted in enumerate(reached) if counts[i] < ceil(wanted)]
        early.sort(key=lambda i: self._weights.due(i, counts[i] + 1, end))
        for i in early[:missing]:
            counts[i] += 1
        self.counts.append(counts)
        self.starts.append(end)


@final
class MixedRows:
    """Rows of several sources: row n is the next row of the source that n is drawn for.

    Inside a block the sources' rows stand in a random order of the seed. An epoch counts the rows of all sources once,
    whatever their weights.
    """

    def __init__(self, sources: Sequence[Rows], weights: Weights, seed: int) -> None:
        self.sequence_length = sources[0].sequence_length
        self.sources, self.weights = tuple(sources), weights
        self._quotas, self._seed = Quotas(weights), key(seed, "mixture")
        self._drawn = lru_cache(maxsize=4)(self._draw)

    def __len__(self) -> int:
        """Rows of all sources together."""
        return sum(len(rows) for rows in self.sources)

    def documents(self) -> NDArray[np.int64]:
        """Tokens of every document of every source."""
        return np.concatenate([rows.documents() for rows in self.sources])

    def row(self, number: int) -> Row:
        """The row of this number."""
        source, own = self.place(number)
        return self.sources[source].row(own)

    def place(self, number: int) -> tuple[int, int]:
        """The source of row `number`, and which of that source's rows it is."""
        block = self._quotas.block(number)
        sources, own = self._drawn(block)
        at = number - self._quotas.starts[block]
        return int(sources[at]), int(own[at])

    def counts(self, rows: int) -> list[int]:
        """How many of the first `rows` rows are of each source."""
        block = self._quotas.block(rows)
        part = self._drawn(block)[0][: rows - self._quotas.starts[block]]
        inside = np.bincount(part, minlength=len(self.sources))
        return [before + int(more) for before, more in zip(self._quotas.counts[block], inside, strict=True)]

    def _draw(self, block: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The source of each row of a block, and its number among that source's rows."""
        first = np.array(self._quotas.counts[block])
        quotas = np.array(self._quotas.counts[block + 1]) - first
        order = permutation(int(quotas.sum()), self._seed, block)
        sources = np.repeat(np.arange(len(quotas)), quotas)[order]
        own = np.empty(len(order), np.int64)
        for source in range(len(quotas)):
            here = sources == source
            own[here] = first[source] + np.arange(quotas[source])
        return sources, own


@final
class InterleavedRows:
    """The rows of several sources, each once an epoch, in the proportion of their weights while they last."""

    def __init__(self, sources: Sequence[Rows], weights: Sequence[Fraction]) -> None:
        self.sequence_length = sources[0].sequence_length
        self._sources = sources
        sizes = [len(rows) for rows in sources]
        self._which = np.repeat(np.arange(len(sizes)), sizes)
        self._own = np.concatenate([np.arange(size) for size in sizes])
        # Row k of a source of weight w is due after (k + ½) / w rows; sources that have faded out come last.
        pace = np.repeat([float(weight) or 1e-12 for weight in weights], sizes)
        self._order = np.argsort((self._own + 0.5) / pace, kind="stable")

    def __len__(self) -> int:
        return len(self._order)

    def documents(self) -> NDArray[np.int64]:
        """Tokens of every document of every source."""
        return np.concatenate([rows.documents() for rows in self._sources])

    def row(self, number: int) -> Row:
        """The row of this number."""
        epoch, place = divmod(number, len(self))
        at = self._order[place]
        source = self._sources[self._which[at]]
        return source.row(int(self._own[at]) + epoch * len(source))


def _shares(weights: Sequence[float]) -> list[Fraction]:
    """Weights as fractions of their sum; 0.1 is a tenth, not its nearest binary number."""
    exact = [Fraction(str(weight)) for weight in weights]
    return [weight / sum(exact) for weight in exact]
