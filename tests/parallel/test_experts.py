"""With experts, N ranks are one rank: loss, what routers are charged, loads, every gradient, and one optimizer step."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from farspan.models.block import Block
from farspan.models.decoder import Decoder, initial
from farspan.models.ffns import BlockFfn, ExpertChoice, Moe, SmoeDropout, Swiglu
from farspan.models.mixers import Softmax
from farspan.parallel.context import Axis, Ring, Runtime
from farspan.parallel.context.shard import IGNORE, Batch
from farspan.parallel.engine import Engine
from farspan.parallel.expert import AllGather, AllToAll, Auto, WeightGather
from farspan.parallel.fsdp import full
from farspan.parallel.mesh import Mesh, Parallel
from farspan.platform.optim import Adamw

DISPATCH = {"auto": Auto(), "all_to_all": AllToAll(), "all_gather": AllGather(), "weight_gather": WeightGather()}
DISPATCH |= {"chunked": AllToAll(chunks=3), "padded": AllToAll(padded=True), "both": AllToAll(chunks=2, padded=True)}
VOCABULARY, LENGTH, ROWS = 64, 19, 8


def model(balance: float) -> Decoder:
    """16 and 8 experts, the second layer's are chosen from groups, and few of them."""
    many = Moe(experts=16, active=3, hidden=8, balance=balance, z_loss=0.1)
    grouped = Moe(experts=8, active=1, hidden=12, shared=8, score="sigmoid", groups=4, kept_groups=1, balance=balance)
    mixer = Softmax(heads=4, head_dim=6)
    return Decoder(
        width=22,
        vocabulary=VOCABULARY,
        blocks=(Block(mixer=mixer, ffn=many), Block(mixer=mixer, ffn=Swiglu(hidden=8)), Block(mixer=None, ffn=grouped)),
    )


def restless(balance: float) -> Decoder:
    """Routers that keep a bias, draw by chance, count over the step and drop visits, grow, and compare neighbours."""
    noisy = Moe(
        experts=16, active=3, hidden=8, balance=balance, balance_over="step", bias="aux_free", bias_rate=0.05,
        jitter=0.3, capacity=2.0, drop="least",
    )  # fmt: skip
    gated = Moe(
        experts=8, active=2, hidden=12, shared=8, shared_gate=True, score="sigmoid", capacity=1.1, balance=balance
    )
    growing = SmoeDropout(experts=8, hidden=4, first=2, last=4, over=2)
    alone = BlockFfn(experts=8, hidden=4, most=6, locality=0.1, sharpness=3.0, sparsity=0.3, chunk=4)
    mixer = Softmax(heads=4, head_dim=6)
    blocks = (
        Block(mixer=mixer, ffn=noisy), Block(mixer=mixer, ffn=gated), Block(mixer=None, ffn=growing),
        Block(mixer=None, ffn=alone),
    )  # fmt: skip
    return Decoder(width=22, vocabulary=VOCABULARY, blocks=blocks)


def widenet(balance: float) -> Decoder:
    """One router and its experts for three layers, with one expert cut like other layers, and a plain ffn for two."""
    ffn = Moe(experts=8, active=2, hidden=12, shared=8, balance=balance, z_loss=0.1)
    blocks = (
        Block(repeat=3, mixer=Softmax(heads=4, head_dim=6), ffn=ffn, shared_ffn=True),
        Block(repeat=2, mixer=None, ffn=Swiglu(hidden=8), shared_ffn=True),
    )
    return Decoder(width=22, vocabulary=VOCABULARY, blocks=blocks)


def few(balance: float) -> Decoder:
    """So few experts that they do not go round, though their channels do."""
    ffn = Moe(experts=3, active=2, hidden=12, shared=8, balance=balance)
    return Decoder(width=24, vocabulary=VOCABULARY, blocks=(Block(mixer=Softmax(heads=4, head_dim=6), ffn=ffn),))


def choosing(balance: float) -> Decoder:
    """Experts that choose few and many tokens, in a model that sees both ways; nothing is charged."""
    mixer = Softmax(heads=4, head_dim=6, causal=False)
    some, many = (ExpertChoice(experts=8, active=active, hidden=8) for active in (1.7, 5.0))
    blocks = (Block(mixer=mixer, ffn=some), Block(mixer=mixer, ffn=many))
    return Decoder(width=22, vocabulary=VOCABULARY, blocks=blocks)


