"""What a document asks of the model: the next token, a rest after a prefix, what was taken out of its middle, or what
was hidden anywhere.

An objective rewrites one document, or what a row holds of it, and never changes its length: a token that only marks
something takes the place of another, at the document's end but for masks. What it draws depends on seed, row number and
document alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal, NamedTuple, final

import numpy as np
from numpy.typing import NDArray

from farspan.kernels.random import key
from farspan.parallel.context.shard import IGNORE
from farspan.platform.data.corpus import Language
from farspan.platform.data.draws import Draws
from farspan.platform.data.row import Row, Rows

HELD_OUT = key("held out")
"""What decides how held-out rows are rewritten, in every run."""


class Fragment(NamedTuple):
    """What one row holds of a document: n tokens, n labels."""

    tokens: NDArray[np.int64]
    labels: NDArray[np.int64]
    prefix: int = 0
    """How many tokens at the beginning see each other both ways."""


@dataclass(frozen=True, kw_only=True)
class Sentinels:
    """Tokens that mark: those that the tokenizer knows by name, and others whose ids follow its vocabulary."""

    ids: Mapping[str, int]
    end: int
    """Ends a document."""
    vocabulary: int
    """Tokens in all."""

    @staticmethod
    def of(tokenizer: Language, names: Sequence[str]) -> "Sentinels":
        ids: dict[str, int] = {}
        vocabulary = tokenizer.vocabulary
        for name in dict.fromkeys(names):
            known = tokenizer.token(name)
            ids[name] = vocabulary if known is None else known
            vocabulary += known is None
        return Sentinels(ids=ids, end=tokenizer.end, vocabulary=vocabulary)

    def notes(self, tokenizer: Language) -> tuple[str, ...]:
        """What to say of names that the tokenizer lacks: a slip in a name would otherwise train other tokens."""
        added = [name for name, number in self.ids.items() if number >= tokenizer.vocabulary]
        if not added:
            return ()
        shown = ", ".join(added[:3]) + (f" and {len(added) - 3} more" if len(added) > 3 else "")
        return (f"not in the tokenizer, and added after its {tokenizer.vocabulary:,} tokens: {shown}",)


class Asking:
    """What objectives have, unless they say otherwise."""

    @property
    def sentinels(self) -> tuple[str, ...]:
        """Names of the tokens that it marks with."""
        return ()

    @property
    def both_ways(self) -> bool:
        """Whether a prefix sees itself both ways."""
        return False

    @property
    def causal(self) -> bool:
        """Whether tokens are told from those before them; false: from all around them."""
        return True


@dataclass(frozen=True, kw_only=True)
class Causal(Asking):
    """Every token predicts the next."""

    def transform(self, fragment: Fragment, sentinels: Sentinels, draws: Draws) -> Fragment:
        return fragment


@dataclass(frozen=True, kw_only=True)
class Prefix(Asking):
    """A random beginning is given, and the rest is predicted (prefix language modelling; Raffel et al., 2020)."""

    share: tuple[float, ...] = (0.1, 0.9)
    """Smallest and largest share of a document that is given; drawn evenly between them."""
    bidirectional: bool = True
    """The tokens that are given see each other both ways; false: they only lose their labels."""

    def __post_init__(self) -> None:
        _check_range("share", self.share, 0.0, 1.0)

    @property
    def both_ways(self) -> bool:
        return self.bidirectional

    def transform(self, fragment: Fragment, sentinels: Sentinels, draws: Draws) -> Fragment:
        size = len(fragment.tokens)
        if size < 2:
            return fragment
        prefix = min(max(round(draws.between(*self.share) * size), 1), size - 1)
        labels = fragment.labels.copy()
        labels[: prefix - 1] = IGNORE  # the last token of the prefix predicts the first of the rest
        return Fragment(fragment.tokens, labels, prefix if self.bidirectional else 0)


@dataclass(frozen=True, kw_only=True)
class SpanCorruption(Asking):
    """Spans are taken out, and told at the end: a <mask_1> c <mask_2> <sep> <mask_1> b <eom> <mask_2> d <eom>.

    The form of CodeGen2 (Nijkamp, Hayashi, Xiong, Savarese, Zhou, 2023, arXiv 2305.02309), which trains half of the
    documents so and half causally, with spans inside one file; a document's end token stays before <sep>. The default
    ranges reach from T5's denoiser (Raffel et al., 2020) to UL2's extreme ones (Tay et al., 2022). With s spans,
    3s + 1 tokens of the document make room for the sentinels.
    """

    mask_ratio: tuple[float, ...] = (0.15, 0.5)
    """Smallest and largest share of the tokens that is taken out, drawn for each document."""
    span_length: tuple[float, ...] = (3.0, 32.0)
    """Smallest and largest mean length of the spans, drawn for each document."""
    max_spans: int = 100
    """Spans in a document at most: so many sentinels exist. Where more were due, spans are longer."""
    labels: Literal["all", "spans"] = "all"
    """What is predicted: every token, or only the spans that are told at the end."""
    mask: str = "<mask_{}>"
    """Name of the sentinels; {} is their number, from 1."""
    separator: str = "<sep>"
    """Name of the sentinel after which the spans are told."""
    end_of_mask: str = "<eom>"
    """Name of the sentinel that ends a span."""

    def __post_init__(self) -> None:
        _check_range("mask_ratio", self.mask_ratio, 0.0, 1.0)
        _check_range("span_length", self.span_length, 1.0, float("inf"))
        if self.max_spans < 1:
            raise ValueError(f"max_spans={self.max_spans}: must be at least 1; try 100")
        if self.mask.count("{}") != 1:
            raise ValueError(f"mask={self.mask!r}: must hold {{}} for the number, once; try '<mask_{{}}>'")
        _check_names(self.sentinels)

    @property
    def sentinels(self) -> tuple[str, ...]:
        return (
            *(self.mask.replace("{}", str(i)) for i in range(1, self.max_spans + 1)),
            self.separator,
            self.end_of_mask,
        )

    def transform(self, fragment: Fragment, sentinels: Sentinels, draws: Draws) -> Fragment:
        size = len(fragment.tokens)
        ratio, mean = draws.between(*self.mask_ratio), draws.between(*self.span_length)
        # A span needs its own token, one to its left that stays, and three sentinels.
        spans = min(max(round(ratio * size / mean), 1), self.max_spans, (size - 3) // 5)
        if spans < 1:
            return fragment
        tokens, closing = _open(fragment.tokens, sentinels.end)
        body = tokens[: len(tokens) - 3 * spans - 1]
        masked = min(max(round(ratio * len(body)), spans), len(body) - spans)
        parts, told = self._parts(body, closing, _spans(len(body), spans, masked, draws), sentinels)
        out = np.concatenate(parts)
        labels = _shifted(out)
        if self.labels == "spans":
            predicted = np.repeat(told, [len(part) for part in parts])
            labels[:-1][~predicted[1:]] = IGNORE
        return Fragment(out, labels)

    def _parts(
        self, body: NDArray[np.int64], closing: NDArray[np.int64], cuts: NDArray[np.int64], sentinels: Sentinels
    ) -> tuple[list[NDArray[np.int64]], list[bool]]:
        """The new document in parts, and which of them are the spans with their ends."""
        kept: list[NDArray[np.int64]] = []
        tail: list[NDArray[np.int64]] = []
        before = 0
        end_of_mask = np.array([sentinels.ids[self.end_of_mask]])
        for number, (begin, stop) in enumerate(cuts.tolist(), 1):
            mask = np.array([sentinels.ids[self.mask.replace("{}", str(number))]])
            kept += [body[before:begin], mask]
            tail += [mask, np.append(body[begin:stop], end_of_mask)]
            before = stop
        kept += [body[before:], closing, np.array([sentinels.ids[self.separator]])]
        return kept + tail, [False] * len(kept) + [False, True] * len(cuts)


@dataclass(frozen=True, kw_only=True)
class FillInTheMiddle(Asking):
    """A document is cut twice at random, and its middle comes last (Bavarian et al., 2022, arXiv 2207.14255).

    Prefix, suffix, middle: <fim_prefix> a <fim_suffix> c <fim_middle> b end. Suffix, prefix, middle:
    <fim_prefix> <fim_suffix> c <fim_middle> a b end. Done to what a row holds of a document, so that rows keep their
    length; the end token that follows the middle says that it has met the suffix. Four tokens make room, or three where
    the document ends in this row.
    """

    rate: float = 0.5
    """Share of the documents that are rearranged; the others stay causal."""
    suffix_first: float = 0.5
    """Share of the rearranged documents whose suffix comes before their prefix (SPM)."""
    prefix: str = "<fim_prefix>"
    """Name of the sentinel before the prefix."""
    suffix: str = "<fim_suffix>"
    """Name of the sentinel before the suffix."""
    middle: str = "<fim_middle>"
    """Name of the sentinel before the middle."""

    def __post_init__(self) -> None:
        for name in ("rate", "suffix_first"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be a share in [0, 1]; try 0.5")
        _check_names(self.sentinels)

    @property
    def sentinels(self) -> tuple[str, ...]:
        return self.prefix, self.suffix, self.middle

    def transform(self, fragment: Fragment, sentinels: Sentinels, draws: Draws) -> Fragment:
        body = fragment.tokens[: max(0, len(fragment.tokens) - 4)]
        if len(body) < 3 or draws.uniform() >= self.rate:
            return fragment
        suffix_first = draws.uniform() < self.suffix_first
        begin, stop = sorted((draws.below(len(body) + 1), draws.below(len(body) + 1)))
        before, inside, after = body[:begin], body[begin:stop], body[stop:]
        prefix, suffix, middle = ([sentinels.ids[name]] for name in self.sentinels)
        head = [prefix, suffix, after, middle, before] if suffix_first else [prefix, before, suffix, after, middle]
        out = np.concatenate([*head, inside, [sentinels.end]]).astype(np.int64)
        return Fragment(out, _shifted(out))


@dataclass(frozen=True, kw_only=True)
class Masked(Asking):
    """Tokens anywhere are hidden behind a sentinel, and told from what is left around them (masked language modelling;
    Devlin et al., 2018). For mixers with causal: false.

    Hidden tokens are never shown as themselves or as others, which gains nothing (Wettig et al., 2023, arXiv
    2202.08005). Held-out documents are asked alike, the same tokens of them in every run.
    """

    mask_ratio: tuple[float, ...] = (0.3, 0.3)
    """Smallest and largest share of a document's tokens that is hidden, drawn evenly between them: at least one."""
    mask: str = "<mask>"
    """Name of the sentinel."""

    def __post_init__(self) -> None:
        _check_range("mask_ratio", self.mask_ratio, 0.0, 1.0)
        _check_names(self.sentinels)

    @property
    def sentinels(self) -> tuple[str, ...]:
        return (self.mask,)

    @property
    def causal(self) -> bool:
        return False

    def transform(self, fragment: Fragment, sentinels: Sentinels, draws: Draws) -> Fragment:
        size = len(fragment.tokens)
        hidden = draws.choose(size, min(max(round(draws.between(*self.mask_ratio) * size), 1), size))
        tokens, labels = fragment.tokens.copy(), np.full_like(fragment.labels, IGNORE)
        labels[hidden] = tokens[hidden]
        tokens[hidden] = sentinels.ids[self.mask]
        return Fragment(tokens, labels)


