"""What an objective does can be undone, labels are exactly what follows, and held-out rows are never touched."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from farspan.parallel.context.shard import IGNORE
from farspan.platform.config import ConfigError, Source, decode
from farspan.platform.data import Text
from farspan.platform.data.draws import Draws
from farspan.platform.data.objective import (
    Causal,
    FillInTheMiddle,
    Fragment,
    Masked,
    Mixed,
    Objective,
    ObjectiveRows,
    Prefix,
    Sentinels,
    SpanCorruption,
    Weighted,
    pursue,
)
from farspan.platform.data.pack import PackedRows
from farspan.platform.data.tokenizer import Bytes

END = 256


def fragment(length: int, closed: bool, draws: Draws) -> Fragment:
    """Random bytes; one that is not closed goes on with byte 7 in the next row."""
    tokens = draws.integers(256, length)
    if closed:
        tokens[-1] = END
    return Fragment(tokens, np.append(tokens[1:], IGNORE if closed else 7))


def shifted(tokens: list[int]) -> list[int]:
    return [*tokens[1:], IGNORE]


@pytest.mark.parametrize("closed", [True, False])
@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 13, 64, 1000])
def test_span_corruption_is_undone(length: int, closed: bool) -> None:
    for case in range(30):
        config = SpanCorruption(max_spans=[1, 3, 100][case % 3], labels="all" if case % 2 else "spans")
        marks = Sentinels.of(Bytes(), config.sentinels)
        given = fragment(length, closed, Draws(case, length))
        out = config.transform(given, marks, Draws("case", case))
        assert out.prefix == 0 and len(out.tokens) == len(out.labels) == length
        if marks.ids["<sep>"] not in out.tokens:
            assert length < 8 and np.array_equal(out.labels, given.labels)
            continue
        tokens = out.tokens.tolist()
        head, tail = tokens[: tokens.index(marks.ids["<sep>"])], tokens[tokens.index(marks.ids["<sep>"]) + 1 :]
        spans: dict[int, list[int]] = {}
        told = [False] * (len(head) + 1)
        while tail:
            stop = tail.index(marks.ids["<eom>"])
            spans[tail[0]] = tail[1:stop]
            told += [False] + [True] * stop
            tail = tail[stop + 1 :]
        found = [token for token in head if token in spans]
        assert found == list(spans) == [marks.ids[f"<mask_{i}>"] for i in range(1, len(spans) + 1)]
        assert all(spans.values()) and len(spans) <= config.max_spans
        assert all(not (a in spans and b in spans) for a, b in pairwise(head)), "spans touch"
        again = [part for token in head for part in spans.get(token, [token])]
        cut = 3 * len(spans) + 1
        kept = given.tokens.tolist()
        assert again == ([*kept[: length - 1 - cut], END] if closed else kept[: length - cut])
        follow = shifted(tokens)
        wanted = (
            follow
            if config.labels == "all"
            else [label if said else IGNORE for label, said in zip(follow, [*told[1:], False], strict=True)]
        )
        assert out.labels.tolist() == wanted


def test_span_corruption_keeps_to_its_ranges() -> None:
    config = SpanCorruption(mask_ratio=(0.3, 0.3), span_length=(8.0, 8.0))
    marks = Sentinels.of(Bytes(), config.sentinels)
    starts = np.zeros(2000)
    for case in range(200):
        out = config.transform(fragment(2000, True, Draws(case)), marks, Draws("case", case)).tokens
        spans = int((out == marks.ids["<eom>"]).sum())
        body = 2000 - 3 * spans - 1
        masked = 2000 - int(np.flatnonzero(out == marks.ids["<sep>"])[0]) - 1 - 2 * spans
        assert spans == 75 and masked == pytest.approx(0.3 * body, abs=1)
        starts[: body // 2] += (out[: body // 2] > END)[:2000]
    first, second = starts[:300].sum(), starts[300:600].sum()
    assert abs(first - second) < 5 * np.sqrt(first + second), "spans lie evenly"


@pytest.mark.parametrize("closed", [True, False])
@pytest.mark.parametrize("length", [1, 6, 7, 8, 100])
def test_fill_in_the_middle_is_undone(length: int, closed: bool) -> None:
    config = FillInTheMiddle(rate=0.7, suffix_first=0.5)
    marks = Sentinels.of(Bytes(), config.sentinels)
    prefix, suffix, middle = (marks.ids[name] for name in config.sentinels)
    forms = {"causal": 0, "psm": 0, "spm": 0}
    for case in range(200):
        given = fragment(length, closed, Draws(case, length))
        out = config.transform(given, marks, Draws("case", case))
        tokens = out.tokens.tolist()
        assert len(tokens) == length
        if tokens[0] != prefix:
            assert np.array_equal(out.tokens, given.tokens) and np.array_equal(out.labels, given.labels)
            forms["causal"] += 1
            continue
        at, then = tokens.index(suffix), tokens.index(middle)
        before, after, rest = tokens[1:at], tokens[at + 1 : then], tokens[then + 1 : -1]
        assert tokens[-1] == END and out.labels.tolist() == shifted(tokens)
        kept = given.tokens.tolist()[: length - 4]
        if at == 1:  # suffix first, or an empty prefix: both say prefix and middle at the end, in order
            assert rest + after == kept
        else:
            assert before + rest + after == kept
        forms["spm" if at == 1 else "psm"] += 1
    if length < 7:
        assert forms["causal"] == 200
    elif length == 100:
        assert 30 < forms["causal"] < 90 and min(forms["psm"], forms["spm"]) > 40


@pytest.mark.parametrize("length", [1, 2, 3, 50])
def test_a_prefix_loses_its_labels_and_nothing_else(length: int) -> None:
    shares = []
    for case in range(100):
        given = fragment(length, True, Draws(case))
        config = Prefix(share=(0.2, 0.8), bidirectional=bool(case % 2))
        out = config.transform(given, Sentinels.of(Bytes(), ()), Draws("case", case))
        assert np.array_equal(out.tokens, given.tokens)
        if length == 1:
            assert out.prefix == 0 and np.array_equal(out.labels, given.labels)
            continue
        lost = int((out.labels != given.labels).sum())
        assert (out.labels[:lost] == IGNORE).all() and np.array_equal(out.labels[lost:], given.labels[lost:])
        assert out.prefix == (lost + 1 if config.bidirectional else 0) and 1 <= lost + 1 < length
        shares.append((lost + 1) / length)
    if length == 50:
        assert 0.2 <= min(shares) < 0.3 and 0.7 < max(shares) <= 0.8 and 0.42 < np.mean(shares) < 0.58


def packed(seed: int | None) -> PackedRows:
    lengths = np.array([30, 5, 200, 90, 3, 61], np.int64)
    tokens = Draws("tokens").integers(256, int(lengths.sum())).astype(np.uint16)
    starts = np.cumsum(lengths) - lengths
    tokens[starts + lengths - 1] = END
    return PackedRows(tokens, starts, lengths, sequence_length=48, end=END, seed=seed)


CODEGEN2 = Mixed(
    objectives=(Weighted(weight=1.0, objective=Causal()), Weighted(weight=1.0, objective=SpanCorruption()))
)


@pytest.mark.parametrize("objective", [CODEGEN2, FillInTheMiddle(rate=1.0), Prefix()])
def test_rows_keep_their_shape_and_depend_on_their_number_alone(objective: Objective) -> None:
    marks = Sentinels.of(Bytes(), objective.sentinels)
    plain, rows = packed(1), ObjectiveRows(packed(1), objective, marks, seed=5)
    again, other = (ObjectiveRows(packed(1), objective, marks, seed=seed) for seed in (5, 6))
    numbers = list(range(3 * len(plain)))
    for number in reversed(numbers):
        row, before = rows.row(number), plain.row(number)
        assert (row.lengths, row.padding) == (before.lengths, before.padding)
        assert np.array_equal(row.tokens, again.row(number).tokens)
        assert np.array_equal(row.labels, again.row(number).labels) and row.prefixes == again.row(number).prefixes
        if row.padding:
            assert np.array_equal(row.tokens[-row.padding :], before.tokens[-row.padding :])
            assert row.prefixes is None or row.prefixes[-1] == 0
        ends = np.cumsum(row.lengths)[: len(row.lengths) - bool(row.padding)]
        inside = np.ones(48, bool)
        inside[ends - 1] = False
        follow = np.append(row.tokens[1:], 0)
        assert (row.labels[inside] == np.where(row.labels[inside] == IGNORE, IGNORE, follow[inside])).all()
    assert any(not np.array_equal(rows.row(n).labels, other.row(n).labels) for n in numbers)
    by_row = {plain.place(n) for n in range(len(plain))}
    first = {plain.place(n): rows.row(n) for n in range(len(plain))}
    second = {plain.place(n): rows.row(n) for n in range(len(plain), 2 * len(plain))}
    assert any(not np.array_equal(first[p].labels, second[p].labels) for p in by_row), "epochs differ"


def test_causal_rows_are_the_rows_themselves() -> None:
    rows = packed(1)
    assert pursue(rows, Causal(), Sentinels.of(Bytes(), ()), 0) is rows


def test_mixed_draws_by_weight() -> None:
    thirds = (Weighted(weight=2.0, objective=Prefix()), Weighted(weight=1.0, objective=Causal()))
    marks = Sentinels.of(Bytes(), ())
    given = fragment(50, True, Draws(0))
    drawn = sum(Mixed(objectives=thirds).transform(given, marks, Draws(case)).prefix > 0 for case in range(600))
    assert 350 < drawn < 450


def test_masked_hides_a_share_and_asks_for_nothing_else() -> None:
    objective = Masked(mask_ratio=(0.2, 0.4))
    marks = Sentinels.of(Bytes(), objective.sentinels)
    shares = []
    for case in range(200):
        given = fragment(1 + case, case % 2 == 0, Draws(case))
        found = objective.transform(given, marks, Draws("masked", case))
        hidden = found.tokens == marks.ids["<mask>"]
        assert np.array_equal(np.where(hidden, found.labels, found.tokens), given.tokens), "nothing is lost"
        assert (found.labels[~hidden] == IGNORE).all() and hidden.any() and found.prefix == 0
        shares.append(hidden.mean())
    late = shares[50:]
    assert 0.19 < min(late) < 0.22 and 0.38 < max(late) < 0.41 and 0.28 < sum(late) / len(late) < 0.32


def test_held_out_rows_are_masked_alike_for_every_seed(tmp_path: Path) -> None:
    for i in range(20):
        (tmp_path / f"{i}.txt").write_text(f"{i} some words that go on and on " * 4)
    sizes: dict[str, Any] = {"paths": (str(tmp_path),), "sequence_length": 64, "held_out": 0.3, "cache": str(tmp_path)}
    text = Text(**sizes, objective=Masked())
    assert not text.causal and text.vocabulary == 258
    one, other = (text.build(seed).held_out for seed in (0, 1))
    for number in range(len(one)):
        row = one.row(number)
        assert np.array_equal(row.tokens, other.row(number).tokens)
        assert (row.tokens == 257).any() and np.array_equal(row.tokens == 257, row.labels != IGNORE)


def test_sentinels_come_from_the_tokenizer_or_after_it() -> None:
    class Knows:
        vocabulary, end = 1000, 3

        def token(self, name: str) -> int | None:
            return {"<fim_suffix>": 17}.get(name)

    marks = Sentinels.of(Knows(), FillInTheMiddle().sentinels)  # type: ignore[arg-type]
    assert marks.ids == {"<fim_prefix>": 1000, "<fim_suffix>": 17, "<fim_middle>": 1001}
    assert (marks.vocabulary, marks.end) == (1002, 3)


def test_a_text_grows_its_vocabulary_and_holds_out_plain_rows(tmp_path: Path) -> None:
    for i in range(20):
        (tmp_path / f"{i}.txt").write_text(f"{i} some words that go on and on " * 4)
    sizes: dict[str, Any] = {"paths": (str(tmp_path),), "sequence_length": 64, "held_out": 0.3, "cache": str(tmp_path)}
    plain = Text(**sizes)
    text = Text(**sizes, objective=FillInTheMiddle(rate=1.0))
    assert (plain.vocabulary, text.vocabulary) == (257, 260)
    corpus, before = text.build(0), plain.build(0)
    assert any(corpus.train.row(0).tokens > END) and corpus.fingerprint == before.fingerprint
    for number in range(len(corpus.held_out)):
        assert np.array_equal(corpus.held_out.row(number).tokens, before.held_out.row(number).tokens)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"kind": "prefix", "share": [0.5]}, r"objective.share=\[0.5\]: must be \[smallest, largest\]"),
        ({"kind": "span_corruption", "mask": "<m>"}, "objective.mask='<m>': must hold {}"),
        ({"kind": "span_corruption", "mask": "{x}"}, "objective.mask='{x}': must hold {}"),
        ({"kind": "fill_in_the_middle", "rate": 2}, "objective.rate=2.0: must be a share"),
        ({"kind": "fill_in_the_middle", "middle": "<fim_prefix>"}, "names must differ"),
        ({"kind": "mixed", "objectives": []}, r"objective.objectives=\[\]"),
        ({"kind": "mixed", "objectives": [{"weight": 0, "objective": {"kind": "causal"}}]}, "objectives.0.weight=0.0"),
        (
            {"kind": "mixed", "objectives": [{"weight": 1, "objective": {"kind": k}} for k in ("causal", "masked")]},
            "objectives: masked goes with no other kind",
        ),
        ({"kind": "masked", "mask_ratio": [0.5, 1.5]}, r"mask_ratio=\[0.5, 1.5\]: must be"),
        ({"kind": "backwards"}, "objective.kind='backwards': unknown kind"),
    ],
)
def test_mistakes_are_named(tree: dict[str, Any], message: str) -> None:
    whole = {"paths": ["x"], "sequence_length": 8, "objective": tree}
    with pytest.raises(ConfigError, match=message):
        decode(Source(tree=whole, raw=whole), Text)
