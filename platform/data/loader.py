"""Rows arrive before they are needed: threads read the coming steps, and keep nothing that a resume would miss."""

import threading
from collections.abc import Iterator
from itertools import count
from typing import final

import torch
from torchdata.nodes import IterableWrapper, ParallelMapper, Prefetcher

from farspan.parallel.context.shard import Batch
from farspan.platform.data.row import Rows, collate


def shares(consumed: int, batch: int, micro_batch: int, dp_rank: int, dp: int) -> list[range]:
    """The row numbers that rank `dp_rank` of `dp` reads in the step after `consumed` rows, one range a micro-batch.

    Ranks in order, and micro-batches in order, give rows consumed … consumed + batch - 1. ValueError: the rows do not
    divide among the ranks, or a number is out of range.
    """
    if min(batch, micro_batch, dp) < 1 or consumed < 0 or not 0 <= dp_rank < dp:
        raise ValueError(
            f"train.batch={batch}, train.micro_batch={micro_batch}, dp={dp}, dp_rank={dp_rank}, consumed={consumed}: "
            "sizes must be at least 1, 0 <= dp_rank < dp, and consumed at least 0"
        )
    if batch % dp:
        raise ValueError(f"train.batch={batch} must be a multiple of dp={dp}; try {batch + dp - batch % dp}")
    mine = batch // dp
    first = consumed + dp_rank * mine
    return [range(start, min(start + micro_batch, first + mine)) for start in range(first, first + mine, micro_batch)]


class DataError(ValueError):
    """Rows that cannot be read however often one tries: what they hold is wrong."""


@final
class Loader(Iterator[list[Batch]]):
    """Endless steps of one dp rank, each the list of its micro-batches, read ahead by `workers` threads.

    Rows are filled up with `end`. The only state is how many rows were consumed: to resume, start another loader
    there. Memory: about `prefetch + workers` steps. ValueError: sizes that `shares` refuses, empty `rows`, or `pin`
    without a CUDA device. An error met in a thread is raised by `next`, and closes the loader.
    """

    def __init__(
        self,
        rows: Rows,
        start: int,
        *,
        end: int,
        batch: int,
        micro_batch: int,
        dp_rank: int,
        dp: int,
        pin: bool,
        prefetch: int = 2,
        workers: int = 1,
    ) -> None:
        shares(start, batch, micro_batch, dp_rank, dp)  # refuses impossible sizes here rather than in a thread
        if prefetch < 1 or workers < 1:
            raise ValueError(f"prefetch={prefetch}, workers={workers}: both must be at least 1")
        if not len(rows):
            raise ValueError("no rows to load: the corpus has none on this side; check data.held_out and data.paths")
        if pin and not torch.cuda.is_available():
            raise ValueError("pin=True: pinned memory needs a CUDA device, and there is none; pass pin=False")
        self._rows, self._end, self._batch, self._micro_batch = rows, end, batch, micro_batch
        self._dp_rank, self._dp = dp_rank, dp
        # A new thread's device is GPU 0 whatever this one's: pinning there would open a context on it for every rank.
        self._device = torch.cuda.current_device() if pin else None
        self._closed = threading.Event()
        self._mapper = ParallelMapper(
            IterableWrapper(count(start, batch)),
            self._read,
            num_workers=workers,
            method="thread",
            max_concurrent=workers,
            snapshot_frequency=0,
        )
        self._steps = Prefetcher(self._mapper, prefetch, snapshot_frequency=0)
        self._steps.reset()

    def __next__(self) -> list[Batch]:
        """The next step. RuntimeError: the loader is closed."""
        try:
            step = next(self._steps)
        except StopIteration:
            raise RuntimeError("the loader is closed; start another at the rows consumed so far") from None
        if isinstance(step, Exception):
            self.close()
            if isinstance(step, ValueError):
                raise DataError(str(step)) from step
            raise step
        return step

    def close(self) -> None:
        """Stop and join every thread, within a fraction of a second; twice does no harm."""
        self._closed.set()
        # torchdata stops its threads only when its iterators are collected, which a traceback can put off for long;
        # the inner one goes first, because the outer one's thread may be waiting for it.
        self._mapper._it._it._shutdown()
        self._steps._it._shutdown()

    def _read(self, consumed: int) -> list[Batch] | Exception:
        """One step, in a thread; errors travel as values, since torchdata would rebuild them from their text."""
        try:
            return list(self._micro_batches(consumed))
        except Exception as error:
            return error

    def _micro_batches(self, consumed: int) -> Iterator[Batch]:
        for numbers in shares(consumed, self._batch, self._micro_batch, self._dp_rank, self._dp):
            if self._closed.is_set():
                return
            yield self._pinned(collate([self._rows.row(number) for number in numbers], self._end))

    def _pinned(self, batch: Batch) -> Batch:
        """The batch in page-locked memory, where one is asked for."""
        if self._device is None:
            return batch
        with torch.cuda.device(self._device):
            return batch.map(lambda tensor: tensor.pin_memory())
