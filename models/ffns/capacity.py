"""Experts that take so many tokens of a row and no more: who finds no room is decided alike on every mesh."""

from collections.abc import Callable
from math import ceil
from typing import Literal

import torch
from torch import Tensor

Drop = Literal["last", "least"]
"""Who finds no room: the last tokens of the row that chose the expert, or those that gave it the least probability."""

GRAINS = 1 << 12
"""`least` rounds probabilities to so many parts, and of equal ones the earlier token stays: what is left to the last
bit would differ from mesh to mesh."""


NEAR = 1e-9
"""What is that little above a whole number of visits is rounding, not another visit."""


def most(rows: int, length: int, *, active: int, experts: int, factor: float) -> int:
    """What an expert takes at most of rows of such a length."""
    return rows * ceil(length * active * (factor / experts) - NEAR)


def within(
    chosen: Tensor,
    share: Tensor,
    numbers: Tensor,
    whole: tuple[int, int],
    experts: int,
    *,
    factor: float,
    drop: Drop,
    every: Callable[[Tensor], Tensor],
    grains: int = GRAINS,
) -> Tensor:
    """chosen, N K, with -1 for visits beyond ⌈factor · K · tokens of the row / E⌉ of an expert: GShard's capacity
    (Lepikhin et al., 2021), row by row.

    share: N K, what part of its whole a visit's probability is, from 0 to 1; numbers: N, where each token lies in the
    whole micro-batch, rows end to end, -1 for padding; whole: its rows and their length; every: N … -> M …, what all
    ranks say that hold tokens of these rows. A visit is one number that puts it in order, so that a search finds how
    many come before it; ranks exchange these, and no count comes to the host.
    """
    rows, length = whole
    grain = torch.zeros_like(chosen, dtype=torch.int64)
    if drop == "least":
        grain = grains - (share.detach() * grains).round().long().clamp(0, grains)
    at = numbers.long().unsqueeze(1)
    row = at.div(length, rounding_mode="floor")
    seat = row * experts + chosen.long()  # of all rows' experts
    span = (grains + 1) * length
    place = seat * span + grain * length + at % length
    there = (chosen >= 0) & (chosen < experts) & (at >= 0)
    place = torch.where(there, place, rows * experts * span)
    line = every(place).flatten().sort().values
    bounds = torch.arange(rows + 1, device=line.device) * (experts * span)
    visits = torch.searchsorted(line, bounds).diff()  # of each row
    # A product with one number is the same on every device; a quotient by one is not.
    room = (visits.double() * (factor / experts) - NEAR).ceil().long()
    before = torch.searchsorted(line, place) - torch.searchsorted(line, seat.clamp(min=0) * span)
    return torch.where(there & (before >= room[row.clamp(min=0)]), -1, chosen)
