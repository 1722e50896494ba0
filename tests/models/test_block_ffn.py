"""Experts above zero, weighed by their norm, equal one after the other; neighbours are charged by definition."""

from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from farspan.models.ffns import BlockFfn
from farspan.models.ffns.block_ffn import BlockFfnLayer
from farspan.models.ffns.router import RowSums
from farspan.parallel.context.shard import Documents

PLAIN = BlockFfn(experts=6, hidden=5)


def made(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def built(config: BlockFfn) -> BlockFfnLayer:
    module = config.build(8, 2).to(torch.float64)
    with torch.no_grad():
        for i, weight in enumerate(module.parameters()):
            weight.copy_(made(i, *weight.shape))
    return module


def by_hand(config: BlockFfn, module: BlockFfnLayer, x: Tensor) -> tuple[Tensor, int]:
    """Token by token, expert by expert; and how many visits there were."""
    rows, visits = [], 0
    for token in x.flatten(0, 1):
        logits = module.router.weight @ token
        active = logits.relu()
        share = active / (active.square().mean() + 1e-6).sqrt() * module.gain
        out = torch.zeros_like(token)
        for e in logits.argsort(descending=True)[: config.met].tolist():
            if logits[e] > 0:
                visits += 1
                w13 = module.experts.w13[e]
                inner = F.silu(w13[0] @ token) * (w13[1] @ token if config.gated else 1)
                out = out + share[e] * (module.experts.w2[e] @ inner)
        rows.append(out)
    return torch.stack(rows).view_as(x), visits


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("most", [None, 3])
def test_equals_one_expert_after_the_other(gated: bool, most: int | None) -> None:
    config = BlockFfn(experts=6, hidden=5, gated=gated, most=most)
    module, x = built(config), made(9, 2, 7, 8).requires_grad_()
    (out, tally), (wanted, visits) = module(x, Documents()), by_hand(config, module, x)
    torch.testing.assert_close(out, wanted)
    assert int(tally.given.sum()) == visits < 14 * config.met, "some meet fewer"
    leaves = [x, *module.parameters()]
    torch.testing.assert_close(*(torch.autograd.grad(y.sin().sum(), leaves) for y in (out, wanted)))


@pytest.mark.parametrize("shuffled", [False, True])
def test_neighbours_are_charged_by_definition(shuffled: bool) -> None:
    """Rows of 7 and 5 tokens and chunks of 3; wherever the tokens lie."""
    config = BlockFfn(experts=6, hidden=5, locality=0.2, sharpness=2.0, sparsity=0.7, chunk=3)
    module, x, labels = built(config), made(3, 2, 7, 8), torch.tensor([4.0, 3.0], dtype=torch.float64)
    wanted = torch.zeros((), dtype=torch.float64)
    for row, length, weight in zip(x, (7, 5), labels, strict=True):
        logits = row[:length] @ module.router.weight.T
        near = [F.binary_cross_entropy((2 * b).sigmoid(), (2 * a).sigmoid().detach()) for a, b in pairwise(logits)]
        share = logits.relu() / (logits.relu().sum(-1, keepdim=True) + 1e-5)
        chunks = [(1 - (1 - part + 1e-5).prod(0)).mean() * len(part) for part in share.split(3)]
        wanted = wanted + weight / length * (0.2 * torch.stack(near).sum() + 0.7 * torch.stack(chunks).sum())
    numbers = torch.arange(14)
    numbers[12:] = -1
    order = torch.randperm(14, generator=torch.Generator().manual_seed(0)) if shuffled else torch.arange(14)
    documents = Documents(places=numbers[order].int()[None], whole=(2, 7))
    _, tally = module(x.flatten(0, 1)[order][None], documents)
    rows = RowSums(torch.tensor([7.0, 5.0], dtype=torch.float64), labels)
    cost = module.charge(tally, tally.given, rows, rows)
    torch.testing.assert_close(cost, wanted, rtol=1e-4, atol=1e-4)  # 1e-5 under the logarithm
    found, expected = (torch.autograd.grad(y, module.router.weight)[0] for y in (cost, wanted))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"most": 7}, "most=7: must be from 1"),
        ({"chunk": 1}, "chunk=1"),
        ({"hidden": 0}, "hidden=0"),
        ({"sharpness": 3.0}, "sharpness=3.0: locality=0 has no use for it; set locality, or leave sharpness at 100.0"),
        ({"chunk": 4, "locality": 0.1}, "chunk=4: sparsity=0 has no use for it"),
    ],
)
def test_mistakes_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BlockFfn(**{**vars(PLAIN), **fields})