MODELS = {"choosing": choosing, "plain": model, "restless": restless, "widenet": widenet, "few": few}


def batches(rank: int, dp: int, micro: int, length: int = LENGTH) -> list[Batch]:
    """Of 8 rows with different numbers of labels. Most tokens are alike, so that some experts are given none."""
    made = torch.Generator().manual_seed(7)
    tokens, labels = (torch.randint(VOCABULARY, (ROWS, length), generator=made) for _ in range(2))
    tokens[:7], tokens[7] = 3, 3 + tokens[7] % 2
    for row in range(ROWS):
        labels[row, : 2 * row] = IGNORE
    mine = torch.arange(rank * ROWS // dp, (rank + 1) * ROWS // dp)
    return [_batch(tokens[part], labels[part]) for part in mine.split(micro)]


def _batch(tokens: Tensor, labels: Tensor) -> Batch:
    return Batch(
        tokens=tokens,
        labels=labels,
        positions=torch.arange(tokens.shape[1]).expand(len(tokens), -1),
        cu_seqlens=None,
        lengths=(tokens.shape[1],) * len(tokens),
        valid=int((labels != IGNORE).sum()),
    )


def runtime(parallel: Parallel, mesh: Mesh) -> Runtime:
    if mesh.sizes.cp == 1:
        return parallel.context.build()
    return parallel.context.build(Axis(group=mesh.context, device=mesh.device, multiple=mesh.sizes.tp))


def whole(tensor: Tensor) -> Tensor:
    return full(tensor).detach().clone()


def probe(
    cuts: list[dict[str, Any]],
    micro: int,
    kept: float | None = None,
    balance: float = 0.5,
    name: str = "plain",
    length: int = LENGTH,
    compiled: bool = False,
) -> list[Any]:
    torch.set_default_dtype(torch.float64)
    control = dist.new_group(backend="gloo")
    results = []
    for cut in cuts:
        parallel = Parallel(**{**cut, "dispatch": DISPATCH[cut.get("dispatch", "auto")], "context": Ring()})
        mesh = Mesh(parallel.sizes(dist.get_world_size()), torch.device("cpu"), control)
        context = runtime(parallel, mesh)
        with torch.device("meta"):
            built = MODELS[name](balance).build(VOCABULARY, context)
        engine = Engine(
            built,
            list(built.layers),
            initial(built),
            mesh,
            context=context,
            seed=3,
            kept=kept,
            compiled=compiled,
            dispatcher=parallel.dispatch.build(mesh.expert_axes),
        )
        optimizer = Adamw(rate=1e-2).build(engine.weights, {}, 0)
        work = batches(mesh.index("dp"), mesh.sizes.dp, micro, length)
        labels = torch.tensor(float(sum(batch.valid for batch in work)))
        dist.all_reduce(labels, group=mesh.dense.get_group("dp"))
        found: dict[str, Any] = {"loss": engine.sum(engine.forward_backward(work, labels.item()))}
        found |= {"cost": engine.cost, "loads": engine.loads, "told": engine.told}
        found |= {"norm": engine.gradient_norm()}
        found["gradients"] = {n: whole(w.grad) for n, w in engine.weights.items() if w.grad is not None}
        found["held out"] = engine.evaluate(batches(0, 1, 3, length)[0])
        optimizer.update(1e-2, torch.tensor(0.5))
        engine.settle(torch.tensor(0.5))
        found["end"] = {n: whole(w) for n, w in engine.weights.items()}
        found["held"] = {n: w.to_local().numel() for n, w in engine.weights.items() if ".experts." in n}
        found["kept"] = {n: kept.clone() for n, kept in engine.buffers.items()}
        if name != "plain":
            engine.clear()
            engine.step = 1
            found["second loss"] = engine.sum(engine.forward_backward(work, labels.item()))
            found["second told"] = engine.told
        results.append(found)
    return results


def same(left: Any, right: Any, near: float = 1e-9) -> None:
    if isinstance(left, dict):
        assert left.keys() == right.keys()
        for key in left.keys() - {"held"}:
            same(left[key], right[key], near)
    elif isinstance(left, list):
        for ours, theirs in zip(left, right, strict=True):
            same(ours, theirs, near)
    else:
        torch.testing.assert_close(left, right, rtol=near, atol=near / 100)


@pytest.fixture(scope="module")
def one_rank(ranks: Any) -> dict[str, Any]:
    found: dict[str, Any] = ranks(1, probe, cuts=[{}], micro=8)[0][0]
    assert any((load == 0).any() for load in found["loads"]), "an expert without a token"
    assert len(found["gradients"]) == len(found["end"]), "every weight has a gradient, an idle expert's as well"
    return found


@pytest.mark.parametrize(
    ("micro", "kept"), [(3, 0.0), *(pytest.param(*each, marks=pytest.mark.laws) for each in ((1, None), (8, 0.5)))]
)
def test_micro_batches_and_recomputation_change_nothing(
    ranks: Any, one_rank: dict[str, Any], micro: int, kept: float | None
) -> None:
    same(ranks(1, probe, cuts=[{}], micro=micro, kept=kept)[0][0], one_rank)


A2A, GATHER, WEIGHTS, CHUNKED, PADDED, BOTH = (
    {"dispatch": kind} for kind in ("all_to_all", "all_gather", "weight_gather", "chunked", "padded", "both")
)
CUTS: dict[str, list[dict[str, Any]]] = {
    "2": [
        {"shard": 2},
        {"shard": 1},
        {"ep": 2, **A2A},
        {"ep": 2, **GATHER},
        {"ep": 2, **WEIGHTS},
        {"etp": 2},
        {"tp": 2},
        {"tp": 2, "ep": 2, **A2A},
        {"cp": 2},
        {"cp": 2, "ep": 2, **GATHER},
        {"ep": 2, **CHUNKED},
        {"cp": 2, "ep": 2, **PADDED},
    ],
    "4": [
        {"ep": 2, "etp": 2, **GATHER},
        {"shard": 2, "ep": 2, **BOTH},
        {"tp": 2, "cp": 2, "ep": 2, **CHUNKED},
        {"tp": 4, "ep": 2, **WEIGHTS},
    ],
    "4 otherwise": [
        {"ep": 4, **A2A},
        {"ep": 2, "etp": 2, **A2A},
        {"tp": 2, "ep": 4, **A2A},
        {"tp": 2, "cp": 2, "etp": 2},
    ],
    "8": [
        {"ep": 8, **A2A},
        {"tp": 2, "cp": 2, "ep": 4, "etp": 2, **A2A},
        {"tp": 2, "shard": 2, "ep": 4, **GATHER},
        {"cp": 4, "ep": 2, "etp": 2, **BOTH},
    ],
}
"""By how many ranks."""


@pytest.mark.parametrize(
    ("name", "micro", "kept"),
    [
        ("4", 1, 0.5),
        *(
            pytest.param(*each, marks=pytest.mark.laws)
            for each in (("2", 3, None), ("4", 2, 0.0), ("4 otherwise", 1, 0.5), ("8", 1, 0.0))
        ),
    ],
)
def test_ranks_equal_one_rank(ranks: Any, one_rank: dict[str, Any], name: str, micro: int, kept: float | None) -> None:
    for of_rank in ranks(int(name[0]), probe, cuts=CUTS[name], micro=micro, kept=kept):
        for found in of_rank:
            same(found, one_rank)


RESTLESS: dict[int, list[dict[str, Any]]] = {
    4: [{"tp": 2, "cp": 2, "ep": 2, **A2A}, {"ep": 2, "etp": 2, **GATHER}, {"cp": 2, "ep": 4, **PADDED}],
    8: [{"tp": 2, "cp": 2, "ep": 4, "etp": 2, **BOTH}, {"cp": 4, "ep": 2, **WEIGHTS}, {"ep": 8, **GATHER}],
}


@pytest.fixture(scope="module")
def restless_alone(ranks: Any) -> dict[str, Any]:
    found: dict[str, Any] = ranks(1, probe, cuts=[{}], micro=8, name="restless")[0][0]
    assert found["told"][0] > 100, "many visits are dropped"
    assert found["kept"]["layers.0.ffn.bias.value"].abs().max() > 0.01
    return found


@pytest.mark.parametrize(("world", "kept"), [(4, 0.0), pytest.param(8, 0.5, marks=pytest.mark.laws)])
def test_what_routers_keep_and_drop_is_alike_on_ranks(
    ranks: Any, restless_alone: dict[str, Any], world: int, kept: float
) -> None:
    """Rows' visits are dropped, tokens shaken and biases moved alike, whoever holds the tokens."""
    for of_rank in ranks(world, probe, cuts=RESTLESS[world], micro=8, kept=kept, name="restless"):
        for found in of_rank:
            same(found, restless_alone)


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.laws)])
def test_experts_choose_alike_on_ranks(ranks: Any, world: int) -> None:
    """Wherever the tokens of a row are: most are alike, so that their places decide."""
    alone = ranks(1, probe, cuts=[{}], micro=8, name="choosing")[0][0]
    cuts = {
        2: [{"cp": 2, "ep": 2, **A2A}, {"tp": 2, **GATHER}, {"ep": 2, **PADDED}],
        4: [{"tp": 2, "cp": 2, "ep": 4, **BOTH}, {"cp": 4, "etp": 2}],
    }
    for of_rank in ranks(world, probe, cuts=cuts[world], micro=8, kept=0.5, name="choosing"):
        for found in of_rank:
            same(found, alone)


