"""What a key of a configuration file means, read from the dataclasses that decode it: no second list can age."""

import ast
import dataclasses
import inspect
import re
import shutil
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, dataclass
from functools import cache
from itertools import pairwise
from typing import Any, get_args, get_origin, get_type_hints

from farspan.launch.on_ray import Ray
from farspan.launch.runner import Launch
from farspan.platform.config import ConfigError, classes_of, encode, in_words, is_choice, kind, nearest, options_of
from farspan.platform.job import Job


@dataclass(frozen=True, kw_only=True)
class File(Job):
    """All of a configuration file."""

    launch: Launch = Ray()
    """Where the ranks run."""


@dataclass(frozen=True, kw_only=True)
class Key:
    """A key, or a class of keys, at one place of the file."""

    path: str
    hint: Any
    """The type of the value."""
    owner: type | None = None
    """The class that has the key; None for a class itself."""
    default: Any = ...
    """`...` where there is none."""
    text: str = ""
    """What its author wrote below the field."""
    kinds: tuple[str, ...] = ()
    """The kinds of the owner that have this same key, where there is a choice."""


def explain(path: str = "") -> str:
    """The key at `path` in words; all top-level keys for none. List items and kinds may be named or left out:
    `model.blocks.mixer`, `model.blocks.0.mixer.softmax.heads` and `optim.betas` all work.

    Raises ConfigError for a path that leads nowhere.
    """
    width = max(60, min(shutil.get_terminal_size((100, 24)).columns, 110))
    if not path.strip("."):
        return "\n".join(_overview(width))
    return "\n\n".join("\n".join(_entry(key, width)) for key in _found(path))


def keys(owner: type, path: str = "") -> list[Key]:
    """The keys of a configuration class, in its order."""
    hints, texts = get_type_hints(owner, include_extras=True), _texts(owner)
    return [
        Key(path=_join(path, f.name), hint=hints[f.name], owner=owner, default=_default(f), text=texts.get(f.name, ""))
        for f in dataclasses.fields(owner)
    ]


def words_of(owner: type) -> str:
    """The docstring of a configuration class, or of what it inherits from; not the one that dataclasses make up."""
    for cls in owner.__mro__:
        if dataclasses.is_dataclass(cls) and (text := ast.get_docstring(_tree(cls))):
            return text
    return ""


def classes_in(hint: Any) -> list[type]:
    """The configuration classes of a type, those of list items and of named parts included."""
    found = list(classes_of(hint))
    for option in options_of(hint):
        if get_origin(option) in (tuple, dict):
            found += classes_in(get_args(option)[-1 if get_origin(option) is dict else 0])
    return found


def _found(path: str) -> list[Key]:
    """The keys that a path names: several where kinds differ in what they mean by it."""
    here = [Key(path="", hint=File)]
    for part in re.sub(r"\[(\d+)\]", r".\1", path).strip(".").split("."):
        if part == "kind" and any(is_choice(hint) for key in here for hint in _layers(key.hint)):
            continue  # the key that every choice has: what it may be stands there
        if not part.isdigit() or here[0].hint is File:
            here = _into(here, part, path)
    return here


def _into(here: Sequence[Key], part: str, path: str) -> list[Key]:
    """One word deeper: a kind, a key, or the name that a file gives to a part."""
    owners = [(key, cls) for key in here for cls in classes_in(key.hint)]
    found = [Key(path=key.path, hint=cls, kinds=(part,)) for key, cls in owners if part == _kind(key, cls)]
    for key, cls in owners:
        chosen_by = _kind(key, cls)
        kinds = (chosen_by,) if chosen_by else key.kinds if key.owner is None else ()
        for child in keys(cls, key.path):
            if child.path == _join(key.path, part):
                _add(found, child, kinds)
    if found:
        return found
    if named := [key for key in here if any(get_origin(option) is dict for option in options_of(key.hint))]:
        return [Key(path=f"{key.path}.NAME", hint=_items(key.hint)) for key in named]
    known = dict.fromkeys(name for key, cls in owners for name in (_kind(key, cls), *_names(cls)) if name)
    at = next((key.path for key in here if key.path), "")
    raise ConfigError([f"--explain {path}: {at or 'a configuration'} has no key {part}{nearest(part, known)}"])


def _add(found: list[Key], key: Key, more: tuple[str, ...]) -> None:
    """Adds a key of some kinds, or only these kinds where another one inherits the very same key."""
    for place, other in enumerate(found):
        if (other.hint, other.default, other.text) == (key.hint, key.default, key.text):
            found[place] = dataclasses.replace(other, kinds=other.kinds + more)
            return
    found.append(dataclasses.replace(key, kinds=more))


