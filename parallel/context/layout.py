"""Which rank holds which tokens of a batch: the same answer on every host, from document lengths alone.

zigzag cuts a document into 2n chunks and gives rank r chunks r and 2n-1-r, so that causal attention weighs the same on
every rank. documents leaves short ones whole and cuts long ones so, over no more ranks than their length asks for.
contiguous keeps the order of the tokens: for windows, recurrent layers and exchanges of heads.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate, groupby
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Kind = Literal["contiguous", "zigzag", "documents"]
KINDS: tuple[Kind, ...] = ("contiguous", "zigzag", "documents")

SPREAD = 4
"""A document is cut over ranks until its part is below 1/SPREAD of what a rank holds."""


class Span(NamedTuple):
    """Tokens `start` to `start + length` of a document."""

    document: int
    start: int
    length: int


class Piece(NamedTuple):
    """A span, and its place among the tokens of a buffer."""

    document: int
    start: int
    length: int
    at: int

    @property
    def stop(self) -> int:
        return self.start + self.length

    @property
    def end(self) -> int:
        return self.at + self.length


def placed(spans: Iterable[Span]) -> tuple[Piece, ...]:
    """The spans laid end to end in the order of documents, those that continue each other joined."""
    joined: list[Span] = []
    for span in sorted(spans):
        last = joined[-1] if joined else None
        if last is not None and last.document == span.document and last.start + last.length == span.start:
            joined[-1] = last._replace(length=last.length + span.length)
        elif span.length:
            joined.append(span)
    places = accumulate((span.length for span in joined), initial=0)
    return tuple(Piece(*span, at) for span, at in zip(joined, places, strict=False))


def length_of(pieces: Sequence[Piece]) -> int:
    """How many tokens placed pieces are."""
    return pieces[-1].end if pieces else 0


@dataclass(frozen=True)
class Layout:
    """Where the tokens of documents of these lengths are: every token on one rank, in the order of documents there."""

    lengths: tuple[int, ...]
    pieces: tuple[tuple[Piece, ...], ...]
    """What each rank holds, in the order in which it does."""
    tokens: int
    """T: tokens that every rank has room for; what its pieces leave is padding, which sees and is seen by nothing."""

    @property
    def ranks(self) -> int:
        return len(self.pieces)

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash((self.lengths, self.pieces, self.tokens))

    def held(self, rank: int) -> int:
        """How many tokens a rank holds, padding not counted."""
        return length_of(self.pieces[rank])

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """The place of each document's first token among all tokens laid end to end."""
        return tuple(accumulate(self.lengths, initial=0))[:-1]

    def places(self, rank: int) -> Tensor:
        """int64 [held]: the places of a rank's tokens among all tokens laid end to end."""
        spans = [torch.arange(p.start, p.stop) + self.starts[p.document] for p in self.pieces[rank]]
        return torch.cat(spans) if spans else torch.empty(0, dtype=torch.int64)

    def joined(self, inner: int) -> "Layout":
        """The layout of groups of `inner` consecutive ranks, each seen as one."""
        return _joined(self, inner)


@lru_cache(maxsize=64)
def _joined(layout: Layout, inner: int) -> Layout:
    groups = [layout.pieces[i : i + inner] for i in range(0, layout.ranks, inner)]
    pieces = tuple(placed(Span(*piece[:3]) for rank in group for piece in rank) for group in groups)
    return Layout(layout.lengths, pieces, layout.tokens * inner)


