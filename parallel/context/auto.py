"""The context schedule that fits the mesh: with cp = 1 there is nothing to exchange."""

from dataclasses import dataclass

from farspan.parallel.context.local import Local


@dataclass(frozen=True, kw_only=True)
class Auto:
    """Picks the schedule from the mesh."""

    def build(self) -> Local:
        return Local()
