"""What every kind of data builds."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from numpy.typing import NDArray

from farspan.platform.data.row import Rows


class Language(Protocol):
    """A tokenizer as sampling and objectives need it: text to tokens and back."""

    @property
    def name(self) -> str: ...

    @property
    def vocabulary(self) -> int: ...

    @property
    def end(self) -> int: ...

    def encode(self, text: str) -> NDArray[Any]: ...

    def decode(self, ids: Sequence[int] | NDArray[Any]) -> str: ...

    def token(self, name: str) -> int | None: ...


@dataclass(frozen=True)
class Corpus:
    """Documents ready to train on. The same contents give the same corpus wherever and whenever they are read."""

    train: Rows
    held_out: Rows
    tokenizer: Language
    fingerprint: str
    """Hash of the documents' contents, the tokenizer and the held-out share: alike on every machine that may resume."""
    notes: tuple[str, ...]
    """What was read, skipped and cached, for a person."""
