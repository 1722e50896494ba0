"""Documents that are not packed: each is a row of its own, and rows of like length come together."""

from dataclasses import dataclass
from functools import lru_cache, partial
from typing import final

import numpy as np
from numpy.typing import NDArray

from farspan.kernels.random import key
from farspan.parallel.context.shard import IGNORE
from farspan.platform.data.draws import permutation
from farspan.platform.data.pack import Packed
from farspan.platform.data.row import MULTIPLE, Row, Tokens, placed


@dataclass(frozen=True, kw_only=True)
class Documents:
    """A document is a row, filled up only to the longest of its micro-batch."""

    bucket: int = 256
    """So many rows that follow each other are of similar length; 1: any length beside any other."""

    def __post_init__(self) -> None:
        if self.bucket < 1:
            raise ValueError(f"bucket={self.bucket}: must be at least 1; a few times train.batch is usual")

    def build(
        self,
        tokens: Tokens,
        starts: NDArray[np.int64],
        lengths: NDArray[np.int64],
        *,
        sequence_length: int,
        end: int,
        seed: int | None,
    ) -> "DocumentRows":
        return DocumentRows(
            tokens, starts, lengths, sequence_length=sequence_length, end=end, seed=seed, bucket=self.bucket
        )


Packing = Packed | Documents


@final
class DocumentRows:
    """Rows of one document each; one longer than S is cut into pieces of at most S tokens, each a row.

    A row is filled up to a multiple of 64 (S at most). With a seed, the pieces of an epoch are sorted by length, with
    ties in random order, and cut into groups of `bucket`; groups come in random order, and so do the rows in a group.
    The group that is left over when `bucket` does not divide their number lies anywhere among the lengths, and comes
    last. Without a seed, documents keep their order.
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
        bucket: int,
    ) -> None:
        self.sequence_length = sequence_length
        self._tokens, self._end, self._documents = tokens, end, lengths
        pieces = -(-lengths // sequence_length)
        which = np.repeat(np.arange(len(lengths)), pieces)
        offset = (np.arange(len(which)) - np.repeat(np.cumsum(pieces) - pieces, pieces)) * sequence_length
        self._starts = starts[which] + offset
        self._rest = lengths[which] - offset  # tokens from here to the document's end
        self._order = None if seed is None else lru_cache(maxsize=2)(partial(self._bucketed, seed, bucket))

    def __len__(self) -> int:
        """Rows of one epoch."""
        return len(self._starts)

    def documents(self) -> NDArray[np.int64]:
        """Tokens of every document."""
        return self._documents

    def row(self, number: int) -> Row:
        """The row of this number. ValueError: there are no rows."""
        piece = placed(number, len(self), self._order)
        rest = int(self._rest[piece])
        filled = min(rest, self.sequence_length)
        read = self._tokens[int(self._starts[piece]) + np.arange(min(rest, filled + 1))]
        length = min(-(-filled // MULTIPLE) * MULTIPLE, self.sequence_length)
        tokens = np.full(length, self._end, np.int64)
        labels = np.full(length, IGNORE, np.int64)
        tokens[:filled] = read[:filled]
        labels[: len(read) - 1] = read[1:]
        padding = length - filled
        return Row(tokens=tokens, labels=labels, lengths=(filled, padding) if padding else (filled,), padding=padding)

    def _bucketed(self, seed: int, bucket: int, epoch: int) -> NDArray[np.int64]:
        """The pieces in the order of this epoch."""
        count = len(self)
        ties = permutation(count, seed, epoch)
        lengths = np.minimum(self._rest, self.sequence_length)
        by_length = ties[np.argsort(lengths[ties], kind="stable")]
        full, left = divmod(count, bucket)
        place = key(seed, "left over", epoch) % (full + 1) * bucket  # where the group that is not full begins
        whole = np.concatenate([by_length[:place], by_length[place + left :]]).reshape(full, bucket)
        groups = whole[permutation(full, key(seed, "groups"), epoch)].ravel()
        order = np.concatenate([groups, by_length[place : place + left]])
        inside = permutation(count, key(seed, "inside"), epoch)
        # Sorting by group, with ties in random order, shuffles every group at once.
        return order[inside[np.argsort(inside // bucket, kind="stable")]]