def _overview(width: int) -> Iterator[str]:
    yield "Keys of a configuration file; launch config --explain KEY tells more, for instance --explain model.blocks"
    yield ""
    for key in keys(File):
        inside = classes_in(key.hint)
        chosen = f"kind: {' | '.join(map(kind, inside))}" if is_choice(key.hint) else ""
        said = key.text or ("" if chosen or not inside else words_of(inside[0])) or ("" if chosen else _type(key.hint))
        first = re.split(r"(?<=\.)\s", " ".join(said.split()), maxsplit=1)[0]
        words = textwrap.shorten(f"{first} {chosen}", width - 14, placeholder=" …")
        yield f"  {key.path:<11} {words}"


def _entry(key: Key, width: int) -> Iterator[str]:
    """A key with its type, default and meaning, then the keys below it."""
    inside = classes_in(key.hint)
    if key.owner is None:
        yield f"{key.path}, kind: {key.kinds[0]}" if key.kinds else key.path
    else:
        yield f"{key.path}  ({' | '.join(key.kinds)})" if key.kinds else key.path
        yield from _wrapped(_value(key), width, 2)
        text = key.text or _mention(key)
        if text:
            yield from _wrapped(text, width, 2)
    choice = key.owner is not None and any(is_choice(hint) for hint in _layers(key.hint))
    for cls in inside:
        yield ""
        if choice:
            yield f"  kind: {kind(cls)}"
        if said := words_of(cls):
            yield from _wrapped(said, width, 4 if choice else 2)
        yield from _rows(keys(cls, key.path), width, 4 if choice else 2)


def _rows(found: Sequence[Key], width: int, indent: int) -> Iterator[str]:
    """A row of name, type and default for each key, what it means below."""
    column = max((len(key.path.rpartition(".")[2]) for key in found), default=0) + 2
    for key in found:
        first, *rest = _wrapped(_value(key), width, indent + column)
        yield f"{' ' * indent}{key.path.rpartition('.')[2]:<{column}}{first.strip()}"
        yield from rest
        if key.text:
            yield from _wrapped(key.text, width, indent + column)


def _wrapped(text: str, width: int, indent: int) -> Iterator[str]:
    """Paragraphs folded to the width."""
    for paragraph in re.split(r"\n\s*\n", inspect.cleandoc(text)):
        margin = " " * indent
        yield from textwrap.wrap(
            " ".join(paragraph.split()), width, initial_indent=margin, subsequent_indent=margin, break_on_hyphens=False
        )


def _value(key: Key) -> str:
    if key.default is ...:
        return f"{_type(key.hint)}; required"
    default = _yaml(encode(key.default, key.hint))
    if dataclasses.is_dataclass(key.default) and len(default) > 50:
        default = "{kind: " + kind(type(key.default)) + ", …}" if is_choice(key.hint) else "as below"
    return f"{_type(key.hint)}; default {default}"


def _mention(key: Key) -> str:
    """What the class says, where it names the key and the field itself says nothing."""
    said = words_of(key.owner) if key.owner else ""
    return said if f"`{key.path.rpartition('.')[2]}`" in said else ""


def _type(hint: Any) -> str:
    """A type in words."""
    if is_choice(hint):
        return in_words(hint)
    parts = []
    for option in options_of(hint):
        if get_origin(option) is tuple:
            parts.append(f"a list, each item {_type(get_args(option)[0])}")
        elif get_origin(option) is dict:
            parts.append(f"names, each with {_type(get_args(option)[1])}")
        else:
            parts.append(in_words(option))
    return " or ".join(parts)


def _layers(hint: Any) -> Iterator[Any]:
    """The type, and those of its items."""
    yield hint
    for option in options_of(hint):
        if get_origin(option) in (tuple, dict):
            yield from _layers(get_args(option)[-1 if get_origin(option) is dict else 0])


def _items(hint: Any) -> Any:
    """The type of what a mapping's names stand for."""
    return next(get_args(option)[1] for option in options_of(hint) if get_origin(option) is dict)


def _kind(key: Key, cls: type) -> str | None:
    """The name of `cls` as a kind at this key; None where there is no choice, or it is made."""
    return kind(cls) if any(is_choice(hint) and cls in classes_of(hint) for hint in _layers(key.hint)) else None


def _names(cls: type) -> list[str]:
    return [f.name for f in dataclasses.fields(cls)]


def _default(field: "dataclasses.Field[Any]") -> Any:
    if field.default_factory is not MISSING:
        return field.default_factory()
    return ... if field.default is MISSING else field.default


def _yaml(value: Any) -> str:
    """A plain value on one line, as a file would have it."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_yaml(child)}" for key, child in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_yaml, value)) + "]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value) or "''"


def _texts(owner: type) -> dict[str, str]:
    """The strings that stand below fields, those of bases included: Python itself forgets them."""
    found: dict[str, str] = {}
    for cls in reversed(owner.__mro__):
        if dataclasses.is_dataclass(cls):
            for field, below in pairwise(_tree(cls).body):
                match field, below:
                    case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                        found[name] = text
    return found


@cache
def _tree(cls: type) -> ast.ClassDef:
    """The source of a class, parsed."""
    found = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    assert isinstance(found, ast.ClassDef)
    return found


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
