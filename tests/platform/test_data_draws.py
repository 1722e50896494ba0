"""Chance is pinned: another value here would mean that runs which resume read other rows."""

import numpy as np

from farspan.platform.data.draws import Draws

PINNED = ([419, 221, 212, 975], 1, [0, 4, 30, 35, 40], [2, 3, 0, 1, 4, 5])


def test_draws_are_pinned() -> None:
    draws = Draws(0, "here", 7)
    assert draws.integers(1000, 4).tolist() == PINNED[0] and draws.below(1000) == PINNED[1]
    assert draws.choose(50, 5).tolist() == PINNED[2] and draws.order(6).tolist() == PINNED[3]
    assert Draws(0, "here", 8).below(1000) != Draws(0, "here", 7).below(1000)


def test_draws_are_even_and_in_range() -> None:
    drawn = np.concatenate([Draws(1, number).integers(7, 3) for number in range(3000)])
    counts = np.bincount(drawn, minlength=7)
    assert len(counts) == 7 and abs(counts - 9000 / 7).max() < 5 * (9000 / 7) ** 0.5
    chosen = np.concatenate([Draws(2, number).choose(10, 3) for number in range(3000)])
    assert abs(np.bincount(chosen, minlength=10) - 900).max() < 150
    assert all(len(set(Draws(3, number).choose(10, 10))) == 10 for number in range(20))
    assert Draws(0).choose(5, 0).tolist() == []
