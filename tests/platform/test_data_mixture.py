"""Every source has its exact share at every block, each of its rows comes in turn, and any row is found at once."""

import random
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from farspan.platform.config import ConfigError, Source, decode
from farspan.platform.data import Mixture
from farspan.platform.data.mixture import InterleavedRows, MixedRows, Quotas, Weights
from farspan.platform.data.row import Row, Rows


class Numbers:
    """Rows that tell their source and number."""

    sequence_length = 2

    def __init__(self, source: int, count: int) -> None:
        self.source, self.count = source, count

    def __len__(self) -> int:
        return self.count

    def documents(self) -> Any:
        return np.full(self.count, 2)

    def row(self, number: int) -> Row:
        told = np.array([self.source, number])
        return Row(tokens=told, labels=told, lengths=(2,))


def read(rows: Rows, numbers: range) -> list[tuple[int, int]]:
    return [(int(row.tokens[0]), int(row.tokens[1])) for row in map(rows.row, numbers)]


def random_weights(draw: random.Random) -> Weights:
    count = draw.randint(1, 9)
    points: list[tuple[int, list[float]]] = []
    for at in sorted([0, *draw.sample(range(1, 9000), draw.randint(0, 5))]):
        weights = [draw.choice([0.0, 0.0, 0.001, 0.01, draw.random()]) for _ in range(count)]
        points.append((at, weights if any(weights) else [1.0] * count))
    return Weights(points)


@pytest.mark.parametrize("case", range(40))
def test_counts_are_within_one_row_of_the_integral(case: int) -> None:
    weights = random_weights(random.Random(case))
    quotas = Quotas(weights)
    quotas.block(12000)
    for end, counts, before in zip(quotas.starts[1:], quotas.counts[1:], quotas.counts, strict=False):
        reached = weights.reached(end)
        assert sum(counts) == sum(reached) == end
        assert all(abs(count - wanted) < 1 for count, wanted in zip(counts, reached, strict=True))
        assert all(count >= earlier for count, earlier in zip(counts, before, strict=True))


def test_the_integral_is_that_of_straight_lines() -> None:
    weights = Weights([(0, [0.75, 0.25]), (100, [0.25, 0.75]), (300, [0.25, 0.75]), (400, [0, 2])])
    assert [float(share) for share in weights.at(50)] == [0.5, 0.5]
    for rows in (0, 1, 37, 100, 222, 399, 400, 1000):
        sums = [0.0, 0.0]
        for tenth in range(rows * 10):  # the middle of each tenth of a row: exact for straight lines
            middle = Fraction(2 * tenth + 1, 20)
            for i, share in enumerate(weights.at(middle)):  # type: ignore[arg-type]
                sums[i] += float(share) / 10
        assert [float(total) for total in weights.reached(rows)] == pytest.approx(sums)


@pytest.mark.parametrize("case", range(4))
def test_rows_of_each_source_come_in_turn(case: int) -> None:
    weights = random_weights(random.Random(100 + case))
    count = len(weights.last)
    rows = MixedRows([Numbers(i, 10 + i) for i in range(count)], weights, seed=case)
    seen = read(rows, range(5000))
    for source in range(count):
        assert [own for which, own in seen if which == source] == list(range(rows.counts(5000)[source]))
    again = MixedRows([Numbers(i, 10 + i) for i in range(count)], weights, seed=case)
    picks = random.Random(case).sample(range(5000), 50)
    assert [read(again, range(n, n + 1))[0] for n in picks] == [seen[n] for n in picks], "in any order of asking"
    assert len(rows) == sum(10 + i for i in range(count))
    if count > 1 and sum(weights.last[i] > 0 for i in range(count)) > 1:
        other = MixedRows([Numbers(i, 10 + i) for i in range(count)], weights, seed=case + 1)
        assert read(other, range(5000)) != seen


def test_a_far_row_is_reached_quickly_and_a_near_share_is_even() -> None:
    weights = Weights([(0, [0.7, 0.2, 0.1]), (10**6, [0.1, 0.1, 0.8])])
    rows = MixedRows([Numbers(i, 7) for i in range(3)], weights, seed=0)
    started = time.monotonic()
    source, own = rows.place(10**8)
    assert time.monotonic() - started < 3
    assert abs(own - float(weights.reached(10**8)[source])) < 2**18
    constant = MixedRows([Numbers(i, 7) for i in range(2)], Weights([(0, [0.5, 0.5])]), seed=0)
    runs = [sum(source for source, _ in read(constant, range(at, at + 16))) for at in range(0, 4096, 16)]
    assert 1.4 < np.std(runs) < 2.6, "random inside a block, as coins would be"


