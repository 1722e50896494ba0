"""The work of each step, one step ahead: its micro-batches, and what all ranks must know of it together."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

from farspan.parallel.context.shard import Batch
from farspan.platform.data.loader import Loader


@dataclass(frozen=True, kw_only=True)
class Work:
    """One optimizer step on this rank, with sums over all ranks."""

    batches: list[Batch]
    labels: float
    """Labels to predict in the whole step: what the summed loss is divided by."""
    tokens: int
    flops: float
    """Operations of the forwards of the whole step."""
    stop: bool
    """Some rank was asked to stop."""
    save_failed: bool
    """Some rank saw its last save fail."""


class Feed:
    """Iterates over `Work` without end.

    The sums travel over the hosts' group while the device is still busy with the step before, and so do the wishes
    of single ranks: all ranks learn of them at the same step.
    """

    def __init__(
        self,
        loader: Loader,
        control: dist.ProcessGroup,
        flops: Callable[[tuple[int, ...]], float],
        wishes: Callable[[], tuple[bool, bool]],
        readers: int,
    ) -> None:
        """`wishes` tells whether this rank was asked to stop and whether its last save failed.

        `readers` ranks each read the same batches: dp times them is the world.
        """
        self.loader, self.control, self.flops, self.wishes, self.readers = loader, control, flops, wishes, readers

    def __iter__(self) -> Iterator[Work]:
        steps = iter(self.loader)
        ahead = self._post(next(steps))
        while True:
            batches, sums, pending = ahead
            pending.wait()
            labels, tokens, flops, stop, failed = (sums / self.readers).tolist()
            ahead = self._post(next(steps))
            yield Work(
                batches=batches,
                labels=max(1.0, labels),  # a step of padding alone has a loss of zero, not of nothing by nothing
                tokens=int(tokens),
                flops=flops,
                stop=stop > 0,
                save_failed=failed > 0,
            )

    def _post(self, batches: list[Batch]) -> tuple[list[Batch], torch.Tensor, dist.Work]:
        labels = sum(batch.valid for batch in batches)
        tokens = sum(batch.tokens.numel() - batch.padding for batch in batches)
        flops = sum(self.flops(batch.lengths) for batch in batches)
        sums = torch.tensor([labels, tokens, flops, *self.wishes()], dtype=torch.float64)
        pending = dist.all_reduce(sums, group=self.control, async_op=True)
        assert pending is not None
        return batches, sums, pending
