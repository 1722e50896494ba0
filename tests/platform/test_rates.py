"""Rates are measured on whatever machine this is, kept as text, and shared when lanes run at once."""

import dataclasses
import json
import math
import random
import time

import pytest
import torch

from farspan.platform.optim.rates import COPIES, Lane, Rates, Trial, measure, slowest

HOST = Rates(h2d=52e9, d2h=48e9, duplex=40e9, cpu=1.5e9, gpu=1e11, dram=400e9, ranks=4)
CPU = torch.device("cpu")


def test_a_machine_without_gpu_measures_its_cores_and_moves_nothing() -> None:
    calls: list[int] = []
    rates = measure(CPU, lambda: calls.append(0), ranks=3)
    assert calls, "ranks must start together"
    assert 1e6 < rates.cpu < 1e11 and rates.gpu == rates.cpu and rates.ranks == 3
    assert {rates.h2d, rates.d2h, rates.duplex, rates.dram} == {math.inf}


def test_the_update_in_use_is_what_is_timed() -> None:
    rates = measure(CPU, lambda: None, cpu=Trial(lambda: time.sleep(0.01), 1000))
    assert 1000 / 0.05 < rates.cpu <= 1000 / 0.01


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


@pytest.mark.parametrize("field", ["h2d", "d2h", "duplex", "gpu", "dram", "ranks"])
@pytest.mark.parametrize("value", [0, -1, math.nan])
def test_rates_are_positive(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=field):
        dataclasses.replace(HOST, **{field: value})
    with pytest.raises(ValueError, match="cpu"):
        dataclasses.replace(HOST, cpu=-1.0)
    assert dataclasses.replace(HOST, cpu=0.0).cpu == 0


def test_the_slowest_rank_counts_rate_by_rate() -> None:
    other = dataclasses.replace(HOST, h2d=9e9, cpu=7e9)
    assert slowest([HOST, other]) == dataclasses.replace(HOST, h2d=9e9)


def test_lanes_have_their_rates_where_memory_is_plenty() -> None:
    plenty = dataclasses.replace(HOST, dram=1e15)
    for lane, alone in (("h2d", HOST.h2d), ("d2h", HOST.d2h), ("cpu", HOST.cpu)):
        assert plenty.speeds([lane], 28.0) == {lane: alone}  # type: ignore[list-item]
    both = plenty.speeds(["d2h", "cpu", "h2d"], 28.0)
    assert both == {"h2d": HOST.duplex, "d2h": HOST.duplex, "cpu": HOST.cpu}


def test_lanes_never_take_more_than_the_hosts_memory_gives_and_never_starve() -> None:
    draw = random.Random(3)
    lanes: list[Lane] = ["h2d", "d2h", "cpu"]
    short = 0
    for _ in range(300):
        link = draw.uniform(5, 60) * 1e9
        cpu, dram, ranks = draw.uniform(0.1, 8) * 1e9, draw.uniform(30, 600) * 1e9, draw.randint(1, 8)
        rates = Rates(h2d=link, d2h=link, duplex=link * 0.9, cpu=cpu, gpu=1e11, dram=dram, ranks=ranks)
        busy = draw.sample(lanes, draw.randint(1, 3))
        speeds = rates.speeds(busy, 28.0)
        free = dataclasses.replace(rates, dram=math.inf).speeds(busy, 28.0)
        wanted, taken = (sum(v * (28 if k == "cpu" else 1) for k, v in each.items()) for each in (free, speeds))
        share = dram / ranks
        assert set(speeds) == set(busy) and all(0 < speeds[lane] <= free[lane] for lane in busy)
        assert taken == pytest.approx(min(wanted, share)), "all of it is used, and no more"
        copied, asked = (sum(v for k, v in each.items() if k != "cpu") for each in (speeds, free))
        assert copied >= min(asked, COPIES * share) * (1 - 1e-9)
        short += wanted > share
    assert 50 < short < 250


def test_an_infinite_link_leaves_the_cores_alone() -> None:
    rates = dataclasses.replace(HOST, h2d=math.inf, d2h=math.inf, duplex=math.inf, dram=math.inf)
    speeds = rates.speeds(["h2d", "d2h", "cpu"], 28.0)
    assert speeds["cpu"] == HOST.cpu and all(math.isfinite(speed) and speed > 1e15 for speed in [speeds["h2d"]])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs one NVIDIA GPU")
def test_gpu_rates_are_those_of_a_machine() -> None:
    device = torch.device("cuda", 0)
    measure(device, lambda: None)
    start = time.perf_counter()
    rates = measure(device, lambda: None)
    assert time.perf_counter() - start < 4
    assert 1e9 < rates.h2d < 1e12 and 1e9 < rates.d2h < 1e12
    assert 0.3 * min(rates.h2d, rates.d2h) < rates.duplex < 1.1 * max(rates.h2d, rates.d2h)
    assert 1e8 < rates.cpu < rates.gpu < 1e12
    assert rates.dram > 2 * rates.duplex * 0.9, "copies both ways are part of what was counted"
    assert Rates.decode(rates.encode()) == rates
