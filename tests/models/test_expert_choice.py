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
        out = torch.zeros_like(row)
        for e in range(config.experts):
            wanting = share[:, e].argsort(descending=True).tolist()
            for t in wanting[: ceil(config.active * len(row) / config.experts)]:
                taken[number, e] += 1
                w13 = module.experts.w13[e]
                inner = F.silu(w13[0] @ row[t]) * (w13[1] @ row[t])
                update = torch.zeros_like(out)
                update[t] = share[t, e] * (module.experts.w2[e] @ inner)
                out = out + update
        outs.append(out)
    return outs, taken


@pytest.mark.parametrize("shuffled", [False, True])
def test_equals_one_expert_after_the_other(shuffled: bool) -> None:
    """Rows of 16 and 9 tokens, the second filled up; wherever the tokens lie."""
    module, x = built(PLAIN), made(9, 2, 16, 8).requires_grad_()
    numbers = torch.arange(32)
    numbers[25:] = -1
    order = torch.randperm(32, generator=torch.Generator().manual_seed(0)) if shuffled else torch.arange(32)
    out, tally = module(x.flatten(0, 1)[order][None], Documents(places=numbers[order].int()[None], whole=(2, 16)))
    out = out.flatten(0, 1)[order.argsort()]
    wanted, taken = by_hand(PLAIN, module, [x[0], x[1, :9]])
    torch.testing.assert_close(out[:25], torch.cat(wanted))
    assert not out[25:].any(), "padding is given nothing"
    assert torch.equal(tally.given.long(), taken)
    assert (taken == torch.tensor([[4], [3]])).all(), "all experts take as many"
    leaves = [x, *module.parameters()]
    found, expected = (torch.autograd.grad(y.sin().sum(), leaves) for y in (out[:25], torch.cat(wanted)))
    torch.testing.assert_close(found, expected)


def test_alike_tokens_are_taken_in_their_order() -> None:
    module, row = built(PLAIN), made(1, 8).expand(1, 12, 8)
    out, tally = module(row, Documents())
    assert tally.given.tolist() == [[3] * 6]
    assert out[0, :3].abs().min() > 0 and not out[0, 3:].any() and tally.unmet == 9


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"active": 0.0}, "active=0.0: must be above 0, and no more than experts=6"),
        ({"active": 6.5}, "active=6.5: must be above 0, and no more than experts=6"),
        ({"hidden": 0}, "hidden=0"),
    ],
)
def test_mistakes_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ExpertChoice(**{**vars(PLAIN), **fields})


def test_probabilities_are_told_apart_as_finely_as_a_row_needs() -> None:
    """Two tokens whose probabilities are 1 / 30,000 apart: the second is taken."""
    module = built(ExpertChoice(experts=2, active=1.0, hidden=5))
    with torch.no_grad():
        module.router.weight.zero_()
        module.router.weight[0, 0] = 1.0
    x = made(2, 1, 2, 8)
    x[0, :, 0] = torch.tensor([0.0, 4 / 30_000])
    out, _ = module(x, Documents())
    wanted, _ = by_hand(module.config, module, [x[0]])
    torch.testing.assert_close(out[0], wanted[0])
    assert not torch.allclose(out[0, 0], out[0, 0] * 0), "the first by the other expert"


def test_memory_and_operations_are_for_the_visits_that_are_taken() -> None:
    config, x = ExpertChoice(experts=8, active=2.0, hidden=5), made(4, 2, 16, 8).requires_grad_()
    module, kept = built(config), 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept = max(kept, tensor.numel() if tensor.shape[-1] in (5, 10) else 0)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        module(x, Documents())
    assert kept == 2 * 16 * 2 * 10, "gate and up of every visit"
    assert module.flops((32,)) == 2 * 32 * (8 * 8 + 2 * 3 * 5 * 8) and config.met == 2


def test_a_causal_model_refuses_them() -> None:
    causal, open_ = (Block(mixer=Softmax(heads=2, causal=value), ffn=PLAIN) for value in (True, False))
    assert not Decoder(width=8, blocks=(open_,)).causal
    with pytest.raises(ValueError, match=r"blocks.1.ffn.kind=expert_choice: experts choose among all tokens of a row"):
        Decoder(width=8, blocks=(Block(mixer=causal.mixer, ffn=None), causal))
