"""Choices are said once, kept, and made again; a file that cannot be read is no reason to stop."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from farspan.platform.choices import FILE, Choices


class Picks:
    """A runtime that picks what it is told, or what was picked before."""

    def __init__(self) -> None:
        self.made: dict[str, str] = {}
        self.replayed: dict[str, str] = {}

    def pick(self, what: str, otherwise: str) -> None:
        self.made[what] = self.replayed.get(what, otherwise)

    def explain(self) -> str:
        return "\n".join(f"{what}: {picked}" for what, picked in self.made.items())

    def chosen(self) -> dict[str, str]:
        return dict(self.made)

    def replay(self, chosen: dict[str, str]) -> None:
        self.replayed = dict(chosen)


@pytest.fixture
def control(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(dist, "get_rank", lambda _: 0)
    monkeypatch.setattr(dist, "broadcast_object_list", lambda *_, **__: None)
    return None


def test_choices_are_said_once_kept_and_made_again(tmp_path: Path, control: Any) -> None:
    said: list[str] = []
    first = Picks()
    choices = Choices(tmp_path, first, control, said.append)  # type: ignore[arg-type]
    choices.tell()
    assert not said and not (tmp_path / FILE).exists(), "nothing was picked"
    first.pick("forward", "ring")
    choices.tell()
    choices.tell()
    first.pick("backward", "gather")
    choices.tell()
    assert said == ["forward: ring", "backward: gather"]
    assert json.loads((tmp_path / FILE).read_text()) == {"context": {"forward": "ring", "backward": "gather"}}

    again = Picks()
    Choices(tmp_path, again, control, said.append)  # type: ignore[arg-type]
    again.pick("forward", "what another machine would take")
    assert again.made == {"forward": "ring"}


@pytest.mark.parametrize("text", ["", "[]", '{"context": 3}', "{"])
def test_what_cannot_be_read_is_picked_anew(tmp_path: Path, control: Any, text: str) -> None:
    (tmp_path / FILE).write_text(text)
    picks = Picks()
    choices = Choices(tmp_path, picks, control, print)  # type: ignore[arg-type]
    picks.pick("forward", "gather")
    choices.tell()
    assert json.loads((tmp_path / FILE).read_text()) == {"context": {"forward": "gather"}}
