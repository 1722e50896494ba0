"""What a forward of a model with experts comes to."""

from typing import NamedTuple

from torch import Tensor


class Sums(NamedTuple):
    """Sums over a micro-batch; divided by the labels of the whole step they are means over it."""

    loss: Tensor
    """Of the tokens' losses, in nats: a scalar."""
    cost: Tensor
    """What routers are charged for uneven loads and large logits: every row's, times its labels; a scalar."""
    loads: tuple[Tensor, ...]
    """Of each layer with experts, how many tokens each expert was given: E, in fp32."""
