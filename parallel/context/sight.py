"""Who sees whom between two lists of pieces of documents: the tiles that a kernel runs.

Without a window, a causal query sees a prefix of its document, so however a document is cut, one rank's queries and
another's keys meet in few rectangles. With one they meet in bands.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from farspan.kernels.softmax_attention_tiles import Tile, Tiles
from farspan.parallel.context.layout import Layout, Piece, Span, placed, runs

Pieces = tuple[Piece, ...]


@dataclass(frozen=True)
class Sight:
    """The mask of an attention, over whole documents: a query sees keys of its own document only."""

    causal: bool
    window: int | None = None
    scale: float | None = None
    softcap: float | None = None

    def tiles(self, queries: Pieces, keys: Pieces) -> tuple[Tiles, ...]:
        """What of `keys` the `queries` see, as lists in each of which neither rows nor keys occur twice."""
        return _tiles(self, queries, keys)

    def _lists(self, queries: Pieces, keys: Pieces) -> tuple[Tiles, ...]:
        found: list[tuple[bool, Tile]] = []
        held = dict(runs(keys))
        for document, rows in runs(queries):
            if document in held:
                found += self._meet(rows, held[document])
        lists: list[tuple[bool, list[Tile]]] = []
        for causal, tile in sorted(found, key=lambda x: (x[1].row, x[1].key)):
            for kind, tiles in lists:
                if kind == causal and tile.row >= _end(tiles[-1])[0] and tile.key >= _end(tiles[-1])[1]:
                    tiles.append(tile)
                    break
            else:
                lists.append((causal, [tile]))
        window = self.window
        return tuple(Tiles(tuple(t), c, window if c else None, self.scale, self.softcap) for c, t in lists)

    def _meet(self, rows: Pieces, keys: Pieces) -> list[tuple[bool, Tile]]:
        """Tiles of one document, and whether they have an edge."""
        if not self.causal:
            return [(False, _rectangle(rows, keys))]
        if self.window is not None:
            return self._bands(rows, keys)
        if [piece[:3] for piece in rows] == [piece[:3] for piece in keys]:
            length = sum(piece.length for piece in rows)  # cut alike, pieces are causal as if they were whole
            return [(True, Tile(rows[0].at, length, keys[0].at, length, 0))]
        found: list[tuple[bool, Tile]] = []
        waiting: tuple[Pieces, Pieces] | None = None  # rows that see the same keys, all of them
        for row in rows:
            past = tuple(key for key in keys if key.stop <= row.start + 1)
            if past:
                if waiting is not None and waiting[1] == past:
                    waiting = (*waiting[0], row), past
                else:
                    found += [(False, _rectangle(*waiting))] if waiting else []
                    waiting = (row,), past
            edge = (key for key in keys if key.stop > row.start + 1 and key.start < row.stop)
            found += [(True, tile) for key in edge if (tile := _band(row, key, None))]
        return found + ([(False, _rectangle(*waiting))] if waiting else [])

    def _bands(self, rows: Pieces, keys: Pieces) -> list[tuple[bool, Tile]]:
        return [(True, tile) for row in rows for key in keys if (tile := _band(row, key, self.window))]

    def wanted(self, queries: Pieces, keys: Pieces) -> tuple[Span, ...]:
        """The parts of `keys` that some query sees, in the order of documents."""
        held = dict(runs(queries))
        spans: list[Span] = []
        for document, parts in runs(keys):
            rows = held.get(document, ())
            for key in parts:
                reaches = [self._reach(row, key) for row in rows]
                spans += [Span(document, low, high - low) for low, high in reaches if high > low]
        return tuple(Span(*piece[:3]) for piece in _united(spans))

    def _reach(self, row: Piece, key: Piece) -> tuple[int, int]:
        """First and last key, exclusive, that a piece of queries sees of a piece of keys; a superset's hull."""
        if not self.causal:
            return key.start, key.stop
        low = 0 if self.window is None else row.start - self.window + 1
        return max(low, key.start), min(row.stop, key.stop)


@lru_cache(maxsize=512)  # lists keep small tensors on the device, and packed batches never come twice
def _tiles(sight: Sight, queries: Pieces, keys: Pieces) -> tuple[Tiles, ...]:
    return sight._lists(queries, keys)


def _united(spans: Sequence[Span]) -> Pieces:
    """The union of spans that may overlap."""
    out: list[Span] = []
    for span in sorted(spans):
        last = out[-1] if out else None
        if last is not None and last.document == span.document and span.start <= last.start + last.length:
            out[-1] = last._replace(length=max(last.length, span.start + span.length - last.start))
        else:
            out.append(span)
    return placed(out)


def _end(tile: Tile) -> tuple[int, int]:
    return tile.row + tile.rows, tile.key + tile.keys


def _rectangle(rows: Pieces, keys: Pieces) -> Tile:
    return Tile(rows[0].at, rows[-1].end - rows[0].at, keys[0].at, keys[-1].end - keys[0].at, 0)


def _band(row: Piece, key: Piece, window: int | None) -> Tile | None:
    """The tile of two pieces under a causal edge, cut down to the rows and keys that meet."""
    first, last = max(row.start, key.start), row.stop
    low, high = key.start, min(key.stop, row.stop)
    if window is not None:
        last = min(last, key.stop - 1 + window)
        low = max(low, first - window + 1)
    high = min(high, last)
    if last <= first or high <= low:
        return None
    tile_row, tile_key = row.at + first - row.start, key.at + low - key.start
    return Tile(tile_row, last - first, tile_key, high - low, first - low)


@dataclass(frozen=True)
class Part:
    """Keys of one rank that another needs: where the owner has them, and where they come to lie."""

    owner: int
    source: int
    """Place among the owner's tokens."""
    length: int
    at: int
    """Place in the buffer."""


@lru_cache(maxsize=1024)
def imports(sight: Sight, layout: Layout, rank: int, whole: bool) -> tuple[Pieces, tuple[Part, ...]]:
    """What a rank gathers: the pieces of its buffer in the order of documents, and whose they are.

    whole: its own keys are among them, so that every query sees one stretch; otherwise only others' keys are.
    """
    queries = layout.pieces[rank]
    owned: list[tuple[Span, int, int]] = []
    for owner, keys in enumerate(layout.pieces):
        if owner == rank and not whole:
            continue
        parts_of = dict(runs(keys))
        for span in sight.wanted(queries, keys):
            key = next(p for p in parts_of[span.document] if p.start <= span.start < p.stop)
            owned.append((span, owner, key.at + span.start - key.start))
    owned.sort()
    at, parts = 0, []
    for span, owner, source in owned:
        parts.append(Part(owner, source, span.length, at))
        at += span.length
    return placed(span for span, _, _ in owned), tuple(parts)


@lru_cache(maxsize=1024)
def exports(sight: Sight, layout: Layout, owner: int, whole: bool) -> tuple[tuple[int, Part], ...]:
    """What every rank gathers of an owner's keys, in the order of ranks."""
    ranks = range(layout.ranks)
    return tuple((r, part) for r in ranks for part in imports(sight, layout, r, whole)[1] if part.owner == owner)
