"""What routers have in common: what they report of their tokens, what they are charged, and what they keep."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from math import log
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from farspan.kernels.random import key, uniform
from farspan.parallel.context.shard import Documents
from farspan.parallel.sums import Now

Scope = Literal["row", "micro_batch", "step"]
"""Whose tokens are counted together: a row's; those of the micro-batch of a rank of dp; those of all ranks, and of the
step's micro-batches so far."""


LONGEST = 1 << 24
"""Tokens of a row that have chances of their own, however long the rows are that were put together with it."""


class Tally(NamedTuple):
    """What a router reports of this rank's tokens, row by row."""

    given: Tensor
    """Tokens that chose each expert, R E, in at least fp32."""
    scores: Tensor
    """Sums that the router is charged for, R n, differentiable; a zero where it is not."""
    z: Tensor
    """Sums of the squared log-sum-exp of logits, R; differentiable where it is charged for."""
    dropped: Tensor
    """Visits that found no room, a scalar."""
    unmet: Tensor
    """Tokens that meet no expert at all, a scalar."""
    wish: Tensor
    """What the router would keep of these tokens, times their number: E; a zero for nothing."""


class RowSums(NamedTuple):
    """Of each row of a micro-batch, or of all rows together, on all ranks: R or 1 each."""

    tokens: Tensor
    labels: Tensor

    @property
    def weight(self) -> Tensor:
        """What a token's share of a mean over tokens counts in a sum over labels."""
        return self.labels / self.tokens.clamp(min=1)


class Routed(nn.Module, ABC):
    """A feed-forward layer with experts, as blocks and models see it."""

    reads_codes = False
    scope: Scope = "row"

    @abstractmethod
    def forward(self, x: Tensor, documents: Documents) -> tuple[Tensor, Tally]:
        """x: B T D, this rank's tokens; padding meets no expert."""

    def charge(self, tally: Tally, given: Tensor, over: RowSums, rows: RowSums) -> Tensor:
        """What this rank's tokens are charged, in nats times labels: the ranks' parts sum to the whole. By itself
        nothing.

        given: tokens within `scope` that chose each expert, R E or 1 E; over: of the same, how many; rows: R.
        """
        return given.new_zeros(())

    def tell(self, name: str, now: Now) -> None:
        """Called before every micro-batch that is learnt from; name: the layer's in the model."""

    def settle(self, load: Tensor, wish: Tensor, scale: Tensor) -> None:
        """Called after an optimizer step, alike on all ranks: `load` (E) and `wish` are sums over all tokens of the
        step. scale: as the optimizer has it; where it is 0 nothing may change."""


class Kept(nn.Module):
    """Numbers that no gradient moves: in fp32 whatever the model is cast to, and in its checkpoints."""

    value: Tensor

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.register_buffer("value", torch.zeros(shape, dtype=torch.float32))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Kept":
        """Moves to other devices, but casts pass by: they take floating point alone."""
        return super()._apply(lambda x: fn(x.view(torch.int32)).view(torch.float32), recurse)


class Jitter:
    """Noise on what a router reads, by where a token stands in the step, so that no mesh changes it (Fedus et al.,
    2022)."""

    def __init__(self, size: float) -> None:
        self.size = size
        self._at: Tensor | None = None

    def tell(self, name: str, now: Now, device: torch.device) -> None:
        if self._at is None:
            self._at = torch.zeros(2, dtype=torch.int64, device=device)
        begin = key(now.seed, "jitter", name, now.step) >> 1
        for number, value in enumerate((begin, now.row)):  # filling waits for nothing, and no graph is made anew
            self._at[number].fill_(value)

    def __call__(self, tokens: Tensor, numbers: Tensor, length: int) -> Tensor:
        """tokens: N D, times 1 - size to 1 + size; numbers: N, as `numbered` has them; length: of a row."""
        if self._at is None:
            return tokens
        begin, row = self._at.unbind()
        place = ((row + numbers.long().div(length, rounding_mode="floor")) * LONGEST + numbers % length).unsqueeze(1)
        channel = torch.arange(tokens.shape[1], device=tokens.device)
        chance = uniform(begin + place * tokens.shape[1] + channel, 0)
        return tokens * (1 + self.size * (2 * chance - 1)).to(tokens.dtype)


