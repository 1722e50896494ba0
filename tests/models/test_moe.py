"""Experts equal one feed-forward after the other, a row's charge its definition, and a choice is never made twice."""

from collections.abc import Callable
from math import log
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from farspan.models.block import Block
from farspan.models.decoder import Decoder, initial
from farspan.models.ffns import Moe, Swiglu, moe
from farspan.models.ffns.moe import MoeFfn
from farspan.models.ffns.router import RowSums, Tally, evenness
from farspan.models.linear import Fp8
from farspan.models.mixers import Softmax
from farspan.models.norm import Rms
from farspan.models.roles import roles
from farspan.parallel import recompute
from farspan.parallel.context.local import Local
from farspan.parallel.context.shard import IGNORE, Batch, Documents
from farspan.parallel.sums import Now, Sums
from farspan.platform.config import kind
from farspan.platform.evaluate import _prefix

PLAIN = Moe(experts=6, active=2, hidden=5)
CHOICES = {
    "softmax": PLAIN,
    "as they are": Moe(experts=6, active=3, hidden=5, normalised=False, scale=2.5, z_loss=0.1),
    "softmax_after": Moe(experts=6, active=2, hidden=5, score="softmax_after", shared=7),
    "sigmoid in groups": Moe(experts=6, active=2, hidden=5, score="sigmoid", groups=3, kept_groups=2, balance=0.5),
    "one": Moe(experts=2, active=1, hidden=1, normalised=False, balance=0.0),
}


def built(config: Moe, width: int = 8, dtype: torch.dtype = torch.float64) -> MoeFfn:
    module = config.build(width, 2).to(dtype)
    made = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in module.parameters():
            weight.normal_(generator=made)
    return module


def scores_of(config: Moe, logits: Tensor) -> Tensor:
    return logits.sigmoid() if config.score == "sigmoid" else logits.softmax(-1)


