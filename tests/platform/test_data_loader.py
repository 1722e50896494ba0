"""Any number of ranks, micro-batches and threads reads the same rows; nothing hangs, is lost or is left behind."""

import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import closing

import numpy as np
import pytest
import torch

from farspan.parallel.context.shard import Batch
from farspan.platform.data.loader import Loader, shares
from farspan.platform.data.pack import PackedRows
from farspan.platform.data.row import Row, Rows, collate


def some_rows(lengths: tuple[int, ...] = (30, 50, 7, 200, 90)) -> PackedRows:
    """Shuffled rows of 16 tokens, over documents of these lengths whose tokens are all different."""
    sizes = np.array(lengths, np.int64)
    tokens = np.arange(sizes.sum(), dtype=np.uint16)
    starts = np.cumsum(sizes) - sizes
    tokens[starts + sizes - 1] = 65535
    return PackedRows(tokens, starts, sizes, sequence_length=16, end=65535, seed=1)


def read(rows: Rows, numbers: Iterable[int]) -> Batch:
    return collate([rows.row(number) for number in numbers], 65535)


@pytest.mark.parametrize("dp", [1, 2, 4])
@pytest.mark.parametrize("micro_batch", [1, 2, 3, 5, 100])
def test_ranks_and_micro_batches_read_the_same_rows(dp: int, micro_batch: int) -> None:
    rows = some_rows()
    whole = read(rows, range(24, 36))
    ranges = [numbers for rank in range(dp) for numbers in shares(24, 12, micro_batch, rank, dp)]
    assert all(1 <= len(numbers) <= micro_batch for numbers in ranges)
    parts = [read(rows, numbers) for numbers in ranges]
    for name in ("tokens", "labels", "positions"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name))
    assert sum((part.lengths for part in parts), ()) == whole.lengths
    assert sum(part.valid for part in parts) == whole.valid


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 10, 1, 0, 4), "train.batch=10 must be a multiple of dp=4; try 12"),
        ((0, 0, 1, 0, 1), "train.batch=0"),
        ((0, 4, 0, 0, 1), "train.micro_batch=0"),
        ((0, 4, 1, 2, 2), "dp_rank=2"),
        ((-1, 4, 1, 0, 2), "consumed=-1"),
    ],
)
def test_impossible_shares_say_why(arguments: tuple[int, int, int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        shares(*arguments)


@pytest.fixture
def no_thread_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) == before


def assert_equal_steps(left: list[Batch], right: list[Batch]) -> None:
    for one, other in zip(left, right, strict=True):
        assert torch.equal(one.tokens, other.tokens) and torch.equal(one.labels, other.labels)
        assert one.lengths == other.lengths


@pytest.mark.usefixtures("no_thread_left")
@pytest.mark.parametrize(("workers", "prefetch"), [(1, 2), (3, 1)])
def test_starting_later_equals_skipping_steps(workers: int, prefetch: int) -> None:
    rows = some_rows()
    assert len(rows) < 40  # so that several epochs pass

    def loader(start: int) -> Loader:
        sizes = {"end": 65535, "batch": 6, "micro_batch": 2, "dp_rank": 1, "dp": 2}
        return Loader(rows, start, **sizes, pin=False, prefetch=prefetch, workers=workers)

    with closing(loader(0)) as early, closing(loader(5 * 6)) as late:
        steps = [next(early) for _ in range(12)]
        for number, step in enumerate(steps):
            assert_equal_steps(step, [read(rows, numbers) for numbers in shares(6 * number, 6, 2, 1, 2)])
        for step in steps[5:]:
            assert_equal_steps(step, next(late))
    with pytest.raises(RuntimeError, match="closed"):
        next(early)
    early.close()


class FaultyRowError(Exception):
    def __init__(self, row: int, why: str) -> None:
        super().__init__(f"row {row}: {why}")


@pytest.mark.usefixtures("no_thread_left")
@pytest.mark.parametrize("error", [FaultyRowError(3, "torn"), StopIteration(), OSError(5, "input/output error")])
def test_errors_in_threads_surface_and_close(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    rows = some_rows()
    real = PackedRows.row

    def row(self: PackedRows, number: int) -> Row:
        if number == 3:
            raise error
        return real(self, number)

    monkeypatch.setattr(PackedRows, "row", row)
    loader = Loader(rows, 0, end=65535, batch=2, micro_batch=1, dp_rank=0, dp=1, pin=False)
    assert torch.equal(next(loader)[1].tokens, read(rows, [1]).tokens)
    with pytest.raises(Exception, match=r"torn|input/output|StopIteration") as caught:
        next(loader)
    assert error in (caught.value, caught.value.__cause__)
    assert not isinstance(caught.value, StopIteration)  # which would end a loop as if all were well
    with pytest.raises(RuntimeError, match="closed"):
        next(loader)


@pytest.mark.usefixtures("no_thread_left")
def test_close_is_prompt_while_threads_are_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = some_rows()
    real, reading = PackedRows.row, threading.Event()

    def slow(self: PackedRows, number: int) -> Row:
        reading.set()
        time.sleep(0.05)
        return real(self, number)

    monkeypatch.setattr(PackedRows, "row", slow)
    loader = Loader(rows, 0, end=65535, batch=100, micro_batch=1, dp_rank=0, dp=1, pin=False, workers=2)  # 5 s a step
    assert reading.wait(5)
    started = time.monotonic()
    loader.close()
    assert time.monotonic() - started < 2


@pytest.mark.usefixtures("no_thread_left")
def test_impossible_loaders_say_why() -> None:
    rows = some_rows()
    sizes = {"end": 65535, "batch": 2, "micro_batch": 1, "dp_rank": 0, "dp": 1}
    with pytest.raises(ValueError, match="prefetch=0"):
        Loader(rows, 0, **sizes, pin=False, prefetch=0)
    with pytest.raises(ValueError, match="held_out"):
        Loader(some_rows(()), 0, **sizes, pin=False)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match=r"pin=True: .*pin=False"):
            Loader(rows, 0, **sizes, pin=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.usefixtures("no_thread_left")
def test_pinned_batches_reach_the_gpu() -> None:
    rows = some_rows()
    with closing(Loader(rows, 0, end=65535, batch=4, micro_batch=4, dp_rank=0, dp=1, pin=True)) as loader:
        [batch] = next(loader)
    assert batch.cu_seqlens is not None
    assert all(tensor.is_pinned() for tensor in (batch.tokens, batch.labels, batch.positions, batch.cu_seqlens))
    there = batch.to(torch.device("cuda"))
    torch.cuda.synchronize()
    assert torch.equal(there.tokens.cpu(), read(rows, range(4)).tokens)
