"""YAML in, frozen dataclasses out: read once, strictly, with every mistake named in one go."""

import dataclasses
import difflib
import re
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

T = TypeVar("T")
Plain = dict[str, Any]


class ConfigError(ValueError):
    """Everything that is wrong with a configuration, a line each: place, value, way out."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(self.problems))


@dataclass(frozen=True, kw_only=True)
class Source:
    """A configuration before it is decoded: the plain tree, and which paths the command line wrote."""

    tree: Plain
    raw: Plain
    """The same tree with `${...}` unresolved: what may be written to disk."""
    overridden: frozenset[str] = frozenset()


def read(path: Path, overrides: Iterable[str] = ()) -> Source:
    """Reads a YAML file and applies `a.b=c` overrides in order; list items are named `a.0.b` or `a[0].b`."""
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], n=1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else "; give the path of a YAML file"
        raise ConfigError([f"--config {path}: no such file{hint}"])
    try:
        config = OmegaConf.load(path)
    except Exception as error:  # yaml and omegaconf raise many kinds; all mean that the file cannot be read
        raise ConfigError([f"--config {path}: not readable as YAML: {error}"]) from error
    if not OmegaConf.is_dict(config):
        raise ConfigError([f"--config {path}: holds a list or nothing; it must hold keys such as name:, model:, data:"])
    problems: list[str] = []
    overridden = {key for text in overrides if (key := _override(config, text, problems))}
    if problems:
        raise ConfigError(problems)
    try:
        tree = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(
            [f"{path}: {str(error).splitlines()[0]}; set the variable, or write the value itself"]
        ) from error
    raw = OmegaConf.to_container(config, resolve=False)
    assert isinstance(tree, dict) and isinstance(raw, dict)
    return Source(tree=_strings(tree), raw=_strings(raw), overridden=frozenset(overridden))


def _override(config: Any, text: str, problems: list[str]) -> str | None:
    """Applies one `a.b=c`; returns its dotted path, or notes what is wrong with it."""
    key, equals, value = text.partition("=")
    path = re.sub(r"\[(\d+)\]", r".\1", key.strip())
    if not equals or not path:
        problems.append(f"override {text!r}: must look like a.b=c, for instance train.steps=100")
        return None
    node: Any = OmegaConf.to_container(config, resolve=False)
    for depth, part in enumerate(path.split(".")):
        if isinstance(node, list) and not (part.isdigit() and int(part) < len(node)):
            at = ".".join(path.split(".")[:depth])
            problems.append(f"override {text!r}: {at} has {len(node)} items, no item {part}; count from 0")
            return None
        node = node[int(part)] if isinstance(node, list) else node.get(part) if isinstance(node, dict) else None
    try:
        parsed = OmegaConf.to_container(OmegaConf.create(f"value: {value}"), resolve=False)
        assert isinstance(parsed, dict)
        OmegaConf.update(config, path, parsed["value"], merge=False, force_add=True)
    except Exception as error:  # a value that is no YAML, or a path through a plain value
        problems.append(f"override {text!r}: {str(error).splitlines()[0]}; write a.b=c with c as YAML")
        return None
    return path


def _strings(value: Any) -> Any:
    """Keys as strings all the way down: YAML reads `1:` as a number."""
    if isinstance(value, dict):
        return {str(key): _strings(child) for key, child in value.items()}
    return [_strings(child) for child in value] if isinstance(value, list) else value


def kind(cls: type) -> str:
    """The name of a class in YAML: `TokenRing` is `token_ring`."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", cls.__name__).lower()


def decode(source: Source, cls: type[T], notes: Callable[[str], None] = lambda _: None) -> T:
    """Builds `cls` from the tree; raises one ConfigError with everything that is wrong."""
    decoder = _Decoder(source.overridden, notes)
    value = decoder.dataclass(source.tree, cls, "")
    if decoder.problems:
        raise ConfigError([_veil(problem, source.tree, source.raw) for problem in decoder.problems])
    return value


