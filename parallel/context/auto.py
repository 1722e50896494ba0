"""The context schedule that fits the mesh: with cp = 1 there is nothing to exchange."""

from dataclasses import dataclass

from farspan.parallel.context.attention import Spread
from farspan.parallel.context.gather import Gather
from farspan.parallel.context.local import Local
from farspan.parallel.context.pinned import Axis


@dataclass(frozen=True, kw_only=True)
class Auto:
    """Picks the schedule from the mesh."""

    def problems(self, cp: int, heads: int, kv_heads: int) -> list[str]:
        """Nothing keeps it from any heads: gather spreads them all."""
        return []

    def build(self, axis: Axis | None = None) -> Local | Spread:
        return Gather().build(axis)
