"""Every token is on exactly one rank, the ranks compute alike, and the tiles of a mask are the mask."""

from itertools import pairwise, product

import pytest
import torch
from torch import Tensor

from farspan.parallel.context.layout import KINDS, SPREAD, Kind, Layout, Piece, decode, encode, layout
from farspan.parallel.context.sight import Pieces, Sight, imports

LENGTHS = [
    (),
    (1,),
    (3,),
    (64,),
    (61,),
    (20, 20),
    (5, 9, 1, 30),
    (1, 1, 1, 1, 1, 1, 1),
    (40, 2, 2, 7, 1, 13),
    (130, 3, 50, 1, 7, 7, 2, 64),
]
SIGHTS = [
    Sight(causal=True),
    Sight(causal=False),
    Sight(causal=True, window=1),
    Sight(causal=True, window=5),
    Sight(causal=True, window=17),
    Sight(causal=True, window=1000),
]
CUTS = [(1, 1), (2, 1), (2, 2), (3, 1), (4, 2), (5, 1), (6, 3), (8, 1), (8, 4)]
"""Ranks, and how many of them are dealt to as one."""


def area(pieces: Pieces, window: int | None = None) -> int:
    """Keys that these tokens see in a causal sequence."""
    tokens = (position for piece in pieces for position in range(piece.start, piece.stop))
    return sum(min(position + 1, window or position + 1) for position in tokens)


def areas(of: Layout) -> list[int]:
    return [area(pieces) for pieces in of.pieces]


def tokens(pieces: Pieces) -> tuple[Tensor, Tensor]:
    """Document and position of each token, in the order of the buffer."""
    documents = [piece.document for piece in pieces for _ in range(piece.length)]
    positions = [position for piece in pieces for position in range(piece.start, piece.stop)]
    return torch.tensor(documents, dtype=torch.int64), torch.tensor(positions, dtype=torch.int64)


def visible(sight: Sight, queries: Pieces, keys: Pieces) -> Tensor:
    """Which queries see which keys, pair by pair."""
    (query_document, query), (key_document, key) = tokens(queries), tokens(keys)
    mask = query_document[:, None] == key_document
    if sight.causal:
        mask &= key <= query[:, None]
    if sight.window is not None:
        mask &= key > query[:, None] - sight.window
    return mask


def counted(sight: Sight, queries: Pieces, keys: Pieces) -> Tensor:
    """How often the tiles show each pair."""
    seen = torch.zeros(sum(p.length for p in queries), sum(p.length for p in keys), dtype=torch.int64)
    for tiles in sight.tiles(queries, keys):
        for tile in tiles.tiles:
            query, key = torch.arange(tile.rows)[:, None] + tile.offset, torch.arange(tile.keys)
            inside = key <= query if tiles.causal else torch.ones(tile.rows, tile.keys, dtype=torch.bool)
            if tiles.window is not None:
                inside = inside & (key > query - tiles.window)
            rows, columns = slice(tile.row, tile.row + tile.rows), slice(tile.key, tile.key + tile.keys)
            assert seen[rows, columns].shape == inside.shape, f"{tile} ends beyond what is held"
            seen[rows, columns] += inside
    return seen


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("multiple", [1, 8])
def test_every_token_is_on_exactly_one_rank(kind: Kind, multiple: int) -> None:
    for lengths, (ranks, inner) in product(LENGTHS, CUTS):
        of = layout(kind, lengths, ranks, inner, multiple)
        places = [of.places(rank) for rank in range(ranks)]
        assert of.ranks == ranks
        assert torch.equal(torch.cat(places).sort().values, torch.arange(sum(lengths)))
        assert [of.held(rank) for rank in range(ranks)] == [len(part) for part in places]
        assert all(torch.equal(part, part.sort().values) for part in places), "documents and positions ascend"


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_lie_end_to_end_and_none_continues_another(kind: Kind) -> None:
    for lengths, (ranks, inner) in product(LENGTHS, CUTS):
        for pieces in layout(kind, lengths, ranks, inner).pieces:
            assert [piece.at for piece in pieces] == [sum(p.length for p in pieces[:i]) for i in range(len(pieces))]
            assert all(piece.length for piece in pieces)
            assert not any(a.document == b.document and a.stop == b.start for a, b in pairwise(pieces))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("multiple", [1, 3, 16])