def encode(value: Any, hint: Any = Any) -> Any:
    """The plain tree of a config, `kind` included wherever the type `hint` is a choice: `decode` reads it back."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        hints = get_type_hints(type(value), include_extras=True)
        tree = {f.name: encode(getattr(value, f.name), hints[f.name]) for f in dataclasses.fields(value)}
        return {"kind": kind(type(value)), **tree} if is_choice(hint) else tree
    if isinstance(value, tuple):
        return [encode(item, _inside(hint, tuple)) for item in value]
    if isinstance(value, dict):
        return {key: encode(item, _inside(hint, dict)) for key, item in value.items()}
    return value


def _inside(hint: Any, container: type) -> Any:
    """The type of a container's items, looked up through unions."""
    for option in options_of(hint):
        if get_origin(option) is container:
            return get_args(option)[-1 if container is dict else 0]
    return Any


def unresolved(tree: Any, raw: Any) -> Any:
    """`tree` with each `${...}` of `raw` put back, so that no secret of the environment is ever written."""
    if isinstance(raw, str) and "${" in raw:
        return raw
    if isinstance(tree, dict) and isinstance(raw, dict):
        return {key: unresolved(child, raw.get(key)) for key, child in tree.items()}
    if isinstance(tree, list) and isinstance(raw, list) and len(tree) == len(raw):
        return [unresolved(child, other) for child, other in zip(tree, raw, strict=True)]
    return tree


def _veil(problem: str, tree: Any, raw: Any) -> str:
    """A problem with each value that came from `${...}` shown as it was written."""
    if isinstance(tree, dict) and isinstance(raw, dict):
        for key, child in tree.items():
            problem = _veil(problem, child, raw.get(key))
    elif isinstance(tree, list) and isinstance(raw, list):
        for child, other in zip(tree, raw, strict=False):
            problem = _veil(problem, child, other)
    elif isinstance(raw, str) and "${" in raw:
        problem = problem.replace(f"={_show(tree)}", f"={raw}")
    return problem


def dump(tree: Plain) -> str:
    """A plain tree as YAML text."""
    return OmegaConf.to_yaml(OmegaConf.create(tree))


def is_choice(hint: Any) -> bool:
    """Whether a `kind` picks the class: a union of dataclasses, or one marked `Annotated[Text, "choice"]` today."""
    if get_origin(hint) in (Union, types.UnionType):
        return len(classes_of(hint)) > 1 or any(is_choice(arg) for arg in get_args(hint))
    return "choice" in getattr(hint, "__metadata__", ())


def classes_of(hint: Any) -> list[type]:
    return [arg for arg in options_of(hint) if dataclasses.is_dataclass(arg) and isinstance(arg, type)]


def options_of(hint: Any) -> tuple[Any, ...]:
    """The members of a union, flat; of anything else, itself."""
    if getattr(hint, "__metadata__", None) is not None:
        return options_of(get_args(hint)[0])
    if get_origin(hint) in (Union, types.UnionType):
        return tuple(option for arg in get_args(hint) for option in options_of(arg))
    return (hint,)


