"""A document is a row; every piece comes once an epoch, beside others of its length."""

import random
from itertools import pairwise

import numpy as np
import pytest

from farspan.parallel.context.shard import IGNORE
from farspan.platform.data.buckets import DocumentRows, Documents
from farspan.platform.data.row import collate

END = 60000


def rows_of(lengths: list[int], bucket: int, seed: int | None = 3, length: int = 100) -> DocumentRows:
    """Documents of different tokens, the last of each an end."""
    sizes = np.array(lengths, np.int64)
    starts = np.cumsum(sizes) - sizes
    tokens = (np.arange(sizes.sum()) % 59999).astype(np.uint16)
    tokens[starts + sizes - 1] = END
    return DocumentRows(tokens, starts, sizes, sequence_length=length, end=END, seed=seed, bucket=bucket)


def skewed(count: int) -> list[int]:
    draw = random.Random(count)
    return [min(2000, 1 + int(draw.lognormvariate(5, 1.2))) for _ in range(count)]


def padding_share(rows: DocumentRows, micro_batch: int) -> float:
    batches = [
        collate([rows.row(n) for n in range(start, min(start + micro_batch, len(rows)))], END)
        for start in range(0, len(rows), micro_batch)
    ]
    return sum(batch.padding for batch in batches) / sum(batch.tokens.numel() for batch in batches)


@pytest.mark.parametrize("bucket", [1, 4, 7, 1000])
@pytest.mark.parametrize("epoch", [0, 2])
def test_an_epoch_holds_every_token_once(bucket: int, epoch: int) -> None:
    lengths = [1, 2, 63, 64, 65, 99, 100, 101, 200, 201, 350, 5, 6, 7]
    rows = rows_of(lengths, bucket)
    assert len(rows) == sum(-(-length // 100) for length in lengths)
    seen: list[tuple[int, ...]] = []
    for number in range(epoch * len(rows), (epoch + 1) * len(rows)):
        row = rows.row(number)
        filled = row.lengths[0]
        assert len(row.tokens) == sum(row.lengths) == min(100, -(-filled // 64) * 64)
        assert (row.tokens[filled:] == END).all() and (row.labels[filled:] == IGNORE).all()
        assert np.array_equal(row.labels[: filled - 1], row.tokens[1:filled])
        whole = row.tokens[filled - 1] == END
        assert (row.labels[filled - 1] == IGNORE) == whole
        seen.append(tuple(row.tokens[:filled].tolist()))
    plain = rows_of(lengths, 1, seed=None)
    kept = [plain.row(number) for number in range(len(plain))]
    assert sorted(seen) == sorted(tuple(row.tokens[: row.lengths[0]].tolist()) for row in kept)
    for row, successor in pairwise(kept):
        assert row.labels[row.lengths[0] - 1] in (IGNORE, successor.tokens[0])


@pytest.mark.parametrize("bucket", [5, 8])
def test_rows_of_a_group_are_alike(bucket: int) -> None:
    rows = rows_of(skewed(203), bucket, length=1000)
    sizes = [rows.row(number).lengths[0] for number in range(len(rows))]
    groups = [sizes[at : at + bucket] for at in range(0, len(sizes), bucket)]
    in_order = sorted(groups, key=lambda group: (min(group), max(group)))
    assert all(max(a) <= min(b) for a, b in pairwise(in_order))
    assert groups != in_order and any(group != sorted(group) for group in groups)
    later = [rows.row(number).lengths[0] for number in range(len(rows), 2 * len(rows))]
    assert later != sizes and sorted(later) == sorted(sizes)


def test_buckets_save_padding() -> None:
    lengths = skewed(1500)
    bucketed = padding_share(rows_of(lengths, 64, length=1000), 8)
    plain = padding_share(rows_of(lengths, 1, length=1000), 8)
    assert bucketed < plain / 3 and plain > 0.5  # the rest is what shapes of 64 cost


def test_zero_rows_and_zero_buckets_say_so() -> None:
    with pytest.raises(ValueError, match="bucket=0"):
        Documents(bucket=0)
    with pytest.raises(ValueError, match="nothing to read"):
        rows_of([], 4).row(0)
