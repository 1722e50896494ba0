"""An exit code is a verdict: it says what happened and whether trying again can help."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from enum import IntEnum
from typing import Any


class Exit(IntEnum):
    """The codes a rank, an agent and the driver end with; every other code, and every signal, is a crash (`RETRY`)."""

    DONE = 0
    CONFIG = 2
    RETRY = 75
    NOT_FINITE = 76
    PREEMPTED = 85

    @property
    def clean(self) -> bool:
        """The process ended as it meant to, its work done or saved."""
        return self in (Exit.DONE, Exit.PREEMPTED)

    @property
    def retried(self) -> bool:
        return self is Exit.RETRY


# A wrong config and a loss that is not finite outrank a crash: they are said on purpose and would only happen again,
# while a crash beside them is most often a neighbour whose connection went away.
_WORST_FIRST = (Exit.CONFIG, Exit.NOT_FINITE, Exit.RETRY, Exit.PREEMPTED, Exit.DONE)


def worst(verdicts: Iterable[Exit]) -> Exit:
    """The one verdict of many processes; `DONE` when there are none."""
    said = set(verdicts)
    return next((verdict for verdict in _WORST_FIRST if verdict in said), Exit.DONE)


@dataclass(frozen=True, kw_only=True)
class RankExit:
    """How one rank ended: `code` is None when a signal ended it."""

    code: int | None
    signal: int | None = None
    step: int | None = None
    reason: str = ""

    @property
    def verdict(self) -> Exit:
        return Exit(self.code) if self.code in set(Exit) else Exit.RETRY


@dataclass(frozen=True, kw_only=True)
class NodeExit:
    """How one node ended, and which of its ranks (global number) is to blame, if one is."""

    code: Exit
    ranks: dict[int, RankExit] = field(default_factory=dict)
    reason: str = ""
    culprit: int | None = None

    @property
    def step(self) -> int | None:
        return max((rank.step for rank in self.ranks.values() if rank.step is not None), default=None)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, message: dict[str, Any]) -> NodeExit:
        """Raises KeyError, TypeError or ValueError for a message that `to_json` did not write."""
        ranks = {int(rank): RankExit(**told) for rank, told in message["ranks"].items()}
        return cls(code=Exit(message["code"]), ranks=ranks, reason=message["reason"], culprit=message.get("culprit"))
