"""Work that goes on beside the model's: state comes in, is updated, and goes out, each in its own queue."""

import mmap
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any, Literal, Protocol, get_args
from weakref import finalize

import torch
from torch import Tensor

Queue = Literal["in", "update", "out", "send"]
"""State comes in, is updated, goes out, as gradients do that the CPU waits for, which sends weights."""

Mark = Any
"""A point in a queue that other work can wait for; None: it is reached."""


class Queues(Protocol):
    """Runs work in the order of each queue, and across queues as marks say."""

    def host(self, size: int) -> Tensor:
        """Flat uint8 host memory that the device can copy from and to. RuntimeError: there is no more."""

    def now(self) -> Mark:
        """Reached when the device has done all that it was told so far outside of the queues."""

    def run(self, queue: Queue, work: Callable[[], object], after: Iterable[Mark], uses: Sequence[Tensor] = ()) -> Mark:
        """Tells the device to do `work` after the marks and all earlier work of the queue; reached when it is done.

        uses: tensors made outside of the queues, whose memory must not be given to others before.
        """

    def hold(self, mark: Mark, streams: Iterable[Any] = ()) -> None:
        """What the device is told from now on, outside of the queues and on these streams, begins after `mark`."""

    def reached(self, mark: Mark) -> None:
        """The host waits for `mark`."""

    def seconds(self, begin: Mark, end: Mark) -> float | None:
        """Between two marks; None: not known, or not yet."""

    def close(self) -> None:
        """Ends the device's hold on host memory, once it is done with it."""


class Streams:
    """A CUDA device: a stream for each queue. Updates go before the model's own work, which waits for them."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._registered: list[finalize[..., Any]] = []
        self._held = 0
        self._streams = {name: torch.cuda.Stream(device, priority=-1) for name in get_args(Queue)}

    def host(self, size: int) -> Tensor:
        # Registered rather than allocated as pinned: that comes in powers of two, and a third would lie idle. Mapped,
        # since what is registered is whole pages, each once, for as long as it lies where it does.
        if not size:
            return torch.empty(0, dtype=torch.uint8)
        try:
            pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            with suppress(AttributeError, OSError):  # large pages, where this system has them, are locked sooner
                pages.madvise(mmap.MADV_HUGEPAGE)
            memory = torch.frombuffer(pages, dtype=torch.uint8)
            torch.cuda.check_error(int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), size, 0)))
        except (OSError, RuntimeError) as error:
            raise RuntimeError(
                f"the host gives no {size:,} bytes more that the device can reach, after {self._held:,} ({error}); set "
                "optim.offload.device_gb, optim.master: none or residual8, or start fewer ranks a node"
            ) from error
        release = finalize(pages, _unregister, self._device, memory.data_ptr())
        release.atexit = False  # the process's end lets go of everything
        self._registered.append(release)
        self._held += size
        return memory

    def close(self) -> None:
        torch.cuda.synchronize(self._device)
        for release in self._registered:
            release()
        self._registered.clear()

    def now(self) -> Mark:
        return torch.cuda.current_stream(self._device).record_event(torch.cuda.Event(enable_timing=True))

    def run(self, queue: Queue, work: Callable[[], object], after: Iterable[Mark], uses: Sequence[Tensor] = ()) -> Mark:
        stream = self._streams[queue]
        for mark in after:
            if mark is not None:
                stream.wait_event(mark)
        with torch.cuda.stream(stream):
            work()
            for tensor in uses:
                tensor.record_stream(stream)
            return stream.record_event(torch.cuda.Event(enable_timing=True))

    def hold(self, mark: Mark, streams: Iterable[Any] = ()) -> None:
        for stream in (torch.cuda.current_stream(self._device), *streams):
            if mark is not None:
                stream.wait_event(mark)

    def reached(self, mark: Mark) -> None:
        if mark is not None:
            mark.synchronize()

    def seconds(self, begin: Mark, end: Mark) -> float | None:
        return begin.elapsed_time(end) / 1e3 if begin.query() and end.query() else None


def _unregister(device: torch.device, address: int) -> None:
    torch.cuda.synchronize(device)  # copies may still be under way
    torch.cuda.check_error(int(torch.cuda.cudart().cudaHostUnregister(address)))


class Inline:
    """A device whose memory is the host's: work is done when `run` returns."""

    def host(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8)

    def now(self) -> Mark:
        return None

    def run(self, queue: Queue, work: Callable[[], object], after: Iterable[Mark], uses: Sequence[Tensor] = ()) -> Mark:
        work()

    def hold(self, mark: Mark, streams: Iterable[Any] = ()) -> None:
        pass

    def reached(self, mark: Mark) -> None:
        pass

    def seconds(self, begin: Mark, end: Mark) -> float | None:
        return None  # work that is done at once takes the host's time, which steps are measured by

    def close(self) -> None:
        pass


def queues_of(device: torch.device) -> Queues:
    return Streams(device) if device.type == "cuda" else Inline()
