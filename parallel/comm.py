"""Collectives with gradients: what one direction gathers, the other sums and scatters."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_OPS = torch.ops._c10d_functional


class Group:
    """Ranks that exchange activations, known to compiled code by their name alone."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.size = group.size()
        self.rank = group.rank()
        self.name = group.group_name
        self.handle = group


def gather(x: Tensor, group: Group) -> Tensor:
    """B T D of every rank's B T/n D; backward sums the ranks' gradients and scatters them.

    What is cut are the B·T tokens laid end to end: the parts follow each other in memory, and no copy is made.
    """
    out: Tensor = _Gather.apply(x, group.size, group.name)
    return out


def scatter(x: Tensor, group: Group) -> Tensor:
    """This rank's B T/n D of the sum of every rank's B T D; backward gathers. T must be a multiple of n."""
    out: Tensor = _Scatter.apply(x, group.size, group.name)
    return out


def gather_rows(x: Tensor, group: Group) -> Tensor:
    """n N … of every rank's N …, without a gradient."""
    return _gathered(x.contiguous(), group.size, group.name).unflatten(0, (group.size, -1))


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, size: int, name: str) -> Tensor:
        ctx.size, ctx.name = size, name
        return _widen(x, size, name)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        return _narrow(upstream, ctx.size, ctx.name), None, None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, size: int, name: str) -> Tensor:
        ctx.size, ctx.name = size, name
        return _narrow(x, size, name)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        return _widen(upstream, ctx.size, ctx.name), None, None


def _widen(x: Tensor, size: int, name: str) -> Tensor:
    rows, length = x.shape[:2]
    return _gathered(x.contiguous().flatten(0, 1), size, name).unflatten(0, (rows, length * size))


def _narrow(x: Tensor, size: int, name: str) -> Tensor:
    rows, length = x.shape[:2]
    summed = _OPS.reduce_scatter_tensor(x.contiguous().flatten(0, 1), "sum", size, name)
    return _OPS.wait_tensor(summed).unflatten(0, (rows, length // size))


def _gathered(x: Tensor, size: int, name: str) -> Tensor:
    return _OPS.wait_tensor(_OPS.all_gather_into_tensor(x, size, name))