@lru_cache(maxsize=256)
def layout(kind: Kind, lengths: tuple[int, ...], ranks: int, inner: int = 1, multiple: int = 1) -> Layout:
    """Deals documents out to `ranks` ranks; T is a multiple of `multiple`.

    inner: groups of so many consecutive ranks are dealt to as one, and what a group gets is cut contiguously.
    Errors: ValueError for sizes that do not fit.
    """
    if ranks < 1 or inner < 1 or ranks % inner:
        raise ValueError(f"context layout: inner={inner} must divide ranks={ranks}; choose a divisor")
    outer = ranks // inner
    if kind == "contiguous":
        dealt = _cut_evenly(_whole(lengths), outer)
    elif kind == "zigzag":
        dealt = [
            [span for document, length in enumerate(lengths) for span in _zigzag(document, length, rank, outer)]
            for rank in range(outer)
        ]
    else:
        dealt = _documents(lengths, outer)
    parts = [part for spans in dealt for part in _cut_evenly([Span(*p[:3]) for p in placed(spans)], inner)]
    pieces = tuple(placed(spans) for spans in parts)
    held = max(sum(piece.length for piece in rank) for rank in pieces)
    tokens = max(held, -(-sum(lengths) // ranks))
    return Layout(lengths, pieces, max(multiple, tokens + -tokens % multiple))


def _whole(lengths: Sequence[int]) -> list[Span]:
    return [Span(document, 0, length) for document, length in enumerate(lengths)]


def _zigzag(document: int, length: int, rank: int, ranks: int) -> list[Span]:
    bounds = [i * length // (2 * ranks) for i in range(2 * ranks + 1)]
    chunks = (rank, 2 * ranks - 1 - rank)
    return [Span(document, bounds[c], bounds[c + 1] - bounds[c]) for c in chunks if bounds[c + 1] > bounds[c]]


def _cut_evenly(spans: Sequence[Span], parts: int) -> list[list[Span]]:
    """The spans in their order, in `parts` parts of as many tokens each, the last ones perhaps fewer."""
    size = max(1, -(-sum(span.length for span in spans) // parts))
    out: list[list[Span]] = [[] for _ in range(parts)]
    at = 0
    for document, start, length in spans:
        for begin in [0, *range(size - at % size, length, size)]:
            stop = min(length, begin + size - (at + begin) % size)
            out[(at + begin) // size].append(Span(document, start + begin, stop - begin))
        at += length
    return out


def _documents(lengths: Sequence[int], ranks: int) -> list[list[Span]]:
    """Long documents in zigzag over a power of two of ranks, short ones whole to whoever has least to compute.

    Every rank gets as many tokens, give or take the remainder: what fits nowhere whole is cut where room is left.
    """
    room = [-(-sum(lengths) // ranks)] * ranks
    capacity = room[0]
    area = [0.0] * ranks
    dealt: list[list[Span]] = [[] for _ in range(ranks)]

    def give(rank: int, span: Span) -> None:
        dealt[rank].append(span)
        room[rank] -= span.length
        area[rank] += span.length * (span.start + span.length / 2)

    left: list[Span] = []
    for length, document in sorted(((n, d) for d, n in enumerate(lengths)), key=lambda x: (-x[0], x[1])):
        wanted = 1
        while wanted < ranks and length * SPREAD > capacity * wanted:
            wanted *= 2
        wanted = min(wanted, ranks)
        chosen = sorted(sorted(range(ranks), key=lambda r: (area[r], -room[r], r))[:wanted])
        parts = [_zigzag(document, length, i, wanted) for i in range(wanted)]
        if any(sum(s.length for s in part) > room[rank] for rank, part in zip(chosen, parts, strict=True)):
            chosen = [r for r in range(ranks) if room[r] >= max(sum(s.length for s in part) for part in parts)]
            chosen = sorted(sorted(chosen, key=lambda r: (area[r], r))[:wanted])
        if len(chosen) < wanted:
            left.append(Span(document, 0, length))
            continue
        for rank, part in zip(chosen, parts, strict=True):
            for span in part:
                give(rank, span)
    for document, start, length in left:
        while length:
            rank = max(range(ranks), key=lambda r: (room[r], -area[r], -r))
            size = min(length, room[rank])
            give(rank, Span(document, start, size))
            start, length = start + size, length - size
    return dealt


Table = tuple[int, ...]


def encode(kind: Kind, lengths: Sequence[int], inner: int, multiple: int) -> Table:
    """A layout as numbers, so that an operator can be given it: zeros fill it up, so that few lengths occur."""
    room = 1 << max(3, (len(lengths) - 1).bit_length())
    return (KINDS.index(kind), inner, multiple, *lengths, *(0,) * (room - len(lengths)))


def decode(table: Tensor, ranks: int) -> Layout:
    """The layout that `encode` wrote, from a tensor on the host."""
    kind, inner, multiple, *lengths = table.tolist()
    return layout(KINDS[kind], tuple(n for n in lengths if n), ranks, inner, multiple)


def runs(pieces: Iterable[Piece]) -> list[tuple[int, tuple[Piece, ...]]]:
    """The pieces by document."""
    return [(document, tuple(group)) for document, group in groupby(pieces, key=lambda piece: piece.document)]
