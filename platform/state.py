"""Where a run stands: global numbers, the same on every rank and on any number of ranks."""

from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True, kw_only=True)
class RunState:
    step: int = 0
    """Optimizer steps made."""
    rows: int = 0
    """Rows of the training data consumed."""
    tokens: int = 0
    """Tokens seen, padding not counted."""

    def advance(self, *, rows: int, tokens: int) -> "RunState":
        return replace(self, step=self.step + 1, rows=self.rows + rows, tokens=self.tokens + tokens)

    @staticmethod
    def of(manifest: dict[str, Any]) -> "RunState":
        return RunState(**manifest["state"])
