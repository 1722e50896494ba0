"""Every key of a configuration file says what it means, and every path a person may write finds it."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

import pytest

from farspan.launch import cli
from farspan.launch.explain import File, Key, classes_in, explain, keys, words_of
from farspan.platform.config import ConfigError


def reachable(owner: type, path: str = "", above: frozenset[type] = frozenset()) -> Iterator[Key]:
    for key in keys(owner, path):
        yield key
        for cls in classes_in(key.hint):
            if cls not in above:
                yield from reachable(cls, key.path, above | {owner, cls})


def test_every_key_is_documented() -> None:
    silent = []
    for key in reachable(File):
        name = key.path.rpartition(".")[2]
        sections = classes_in(key.hint)
        in_class = key.owner is not None and f"`{name}`" in words_of(key.owner)
        if not (key.text or in_class or (sections and all(words_of(cls) for cls in sections))):
            silent.append(f"{name} of {key.owner}")
    assert not silent, "write a docstring below these fields:\n" + "\n".join(dict.fromkeys(silent))


def test_every_key_can_be_asked_for() -> None:
    paths = list(dict.fromkeys(key.path for key in reachable(File)))
    assert {"metrics.trace.ranks", "model.blocks.mixer.heads", "launch.retries"} <= set(paths)
    for path in paths:
        assert f"\n{path}" in f"\n{explain(path)}"


def test_without_a_path_each_top_level_key_has_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for columns in ("70", "100", "300"):
        monkeypatch.setenv("COLUMNS", columns)
        _, empty, *lines = explain().splitlines()
        assert empty == "" and [line.split()[0] for line in lines] == [key.path for key in keys(File)]
        assert all(len(line.split()) > 1 and len(line) <= int(columns) for line in lines)


def test_a_choice_lists_its_kinds_with_their_keys() -> None:
    told = explain("schedule")
    assert re.findall(r"^  kind: (\w+)$", told, re.MULTILINE) == ["cosine", "linear", "constant", "wsd"]
    cosine, wsd = told.index("kind: cosine\n"), told.index("kind: wsd\n")
    assert cosine < told.index("floor") < wsd < told.index("decay", wsd)


@pytest.mark.parametrize("path", ["optim.betas", "optim.adamw.betas", "optim.betas."])
def test_a_kind_may_be_named_or_left_out(path: str) -> None:
    first, value, *_ = explain(path).splitlines()
    assert first.startswith("optim.betas  (") and "adamw" in first
    assert value == "  a list, each item a finite number; default [0.9, 0.95]"


@pytest.mark.parametrize(
    "path", ["model.blocks.mixer", "model.blocks.0.mixer", "model.blocks[3].mixer", "model.decoder.blocks.mixer"]
)
def test_list_items_may_be_named_or_left_out(path: str) -> None:
    assert explain(path).startswith("model.blocks.mixer") and "\n  kind: softmax\n" in explain(path)


def test_a_kind_alone_shows_its_keys_and_not_those_of_others() -> None:
    told = explain("schedule.constant")
    assert told.startswith("schedule, kind: constant\n") and "warmup" in told and "floor" not in told


def test_kinds_that_share_a_key_are_told_together() -> None:
    assert explain("schedule.floor").startswith("schedule.floor  (cosine | linear | wsd)\n")
    assert explain("schedule.floor").count("share of the peak") == 1


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("optin", "--explain optin: a configuration has no key optin; did you mean optim?"),
        ("optim.bets", "--explain optim.bets: optim has no key bets; did you mean betas?"),
        ("schedule.cosin", "schedule has no key cosin; did you mean cosine?"),
        ("train.steps.more", "train.steps has no key more; known here: nothing"),
    ],
)
def test_a_path_that_leads_nowhere_names_the_nearest(path: str, said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        explain(path)


@dataclass(frozen=True, kw_only=True)
class Grain:
    weight: float
    """How much of it."""


@dataclass(frozen=True, kw_only=True)
class Bread:
    """Of `flour`."""

    grains: dict[str, Annotated[Grain, "choice"]]
    flour: int | None = None
    salted: bool = True


def test_types_of_names_and_texts_are_read_from_the_source() -> None:
    grains, flour, salted = keys(Bread, "a")
    assert (grains.path, flour.default, grains.default, salted.text) == ("a.grains", None, ..., "")
    assert classes_in(grains.hint) == [Grain] and keys(Grain)[0].text == "How much of it."
    assert words_of(Bread) == "Of `flour`." and words_of(Grain) == ""


def test_the_command_explains_and_refuses(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["config", "--explain"]) == 0 and "checkpoint" in capsys.readouterr().out
    assert cli.main(["config", "--explain", "metrics.trace.first"]) == 0
    assert "default 10" in capsys.readouterr().out
    assert cli.main(["config", "--explain", "metric"]) == 2
    assert "did you mean metrics?" in capsys.readouterr().err
