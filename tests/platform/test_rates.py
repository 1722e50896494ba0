"""Rates are measured on whatever machine this is, kept as text, and shared when lanes run at once."""

import dataclasses
import json
import math
import random
import time

import pytest
import torch

from farspan.platform.optim.rates import SPAN, Lane, Rates, Trial, measure, slowest

HOST = Rates(h2d=52e9, d2h=48e9, duplex=40e9, cpu=1.5e9, gpu=1e11, cpu_beside=1.2e9, duplex_beside=30e9)
CPU = torch.device("cpu")


def test_a_machine_without_gpu_measures_its_cores_and_moves_nothing() -> None:
    calls: list[int] = []
    rates = measure(CPU, lambda: calls.append(0))
    assert calls, "ranks must start together"
    assert 1e6 < rates.cpu < 1e11 and rates.gpu == rates.cpu == rates.cpu_beside
    assert {rates.h2d, rates.d2h, rates.duplex, rates.duplex_beside} == {math.inf}


def test_the_update_in_use_is_what_is_timed() -> None:
    rates = measure(CPU, lambda: None, cpu=Trial(lambda: time.sleep(0.01), 1000))
    assert 1000 / 0.05 < rates.cpu <= 1000 / 0.01


def test_what_a_processor_keeps_up_is_what_counts() -> None:
    """Not its first burst, which a quota of time or a boost makes faster than a whole update will be."""
    begin = time.perf_counter()
    burst = Trial(lambda: time.sleep(0.001 if time.perf_counter() - begin < SPAN / 5 else 0.02), 1000)
    assert measure(CPU, lambda: None, cpu=burst).cpu < 1000 / 0.004


@pytest.mark.parametrize("rates", [HOST, measure(CPU, lambda: None, cpu=Trial(lambda: None, 7))])
def test_rates_survive_json(rates: Rates) -> None:
    text = rates.encode()
    assert Rates.decode(text) == rates
    strict = json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert set(strict) == {field.name for field in dataclasses.fields(Rates)}


@pytest.mark.parametrize("text", ["", "[]", "{}", "{", '{"h2d": "fast"}', HOST.encode().replace("52", "-52"), "3"])
def test_damaged_text_is_told(text: str) -> None:
    with pytest.raises(ValueError, match=r"measure|Expecting|could not convert"):
        Rates.decode(text)


@pytest.mark.parametrize("field", ["h2d", "d2h", "duplex", "gpu", "duplex_beside"])
@pytest.mark.parametrize("value", [0, -1, math.nan])
def test_rates_are_positive(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=field):
        dataclasses.replace(HOST, **{field: value})
    for cores in ("cpu", "cpu_beside"):
        with pytest.raises(ValueError, match=f"{cores} of"):
            dataclasses.replace(HOST, **{cores: -1.0})
        assert getattr(dataclasses.replace(HOST, **{cores: 0.0}), cores) == 0


def test_the_slowest_rank_counts_rate_by_rate() -> None:
    other = dataclasses.replace(HOST, h2d=9e9, cpu=7e9)
    assert slowest([HOST, other]) == dataclasses.replace(HOST, h2d=9e9)


def test_lanes_have_the_rates_that_were_measured() -> None:
    for lane, alone in (("h2d", HOST.h2d), ("d2h", HOST.d2h), ("cpu", HOST.cpu)):
        assert HOST.speeds([lane]) == {lane: alone}  # type: ignore[list-item]
    assert HOST.speeds(["d2h", "h2d"]) == {"h2d": HOST.duplex, "d2h": HOST.duplex}
    everything = HOST.speeds(["d2h", "cpu", "h2d"])
    assert everything == pytest.approx({"h2d": HOST.duplex_beside, "d2h": HOST.duplex_beside, "cpu": HOST.cpu_beside})


def test_cores_lose_in_proportion_to_what_is_copied() -> None:
    """One way is less than two, and the whole is never more than what was measured."""
    one = HOST.speeds(["h2d", "cpu"])
    assert one == pytest.approx({"h2d": HOST.h2d, "cpu": 1.5e9 - 0.3e9 * 52 / 60})
    draw = random.Random(3)
    lanes: list[Lane] = ["h2d", "d2h", "cpu"]
    for _ in range(300):
        link, cpu = draw.uniform(5, 60) * 1e9, draw.uniform(0.1, 8) * 1e9
        beside, each = cpu * draw.uniform(0.1, 1.2), link * draw.uniform(0.1, 1.2)
        rates = Rates(h2d=link, d2h=link, duplex=link * 0.9, cpu=cpu, gpu=1e11, cpu_beside=beside, duplex_beside=each)
        busy = draw.sample(lanes, draw.randint(1, 3))
        speeds = rates.speeds(busy)
        assert set(speeds) == set(busy) and all(speed > 0 for speed in speeds.values())
        alone = {lane: rates.speeds([lane])[lane] for lane in busy}
        assert all(speeds[lane] <= alone[lane] for lane in busy)
        if "cpu" in busy:
            copied = sum(speeds.values()) - speeds["cpu"]
            assert min(cpu, beside) <= speeds["cpu"] * (1 + 1e-9) and copied <= 2 * each * (1 + 1e-9)


def test_an_infinite_link_leaves_the_cores_alone() -> None:
    here = measure(CPU, lambda: None, cpu=Trial(lambda: None, 7))
    speeds = here.speeds(["h2d", "d2h", "cpu"])
    assert speeds["cpu"] == here.cpu and all(math.isfinite(speed) and speed > 1e15 for speed in [speeds["h2d"]])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs one NVIDIA GPU")
def test_gpu_rates_are_those_of_a_machine() -> None:
    device = torch.device("cuda", 0)
    measure(device, lambda: None)
    start = time.perf_counter()
    rates = measure(device, lambda: None)
    assert time.perf_counter() - start < 6
    assert 1e9 < rates.h2d < 1e12 and 1e9 < rates.d2h < 1e12
    assert 0.3 * min(rates.h2d, rates.d2h) < rates.duplex < 1.1 * max(rates.h2d, rates.d2h)
    assert 1e8 < rates.cpu < rates.gpu < 1e12
    assert 0.05 * rates.cpu < rates.cpu_beside <= rates.cpu
    assert 0.05 * rates.duplex < rates.duplex_beside <= rates.duplex
    assert Rates.decode(rates.encode()) == rates