Simple = Causal | Prefix | SpanCorruption | FillInTheMiddle | Masked


@dataclass(frozen=True, kw_only=True)
class Weighted:
    """An objective and how often it is drawn, relative to the others."""

    weight: float
    """How often, relative to the others."""
    objective: Simple
    """What the document then asks."""

    def __post_init__(self) -> None:
        if not 0 < self.weight < float("inf"):
            raise ValueError(f"weight={self.weight}: must be positive; leave the objective out instead")


@dataclass(frozen=True, kw_only=True)
class Mixed(Asking):
    """One of several objectives is drawn for each document."""

    objectives: tuple[Weighted, ...]
    """What may be drawn."""

    def __post_init__(self) -> None:
        if not self.objectives:
            raise ValueError("objectives=[]: needs at least one, as {weight: 0.5, objective: {kind: causal}}")
        if len({option.objective.causal for option in self.objectives}) > 1:
            raise ValueError(
                "objectives: masked goes with no other kind, whose mixers are causal; leave one of them out"
            )

    @property
    def sentinels(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for option in self.objectives for name in option.objective.sentinels))

    @property
    def both_ways(self) -> bool:
        return any(option.objective.both_ways for option in self.objectives)

    @property
    def causal(self) -> bool:
        return self.objectives[0].objective.causal

    def transform(self, fragment: Fragment, sentinels: Sentinels, draws: Draws) -> Fragment:
        reach = list(accumulate(option.weight for option in self.objectives))
        drawn = draws.uniform() * reach[-1]
        chosen = next(i for i, bound in enumerate(reach) if drawn < bound or bound == reach[-1])
        return self.objectives[chosen].objective.transform(fragment, sentinels, draws)


