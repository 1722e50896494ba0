"""Choices, probabilities and charges of routers are megatron-core's, where that is installed."""

from typing import Any

import pytest
import torch
from torch import Tensor

from farspan.kernels.route import route
from farspan.models.block import Block
from farspan.models.decoder import Decoder
from farspan.models.ffns import Moe
from farspan.parallel.context.local import Local
from farspan.parallel.context.shard import Batch
from farspan.parallel.sums import Sums


@pytest.fixture(scope="module")
def megatron() -> Any:
    return pytest.importorskip("megatron.core.transformer.moe.moe_utils")


def logits_of(tokens: int, experts: int, seed: int = 0) -> Tensor:
    return torch.randn(tokens, experts, generator=torch.Generator().manual_seed(seed)) * 2


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"score": "softmax"}, {"use_pre_softmax": True}),
        ({"score": "softmax_after"}, {"use_pre_softmax": False}),
        ({"score": "sigmoid", "normalised": True, "scale": 2.5}, {"score_function": "sigmoid", "scaling_factor": 2.5}),
        (
            {"score": "sigmoid", "normalised": True, "groups": (4, 2)},
            {"score_function": "sigmoid", "num_groups": 4, "group_topk": 2},
        ),
    ],
    ids=["softmax", "softmax after", "sigmoid", "groups"],
)
@pytest.mark.parametrize("biased", [False, True])
def test_routes_as_megatron(megatron: Any, ours: dict[str, Any], theirs: dict[str, Any], biased: bool) -> None:
    """Its groups are scored by as many of their best as each has of the chosen, two here as in ours."""
    if biased and "score_function" not in theirs:
        pytest.skip("Megatron's softmax takes no bias")
    logits, bias = logits_of(63, 16), torch.linspace(-0.2, 0.2, 16) if biased else None
    leaves = [logits.clone().requires_grad_() for _ in range(2)]
    p, chosen = route(leaves[0], 4, bias=bias, **ours)
    dense = torch.zeros_like(logits).scatter(1, chosen.long(), p)
    wanted, routed = megatron.topk_routing_with_score_function(leaves[1], 4, expert_bias=bias, **theirs)
    assert torch.equal(dense > 0, routed)
    torch.testing.assert_close(dense, wanted)
    upstream = torch.randn(dense.shape, generator=torch.Generator().manual_seed(1))
    found, expected = (torch.autograd.grad(x, y, upstream)[0] for x, y in zip((dense, wanted), leaves, strict=True))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_charges_as_megatron(megatron: Any, score: Any) -> None:
    """Of a row whose tokens all have labels: the balance loss and z-loss of its tokens, and their gradients."""
    balance, z_loss, experts, length, vocabulary = 0.3, 0.02, 8, 24, 31
    ffn = Moe(experts=experts, active=2, hidden=5, score=score, balance=balance, z_loss=z_loss)
    model = Decoder(width=12, vocabulary=vocabulary, blocks=(Block(mixer=None, ffn=ffn),)).build(vocabulary, Local())
    made = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, generator=made)
    tokens = torch.randint(vocabulary, (1, length), generator=made)
    batch = Batch(
        tokens=tokens,
        labels=tokens.roll(-1, 1),
        positions=torch.arange(length)[None],
        cu_seqlens=None,
        lengths=(length,),
        valid=length,
    )
    sums, layer = model(batch), model.layers[0]
    assert isinstance(sums, Sums)
    logits = (layer.ffn_norm(model.embed(tokens)[0]) @ layer.ffn.router.weight.T).float()  # type: ignore[operator, union-attr]
    map_of, scores = megatron.compute_routing_scores_for_aux_loss(logits, 2, score)
    if map_of.dtype != torch.bool:
        map_of, scores = scores, map_of
    wanted = megatron.switch_load_balancing_loss_func(scores, map_of.sum(0), length, 2, experts, balance)
    wanted = wanted + megatron.z_loss_func(logits, z_loss)
    torch.testing.assert_close(sums.cost / length, wanted)
    router = layer.ffn.router.weight  # type: ignore[union-attr]
    found, expected = (torch.autograd.grad(x, router, retain_graph=True)[0] for x in (sums.cost / length, wanted))
    torch.testing.assert_close(found, expected)