def test_held_out_rows_come_once_in_proportion() -> None:
    rows = InterleavedRows(
        [Numbers(0, 10), Numbers(1, 0), Numbers(2, 100), Numbers(3, 3)], Weights([(0, [3, 1, 1, 0])]).last
    )
    assert len(rows) == 113
    seen = read(rows, range(113))
    assert len(set(seen)) == 113 and seen[-3:] == [(3, 0), (3, 1), (3, 2)]
    assert sum(source == 0 for source, _ in seen[:12]) == 9, "three to one while both last"
    assert read(rows, range(113, 226)) == [(source, own + (10, 0, 100, 3)[source]) for source, own in seen]


def text(folder: Path, name: str, **other: Any) -> dict[str, Any]:
    return {"kind": "text", "paths": [f"{folder}/{name}"], "sequence_length": 32, "cache": str(folder), **other}


def mixture(*sources: tuple[float, dict[str, Any]], **other: Any) -> Mixture:
    tree = {"sources": [{"weight": weight, "data": data} for weight, data in sources], **other}
    return decode(Source(tree=tree, raw=tree), Mixture)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
        for i in range(1 if name == "c" else 12):
            (tmp_path / name / f"{i}.txt").write_text(f"{name} {i} " * 20)
    return tmp_path


def test_a_mixture_of_texts(folder: Path) -> None:
    fim, spans = {"kind": "fill_in_the_middle", "rate": 1.0}, {"kind": "span_corruption", "max_spans": 4}
    config = mixture(
        (0.5, text(folder, "a", objective=fim)), (0.25, text(folder, "b", objective=spans)), (0.25, text(folder, "c"))
    )
    assert config.vocabulary == 257 + 3 + 6 and config.sequence_length == 32 and config.held_out == 0.01
    config.find()
    corpus = config.build(3)
    assert isinstance(corpus.train, MixedRows) and corpus.train.counts(1024) == [512, 256, 256]
    said = {0: set[int](), 1: set[int](), 2: set[int]()}
    for number in range(300):
        source, _ = corpus.train.place(number)
        said[source] |= {int(token) for token in corpus.train.row(number).tokens if token > 256}
    assert said[0] == {257, 258, 259} and min(said[1]) == 260 and not said[2], "sentinels of sources never meet"
    assert len(corpus.held_out) == sum(len(source.data.build(0).held_out) for source in config.sources) > 0
    assert max(int(corpus.held_out.row(n).tokens.max()) for n in range(len(corpus.held_out))) <= 256
    assert corpus.fingerprint == config.build(4).fingerprint
    other = mixture((0.4, text(folder, "a")), (0.25, text(folder, "b")), (0.25, text(folder, "c")))
    assert corpus.fingerprint != other.build(3).fingerprint
    assert any(note.startswith("source 2: ") for note in corpus.notes)


def test_a_mixture_of_masks_is_not_causal(folder: Path) -> None:
    sources = [text(folder, name, objective={"kind": "masked", "mask": f"<{name}>"}) for name in ("a", "b")]
    config = mixture(*((1.0, source) for source in sources))
    assert not config.causal and mixture((1.0, text(folder, "a"))).causal
    corpus = config.build(0)
    for rows in (corpus.train, corpus.held_out):
        hidden = {int(token) for number in range(40) for token in rows.row(number).tokens if token > 256}
        assert hidden == {257, 258}, "each its own, held out as well"


def test_mistakes_are_named(folder: Path) -> None:
    a, b = text(folder, "a"), text(folder, "b")
    bad: list[tuple[list[tuple[float, dict[str, Any]]], dict[str, Any], str]] = [
        ([], {}, "sources=.*at least one"),
        ([(0.0, a)], {}, "every weight is 0"),
        ([(1.0, a), (1.0, {**b, "sequence_length": 64})], {}, r"sources.1.data.sequence_length=64: .* is 32"),
        ([(1.0, a), (1.0, {**b, "tokenizer": "x"})], {}, r"sources.1.data.tokenizer='x': .* is 'bytes'"),
        ([(1.0, a), (1.0, {**b, "end": "<e>"})], {}, r"sources.1.data.end='<e>': .* is None"),
        ([(1.0, a), (1.0, b)], {"schedule": [{"at": 0, "weights": [1, 1]}]}, r"schedule.0.at=0"),
        ([(1.0, a), (1.0, b)], {"schedule": [{"at": 9, "weights": [1]}]}, r"schedule.0.weights=\[1.0\]: there are 2"),
        ([(1.0, a), (1.0, b)], {"schedule": [{"at": 9, "weights": [0, 0]}]}, "at least one positive"),
        ([(-1.0, a)], {}, "sources.0.weight=-1.0"),
        (
            [(1.0, a), (1.0, {**b, "objective": {"kind": "masked"}})],
            {},
            r"sources.1.data.objective: masked",
        ),
    ]
    for sources, other, message in bad:
        with pytest.raises(ConfigError, match=message):
            mixture(*sources, **other)
    with pytest.raises(ValueError, match=r"data.sources.1: data.paths\[0\]"):
        mixture((1.0, a), (1.0, text(folder, "nowhere"))).find()