@dataclass
class _Decoder:
    overridden: frozenset[str]
    notes: Callable[[str], None]
    problems: list[str] = field(default_factory=list)

    def value(self, tree: Any, hint: Any, path: str) -> Any:
        options = options_of(hint)
        if tree is None and types.NoneType in options:
            return None
        classes = classes_of(hint)
        if isinstance(tree, dict) and classes:
            if is_choice(hint):
                return self.choice(tree, classes, path)
            return self.dataclass(tree, classes[0], path)
        for option in options:
            found = _plain(tree, option)
            if found is not MISSING:
                return found
            if get_origin(option) is tuple and isinstance(tree, (list, tuple)):
                return tuple(self.value(item, get_args(option)[0], f"{path}.{i}") for i, item in enumerate(tree))
            if get_origin(option) is dict and isinstance(tree, dict):
                return {key: self.value(item, get_args(option)[1], _join(path, key)) for key, item in tree.items()}
        self.problems.append(f"{path}={_show(tree)}: must be {in_words(hint)}{_quote_hint(tree, options)}")
        return None

    def choice(self, tree: Plain, classes: list[type], path: str) -> Any:
        kinds = {kind(cls): cls for cls in classes}
        chosen = tree.get("kind", MISSING)
        if chosen is MISSING:
            self.problems.append(f"{path}: needs a kind; one of {', '.join(sorted(kinds))}")
            return None
        if not isinstance(chosen, str) or chosen not in kinds:
            self.problems.append(f"{path}.kind={_show(chosen)}: unknown kind{nearest(str(chosen), kinds)}")
            return None
        rest = {key: child for key, child in tree.items() if key != "kind"}
        if f"{path}.kind" in self.overridden:
            rest = self.without_stale(rest, kinds[chosen], path)
        return self.dataclass(rest, kinds[chosen], path)

    def without_stale(self, tree: Plain, cls: type, path: str) -> Plain:
        """Drops what the file said for another kind; keys on the command line stay, and stay strict."""
        known = {f.name for f in dataclasses.fields(cls)}
        kept = {}
        for key, child in tree.items():
            at = _join(path, key)
            if key in known or any(o == at or o.startswith(f"{at}.") for o in self.overridden):
                kept[key] = child
            else:
                self.notes(f"{at}={_show(child)} of the file is dropped: {path}.kind={kind(cls)} has no such key")
        return kept

    def dataclass(self, tree: Any, cls: type, path: str) -> Any:
        if not isinstance(tree, dict):
            self.problems.append(f"{path}={_show(tree)}: must be keys of {cls.__name__}")
            return None
        fields = {f.name: f for f in dataclasses.fields(cls)}
        hints = get_type_hints(cls, include_extras=True)
        before = len(self.problems)
        for key in tree:
            if key not in fields:
                self.problems.append(f"{_join(path, key)}={_show(tree[key])}: unknown key{nearest(key, fields)}")
        values = {}
        for name, f in fields.items():
            if name in tree:
                values[name] = self.value(tree[name], hints[name], _join(path, name))
            elif f.default is MISSING and f.default_factory is MISSING:
                self.problems.append(f"{_join(path, name)}: missing; it must be {in_words(hints[name])}")
        if len(self.problems) > before:
            return None
        try:
            return cls(**values)
        except ConfigError as error:
            self.problems.extend(_join(path, problem) for problem in error.problems)
        except ValueError as error:
            self.problems.append(_join(path, str(error)))
        return None


def _plain(tree: Any, option: Any) -> Any:
    """The value as a plain type, or MISSING if it is not one: `1e6` is a fine integer, `true` is no number."""
    if option is Any:
        return tree
    if get_origin(option) is Literal:
        same = [arg for arg in get_args(option) if arg == tree and type(arg) is type(tree)]
        return same[0] if same else MISSING
    if option is bool or isinstance(tree, bool):
        return tree if option is bool and isinstance(tree, bool) else MISSING
    if option in (int, float) and isinstance(tree, (int, float)):
        if not abs(tree) < 2**63:  # nan fails too; no number that a job has is larger
            return MISSING
        return float(tree) if option is float else int(tree) if int(tree) == tree else MISSING
    return tree if option is str and isinstance(tree, str) else MISSING


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def in_words(hint: Any) -> str:
    """A type in words, for an error."""
    words = {
        int: "an integer",
        float: "a finite number",
        str: "a string",
        bool: "true or false",
        types.NoneType: "null",
    }
    if is_choice(hint):
        none = " or null" if types.NoneType in options_of(hint) else ""
        return f"a mapping with kind: {' | '.join(kind(cls) for cls in classes_of(hint))}{none}"
    parts = []
    for option in options_of(hint):
        if get_origin(option) is Literal:
            parts += [str(arg) for arg in get_args(option)]
        elif get_origin(option) is tuple:
            parts.append(f"a list of {in_words(get_args(option)[0])}")
        else:
            parts.append(words.get(option, f"keys of {getattr(option, '__name__', option)}"))
    return " or ".join(parts)


def _quote_hint(tree: Any, options: tuple[Any, ...]) -> str:
    return (
        "; YAML reads this word as a truth value: put it in quotes" if isinstance(tree, bool) and str in options else ""
    )


def nearest(word: str, known: Iterable[str]) -> str:
    """The way out of an unknown key: the nearest one, or all there are."""
    names: Mapping[str, None] = dict.fromkeys(known)
    near = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else f"; known here: {', '.join(names) or 'nothing'}"
