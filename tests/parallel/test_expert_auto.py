"""The dispatch that is picked has the least bytes to wait for, and all ranks pick the same."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from farspan.parallel.comm import Group
from farspan.parallel.expert.auto import KINDS, Layer, Link, measure, pick, seconds
from farspan.parallel.mesh import Mesh, Parallel

QWEN = Layer(tokens=16384, experts=128, active=8, width=2048, hidden=768, itemsize=2)
"""A layer of Qwen3-30B-A3B."""
NVLINK = Link(exchange=375e9, gather=375e9, latency=0.0, product=1e30)
"""One that hides nothing behind products."""


def test_bytes_are_those_of_the_layer() -> None:
    """Eight ranks: a token goes to 5.25 of them, and the ranks gather 1.06 GB of experts that are elsewhere."""
    found = seconds(QWEN, 8, 1, NVLINK)
    met = 8 * (1 - (7 / 8) ** 8)
    assert met == pytest.approx(5.25, abs=0.01)
    assert found["all_to_all"] * 375e9 == pytest.approx(4 * 16384 * met * 7 / 8 * 4096)
    assert found["all_gather"] * 375e9 == pytest.approx(4 * 16384 * 7 * 4096)
    assert found["weight_gather"] * 375e9 == pytest.approx((2 + 2 + 4) * 3 * 128 * 2048 * 768 * 7 / 8)
    apart = replace(NVLINK, latency=1e-3)
    assert seconds(QWEN, 8, 1, apart)["all_to_all"] - found["all_to_all"] == pytest.approx(9e-3)


def test_a_shared_expert_hides_what_goes_there() -> None:
    """Half of a short exchange, in both directions, and of a long one what the products last."""
    layer, fast = replace(QWEN, shared=768), replace(NVLINK, product=500e12)
    for kind in ("all_to_all", "all_gather"):
        whole = seconds(QWEN, 8, 1, fast)[kind]
        lasts = 18 * 16384 * 2048 * 768 / 500e12
        assert seconds(layer, 8, 1, fast)[kind] == pytest.approx(whole - lasts)
        assert seconds(replace(layer, shared=1 << 20), 8, 1, fast)[kind] == pytest.approx(whole / 2)


def test_experts_that_are_gathered_anyhow_cost_their_rest() -> None:
    """Sharded over two ranks besides, three quarters come instead of a quarter."""
    weights = 3 * 128 * 2048 * 768
    assert seconds(QWEN, 2, 2, NVLINK)["weight_gather"] * 375e9 == pytest.approx(8 * weights * (3 / 4 - 1 / 4))


def test_many_tokens_stay_and_few_travel() -> None:
    assert pick({replace(QWEN, tokens=1024): 48}, 8, 1, NVLINK)[0] == "all_to_all"
    best, why = pick({replace(QWEN, tokens=1 << 18): 48}, 8, 1, NVLINK)
    assert best == "weight_gather" and "all_gather" in why and "375 GB/s all to all" in why
    assert pick({replace(QWEN, tokens=16): 1}, 2, 1, replace(NVLINK, latency=1e-2))[0] == "weight_gather"
    assert pick({replace(QWEN, tokens=16): 1}, 2, 1, replace(NVLINK, latency=5e-6))[0] == "all_gather"
    hidden = replace(NVLINK, product=500e12)
    assert seconds(replace(QWEN, tokens=1 << 18), 8, 1, hidden)["weight_gather"] == 0, "behind the products"


def test_what_does_not_fit_is_left_out() -> None:
    layers, needs = {replace(QWEN, tokens=1 << 18): 48}, {"all_to_all": 40, "all_gather": 70, "weight_gather": 90}
    assert pick(layers, 8, 1, NVLINK, needs, 90)[0] == "weight_gather"
    best, why = pick(layers, 8, 1, NVLINK, {kind: size * 10**9 for kind, size in needs.items()}, 80 * 10**9)
    assert best == "all_to_all" and why.endswith("gathering); weight_gather would take 90 GB of the device's 80")
    assert pick(layers, 8, 1, NVLINK, needs, 30)[0] == "all_to_all", "the smallest, if none fits"


def measured() -> Any:
    control = dist.new_group(backend="gloo")
    mesh = Mesh(Parallel(ep=2).sizes(2), torch.device("cpu"), control)
    assert mesh.expert_axes.ep is not None
    link = measure(mesh.expert_axes.ep, mesh.device, torch.float32, Group(control))
    return vars(link), pick({replace(QWEN, tokens=64): 3}, 2, 1, link)


def test_ranks_agree(ranks: Any) -> None:
    first, second = ranks(2, measured)
    assert first == second and first[1][0] in KINDS
    assert all(value > 0 for value in first[0].values())