def chosen_by(config: Moe, logits: Tensor) -> list[int]:
    """Of one token, by hand."""
    allowed = set(range(config.experts))
    if config.groups > 1:
        size = config.experts // config.groups
        best = [
            logits.sigmoid()[g * size : (g + 1) * size].topk(min(2, size)).values.sum() for g in range(config.groups)
        ]
        kept = torch.stack(best).topk(config.kept_groups).indices.tolist()
        allowed = {expert for expert in allowed if expert // size in kept}
    return sorted(allowed, key=lambda expert: -float(logits[expert].detach()))[: config.active]


def by_hand(config: Moe, module: MoeFfn, x: Tensor) -> Tensor:
    """Token by token, expert by expert."""
    rows, w13, w2 = [], module.experts.w13, module.experts.w2
    for token in x.flatten(0, 1):
        logits = module.router.weight @ token
        chosen = chosen_by(config, logits)
        p = logits[chosen].softmax(0) if config.score == "softmax_after" else scores_of(config, logits)[chosen]
        if config.normalised and config.score != "softmax_after":
            p = p / p.sum()
        parts = [
            p[i] * config.scale * (w2[e] @ (F.silu(w13[e, 0] @ token) * (w13[e, 1] @ token)))
            for i, e in enumerate(chosen)
        ]
        if module.shared is not None:
            inner = F.silu(module.shared.to_gate.weight @ token) * (module.shared.to_up.weight @ token)
            parts.append(module.shared.to_out.weight @ inner)
        rows.append(torch.stack(parts).sum(0))
    return torch.stack(rows).view_as(x)


@pytest.mark.parametrize("name", CHOICES)
def test_equals_one_expert_after_the_other(name: str) -> None:
    module = built(CHOICES[name])
    x = torch.randn(2, 7, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    (out, _), wanted = module(x, Documents()), by_hand(CHOICES[name], module, x)
    torch.testing.assert_close(out, wanted)
    leaves = [x, *module.parameters()]
    found, expected = (torch.autograd.grad(y.sin().sum(), leaves) for y in (out, wanted))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", CHOICES)
def test_a_row_is_charged_by_definition(name: str) -> None:
    config, length = CHOICES[name], 9
    module = built(config)
    x = torch.randn(3, length, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).requires_grad_()
    _, tally = module(x, Documents())
    costs, load = [], torch.zeros(config.experts)
    for row in x:
        logits = row @ module.router.weight.T
        shares = scores_of(config, logits)
        shares = shares / shares.sum(-1, keepdim=True)
        given = torch.zeros(config.experts, dtype=torch.float64)
        for token in logits:
            given[chosen_by(config, token)] += 1
        balance = config.experts * ((given / (length * config.active)) * shares.mean(0)).sum()
        costs.append(config.balance * balance + config.z_loss * logits.exp().sum(-1).log().square().mean())
        load += given
    torch.testing.assert_close(tally.given.sum(0).float(), load.float())
    weights = torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64)
    cost, wanted = charge(module, tally, length, weights), torch.stack(costs) @ weights
    torch.testing.assert_close(cost, wanted)
    if config.balance + config.z_loss:
        found, expected = (torch.autograd.grad(y, [x, module.router.weight]) for y in (cost, wanted))
        torch.testing.assert_close(found, expected)


def charge(module: MoeFfn, tally: Tally, length: int, labels: Tensor) -> Tensor:
    """Of rows of so many tokens."""
    rows = RowSums(torch.full_like(labels, length), labels)
    return module.charge(tally, tally.given, rows, rows)


def test_even_loads_are_charged_least() -> None:
    """Equal scores and loads cost what `balance` says, and one expert for all of them costs E times as much."""
    config = Moe(experts=4, active=1, hidden=3, balance=1.0)
    module = built(config, width=4)
    with torch.no_grad():
        module.router.weight.copy_(1e3 * torch.eye(4))
    even, uneven = torch.eye(4)[None], torch.eye(4)[:1].expand(4, -1)[None]
    one = torch.ones(1, dtype=torch.float64)
    for tokens, cost in ((even, 1), (uneven, 4)):
        assert abs(float(charge(module, module(tokens.double(), Documents())[1], 4, one).detach()) - cost) < 1e-6
    told = evenness([torch.tensor([2.0, 2, 2, 2]), torch.tensor([6.0, 2, 0, 0])])
    assert told["load_max"] == 3
    assert abs(float(told["load_entropy"]) - (0.75 * log(4 / 3) + 0.25 * log(4)) / log(4)) < 1e-6


@pytest.mark.parametrize("shared", [0, 6])
def test_flops_are_what_torch_counts(shared: int) -> None:
    module = Moe(experts=6, active=2, hidden=21, shared=shared).build(8, 2)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(torch.randn(1, 13, 8), Documents())
    assert module.flops((4, 9)) == counter.get_total_flops()


def test_every_weight_has_a_beginning_and_a_role() -> None:
    layer = Block(mixer=None, ffn=Moe(experts=4, active=1, hidden=64, shared=64)).build(32, 2, Rms(), "pre", Local())
    assert {name for name, _ in layer.ffn.named_parameters()} == set(initial(layer.ffn))  # type: ignore[union-attr]
    kinds = {name: role.kind for name, role in roles(layer).items()}
    assert kinds["ffn.router.weight"] == "router" and kinds["ffn.experts.w13"] == kinds["ffn.experts.w2"] == "matrix"
    assert kind(Moe) == "moe"


def layered(keep: float | None, compiled: bool = False, **more: Any) -> tuple[Any, Tensor]:
    torch.manual_seed(0)
    block = Block(mixer=Softmax(heads=2), ffn=Moe(experts=8, active=3, hidden=16, z_loss=0.1, **more))
    layer = block.build(16, 2, Rms(), "pre", Local())
    for weight in layer.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    if more:
        layer.ffn.tell("layers.0.ffn", Now(seed=0, step=1, row=0, first=True))  # type: ignore[union-attr]
    recompute.apply(layer, keep)
    if compiled:
        torch._dynamo.reset()
        layer.forward = torch.compile(layer.forward, backend="aot_eager", fullgraph=True)  # type: ignore[method-assign]
    return layer, torch.randn(2, 24, 16).requires_grad_()


def gradients_of(layer: Any, x: Tensor) -> list[Tensor]:
    _, angles, documents = layer.example(2, 24)
    out, tally = layer(x, angles, documents)
    total = out.sin().sum() + charge(layer.ffn, tally, 24, torch.ones(2))
    return [out.detach(), *torch.autograd.grad(total, [x, *layer.parameters()])]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("keep", [0.0, 0.5])
def test_recomputation_changes_nothing(keep: float, compiled: bool) -> None:
    more: dict[str, Any] = {"jitter": 0.2, "capacity": 1.0, "drop": "least", "bias": "aux_free"}
    plain, again = gradients_of(*layered(None, **more)), gradients_of(*layered(keep, compiled, **more))
    for ours, theirs in zip(again, plain, strict=True):
        if compiled:
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
        else:
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("keep", [0.0, 1.0])
def test_what_was_chosen_stays_chosen(keep: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits that change between a forward and its recomputation change no expert."""
    found: list[Tensor] = []
    real: Callable[..., tuple[Tensor, Tensor]] = moe.route

    def noisy(logits: Tensor, *rest: Any, **more: Any) -> tuple[Tensor, Tensor]:
        p, chosen = real(logits + len(found) * torch.randn_like(logits), *rest, **more)
        found.append(chosen)
        return p, chosen

    monkeypatch.setattr(moe, "route", noisy)
    layer, x = layered(None)  # what is kept is chosen on numbers without meaning
    recompute.apply(layer, keep)
    found.clear()
    gradients_of(layer, x)
    assert len(found) == 2 and torch.equal(*found)


@pytest.mark.parametrize("drop", ["last", "least"])
def test_what_is_sampled_does_not_depend_on_padding(drop: Any) -> None:
    """Of rows that a sampler fills up: who fills up takes no room."""
    ffn = Moe(experts=8, active=2, hidden=5, capacity=1.0, drop=drop)
    model = Decoder(width=8, vocabulary=11, blocks=(Block(repeat=2, mixer=None, ffn=ffn),)).build(11, Local()).double()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.5)
    ids = torch.randint(11, (37,), generator=torch.Generator().manual_seed(0)).tolist()
    padded, at = _prefix(ids)
    tokens = torch.tensor([ids])
    bare = Batch(
        tokens=tokens,
        labels=torch.full_like(tokens, IGNORE),
        positions=torch.arange(37)[None],
        cu_seqlens=None,
        lengths=(37,),
        valid=0,
    )
    assert padded.tokens.shape[1] == 64 and padded.padding == 27
    with torch.no_grad():
        torch.testing.assert_close(model(padded, at), model(bare, at))


def test_layers_that_share_their_experts_run_the_same_ones() -> None:
    """As copies of them do, whose gradients are summed; norms are each layer's own."""
    torch.manual_seed(0)
    shared, apart = (
        Decoder(width=8, vocabulary=11, blocks=(Block(repeat=3, mixer=None, ffn=PLAIN, shared_ffn=one),))
        .build(11, Local())
        .double()
        for one in (True, False)
    )
    for weight in shared.parameters():
        torch.nn.init.normal_(weight, std=0.5)
    own = dict(shared.named_parameters())
    assert sorted({name.partition(".")[0] for name in own}) == ["embed", "head", "layers", "norm", "shared_ffns"]
    names = {n: n if n in own else f"shared_ffns.0.{n.split('.', 3)[3]}" for n, _ in apart.named_parameters()}
    apart.load_state_dict({name: own[of] for name, of in names.items()})
    tokens = torch.randint(11, (2, 6))
    batch = Batch(
        tokens=tokens,
        labels=tokens.roll(-1, 1),
        positions=torch.zeros_like(tokens),
        cu_seqlens=None,
        lengths=(6, 6),
        valid=12,
    )
    sums = [model(batch) for model in (shared, apart)]
    torch.testing.assert_close(sums[0], sums[1])
    found, wanted = (
        dict(
            zip(
                dict(model.named_parameters()),
                torch.autograd.grad(x.loss + x.cost, list(model.parameters())),
                strict=True,
            )
        )
        for model, x in zip((shared, apart), sums, strict=True)
    )
    for name in own:
        torch.testing.assert_close(found[name], sum(wanted[n] for n, of in names.items() if of == name))
    assert shared.flops((6,)) == apart.flops((6,))


def test_the_model_adds_what_routers_charge() -> None:
    """Each row's, times its labels, from every layer; evaluation leaves it out."""
    decoder = Decoder(
        width=8, vocabulary=11, blocks=(Block(repeat=2, mixer=None, ffn=PLAIN), Block(mixer=None, ffn=Swiglu(hidden=4)))
    )
    model = decoder.build(11, Local())
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.5)
    tokens = torch.randint(11, (2, 6), generator=torch.Generator().manual_seed(0))
    labels = tokens.roll(-1, 1)
    labels[0, 2:] = IGNORE
    batch = Batch(
        tokens=tokens, labels=labels, positions=torch.zeros_like(tokens), cu_seqlens=None, lengths=(6, 6), valid=8
    )
    sums = model(batch)
    assert isinstance(sums, Sums) and len(sums.loads) == 2 and all(load.sum() == 24 for load in sums.loads)
    x, wanted = model.embed(tokens), torch.zeros(())
    for layer in model.layers:
        found = layer(x, None, batch.documents)
        x, tally = found if isinstance(found, tuple) else (found, None)
        wanted = wanted if tally is None else wanted + charge(layer.ffn, tally, 6, torch.tensor([2.0, 6.0]))
    torch.testing.assert_close(sums.cost, wanted)
    with torch.no_grad():
        torch.testing.assert_close(model(batch), sums.loss)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"experts": 1}, "experts=1: must be at least 2"),
        ({"active": 7}, "active=7: must be at least 1, and no more than the 6 experts that take part"),
        ({"active": 0}, "active=0: must be at least 1"),
        ({"forced": True, "bias": "aux_free"}, "bias=aux_free: forced=True chooses in turns"),
        ({"groups": 4}, "groups=4: must divide experts=6"),
        ({"groups": 3, "kept_groups": 4}, "kept_groups=4: must be from 1 to groups=3"),
        ({"groups": 3, "active": 3}, "active=3: must be at least 1, and no more than the 2 experts"),
        ({"hidden": 0}, "hidden=0, shared=0: must be at least 1 and 0"),
        ({"balance": -1.0}, "balance=-1.0"),
        ({"score": "softmax_after", "normalised": False}, "normalised=False: softmax_after always sums to one"),
        ({"balance": 0.0, "balance_over": "step"}, "balance_over=step: balance=0 charges for nobody's loads"),
    ],
)
def test_mistakes_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Moe(**{"experts": 6, "active": 2, "hidden": 5, **fields})


def test_what_cannot_be_combined_is_refused() -> None:
    decoder = Decoder(width=32, blocks=(Block(mixer=Softmax(heads=2), ffn=CHOICES["softmax_after"]),))
    assert decoder.tensor_problems(2) == ["blocks.0.ffn.shared: hidden=7: must be a multiple of parallel.tp=2"]
    assert decoder.expert_problems(3, 5) == []
    found = decoder.expert_problems(4, 2)
    assert found[0] == "blocks.0.ffn.experts=6: must be a multiple of parallel.ep=4"
    assert found[1] == "blocks.0.ffn.hidden=5: must be a multiple of parallel.etp=2"
    dense = Decoder(width=32, blocks=(Block(mixer=None, ffn=Swiglu(hidden=4)),))
    assert "parallel.ep=2, etp=1 are for experts" in dense.expert_problems(2, 1)[0]
    with pytest.raises(ValueError, match=r"blocks\.0\.linear: ffn\.experts: .* set linear: \{kind: plain\}"):
        Decoder(width=32, blocks=(Block(mixer=Softmax(heads=2), ffn=PLAIN, linear=Fp8()),))
