"""Documents laid end to end and cut into rows: any row is found by its number alone."""

from dataclasses import dataclass
from functools import lru_cache, partial
from typing import final

import numpy as np
from numpy.typing import NDArray

from farspan.parallel.context.shard import IGNORE
from farspan.platform.data.draws import permutation
from farspan.platform.data.row import Row, Tokens, placed


@dataclass(frozen=True, kw_only=True)
class Packed:
    """Rows are full: documents are cut where a row ends, and go on in another."""

    def build(
        self,
        tokens: Tokens,
        starts: NDArray[np.int64],
        lengths: NDArray[np.int64],
        *,
        sequence_length: int,
        end: int,
        seed: int | None,
    ) -> "PackedRows":
        return PackedRows(tokens, starts, lengths, sequence_length=sequence_length, end=end, seed=seed)


@final
class PackedRows:
    """Rows of `sequence_length` tokens cut from a stream of documents.

    The stream holds whole documents in the order of `starts`; row i is its positions [i·S, (i+1)·S), and the last row
    is filled up with a document of `end` tokens. Row numbers count on for ever: number n is row π(n mod len) of epoch
    n // len, where π is a permutation of its own for every seed and epoch, or the identity where `seed` is None. A
    document never sees another: its last token predicts nothing, whatever it is; labels go on across a row's end.
    """

    def __init__(
        self,
        tokens: Tokens,
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
        starts, lengths = starts[lengths > 0], lengths[lengths > 0]
        self._bounds = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])
        self._shift = starts - self._bounds[:-1]  # position in the stream → position in the file
        self._order = None if seed is None else lru_cache(maxsize=2)(partial(permutation, len(self), seed))

    def __len__(self) -> int:
        """Rows of one epoch."""
        return -(-int(self._bounds[-1]) // self.sequence_length)

    def place(self, number: int) -> int:
        """Where in the stream the row of this number lies, in rows."""
        return placed(number, len(self), self._order)

    def documents(self) -> NDArray[np.int64]:
        """Tokens of every document."""
        return np.diff(self._bounds)

    def row(self, number: int) -> Row:
        """The row of this number, always S tokens. ValueError: there are no rows."""
        begin = self.place(number) * self.sequence_length
        stop = min(begin + self.sequence_length, int(self._bounds[-1]))
        first = int(np.searchsorted(self._bounds, begin, side="right")) - 1
        last = int(np.searchsorted(self._bounds, stop, side="left"))
        cuts = np.clip(self._bounds[first : last + 1], begin, stop) - begin
        lengths = np.diff(cuts)
        source = np.arange(begin, stop) + np.repeat(self._shift[first:last], lengths)
        filled = stop - begin
        tokens = np.full(self.sequence_length, self._end, np.int64)
        labels = np.full(self.sequence_length, IGNORE, np.int64)
        tokens[:filled] = self._tokens[source]
        labels[: filled - 1] = tokens[1:filled]
        labels[cuts[1:] - 1] = IGNORE
        if self._bounds[last] > begin + filled:  # the document goes on in the next row
            labels[filled - 1] = self._tokens[source[-1:] + 1][0]
        padding = self.sequence_length - filled
        return Row(
            tokens=tokens,
            labels=labels,
            lengths=(*lengths.tolist(), padding) if padding else tuple(lengths.tolist()),
            padding=padding,
        )
