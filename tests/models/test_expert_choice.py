"""Experts take the best tokens of each row, equal one after the other, and as many as any other expert."""

from math import ceil
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from farspan.models.block import Block
from farspan.models.decoder import Decoder
from farspan.models.ffns import ExpertChoice
from farspan.models.ffns.expert_choice import ExpertChoiceFfn
from farspan.models.mixers import Softmax
from farspan.parallel.context.shard import Documents

PLAIN = ExpertChoice(experts=6, active=1.5, hidden=5)


def made(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def built(config: ExpertChoice) -> ExpertChoiceFfn:
    module = config.build(8, 2).to(torch.float64)
    with torch.no_grad():
        for i, weight in enumerate(module.parameters()):
            weight.copy_(made(i, *weight.shape))
    return module


def by_hand(config: ExpertChoice, module: ExpertChoiceFfn, rows: list[Tensor]) -> tuple[list[Tensor], Tensor]:
    """Row by row, expert by expert; and how many tokens each expert took of each row."""
    outs, taken = [], torch.zeros(len(rows), config.experts, dtype=torch.int64)
    for number, row in enumerate(rows):
        share = (row @ module.router.weight.T).softmax(-1)
        best = share.topk(config.columns).indices
        out = torch.zeros_like(row)
        for e in range(config.experts):
            wanting = [t for t in range(len(row)) if e in best[t]]
            wanting.sort(key=lambda t: -share[t, e].item())
            for t in wanting[: ceil(config.active * len(row) / config.experts)]:
                taken[number, e] += 1
                w13 = module.experts.w13[e]
                inner = F.silu(w13[0] @ row[t]) * (w13[1] @ row[t])
                update = torch.zeros_like(out)
                update[t] = share[t, e] * (module.experts.w2[e] @ inner)
                out = out + update
        outs.append(out)
    return outs, taken


@pytest.mark.parametrize("most", [None, 2])
@pytest.mark.parametrize("shuffled", [False, True])
def test_equals_one_expert_after_the_other(most: int | None, shuffled: bool) -> None:
    """Rows of 16 and 9 tokens, the second filled up; wherever the tokens lie."""
    config = ExpertChoice(experts=6, active=1.5, hidden=5, most=most)
    module, x = built(config), made(9, 2, 16, 8).requires_grad_()
    numbers = torch.arange(32)
    numbers[25:] = -1
    order = torch.randperm(32, generator=torch.Generator().manual_seed(0)) if shuffled else torch.arange(32)
    out, tally = module(x.flatten(0, 1)[order][None], Documents(places=numbers[order].int()[None], whole=(2, 16)))
    out = out.flatten(0, 1)[order.argsort()]
    wanted, taken = by_hand(config, module, [x[0], x[1, :9]])
    torch.testing.assert_close(out[:25], torch.cat(wanted))
    assert not out[25:].any(), "padding is given nothing"
    assert torch.equal(tally.given.long(), taken)
    if most is None:
        assert (taken == torch.tensor([[4], [3]])).all(), "all experts take as many"
    leaves = [x, *module.parameters()]
    found, expected = (torch.autograd.grad(y.sin().sum(), leaves) for y in (out[:25], torch.cat(wanted)))
    torch.testing.assert_close(found, expected)


def test_alike_tokens_are_taken_in_their_order() -> None:
    module, row = built(PLAIN), made(1, 8).expand(1, 12, 8)
    out, tally = module(row, Documents())
    assert tally.given.tolist() == [[3] * 6]
    assert out[0, :3].abs().min() > 0 and not out[0, 3:].any()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"most": 7}, "most=7: must be from 1"),
        ({"active": 0.0}, "active=0.0: must be above 0, and no more than experts=6"),
        ({"active": 2.5, "most": 2}, "active=2.5: must be above 0, and no more than most=2"),
        ({"hidden": 0}, "hidden=0"),
    ],
)
def test_mistakes_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ExpertChoice(**{**vars(PLAIN), **fields})


def test_a_causal_model_refuses_them() -> None:
    causal, open_ = (Block(mixer=Softmax(heads=2, causal=value), ffn=PLAIN) for value in (True, False))
    assert not Decoder(width=8, blocks=(open_,)).causal
    with pytest.raises(ValueError, match=r"blocks.1.ffn.kind=expert_choice: experts choose among all tokens of a row"):
        Decoder(width=8, blocks=(Block(mixer=causal.mixer, ffn=None), causal))
