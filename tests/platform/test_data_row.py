"""Rows of any lengths become one batch: documents stay apart, prefixes are found, and only padding is added."""

import random

import numpy as np
import pytest

from farspan.parallel.context.shard import IGNORE
from farspan.platform.data.row import Row, collate

END = 99


def some_row(draw: random.Random, length: int, prefixes: bool) -> Row:
    lengths = []
    while sum(lengths) < length:
        lengths.append(draw.randint(1, length - sum(lengths)))
    padded = len(lengths) > 1 and draw.random() < 0.5
    tokens = np.array([draw.randrange(90) for _ in range(length)], np.int64)
    labels = np.array([draw.choice([IGNORE, 5]) for _ in range(length)], np.int64)
    if padded:
        tokens[-lengths[-1] :], labels[-lengths[-1] :] = END, IGNORE
    return Row(
        tokens=tokens,
        labels=labels,
        lengths=tuple(lengths),
        padding=lengths[-1] if padded else 0,
        prefixes=tuple(draw.randint(0, size) for size in lengths) if prefixes else None,
    )


@pytest.mark.parametrize("case", range(12))
def test_a_batch_is_its_rows_and_padding(case: int) -> None:
    draw = random.Random(case)
    sizes = [draw.choice([1, 63, 64, 65, 130]) for _ in range(draw.randint(1, 5))]
    rows = [some_row(draw, size, prefixes=draw.random() < 0.6) for size in sizes]
    batch = collate(rows, END)
    length = sizes[0] if len(set(sizes)) == 1 else -(-max(sizes) // 64) * 64
    assert batch.tokens.shape == (len(rows), length)
    assert sum(batch.lengths) + batch.padding == batch.tokens.numel()
    assert batch.padding == sum(row.padding + length - size for row, size in zip(rows, sizes, strict=True))
    assert batch.valid == (batch.labels != IGNORE).sum() == sum((row.labels != IGNORE).sum() for row in rows)
    prefix, prefix_bounds, bounds, lengths = [], [0], [0], []
    for number, row in enumerate(rows):
        size = len(row.tokens)
        assert np.array_equal(batch.tokens[number, :size], row.tokens)
        assert np.array_equal(batch.labels[number, :size], row.labels)
        assert (batch.tokens[number, size:] == END).all() and (batch.labels[number, size:] == IGNORE).all()
        documents = row.lengths[:-1] if row.padding else row.lengths
        begin = 0
        for which, document in enumerate(documents):
            assert batch.positions[number, begin : begin + document].tolist() == list(range(document))
            if row.prefixes is not None and row.prefixes[which]:
                prefix += range(number * length + begin, number * length + begin + row.prefixes[which])
                prefix_bounds.append(len(prefix))
            begin += document
            lengths.append(document)
            bounds.append(number * length + begin)
        if begin < length:  # one document of padding at the end, old and new together
            assert batch.positions[number, begin:].tolist() == list(range(length - begin))
            bounds.append((number + 1) * length)
            if row.padding and row.prefixes is not None and size == length and row.prefixes[-1]:
                prefix += range(number * length + begin, number * length + begin + row.prefixes[-1])
                prefix_bounds.append(len(prefix))
    assert batch.lengths == tuple(lengths)
    if len(bounds) - 1 > len(rows):
        assert batch.cu_seqlens is not None and np.unique(batch.cu_seqlens).tolist() == bounds
    else:
        assert batch.cu_seqlens is None
    if prefix:
        assert batch.prefix is not None and batch.prefix.tolist() == prefix
        assert batch.prefix_cu_seqlens is not None and np.unique(batch.prefix_cu_seqlens).tolist() == prefix_bounds
        assert len(batch.prefix_cu_seqlens).bit_count() == 1
    else:
        assert batch.prefix is None and batch.prefix_cu_seqlens is None


def test_no_rows_are_no_batch() -> None:
    with pytest.raises(ValueError, match="at least one row"):
        collate([], END)
