"""Every token of an epoch comes once, and no document sees another."""

import hashlib
import random
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch

from farspan.parallel.context.shard import IGNORE, Batch
from farspan.platform.data import Text
from farspan.platform.data.draws import permutation
from farspan.platform.data.pack import PackedRows
from farspan.platform.data.row import Rows, collate
from farspan.platform.data.tokenizer import Bytes

END = 256


def plain_rows(documents: list[list[int]], length: int, end: int) -> list[list[tuple[int, int, int, int]]]:
    """The specification, token by token: rows of (token, label, position, fragment)."""
    stream = []
    for which, document in enumerate(documents):
        closed = [*document, end]
        for token, label in zip(closed, [*closed[1:], IGNORE], strict=True):
            stream.append((token, label, which))
    while len(stream) % length:
        stream.append((end, IGNORE, -1))
    rows: list[list[tuple[int, int, int, int]]] = []
    for at, (token, label, which) in enumerate(stream):
        if at % length == 0:
            rows.append([])
            position, fragment, before = 0, 0, which
        if which != before:
            position, fragment, before = 0, fragment + 1, which
        rows[-1].append((token, label, position, fragment))
        position += 1
    return rows


def assert_batch(batch: Batch, expected: list[list[tuple[int, int, int, int]]]) -> None:
    token, label, position, _ = np.array(expected).transpose(2, 0, 1)
    assert batch.tokens.dtype == batch.labels.dtype == batch.positions.dtype == torch.int64
    assert np.array_equal(batch.tokens, token)
    assert np.array_equal(batch.labels, label)
    assert np.array_equal(batch.positions, position)
    assert batch.valid == (label != IGNORE).sum()
    lengths = [sum(entry[3] == part for entry in row) for row in expected for part in range(row[-1][3] + 1)]
    rest = iter(lengths)  # with the padding at the end of some rows
    assert sum(batch.lengths) + batch.padding == sum(lengths) and all(size in rest for size in batch.lengths)
    if len(lengths) == len(expected):
        assert batch.cu_seqlens is None
        return
    assert batch.cu_seqlens is not None and batch.cu_seqlens.dtype == torch.int32
    bounds = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    entries = next(2**k for k in range(4, 40) if 2**k >= len(bounds))
    assert batch.cu_seqlens.tolist() == bounds + [bounds[-1]] * (entries - len(bounds))


def numbered(lengths: list[int], length: int, seed: int | None = None) -> tuple[PackedRows, list[list[int]]]:
    """Rows over documents whose tokens are all different, stored in another order than they are streamed."""
    values = iter(range(60000))
    documents = [[next(values) for _ in range(size)] for size in lengths]
    stored = random.Random(len(lengths)).sample(range(len(lengths)), len(lengths))
    flat: list[int] = []
    starts = [0] * len(lengths)
    for which in stored:
        starts[which] = len(flat)
        flat += [*documents[which], 65535]
    sizes = np.array(lengths, np.int64) + 1
    tokens = np.array(flat, np.uint16)
    return PackedRows(tokens, np.array(starts), sizes, sequence_length=length, end=65535, seed=seed), documents


def read(rows: Rows, numbers: Iterable[int], end: int = 65535) -> Batch:
    return collate([rows.row(number) for number in numbers], end)


def epoch_rows(rows: Rows, end: int = 65535) -> Batch:
    return read(rows, range(len(rows)), end)


def test_bytes_there_and_back() -> None:
    tokenizer = Bytes()
    said = "a\r\n\0é漢🙂"
    ids = tokenizer.encode(said)
    assert ids.dtype == np.uint16 and ids.max() < tokenizer.end < tokenizer.vocabulary
    assert tokenizer.decode(ids) == said
    assert tokenizer.decode([97, END, 0xFF, 98]) == "a�b"
    with pytest.raises(ValueError, match="token 257"):
        tokenizer.decode([257])


@pytest.mark.parametrize("length", [1, 2, 7, 16, 1000])
@pytest.mark.parametrize("case", range(6))
def test_rows_equal_the_plain_reference(length: int, case: int) -> None:
    draw = random.Random(case)
    sizes = [draw.choice([1, 2, 5, length, max(1, length - 1), 3 * length]) for _ in range(draw.randrange(1, 30))]
    rows, documents = numbered(sizes, length)
    expected = plain_rows(documents, length, 65535)
    assert len(rows) == len(expected)
    assert_batch(epoch_rows(rows), expected)
    numbers = [draw.randrange(len(rows)) for _ in range(5)]
    assert_batch(read(rows, numbers), [expected[number] for number in numbers])


def test_cu_seqlens_is_none_only_where_every_row_is_one_document() -> None:
    rows, documents = numbered([7, 7, 20, 3], 8)
    assert read(rows, [0, 1]).cu_seqlens is None
    assert read(rows, [0, 1, 2, 3]).cu_seqlens is None
    assert read(rows, [0, 4]).cu_seqlens is not None
    many, documents = numbered([1] * 100, 40)
    assert_batch(epoch_rows(many), plain_rows(documents, 40, 65535))


