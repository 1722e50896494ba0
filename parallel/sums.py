"""What a forward of a model with experts comes to, and what it is told beforehand."""

from typing import NamedTuple

from torch import Tensor


class Sums(NamedTuple):
    """Sums over a micro-batch; divided by the labels of the whole step they are means over it."""

    loss: Tensor
    """Of the tokens' losses, in nats: a scalar."""
    cost: Tensor
    """What routers are charged for uneven loads and large logits: every row's, times its labels; a scalar."""
    loads: tuple[Tensor, ...]
    """Of each layer with experts, how many tokens chose each expert: E, in fp32."""
    wishes: tuple[Tensor, ...]
    """Of each layer with experts, what its router would keep of these tokens, times their number: E, or 0."""
    told: Tensor
    """Over layers, 4: visits that were dropped, squared log-sum-exp of logits, tokens that met nobody, and tokens."""


class Now(NamedTuple):
    """Which micro-batch comes."""

    seed: int
    """The run's."""
    step: int
    """Optimizer steps made."""
    row: int
    """The number of its first row among those of the step, on all ranks."""
    first: bool
    """Whether it is this rank's first of the step."""
