"""On real text every way of evening loads does, without one they collapse; experts learn more than a dense layer."""

import sys
from pathlib import Path
from types import ModuleType

import pytest

from farspan.models.ffns import Moe, Swiglu

pytestmark = pytest.mark.laws


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
    try:
        import balance
    finally:
        sys.path.pop(0)
    return balance


def test_loads_are_even_and_the_loss_is_below_a_dense_models(benchmark: ModuleType) -> None:
    size, text = benchmark.Size(steps=250, rows=8, length=64), benchmark.text()
    ways = {
        "rows": {"balance": 0.02},
        "sign": benchmark.BIASES["bias by sign"],
        "quantiles": benchmark.BIASES["bias by quantiles"],
        "none": {"balance": 0.0},
    }
    found = {
        name: benchmark.trained(Moe(experts=16, active=2, hidden=size.hidden, **fields), size, text)
        for name, fields in ways.items()
    }
    dense = benchmark.trained(Swiglu(hidden=2 * size.hidden), size, text)
    print(found, dense)
    assert found.pop("none").entropy < 0.8
    assert all(learnt.entropy > 0.95 and learnt.loss < dense.loss for learnt in found.values())
