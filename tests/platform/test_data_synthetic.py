"""Synthetic rows can be solved from what they show, and are the same for ever."""

from itertools import pairwise

import numpy as np
import pytest

from farspan.parallel.context.shard import IGNORE
from farspan.platform.data.synthetic import Copy, Needle, Synthetic


@pytest.mark.parametrize("length", [3, 4, 31, 256])
def test_a_copy_repeats_what_was_said(length: int) -> None:
    corpus = Synthetic(task=Copy(symbols=9), sequence_length=length, rows=50).build(1)
    separator = corpus.tokenizer.encode("<copy>")[0]
    half = (length - 1) // 2
    for number in range(50):
        row = corpus.train.row(number)
        said, mark, again = row.tokens[:half], row.tokens[half], row.tokens[half + 1 : 2 * half + 1]
        assert mark == separator and np.array_equal(said, again) and said.max() < 9
        assert np.array_equal(row.labels[half : 2 * half], again)
        assert (row.labels != IGNORE).sum() == half and row.padding == length - 2 * half - 1
        assert sum(row.lengths) == len(row.tokens) == length
    assert corpus.train.row(0).tokens.tolist() == corpus.train.row(50).tokens.tolist()


@pytest.mark.parametrize(("length", "pairs", "questions"), [(14, 4, 2), (200, 8, 8), (333, 5, 1)])
def test_every_question_has_its_answer(length: int, pairs: int, questions: int) -> None:
    task = Needle(pairs=pairs, questions=questions, keys=20, values=30, filler=10)
    corpus = Synthetic(task=task, sequence_length=length).build(1)
    again = Synthetic(task=task, sequence_length=length).build(1)
    haystack = length - 3 * questions
    depths = np.zeros(pairs, int)
    for number in range(200):
        row = corpus.train.row(number)
        assert np.array_equal(row.tokens, again.train.row(number).tokens) and row.lengths == (length,)
        words = corpus.tokenizer.decode(row.tokens).split()
        assert len(words) == length
        shown = {a: b for a, b in pairwise(words[:haystack]) if a[0] == "k"}
        assert len(shown) == pairs and all(value[0] == "v" for value in shown.values())
        places = [i for i, word in enumerate(words[:haystack]) if word[0] == "k"]
        parts = np.arange(pairs + 1) * haystack // pairs
        assert all(low <= at and at + 1 < high for at, low, high in zip(places, parts, parts[1:], strict=False))
        labels = np.flatnonzero(row.labels != IGNORE)
        assert labels.tolist() == list(range(haystack + 1, length, 3))
        asked = [words[at] for at in labels]
        assert len(set(asked)) == questions and all(words[at - 1] == "<ask>" for at in labels)
        for at in labels:
            assert words[at + 1] == shown[words[at]] and row.labels[at] == row.tokens[at + 1]
            depths[list(shown).index(words[at])] += 1
    assert depths.max() - depths.min() <= questions, "every depth is asked for equally often"


def test_sides_seeds_and_words() -> None:
    config = Synthetic(task=Needle(), sequence_length=100, held_out_rows=5)
    corpus, other = config.build(1), config.build(2)
    assert len(corpus.held_out) == 5 and 0 < config.held_out < 1
    assert not np.array_equal(corpus.train.row(0).tokens, corpus.held_out.row(0).tokens)
    assert not np.array_equal(corpus.train.row(0).tokens, other.train.row(0).tokens)
    assert corpus.tokenizer.vocabulary == config.vocabulary == 64 * 3 + 2
    assert corpus.tokenizer.decode(corpus.tokenizer.encode("k3 v5 <ask> <end> f0")) == " k3 v5 <ask> f0"
    with pytest.raises(ValueError, match=r"'hello': no symbol of needle"):
        corpus.tokenizer.encode("hello k3")


def test_tasks_that_do_not_fit_say_so() -> None:
    with pytest.raises(ValueError, match="sequence_length=27: pairs and questions take 28 tokens"):
        Synthetic(task=Needle(), sequence_length=27)
    with pytest.raises(ValueError, match="sequence_length=2: a copy needs at least 3"):
        Synthetic(task=Copy(), sequence_length=2)
    with pytest.raises(ValueError, match="pairs=9"):
        Needle(pairs=9, keys=8)
    with pytest.raises(ValueError, match="questions=9"):
        Needle(questions=9)