def test_rows_that_tp_cuts_evenly_are_rows_still(ranks: Any) -> None:
    """Nothing is padded, and a rank's part of the tokens is half of each row, or a row and a half."""
    alone = ranks(1, probe, cuts=[{}], micro=8, name="restless", length=20)[0][0]
    for found in ranks(2, probe, cuts=[{"tp": 2, "ep": 2, **A2A}], micro=8, kept=0.5, name="restless", length=20):
        same(found[0], alone)


@pytest.mark.laws
@pytest.mark.parametrize(("world", "kept"), [(2, 0.5), (4, None)], ids=["two ranks", "four ranks"])
def test_layers_that_share_experts_share_them_on_all_ranks(ranks: Any, world: int, kept: float | None) -> None:
    alone = ranks(1, probe, cuts=[{}], micro=8, name="widenet")[0][0]
    cuts = {2: [{"ep": 2, **A2A}, {"tp": 2}], 4: [{"tp": 2, "ep": 2, "etp": 2, **GATHER}, {"cp": 2, "shard": 2}]}
    for of_rank in ranks(world, probe, cuts=cuts[world], micro=3, kept=kept, name="widenet"):
        for found in of_rank:
            same(found, alone)


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.laws)])
def test_experts_that_do_not_go_round_are_cut_across(ranks: Any, world: int) -> None:
    alone = ranks(1, probe, cuts=[{}], micro=8, name="few")[0][0]
    cuts = {2: [{"shard": 2}, {"tp": 2}], 4: [{"tp": 2, "shard": 2}, {"etp": 2}, {"etp": 2, "cp": 2}]}
    for of_rank in ranks(world, probe, cuts=cuts[world], micro=3, name="few"):
        for found in of_rank:
            assert {n: held * world for n, held in found["held"].items()} == alone["held"]
            same(found, alone)


@pytest.mark.laws
def test_compiled_layers_meet_the_experts_of_other_ranks(ranks: Any, one_rank: dict[str, Any]) -> None:
    cuts = [{"ep": 2, **CHUNKED}, {"ep": 2, **GATHER}, {"etp": 2}]
    for of_rank in ranks(2, probe, cuts=cuts, micro=3, kept=0.5, compiled=True):
        for found in of_rank:
            same(found, one_rank, 1e-6)


def test_what_is_dropped_and_shaken_is_of_the_row(ranks: Any, restless_alone: dict[str, Any]) -> None:
    """In micro-batches of another size only what counts over the step differs."""
    again = ranks(1, probe, cuts=[{}], micro=3, name="restless")[0][0]
    for key in ("loss", "told", "loads"):
        same(again[key], restless_alone[key])


def test_a_charge_that_outweighs_all_else_is_shared_alike(ranks: Any) -> None:
    """At 1000 the gradient is that of balance."""
    plain = ranks(1, probe, cuts=[{}], micro=8, balance=1e3)[0][0]
    assert plain["cost"] > 100 * plain["loss"]
    for of_rank in ranks(2, probe, cuts=[{"shard": 2}], micro=3, balance=1e3):
        same(of_rank[0], plain)