def numbered(documents: Documents, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """Where each token of x (B T D) lies in the whole micro-batch, N, -1 for padding; and its rows and their length."""
    if documents.places is not None:
        return documents.places.flatten(), documents.whole
    return torch.arange(x.shape[0] * x.shape[1], dtype=torch.int32, device=x.device), (x.shape[0], x.shape[1])


def without_padding(chosen: Tensor, documents: Documents) -> Tensor:
    """chosen: N K, with -1 in the rows of padding."""
    if documents.places is None:
        return chosen
    return torch.where(documents.places.view(-1, 1) >= 0, chosen, -1)


def met(chosen: Tensor, like: Tensor) -> Tensor:
    """Ones where a token chose an expert: N K -> N E as `like`; numbers below 0 are nobody."""
    tokens, experts = like.shape
    found = torch.zeros(tokens, experts + 1, dtype=like.dtype, device=like.device)
    return found.scatter(1, torch.where(chosen < 0, experts, chosen).long(), 1.0)[:, :-1]


def uncharged(chosen: Tensor, logits: Tensor, documents: Documents, rows: int) -> Tally:
    """chosen: N K, logits: N E -> what is told of a router that drops nothing and learns by the tokens' loss alone."""
    none = logits.new_zeros(())
    given, z = by_row(met(chosen, logits), documents, rows), squared_lse(logits, documents, rows, learns=False)
    return Tally(given, scores=none, z=z, dropped=none, unmet=unmet(chosen, documents, logits), wish=none)


def unmet(chosen: Tensor, documents: Documents, like: Tensor) -> Tensor:
    """How many tokens chose nobody, or were chosen by nobody, as `like`: N K -> a scalar; padding left out."""
    none = (chosen < 0).all(1)
    if documents.places is not None:
        none = none & (documents.places.flatten() >= 0)
    return none.sum().to(like.dtype)


def squared_lse(logits: Tensor, documents: Documents, rows: int, learns: bool) -> Tensor:
    """Sums over the rows' tokens, R; differentiable if it `learns`."""
    with torch.set_grad_enabled(learns and torch.is_grad_enabled()):
        return by_row(logits.logsumexp(-1).square().unsqueeze(1), documents, rows).sum(
            1
        )  # no view, of which FSDP2 would warn


def by_row(x: Tensor, documents: Documents, rows: int) -> Tensor:
    """Sums over the tokens of each row, padding left out: N E -> R E. rows: R, where this rank has all of each row."""
    if documents.places is None:
        return x.unflatten(0, (rows, -1)).sum(1)
    rows, length = documents.whole
    number = torch.arange(rows, dtype=torch.int32, device=x.device)
    of = documents.places.flatten().div(length, rounding_mode="floor")  # -1 for padding
    return (number.unsqueeze(1) == of).to(x.dtype) @ x  # the same each time


def evenness(loads: Sequence[Tensor]) -> dict[str, Tensor]:
    """How evenly tokens were given to experts, of the layer where that is worst: device scalars.

    load_max: the fullest expert's tokens over the mean, 1 at best. load_entropy: of the shares, over that of equal
    ones, 1 at best. loads: of each layer, E.
    """
    fullest = [load.max() / load.mean().clamp(min=1e-30) for load in loads]
    shares = [load / load.sum().clamp(min=1e-30) for load in loads]
    entropies = [torch.special.entr(share).sum() / log(len(share)) for share in shares]
    return {"load_max": torch.stack(fullest).max(), "load_entropy": torch.stack(entropies).min()}
