"""Configurations: strict, typed, and all their mistakes at once."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest

from farspan.platform.config import ConfigError, Source, decode, dump, encode, read, unresolved


@dataclass(frozen=True, kw_only=True)
class TokenRing:
    chunks: int = 1


@dataclass(frozen=True, kw_only=True)
class Ulysses:
    groups: int = 2

    def __post_init__(self) -> None:
        if self.groups < 1:
            raise ValueError(f"groups={self.groups}: must be at least 1")


@dataclass(frozen=True, kw_only=True)
class Only:
    size: int


@dataclass(frozen=True, kw_only=True)
class Part:
    repeat: int = 1
    choice: TokenRing | Ulysses | None = None


@dataclass(frozen=True, kw_only=True)
class Job:
    name: str
    steps: int
    rate: float = 0.5
    ring: TokenRing | Ulysses = TokenRing()
    only: Annotated[Only, "choice"] | None = None
    parts: tuple[Part, ...] = ()
    mode: Literal["fast", "slow"] = "fast"
    ranks: int | Literal["auto"] = "auto"
    flag: bool = False
    shares: dict[str, float] | None = None


def job(tmp_path: Path, text: str, *overrides: str, notes: list[str] | None = None) -> Job:
    path = tmp_path / "job.yaml"
    path.write_text(text)
    return decode(read(path, overrides), Job, (notes if notes is not None else []).append)


BASE = "name: a\nsteps: 5\n"


def test_values_choices_lists_and_defaults(tmp_path: Path) -> None:
    text = BASE + (
        "ring: {kind: ulysses, groups: 4}\nonly: {kind: only, size: 3}\n"
        "parts: [{repeat: 2, choice: {kind: token_ring}}, {choice: null}]\nshares: {a: 1, b: 0.5}\n"
    )
    assert job(tmp_path, text) == Job(
        name="a",
        steps=5,
        ring=Ulysses(groups=4),
        only=Only(size=3),
        parts=(Part(repeat=2, choice=TokenRing()), Part()),
        shares={"a": 1.0, "b": 0.5},
    )


@pytest.mark.parametrize(("written", "value"), [("1e6", 1_000_000), ("3.0", 3), ("7", 7)])
def test_a_whole_number_is_an_integer_however_it_is_written(tmp_path: Path, written: str, value: int) -> None:
    assert job(tmp_path, BASE, f"steps={written}").steps == value


def test_overrides_reach_into_lists_and_new_branches(tmp_path: Path) -> None:
    text = BASE + "parts: [{repeat: 2}, {repeat: 3}]\n"
    found = job(
        tmp_path, text, "parts[1].repeat=9", "parts.0.choice.kind=ulysses", "parts.0.choice.groups=7", "flag=true"
    )
    assert found.parts == (Part(repeat=2, choice=Ulysses(groups=7)), Part(repeat=9)) and found.flag


def test_another_kind_drops_the_files_keys_and_says_so(tmp_path: Path) -> None:
    notes: list[str] = []
    found = job(tmp_path, BASE + "ring: {kind: token_ring, chunks: 4}\n", "ring.kind=ulysses", notes=notes)
    assert found.ring == Ulysses()
    assert notes == ["ring.chunks=4 of the file is dropped: ring.kind=ulysses has no such key"]


def test_keys_on_the_command_line_stay_strict(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"ring\.chunks=2: unknown key"):
        job(tmp_path, BASE + "ring: {kind: token_ring, chunks: 4}\n", "ring.kind=ulysses", "ring.chunks=2")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stpes=3", "stpes=3: unknown key; did you mean steps?"),
        ("zzz=3", "zzz=3: unknown key; known here: name, steps, rate"),
        ("steps=1.5", "steps=1.5: must be an integer"),
        ("steps=true", "steps=True: must be an integer"),
        ("steps=", "steps=None: must be an integer"),
        ("steps=nan", "must be an integer"),
        ("rate=fast", "rate='fast': must be a finite number"),
        ("rate=.nan", "rate=nan: must be a finite number"),
        ("rate=1e400", "must be a finite number"),
        ("steps=1e30", "must be an integer"),
        ("ring.kind=[a]", "ring.kind=['a']: unknown kind"),
        ("name=yes", "name=True: must be a string; YAML reads this word as a truth value: put it in quotes"),
        ("mode=medium", "mode='medium': must be fast or slow"),
        ("ranks=many", "ranks='many': must be an integer or auto"),
        ("ring.kind=token_rig", "ring.kind='token_rig': unknown kind; did you mean token_ring?"),
        ("ring=3", "ring=3: must be a mapping with kind: token_ring | ulysses"),
        ("ring={chunks: 2}", "ring: needs a kind; one of token_ring, ulysses"),
        ("ring={kind: ulysses, groups: 0}", "ring.groups=0: must be at least 1"),
        ("only.kind=onyl", "only.kind='onyl': unknown kind; did you mean only?"),
        ("only={kind: only}", "only.size: missing; it must be an integer"),
        ("parts.0.repeat=2", "parts has 0 items, no item 0"),
        ("parts=[{repaet: 2}]", "parts.0.repaet=2: unknown key; did you mean repeat?"),
        ("parts=3", "parts=3: must be a list of keys of Part"),
        ("shares.a=much", "shares.a='much': must be a finite number"),
        ("steps", "override 'steps': must look like a.b=c"),
        ("=3", "must look like a.b=c"),
        ("rate={a", "write a.b=c with c as YAML"),
        ("rate=${nowhere}", "nowhere"),
        ("rate=${oc.env:FARSPAN_NO_SUCH_VARIABLE}", "FARSPAN_NO_SUCH_VARIABLE.*set the variable"),
    ],
)
def test_errors_name_place_value_and_way_out(tmp_path: Path, override: str, message: str) -> None:
    import re

    pattern = message if ".*" in message else re.escape(message)
    with pytest.raises(ConfigError, match=pattern):
        job(tmp_path, BASE + "parts: []\n", override)


def test_all_mistakes_are_named_together(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        job(tmp_path, "stpes: 3\nmode: medium\nring: {kind: x}\n")
    assert len(caught.value.problems) == 5  # the three written, and two keys missing


def test_a_file_that_is_missing_or_no_mapping(tmp_path: Path) -> None:
    (tmp_path / "quickstart.yaml").write_text(BASE)
    with pytest.raises(ConfigError, match=r"quikstart.yaml: no such file; did you mean .*quickstart.yaml\?"):
        read(tmp_path / "quikstart.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ConfigError, match="holds a list or nothing"):
        read(tmp_path / "list.yaml")
    (tmp_path / "broken.yaml").write_text("a: [1\n")
    with pytest.raises(ConfigError, match="not readable as YAML"):
        read(tmp_path / "broken.yaml")


def test_what_is_written_reads_back_equal(tmp_path: Path) -> None:
    first = job(tmp_path, BASE + "only: {kind: only, size: 2}\nparts: [{choice: {kind: ulysses}}]\nshares: {a: 1}\n")
    again = job(tmp_path, dump(encode(first)))
    assert again == first


def test_the_environment_is_never_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FARSPAN_TEST_SECRET", "hush")
    path = tmp_path / "job.yaml"
    path.write_text(BASE.replace("name: a", "name: ${oc.env:FARSPAN_TEST_SECRET}"))
    source: Source = read(path)
    found: Any = decode(source, Job)
    assert found.name == "hush"
    text = dump(unresolved(encode(found), source.raw))
    path.write_text(BASE + "rate: ${oc.env:FARSPAN_TEST_SECRET}\n")
    with pytest.raises(ConfigError, match=r"rate=\$\{oc.env:FARSPAN_TEST_SECRET\}: must be") as caught:
        decode(read(path), Job)
    assert "hush" not in str(caught.value)
    assert "hush" not in text and "${oc.env:FARSPAN_TEST_SECRET}" in text
