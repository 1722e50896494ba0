"""Squared ReLU equals its formula, and each token is alone with it."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from farspan.models.decoder import initial
from farspan.models.ffns import SquaredRelu


@pytest.mark.parametrize(("width", "hidden"), [(3, 1), (8, 21)])
def test_equals_its_formula(width: int, hidden: int) -> None:
    module = SquaredRelu(hidden=hidden).build(width, 2).double()
    up, down = weights = module.to_up.weight, module.to_out.weight
    x = torch.randn(2, 5, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    inner = torch.einsum("btd,hd->bth", x, up)
    wanted = torch.einsum("bth,dh->btd", torch.where(inner > 0, inner**2, 0), down)
    out = module(x)
    torch.testing.assert_close(out, wanted)
    for left, right in zip(
        torch.autograd.grad(out.sin().sum(), [x, *weights]),
        torch.autograd.grad(wanted.sin().sum(), [x, *weights]),
        strict=True,
    ):
        torch.testing.assert_close(left, right)


def test_flops_are_what_torch_counts() -> None:
    module = SquaredRelu(hidden=21).build(8, 2)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(torch.randn(1, 13, 8))
    assert module.flops((4, 9)) == counter.get_total_flops()


def test_scales_keep_the_sum_of_all_branches_near_one() -> None:
    depth, width = 3, 64
    module = SquaredRelu(hidden=512).build(width, depth)
    made = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in module.named_parameters():
            weight.normal_(0.0, initial(module)[name].std, generator=made)
        out = module(torch.randn(400, width, generator=made))
    assert 1.0 < 2 * depth * out.square().mean() < 2.0  # 3/2


def test_a_hidden_size_of_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="hidden=0: must be at least 1; 4 times the width is usual"):
        SquaredRelu(hidden=0)