def test_labels_stop_at_bounds_and_not_at_end_tokens() -> None:
    """Documents of Megatron files may lack the end token, hold it inside, or be empty."""
    tokens = np.array([9, 1, 2, 9, 3, 4, 5, 9, 6], np.uint16)
    starts, lengths = np.array([0, 3, 3, 7, 8]), np.array([3, 0, 4, 1, 1])
    rows = PackedRows(tokens, starts, lengths, sequence_length=4, end=9, seed=None)
    batch = epoch_rows(rows, 9)
    assert batch.tokens.tolist() == [[9, 1, 2, 9], [3, 4, 5, 9], [6, 9, 9, 9]]
    no = IGNORE
    assert batch.labels.tolist() == [[1, 2, no, 3], [4, 5, no, no], [no, no, no, no]]
    assert (batch.lengths, batch.padding) == ((3, 1, 3, 1, 1), 3)
    assert rows.documents().tolist() == [3, 4, 1, 1]


def test_no_rows_say_so() -> None:
    empty = np.empty(0, np.int64)
    with pytest.raises(ValueError, match="nothing to read"):
        PackedRows(np.empty(0, np.uint16), empty, empty, sequence_length=4, end=9, seed=None).row(0)


@pytest.mark.parametrize("epoch", [0, 3])
def test_an_epoch_covers_every_token_once(epoch: int) -> None:
    rows, documents = numbered([5, 90, 1, 33, 64, 17], 16, seed=11)
    batch = read(rows, range(epoch * len(rows), (epoch + 1) * len(rows)))
    seen = batch.tokens[batch.tokens != 65535].tolist()
    assert sorted(seen) == sorted(token for document in documents for token in document)
    assert batch.valid == len(seen)
    labels = batch.labels[batch.labels != IGNORE].tolist()
    assert sorted(labels) == sorted([token for document in documents for token in document[1:]] + [65535] * 6)


def test_permutations_are_bijections_of_their_own() -> None:
    count = 1000
    orders = {(seed, epoch): permutation(count, seed, epoch) for seed in (0, 1, -5) for epoch in (0, 1, 2)}
    for order in orders.values():
        assert np.array_equal(np.sort(order), np.arange(count))
    drawn = list(orders.values())
    same = [(a == b).sum() for i, a in enumerate(drawn) for b in drawn[:i]]
    assert max(same) < 10  # two random permutations agree in about one place
    assert permutation(8, 0, 0).tolist() == PINNED, "runs that resume would read other rows"


PINNED = [1, 0, 5, 6, 4, 2, 7, 3]


def test_epochs_differ_and_held_out_rows_stay_in_order() -> None:
    shuffled, documents = numbered([100] * 20, 16, seed=3)
    count = len(shuffled)
    first, second = read(shuffled, range(count)), read(shuffled, range(count, 2 * count))
    assert not torch.equal(first.tokens, second.tokens)
    assert torch.equal(read(shuffled, [count - 1, count]).tokens, torch.stack([first.tokens[-1], second.tokens[0]]))
    plain, _ = numbered([100] * 20, 16)
    assert torch.equal(read(plain, range(count, 2 * count)).tokens, epoch_rows(plain).tokens)
    assert_batch(epoch_rows(plain), plain_rows(documents, 16, 65535))


@pytest.mark.parametrize("case", range(4))
def test_corpus_equals_the_plain_reference(tmp_path: Path, case: int) -> None:
    draw = random.Random(case)
    contents = ["".join(draw.choices("ab \né漢🙂", k=draw.randrange(1, 40))).encode() for _ in range(13)]
    (tmp_path / "in").mkdir()
    for i, content in enumerate(contents):
        (tmp_path / "in" / f"{i}.txt").write_bytes(content)
    config = Text(paths=(str(tmp_path / "in"),), sequence_length=9, held_out=0, cache=str(tmp_path / "cache"))
    built = config.build(seed=4)
    in_order = sorted(set(contents), key=lambda content: hashlib.blake2b(content, digest_size=16).digest())
    expected = plain_rows([list(content) for content in in_order], 9, END)
    assert_batch(epoch_rows(built.train, END), [expected[row] for row in permutation(len(expected), 4, 0)])
    assert len(built.held_out) == 0


def test_a_corpus_shorter_than_a_row_is_one_padded_row(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("hi")
    built = Text(paths=(str(tmp_path / "a.txt"),), sequence_length=5, cache=str(tmp_path)).build(seed=0)
    assert len(built.train) == 1
    batch = read(built.train, [0], END)
    assert batch.tokens.tolist() == [[104, 105, END, END, END]]
    assert batch.labels.tolist() == [[105, END, IGNORE, IGNORE, IGNORE]]
    assert batch.positions.tolist() == [[0, 1, 2, 0, 1]]
    assert (batch.lengths, batch.valid) == ((3,), 2)
