"""Schedules rise, hold and fall where they say."""

from itertools import pairwise
from math import isclose

import pytest

from farspan.platform.schedule import Constant, Cosine, Linear, Schedule, Wsd


@pytest.mark.parametrize(
    "schedule",
    [Cosine(warmup=10, steps=100), Linear(warmup=10, steps=100), Constant(warmup=10), Wsd(warmup=10, steps=100)],
)
def test_warm_up_is_a_line_to_the_peak(schedule: Schedule) -> None:
    assert [schedule.factor(step) for step in range(10)] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert schedule.factor(10) == pytest.approx(1.0)


@pytest.mark.parametrize(
    "schedule", [Cosine(steps=100, floor=0.2), Linear(steps=100, floor=0.2), Wsd(steps=100, floor=0.2)]
)
def test_the_end_is_the_floor_and_stays(schedule: Schedule) -> None:
    assert schedule.factor(100) == pytest.approx(0.2) and schedule.factor(1000) == pytest.approx(0.2)
    factors = [schedule.factor(step) for step in range(101)]
    assert all(later <= earlier for earlier, later in pairwise(factors))


def test_shapes_at_their_middle() -> None:
    assert isclose(Cosine(steps=100, floor=0.0).factor(50), 0.5)
    assert isclose(Cosine(steps=100, floor=0.0).factor(25), 0.5 * (1 + 2**-0.5))
    assert isclose(Linear(steps=100, floor=0.5).factor(50), 0.75)
    assert Wsd(steps=100, decay=0.2).factor(80) == 1.0 and isclose(Wsd(steps=100, decay=0.2, floor=0.0).factor(90), 0.5)
    assert Constant().factor(10**9) == 1.0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Cosine(warmup=-1), "warmup=-1"),
        (lambda: Linear(floor=1.5), "floor=1.5"),
        (lambda: Wsd(decay=2.0), "decay=2.0"),
        (lambda: Cosine(warmup=10, steps=5), "steps=5"),
        (lambda: Constant(warmup=-2), "warmup=-2"),
    ],
)
def test_errors(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]
