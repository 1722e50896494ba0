"""What routers count, keep, shake and drop is what their definitions say."""

from math import ceil
from typing import Any

import pytest
import torch
from torch import Tensor

from farspan.kernels.route import route
from farspan.models.block import Block
from farspan.models.decoder import Decoder, initial
from farspan.models.ffns import BlockFfn, ExpertChoice, Moe, SmoeDropout, Sparse
from farspan.models.ffns.balance import quantiles, shifted
from farspan.models.ffns.capacity import Drop, within
from farspan.models.ffns.moe import MoeFfn
from farspan.models.ffns.router import Kept, Scope
from farspan.models.norm import Rms
from farspan.parallel import recompute
from farspan.parallel.context.local import Local
from farspan.parallel.context.shard import IGNORE, Batch, Documents
from farspan.parallel.expert import Visits
from farspan.parallel.sums import Now, Sums

PLAIN: dict[str, Any] = {"experts": 6, "active": 2, "hidden": 5}


def made(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def built(width: int = 8, **fields: Any) -> MoeFfn:
    module = Moe(**{**PLAIN, **fields}).build(width, 2).to(torch.float64)
    with torch.no_grad():
        for i, weight in enumerate(module.parameters()):
            weight.copy_(made(i, *weight.shape))
    return module


def now(step: int = 0, row: int = 0, first: bool = True) -> Now:
    return Now(seed=5, step=step, row=row, first=first)


def batch_of(tokens: Tensor, labelled: int) -> Batch:
    labels = tokens.roll(-1, 1)
    labels[0, labelled:] = IGNORE
    positions, lengths = torch.zeros_like(tokens), (tokens.shape[1],) * len(tokens)
    return Batch(
        tokens=tokens, labels=labels, positions=positions, cu_seqlens=None, lengths=lengths, valid=labels.numel()
    )


@pytest.mark.parametrize("scope", ["micro_batch", "step"])
def test_loads_are_counted_over_their_scope(scope: Scope) -> None:
    """Two micro-batches: of the first both scopes are that micro-batch; of the second `step` is both."""
    ffn = Moe(**PLAIN, balance=1.0, balance_over=scope)
    model = Decoder(width=8, vocabulary=11, blocks=(Block(mixer=None, ffn=ffn),)).build(11, Local())
    for i, weight in enumerate(model.parameters()):
        weight.data.copy_(made(i, *weight.shape))
    tokens = torch.randint(11, (2, 3, 7), generator=torch.Generator().manual_seed(0))
    given, labels = torch.zeros(6), 0
    for i, (part, labelled) in enumerate(zip(tokens, (7, 4), strict=True)):
        model.tell(now(row=3 * i, first=i == 0))
        batch = batch_of(part, labelled)
        sums = model(batch)
        assert isinstance(sums, Sums)
        layer: Any = model.layers[0]
        logits = layer.ffn_norm(model.embed(part)).flatten(0, 1) @ layer.ffn.router.weight.T
        own = torch.zeros(6).index_add(0, logits.topk(2).indices.flatten(), torch.ones(42))
        valid = int((batch.labels != IGNORE).sum())
        given, labels = (given + own, labels + valid) if scope == "step" else (own, valid)
        count = given.sum() / 2
        wanted = 6 * (given / (2 * count) * logits.softmax(-1).sum(0)).sum() * labels / count
        torch.testing.assert_close(sums.cost, wanted)
        wanted.backward(retain_graph=True)
        expected = layer.ffn.router.weight.grad.clone()
        layer.ffn.router.weight.grad = None
        sums.cost.backward()
        torch.testing.assert_close(layer.ffn.router.weight.grad, expected)
        layer.ffn.router.weight.grad = None


def test_the_bias_follows_the_loads() -> None:
    module = built(bias="aux_free", bias_rate=0.25)
    assert module.bias is not None and set(initial(module)) == {n for n, _ in module.named_parameters()} | {
        "bias.value"
    }
    load = torch.tensor([8.0, 0, 0, 4, 4, 8], dtype=torch.float64)
    module.settle(load, load[:1], torch.tensor(0.0))
    assert (module.bias.value == 0).all(), "a step that is not taken moves nothing"
    module.settle(load, load[:1], torch.tensor(0.3))
    assert module.bias.value.tolist() == [-0.25, 0.25, 0.25, 0, 0, -0.25]
    module.settle(torch.tensor([9.0, 3, 3, 3, 3, 3], dtype=torch.float64), load[:1], torch.tensor(1.0))
    assert abs(float(module.bias.value.sum())) < 1e-6 and float(module.bias.value[0]) == pytest.approx(-2 / 3)


def test_a_bias_decides_who_is_chosen_and_not_how_much_of_it() -> None:
    module = built(bias="aux_free", score="sigmoid", normalised=False, balance=0.0)
    assert module.bias is not None
    plain = built(score="sigmoid", normalised=False, balance=0.0)
    plain.load_state_dict(module.state_dict(), strict=False)
    module.bias.value.copy_(torch.tensor([0.0, 0, 100, 0, 50, 0]))
    x = made(9, 1, 5, 8)
    out, tally = module(x, Documents())
    assert tally.given[0].tolist() == [0, 0, 5, 0, 5, 0]
    share = (x[0] @ module.router.weight.T).sigmoid()[:, [2, 4]]
    wanted = plain.experts(Visits(x[0], torch.tensor([[2, 4]] * 5, dtype=torch.int32), share))
    torch.testing.assert_close(out[0], wanted)


def test_casts_leave_alone_what_is_kept() -> None:
    kept = Kept(4)
    with torch.no_grad():
        kept.value.copy_(torch.tensor([1e-3, -2e-3, 1 / 3, 0]))
    before = kept.value.clone()
    for dtype in (torch.bfloat16, torch.float64):
        kept.to(dtype)
        assert kept.value.dtype == torch.float32 and torch.equal(kept.value, before)
    assert kept.to("meta").value.is_meta and list(kept.state_dict()) == ["value"]


def test_quantiles_even_the_loads() -> None:
    """Few rounds make the loads of skewed scores even; padding has no say; a round is its definition."""
    scores = (made(3, 96, 8) + torch.arange(8)).softmax(-1)
    bias = torch.zeros(8, dtype=torch.float64)
    for _ in range(30):
        bias = quantiles(scores, bias, 2, None) / 96
    loads = torch.zeros(8).index_add(0, (scores + bias).topk(2).indices.flatten(), torch.ones(192))
    assert loads.max() <= 27 and loads.min() >= 21
    places = torch.arange(96).where(torch.arange(96) % 3 > 0, -1)
    padded = quantiles(scores, bias, 2, places)
    torch.testing.assert_close(padded, quantiles(scores[places >= 0], bias, 2, None))
    rival = (scores + bias).sort(descending=True).values[:, 2:3]
    wanted = -(scores - rival).sort(0, descending=True).values[96 * 2 // 8]
    torch.testing.assert_close(quantiles(scores, bias, 2, None), 96 * wanted)
    assert (quantiles(scores, bias, 2, torch.full((96,), -1)) == 0).all()


def test_quantiles_are_what_the_step_asked_for() -> None:
    module = built(bias="quantile")
    x = made(4, 2, 9, 8)
    _, tally = module(x, Documents())
    module.settle(tally.given.sum(0), tally.wish, torch.tensor(1.0))
    assert module.bias is not None
    scores = (x.flatten(0, 1) @ module.router.weight.T).softmax(-1)
    torch.testing.assert_close(module.bias.value, (quantiles(scores, torch.zeros(6), 2, None) / 18).float())
    assert shifted(torch.zeros(2), torch.ones(2), 1.0).tolist() == [0, 0]
    with torch.no_grad():
        assert module(x, Documents())[1].wish.shape == (), "no step, no sort"


def test_jitter_is_of_the_token_and_the_step() -> None:
    """The same again for the same step; other noise in another; none without gradients; a cut row's is its part's."""
    module, x = built(jitter=0.5, balance=1.0), made(6, 2, 7, 8)

    def scores(x: Tensor, at: Now, places: Tensor | None = None) -> Tensor:
        module.tell("layers.0.ffn", at)
        documents = Documents() if places is None else Documents(places=places.int(), whole=(2, 7))
        return module(x, documents)[1].scores

    first = scores(x, now())
    assert torch.equal(first, scores(x, now()))
    assert not torch.allclose(first, scores(x, now(step=1)))
    moved = scores(x[1:], now(row=1))
    torch.testing.assert_close(moved, first[1:])
    order = torch.randperm(14, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(scores(x.flatten(0, 1)[order][None], now(), order[None]), first)
    with torch.no_grad():
        plain = scores(x, now())
    module.jitter = None
    torch.testing.assert_close(plain, scores(x, now()))
    assert not torch.allclose(plain, first)


def test_forced_choice_is_even_and_probabilities_are_the_routers() -> None:
    module = built(forced=True, score="softmax")
    x = made(7, 1, 9, 8)
    out, tally = module(x, Documents())
    assert (tally.given == 3).all()
    turns = (torch.arange(9).unsqueeze(1) * 2 + torch.arange(2)) % 6
    p, _ = route(x[0] @ module.router.weight.T, 2, score="softmax", normalised=True, chosen=turns.int())
    torch.testing.assert_close(out[0], module.experts(Visits(x[0], turns.int(), p)))


def test_a_gate_on_the_shared_expert() -> None:
    gated, x = built(shared=3, shared_gate=True), made(8, 1, 4, 8)
    assert gated.shared is not None and gated.shared_gate is not None
    plain = built(shared=3)
    plain.load_state_dict({n: w for n, w in gated.state_dict().items() if "gate.w" not in n or "to_" in n})
    gate = (x @ gated.shared_gate.weight.T).sigmoid()
    beside = gated.shared(x)
    torch.testing.assert_close(gated(x, Documents())[0], plain(x, Documents())[0] - beside + gate * beside)


def dropped_by_hand(
    chosen: Tensor, share: Tensor, lengths: list[int], experts: int, factor: float, drop: Drop
) -> Tensor:
    """Row by row, visit by visit; tokens of a row one after the other, padding (-1) last."""
    out, start = chosen.clone(), 0
    for length in lengths:
        room = ceil(length * chosen.shape[1] / experts * factor - 1e-9)
        for expert in range(experts):
            visits = [(t, j) for t in range(start, start + length) for j in range(chosen.shape[1])]
            visits = [(t, j) for t, j in visits if chosen[t, j] == expert]
            if drop == "least":
                visits.sort(key=lambda at: -round(float(share[at]) * 4096))
            for at in visits[room:]:
                out[at] = -1
        start += 11
    return out


@pytest.mark.parametrize("drop", ["last", "least"])
@pytest.mark.parametrize("factor", [0.3, 1.0, 1.25, 9.0])
def test_capacity_is_of_the_row(drop: Drop, factor: float) -> None:
    """As by hand; and for shuffled tokens of two ranks, which exchange what they chose."""
    logits = made(1, 33, 5) * 2
    share, chosen = route(logits, 2, score="softmax")
    lengths = [11, 7, 0]
    numbers = torch.arange(33)
    for row, length in enumerate(lengths):
        numbers[row * 11 + length : (row + 1) * 11] = -1
    chosen = torch.where(numbers.unsqueeze(1) >= 0, chosen, -1)
    settings: dict[str, Any] = {"factor": factor, "drop": drop}
    found = within(chosen, share, numbers, (3, 11), 5, **settings, every=lambda said: said)
    assert torch.equal(found, dropped_by_hand(chosen, share, lengths, 5, factor, drop))
    order = torch.randperm(33, generator=torch.Generator().manual_seed(2))
    said: list[Tensor] = []
    for own in order.split(17):
        within(chosen[own], share[own], numbers[own], (3, 11), 5, **settings, every=lambda x: said.append(x) or x)
    for own in order.split(17):
        part = within(chosen[own], share[own], numbers[own], (3, 11), 5, **settings, every=lambda _: torch.cat(said))
        assert torch.equal(part, found[own])


def test_who_finds_no_room_adds_nothing_and_is_counted() -> None:
    module, x = built(capacity=0.5, balance=0.0), made(2, 2, 9, 8).requires_grad_()
    out, tally = module(x, Documents())
    assert tally.given.sum() == 36 and int(tally.dropped) >= 12
    p, chosen = route(x.detach().flatten(0, 1) @ module.router.weight.T, 2, score="softmax", normalised=True)
    kept = within(chosen, p, torch.arange(18), (2, 9), 6, factor=0.5, drop="last", every=lambda said: said)
    assert int((kept < 0).sum()) == int(tally.dropped)
    assert int((kept < 0).all(1).sum()) == int(tally.unmet) > 0
    wanted = module.experts(Visits(x.flatten(0, 1), kept, p)).view_as(x)
    torch.testing.assert_close(out, wanted)


KINDS: dict[str, Sparse] = {
    "block_ffn": BlockFfn(experts=6, hidden=5),
    "smoe_dropout": SmoeDropout(experts=6, hidden=5, first=2, last=4, over=9),
    "expert_choice": ExpertChoice(experts=6, active=1.5, hidden=5),
}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("keep", [0.0, 0.5])
def test_recomputation_changes_nothing(name: str, keep: float) -> None:
    def gradients(keep: float | None) -> list[Tensor]:
        layer = Block(mixer=None, ffn=KINDS[name]).build(8, 2, Rms(), "pre", Local()).to(torch.float64)
        with torch.no_grad():
            for i, weight in enumerate(layer.parameters()):
                weight.copy_(made(i, *weight.shape))
        recompute.apply(layer, keep)
        x = made(5, 2, 9, 8).requires_grad_()
        out, _ = layer(x, None, Documents())
        return list(torch.autograd.grad(out.sin().sum(), [x, *layer.parameters()]))

    for ours, theirs in zip(gradients(keep), gradients(None), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", KINDS)
def test_every_weight_has_a_beginning(name: str) -> None:
    layer = KINDS[name].build(8, 2)
    assert set(initial(layer)) == {
        name for held in (layer.named_parameters(), layer.named_buffers()) for name, _ in held
    }


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"shared_gate": True}, "shared_gate=True: there is no shared expert"),
        ({"jitter": 1.0}, "jitter=1.0: must be from 0"),
        ({"capacity": 0.0}, "capacity=0.0: must be above 0"),
        ({"drop": "least"}, "drop=least: without a capacity no visit is left out; set capacity: 1.25, or leave drop"),
        ({"bias": "aux_free", "bias_rate": 0.0}, "bias_rate=0.0: must be above 0"),
        ({"bias": "quantile", "bias_rate": 0.1}, "bias_rate=0.1: bias=quantile has no rate; set bias: aux_free"),
        ({"bias": "aux_free", "score": "softmax_after"}, "bias=aux_free: is for scores of a fixed range"),
        ({"bias": "quantile", "groups": 2, "kept_groups": 2}, "bias=quantile: needs groups=1"),
        ({"bias": "quantile", "active": 6}, "active below experts"),
    ],
)
def test_mistakes_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Moe(**{**PLAIN, **fields})
