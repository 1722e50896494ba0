"""A prefix is seen both ways, the rest stays causal, and no document sees another: in outputs and in gradients."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from farspan.kernels.random import key
from farspan.models.block import Block
from farspan.models.decoder import Decoder, DecoderModel, initial
from farspan.models.ffns import Swiglu
from farspan.models.mixers import Softmax
from farspan.parallel.context.local import Local
from farspan.parallel.context.shard import Batch
from farspan.platform.data.row import Row, collate

LENGTHS, PREFIXES = (9, 1, 6, 7), (5, 1, 0, 6)
MIXERS = {
    "full": Softmax(heads=4, kv_heads=2, qk_norm=True),
    "softcap": Softmax(heads=2, softcap=3.0),
    "sinks": Softmax(heads=2, sinks=True),
}


def build(mixer: Softmax) -> DecoderModel:
    config = Decoder(width=16, vocabulary=48, blocks=(Block(repeat=2, mixer=mixer, ffn=Swiglu(hidden=23)),))
    model = config.build(48, Local())
    with torch.no_grad():
        for name, weight in model.named_parameters():
            initial(model)[name].fill(weight, key(0, name), tuple(weight.shape), (0,) * weight.dim())
    return model.double()


def batch() -> Batch:
    tokens = torch.randint(48, (sum(LENGTHS),), generator=torch.Generator().manual_seed(1)).numpy()
    row = Row(tokens=tokens, labels=np.roll(tokens, -1), lengths=LENGTHS, prefixes=PREFIXES)
    return collate([row, replace(row, tokens=tokens[::-1].copy(), prefixes=(0, 0, 2, 3))], 0)


def logits(model: DecoderModel, given: Batch) -> Tensor:
    return model(given, torch.arange(sum(LENGTHS)))  # row 0: N V


def expected() -> Tensor:
    """Which token (row) may depend on which (column)."""
    seen = torch.zeros(sum(LENGTHS), sum(LENGTHS), dtype=torch.bool)
    begin = 0
    for length, prefix in zip(LENGTHS, PREFIXES, strict=True):
        inside = torch.ones(length, length, dtype=torch.bool).tril()
        inside[:prefix, :prefix] = True
        seen[begin : begin + length, begin : begin + length] = inside
        begin += length
    return seen


@pytest.mark.parametrize("name", MIXERS)
def test_outputs_move_where_they_may_and_nowhere_else(name: str) -> None:
    model, given = build(MIXERS[name]), batch()
    with torch.no_grad():
        before = logits(model, given)
        for place in range(sum(LENGTHS)):
            tokens = given.tokens.clone()
            tokens[0, place] = (tokens[0, place] + 1) % 48
            moved = (logits(model, replace(given, tokens=tokens)) != before).any(-1)
            assert torch.equal(moved, expected()[:, place]), f"token {place}"


@pytest.mark.parametrize("name", MIXERS)
def test_gradients_reach_what_is_seen(name: str) -> None:
    model, given = build(MIXERS[name]), batch()
    count = sum(LENGTHS)
    given = replace(given, tokens=torch.arange(2 * count).view(2, count))  # a token's weight is then its place's
    out = logits(model, given)
    for place in range(count):
        [gradient] = torch.autograd.grad(out[place].square().sum(), model.embed.weight, retain_graph=True)
        reached = gradient.abs().sum(-1) > 0
        assert torch.equal(reached[:count], expected()[place])
        assert not reached[count:].any(), "rows never see each other"


def test_a_prefix_of_one_is_causal() -> None:
    model = build(MIXERS["full"])
    tokens = batch().tokens[0].numpy()
    row = Row(tokens=tokens, labels=tokens, lengths=LENGTHS)
    with torch.no_grad():
        plain = model(collate([row], 0))
        ones = model(collate([replace(row, prefixes=(1, 1, 1, 1))], 0))
        more = model(collate([replace(row, prefixes=PREFIXES)], 0))
    torch.testing.assert_close(ones, plain)
    assert abs(float(more - plain)) > 1e-3


@pytest.mark.parametrize("name", MIXERS)
def test_without_causality_every_document_is_a_prefix(name: str) -> None:
    tokens = batch().tokens[0].numpy()
    row = Row(tokens=tokens, labels=tokens, lengths=LENGTHS)
    prefixed, open_ = build(MIXERS[name]), build(replace(MIXERS[name], causal=False))
    with torch.no_grad():
        wanted = prefixed(collate([replace(row, prefixes=LENGTHS)], 0))
        found, causal = (model(collate([row], 0)) for model in (open_, prefixed))
    torch.testing.assert_close(found, wanted)
    assert abs(float(found - causal)) > 1e-3
    assert open_.flops((9,)) - prefixed.flops((9,)) == 4 * (81 - 45) * 16 * 2, "two layers of 16 channels"


@pytest.mark.parametrize("lengths", [LENGTHS, (sum(LENGTHS),)])
def test_padding_apart_is_seen_by_nobody(lengths: tuple[int, ...]) -> None:
    tokens = batch().tokens[0].numpy()
    model, rows = build(Softmax(heads=2, causal=False)), [Row(tokens=tokens, labels=tokens, lengths=lengths)] * 2
    with torch.no_grad():
        plain = collate(rows, 0)
        wanted, found, over = (model(x) for x in (plain, plain.padded(16, apart=True), plain.padded(16)))
    torch.testing.assert_close(found, wanted)
    assert abs(float(over - wanted)) > 1e-3


def test_a_window_looks_back() -> None:
    with pytest.raises(ValueError, match="window=4: looks back, and causal=False both ways"):
        Softmax(heads=2, window=4, causal=False)
