"""Two dimensions of ranks: heads are swapped for sequence within groups, and a ring or a gather spans the groups.

After USP (Fang and Zhao, 2024). Ranks of a group are consecutive, so that a group that divides the ranks of a node
never leaves it: what travels far is the outer schedule's, with a group's share of the heads.
"""

from dataclasses import dataclass
from typing import Annotated

from torch import Tensor

from farspan.parallel.context.exchange import Schedule
from farspan.parallel.context.gather import Gather
from farspan.parallel.context.pinned import Pinned
from farspan.parallel.context.ring import Ring
from farspan.parallel.context.sums import Grads, Me, Saved
from farspan.parallel.context.token_ring import TokenRing
from farspan.parallel.context.ulysses import Alone, Swapping

Outer = Annotated[Gather | Ring | TokenRing, "choice"]


@dataclass(frozen=True, kw_only=True)
class Grid(Pinned):
    """Ulysses within groups of `inner` consecutive ranks, `outer` between the groups."""

    inner: int
    """Ranks of a group; the heads are dealt out evenly among them."""
    outer: Outer = Gather()
    """What spans the groups: gather, ring or token_ring."""
    groups: int = 1
    """Parts that a rank's heads travel in."""

    def __post_init__(self) -> None:
        for name, value in (("inner", self.inner), ("groups", self.groups)):
            if value < 1:
                raise ValueError(f"{name}={value}: must be at least 1")
        for name in ("layout", "carrier"):
            if (value := getattr(self.outer, name)) != "auto":
                raise ValueError(f"outer.{name}={value}: has no say there; set {name} of the grid instead")

    @property
    def within(self) -> int:
        return self.inner

    def problems(self, cp: int, heads: int, kv_heads: int) -> list[str]:
        if cp % self.inner:
            near = max(n for n in range(1, min(self.inner, cp) + 1) if cp % n == 0)
            return [f"inner={self.inner}: must divide parallel.cp={cp}; try {near}"]
        part, key_part = heads // self.inner, kv_heads // self.inner
        if cp > self.inner and not _even(self.inner, heads, kv_heads):
            fit = [n for n in range(2, cp) if cp % n == 0 and _even(n, heads, kv_heads)]
            way_out = f"try {fit[-1]}" if fit else "take kind: ulysses or gather, which deal out any"
            return [f"inner={self.inner}: {heads} heads with {kv_heads} for keys cannot be dealt out evenly; {way_out}"]
        if cp > self.inner and (key_part or part) % self.groups:
            return [f"groups={self.groups}: must divide the {key_part or part} heads of each rank; try 1"]
        return []

    def forward(self, me: Me, q: Tensor, k: Tensor, v: Tensor) -> Schedule[tuple[Tensor, Tensor]]:
        return self._swapping(me).forward(me, q, k, v)

    def backward(self, me: Me, saved: Saved) -> Schedule[Grads]:
        return self._swapping(me).backward(me, saved)

    def _swapping(self, me: Me) -> Swapping:
        return Swapping(self.inner, self.outer if me.ranks > self.inner else Alone(), self.groups)


def _even(inner: int, heads: int, kv_heads: int) -> bool:
    return heads % inner == 0 and (kv_heads % inner == 0 or inner % kv_heads == 0)