def test_all_ranks_have_room_for_as_many_tokens(kind: Kind, multiple: int) -> None:
    """Zigzag loses up to a token for each chunk of each document; the others lose none but the remainder."""
    for lengths, (ranks, inner) in product(LENGTHS, CUTS):
        of = layout(kind, lengths, ranks, inner, multiple)
        spare = 2 * len(lengths) if kind == "zigzag" else 0
        most = max(multiple, -(-sum(lengths) // ranks) + spare)
        assert of.tokens % multiple == 0
        assert max(of.held(rank) for rank in range(ranks)) <= of.tokens < most + multiple


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 5, 8])
def test_zigzag_computes_the_same_on_every_rank(ranks: int) -> None:
    """Exactly where 2n divides the length; else each of a rank's four bounds is less than a token off."""
    for chunk in (1, 7, 32):
        of = layout("zigzag", (2 * ranks * chunk,), ranks)
        assert {of.held(rank) for rank in range(ranks)} == {2 * chunk}
        assert len(set(areas(of))) == 1
    for length in (97, 1000, 1013):
        of = layout("zigzag", (length,), ranks)
        mean = length * (length + 1) / 2 / ranks
        assert max(abs(a - mean) for a in areas(of)) <= 4 * length


def test_contiguous_keeps_the_order_and_computes_alike_under_a_window() -> None:
    for lengths, ranks in product(LENGTHS, (1, 3, 4, 8)):
        of = layout("contiguous", lengths, ranks)
        assert torch.equal(torch.cat([of.places(rank) for rank in range(ranks)]), torch.arange(sum(lengths)))
    window, held = 9, 50
    of = layout("contiguous", (8 * held,), 8)
    assert {area(pieces, window) for pieces in of.pieces[1:]} == {held * window}
    assert area(of.pieces[0], window) == held * window - window * (window - 1) // 2, "the first tokens see fewer"


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
def test_documents_spread_no_further_than_their_length_asks(ranks: int) -> None:
    """Short ones stay whole, but for what fills the last rooms: each rank but one may be filled by one cut more."""
    drawn = torch.Generator().manual_seed(ranks)
    for _ in range(30):
        lengths = tuple((torch.randn(40, generator=drawn) * 1.2 + 4).exp().long().clamp(1, 3000).tolist())
        of, capacity, more = layout("documents", lengths, ranks), -(-sum(lengths) // ranks), 0
        for document, length in enumerate(lengths):
            asked = next(n for n in (1, 2, 4, 8) if length * SPREAD <= capacity * n or n >= ranks)
            holders = sum(any(piece.document == document for piece in pieces) for pieces in of.pieces)
            more += max(0, holders - asked)
        assert more <= ranks - 1


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
def test_documents_deals_out_work_and_tokens_alike(ranks: int) -> None:
    """Long-tailed lengths, as corpora have them: the busiest rank against the mean of all, which all wait for."""
    drawn, busiest = torch.Generator().manual_seed(0), []
    for _ in range(60):
        lengths = tuple((torch.randn(60, generator=drawn) * 1.3 + 5).exp().long().clamp(1, 4000).tolist())
        of = layout("documents", lengths, ranks)
        held, work = [of.held(rank) for rank in range(ranks)], areas(of)
        assert max(held) - min(held) < ranks
        busiest.append(max(work) * ranks / sum(work))
    assert max(busiest) <= 1.25
    assert sum(busiest) / len(busiest) <= 1.025


def test_one_long_document_is_dealt_out_as_zigzag_does() -> None:
    for ranks in (2, 4, 8):
        length = 2 * ranks * 13
        assert layout("documents", (length,), ranks) == layout("zigzag", (length,), ranks)


@pytest.mark.parametrize("kind", KINDS)
def test_joined_groups_hold_what_is_dealt_to_them_as_one(kind: Kind) -> None:
    for lengths, (ranks, inner) in product(LENGTHS, CUTS):
        of = layout(kind, lengths, ranks, inner)
        together = of.joined(inner)
        assert together.pieces == layout(kind, lengths, ranks // inner).pieces
        assert together.tokens == of.tokens * inner
        for group in range(ranks // inner):
            members = [of.places(rank) for rank in range(group * inner, (group + 1) * inner)]
            assert torch.equal(torch.cat(members), together.places(group)), "a group is cut contiguously"


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_beyond_the_tokens_are_empty(kind: Kind) -> None:
    of = layout(kind, (3,), 8, 1, 4)
    assert of.tokens == 4
    assert sum(of.held(rank) == 0 for rank in range(8)) == (6 if kind == "zigzag" else 5)
    empty = next(rank for rank in range(8) if not of.held(rank))
    assert of.pieces[empty] == () and of.places(empty).shape == (0,)


def test_a_layout_survives_as_numbers() -> None:
    sizes = set()
    for kind, lengths, (ranks, inner), multiple in product(KINDS, LENGTHS, CUTS, (1, 8)):
        table = encode(kind, lengths, inner, multiple)
        sizes.add(len(table))
        assert decode(torch.tensor(table), ranks) == layout(kind, lengths, ranks, inner, multiple)
    assert sizes == {3 + 8}, "few shapes occur"
    assert len(encode("zigzag", (5,) * 9, 1, 1)) == 3 + 16


@pytest.mark.parametrize(("ranks", "inner"), [(0, 1), (-2, 1), (4, 3), (4, 0)])
def test_sizes_that_do_not_fit_are_refused(ranks: int, inner: int) -> None:
    with pytest.raises(ValueError, match=f"inner={inner} must divide ranks={ranks}"):
        layout("zigzag", (8,), ranks, inner)


@pytest.mark.parametrize("sight", SIGHTS, ids=lambda s: f"{'causal' if s.causal else 'full'}-{s.window}")
@pytest.mark.parametrize("kind", KINDS)
def test_tiles_show_every_visible_pair_exactly_once(kind: Kind, sight: Sight) -> None:
    """Tiles refuse rows or keys that occur twice in a list."""
    for lengths, (ranks, inner) in product(LENGTHS, [(1, 1), (2, 1), (3, 1), (4, 2), (8, 1)]):
        of = layout(kind, lengths, ranks, inner)
        for queries, keys in product(of.pieces, repeat=2):
            assert torch.equal(counted(sight, queries, keys), visible(sight, queries, keys).long())


@pytest.mark.parametrize("sight", SIGHTS, ids=lambda s: f"{'causal' if s.causal else 'full'}-{s.window}")
@pytest.mark.parametrize("kind", KINDS)
def test_a_rank_imports_exactly_the_keys_that_it_sees(kind: Kind, sight: Sight) -> None:
    for lengths, (ranks, inner) in product(LENGTHS, [(1, 1), (3, 1), (4, 2), (8, 1)]):
        of = layout(kind, lengths, ranks, inner)
        for rank, whole in product(range(ranks), (False, True)):
            pieces, parts = imports(sight, of, rank, whole)
            landed = torch.stack(tokens(pieces))
            for part in parts:
                source = torch.stack(tokens(of.pieces[part.owner]))[:, part.source : part.source + part.length]
                assert torch.equal(source, landed[:, part.at : part.at + part.length])
            assert sum(part.length for part in parts) == landed.shape[1]
            for owner, keys in enumerate(of.pieces):
                seen = int(visible(sight, of.pieces[rank], keys).any(0).sum())
                mine = sum(part.length for part in parts if part.owner == owner)
                assert mine == (seen if whole or owner != rank else 0)
            if whole:
                assert torch.equal(counted(sight, of.pieces[rank], pieces), visible(sight, of.pieces[rank], pieces))


def test_wanted_keys_are_those_that_some_query_sees() -> None:
    queries = (Piece(0, 10, 4, 0), Piece(0, 30, 2, 4), Piece(2, 0, 3, 6))
    keys = (Piece(0, 0, 20, 0), Piece(0, 25, 9, 20), Piece(1, 0, 5, 29), Piece(2, 1, 8, 34))
    for sight in SIGHTS:
        wanted = sorted((s.document, s.start + i) for s in sight.wanted(queries, keys) for i in range(s.length))
        columns = visible(sight, queries, keys).any(0)
        document, position = tokens(keys)
        assert wanted == list(zip(document[columns].tolist(), position[columns].tolist(), strict=True))


@pytest.mark.parametrize("lengths", [(4096,), (64, 64, 512), (512,) * 16])
def test_causal_zigzag_is_one_call_a_pair_of_ranks(lengths: tuple[int, ...]) -> None:
    """The own block is one causal tile a document, any other's a rectangle: few long kernels, whatever is packed."""
    of = layout("zigzag", lengths, 4)
    for queries, keys in product(of.pieces, repeat=2):
        (tiles,) = Sight(causal=True).tiles(queries, keys)
        assert len(tiles.tiles) == len(lengths)
        assert tiles.causal == (queries == keys)
