"""A random router sends tokens to more and more experts, and nothing but the experts learns."""

from typing import Any

import pytest
import torch
from torch import Tensor

from farspan.models.decoder import initial
from farspan.models.ffns import SmoeDropout
from farspan.models.ffns.smoe_dropout import SmoeDropoutFfn
from farspan.parallel.context.shard import Documents
from farspan.parallel.expert import Visits
from farspan.parallel.sums import Now

CONFIG = SmoeDropout(experts=6, hidden=5, first=2, last=5, over=12)


def made(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def built() -> SmoeDropoutFfn:
    module = CONFIG.build(8, 2).to(torch.float64)
    with torch.no_grad():
        for i, weight in enumerate([*module.parameters(), module.router.value]):
            weight.copy_(made(i, *weight.shape))
    return module


@pytest.mark.parametrize(("step", "active"), [(0, 2), (4, 3), (12, 5), (99, 5)])
def test_meets_its_best_and_more_of_them_later(step: int, active: int) -> None:
    module = built()
    module.tell("", Now(seed=0, step=step, row=0, first=True))
    x = made(7, 2, 4, 8).requires_grad_()
    out, tally = module(x, Documents())
    assert (tally.given.sum(1) == 4 * active).all() and CONFIG.active(step) == active
    logits = x.flatten(0, 1) @ module.router.value.double().T
    best = logits.topk(active)
    wanted = module.experts(Visits(x.flatten(0, 1), best.indices.int(), best.values.softmax(-1))).view_as(x)
    torch.testing.assert_close(out, wanted)
    leaves = [x, *module.parameters()]
    torch.testing.assert_close(*(torch.autograd.grad(y.sin().sum(), leaves) for y in (out, wanted)))


def test_the_router_never_learns_and_has_a_beginning() -> None:
    module = built()
    assert {name for name, _ in module.named_parameters()} == {"experts.w13", "experts.w2"}
    assert set(initial(module)) == {"router.value", "active.value", "experts.w13", "experts.w2"}
    assert float(module.charge(module(made(1, 1, 3, 8), Documents())[1], torch.ones(1, 6), None, None)) == 0  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fields", "message"), [({"first": 0}, "first=0, last=5"), ({"last": 7}, "last=7"), ({"over": 0}, "over=0")]
)
def test_mistakes_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SmoeDropout(**{**vars(CONFIG), **fields})