Objective = Causal | Prefix | SpanCorruption | FillInTheMiddle | Masked | Mixed


@final
class ObjectiveRows:
    """Rows whose documents an objective has rewritten, each time differently, at the same length."""

    def __init__(self, rows: Rows, objective: Objective, sentinels: Sentinels, seed: int) -> None:
        self.sequence_length = rows.sequence_length
        self._rows, self._objective, self._sentinels, self._seed = rows, objective, sentinels, seed

    def __len__(self) -> int:
        return len(self._rows)

    def documents(self) -> NDArray[np.int64]:
        """Tokens of every document."""
        return self._rows.documents()

    def row(self, number: int) -> Row:
        """The row of this number; padding is left alone."""
        row = self._rows.row(number)
        tokens, labels, prefixes = row.tokens.copy(), row.labels.copy(), []
        begin = 0
        for place, length in enumerate(row.lengths[:-1] if row.padding else row.lengths):
            part = slice(begin, begin + length)
            draws = Draws(self._seed, "objective", number, place)
            changed = self._objective.transform(Fragment(tokens[part], labels[part]), self._sentinels, draws)
            tokens[part], labels[part] = changed.tokens, changed.labels
            prefixes.append(changed.prefix)
            begin += length
        if row.padding:
            prefixes.append(0)
        return Row(
            tokens=tokens,
            labels=labels,
            lengths=row.lengths,
            padding=row.padding,
            prefixes=tuple(prefixes) if self._objective.both_ways else None,
        )


def pursue(rows: Rows, objective: Objective, sentinels: Sentinels, seed: int) -> Rows:
    """The rows with each document rewritten for its objective; `seed` decides how."""
    return rows if isinstance(objective, Causal) else ObjectiveRows(rows, objective, sentinels, seed)


def examined(rows: Rows, objective: Objective, sentinels: Sentinels) -> Rows:
    """Held-out rows: as they are, for they are causal; those of a model that is not are rewritten, alike for every
    seed."""
    return rows if objective.causal else ObjectiveRows(rows, objective, sentinels, HELD_OUT)


def _open(tokens: NDArray[np.int64], end: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The tokens without a last `end`, and that token or nothing."""
    cut = len(tokens) - int(tokens[-1] == end)
    return tokens[:cut], tokens[cut:]


def _shifted(tokens: NDArray[np.int64]) -> NDArray[np.int64]:
    """What each token predicts: its successor, and the last one nothing."""
    return np.append(tokens[1:], IGNORE)


def _spans(size: int, count: int, masked: int, draws: Draws) -> NDArray[np.int64]:
    """(begin, stop) of `count` spans that hold `masked` of range(size), none empty and no two adjacent.

    Every such choice of lengths and of gaps is equally likely (stars and bars).
    """
    inner = np.concatenate([[0], draws.choose(masked - 1, count - 1) + 1, [masked]])
    lengths = np.diff(inner)
    free = size - masked - (count - 1)  # tokens that may stand in any gap, also before the first and after the last
    gaps = np.diff(draws.choose(free + count, count), prepend=-1) - 1
    gaps[1:] += 1
    begins = np.cumsum(gaps) + np.cumsum(lengths) - lengths
    return np.stack([begins, begins + lengths], axis=1)


def _check_range(name: str, given: tuple[float, ...], low: float, high: float) -> None:
    if len(given) != 2 or not low <= given[0] <= given[1] <= high or given[1] == float("inf"):
        raise ValueError(f"{name}={list(given)}: must be [smallest, largest] within {low:g} and {high:g}")


def _check_names(names: Sequence[str]) -> None:
    if len(set(names)) < len(names) or "" in names:
        raise ValueError(f"sentinels {', '.join(map(repr, names[-3:]))}: names must differ and not be empty")
