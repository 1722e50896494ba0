"""N ranks are one rank: loss, every gradient, the norm and one optimizer step, however the weights are cut."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from farspan.models.block import Block
from farspan.models.decoder import Decoder, initial
from farspan.models.ffns import Swiglu
from farspan.models.mixers import Softmax
from farspan.parallel.context import Auto, Axis, Context, Gather, Grid, Ring, Runtime, TokenRing, Ulysses
from farspan.parallel.context.local import Local
from farspan.parallel.context.shard import IGNORE, Batch
from farspan.parallel.engine import Engine
from farspan.parallel.fsdp import full
from farspan.parallel.mesh import Mesh, Parallel
from farspan.platform.optim import Adamw

WIDTH, VOCABULARY, LENGTH, ROWS = 22, 60, 19, 8
"""Odd sizes: neither the rows, the width, the norms nor what tp leaves of a weight divide by the ranks."""


CONTEXTS: dict[str, Context] = {
    "auto": Auto(),
    "gather": Gather(),
    "grid": Grid(inner=2, outer=Ring()),
    "ring": Ring(),
    "token_ring": TokenRing(),
    "ulysses": Ulysses(),
    "contiguous": Gather(layout="contiguous"),
}


def batches(rank: int, dp: int, micro: int, packed: bool = True) -> list[Batch]:
    """This rank's micro-batches of one step of 8 rows, whose numbers of valid labels differ from row to row."""
    made = torch.Generator().manual_seed(7)
    tokens = torch.randint(VOCABULARY, (ROWS, LENGTH), generator=made)
    labels = torch.randint(VOCABULARY, (ROWS, LENGTH), generator=made)
    for row in range(ROWS):
        labels[row, : 2 * row] = IGNORE
    mine = range(rank * ROWS // dp, (rank + 1) * ROWS // dp)
    return [_batch(tokens[part], labels[part], packed) for part in torch.tensor(mine).split(micro)]


def _batch(tokens: Tensor, labels: Tensor, packed: bool) -> Batch:
    """Each row is two documents, of 7 and 12 tokens, or one."""
    rows = len(tokens)
    lengths = ((7, 12) if packed else (LENGTH,)) * rows
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    positions = torch.cat([torch.arange(length) for length in lengths]).view(rows, LENGTH)
    return Batch(
        tokens=tokens,
        labels=labels,
        positions=positions,
        cu_seqlens=bounds if packed else None,
        lengths=lengths,
        valid=int((labels != IGNORE).sum()),
    )


def model(tied: bool = False) -> Decoder:
    rich = Softmax(heads=4, kv_heads=2, head_dim=8, qk_norm=True, window=5, sinks=True)
    plain = Softmax(heads=4, kv_heads=1, head_dim=6, rope=None, softcap=3.0)
    return Decoder(
        width=WIDTH,
        tied=tied,
        vocabulary=VOCABULARY,
        blocks=(
            Block(repeat=2, mixer=rich, ffn=Swiglu(hidden=36)),
            Block(mixer=plain, ffn=None),
            Block(mixer=None, ffn=Swiglu(hidden=12)),
        ),
    )


def whole(tensor: Tensor) -> Tensor:
    return full(tensor).detach().clone()


def runtime(parallel: Parallel, mesh: Mesh) -> Runtime:
    """What the model attends with, as a run builds it."""
    if mesh.sizes.cp == 1:
        return parallel.context.build()
    return parallel.context.build(Axis(group=mesh.context, device=mesh.device, multiple=mesh.sizes.tp))


def probe(
    cuts: list[dict[str, Any]],
    micro: int,
    kept: float | None = None,
    compiled: bool = False,
    tied: bool = False,
    packed: bool = True,
) -> list[dict[str, Any]]:
    """On each cut of weights and sequences: loss, gradients, norm, logits, and the weights after one step."""
    torch.set_default_dtype(torch.float64)
    world = dist.get_world_size()
    control = dist.new_group(backend="gloo")
    results = []
    for cut in cuts:
        parallel = Parallel(**{**cut, "context": CONTEXTS[cut.get("context", "auto")]})
        mesh = Mesh(parallel.sizes(world), torch.device("cpu"), control)
        context = runtime(parallel, mesh)
        with torch.device("meta"):
            built = model(tied).build(VOCABULARY, context)
        layers = list(built.layers)
        engine = Engine(
            built,
            layers,
            initial(built),
            mesh,
            context=context,
            seed=3,
            kept=kept,
            compiled=compiled,
            gather=parallel.gathering(mesh.sizes),
        )
        optimizer = Adamw(rate=1e-2).build(engine.weights, {}, 0)
        work = batches(mesh.index("dp"), mesh.sizes.dp, micro, packed)
        labels = torch.tensor(float(sum(batch.valid for batch in work)))
        dist.all_reduce(labels, group=mesh.dense.get_group("dp"))
        found: dict[str, Any] = {"start": {n: whole(w) for n, w in engine.weights.items()}}
        found["loss"] = engine.sum(engine.forward_backward(work, labels.item()))
        found["norm"] = engine.gradient_norm()
        found["gradients"] = {n: whole(w.grad) for n, w in engine.weights.items() if w.grad is not None}
        told = batches(0, 1, 3, packed)[0]
        found["logits"] = engine.evaluate(told, torch.tensor([3, 18, 0]))
        found["held out"] = engine.evaluate(told)
        optimizer.update(1e-2, torch.tensor(0.5))
        found["end"] = {n: whole(w) for n, w in engine.weights.items()}
        results.append(found)
    return results


def same(left: Any, right: Any, tolerance: float = 1e-9) -> None:
    if isinstance(left, dict):
        assert left.keys() == right.keys()
        for key in left:
            same(left[key], right[key], tolerance)
    else:
        torch.testing.assert_close(left, right, rtol=tolerance, atol=tolerance / 100)


@pytest.fixture(scope="module")
def one_rank(ranks: Any) -> dict[str, Any]:
    found: dict[str, Any] = ranks(1, probe, cuts=[{}], micro=8)[0][0]
    return found


def test_one_rank_is_the_plain_model(one_rank: dict[str, Any]) -> None:
    """The engine adds nothing of its own: the same weights in a bare module give the same loss and gradients."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        plain = model().build(VOCABULARY, Local())
        plain.load_state_dict(one_rank["start"])
        batch = batches(0, 1, 8)[0]
        loss = plain(batch) / batch.valid
        loss.backward()
    finally:
        torch.set_default_dtype(before)
    gradients = {name: weight.grad for name, weight in plain.named_parameters()}
    same(loss.detach(), one_rank["loss"])
    same(gradients, one_rank["gradients"])
    assert set(gradients) == set(one_rank["end"])
    norm = torch.stack([g.square().sum() for g in gradients.values() if g is not None]).sum().sqrt()
    same(norm, one_rank["norm"])
    assert all(not torch.equal(one_rank["start"][n], one_rank["end"][n]) for n in gradients)


CUTS = {
    2: [{"shard": 2}, {"shard": 1}, {"tp": 2}],
    4: [{"shard": 4, "gather": "step"}, {"shard": 2}, {"tp": 2}, {"tp": 2, "shard": 1}, {"tp": 4}],
}


@pytest.mark.parametrize(("world", "micro"), [(2, 3), (4, 1)])
def test_ranks_equal_one_rank(ranks: Any, one_rank: dict[str, Any], world: int, micro: int) -> None:
    for of_rank in ranks(world, probe, cuts=CUTS[world], micro=micro):
        for found in of_rank:
            same(found, one_rank)


SPREAD: dict[int, list[dict[str, Any]]] = {
    2: [{"cp": 2, "context": name} for name in CONTEXTS],
    4: [
        *({"cp": 4, "context": name} for name in ("grid", "ring", "token_ring")),
        {"cp": 2, "tp": 2, "context": "ulysses"},
        {"cp": 2, "tp": 2, "context": "gather", "shard": 1},
        {"cp": 2, "shard": 2, "context": "token_ring"},
    ],
}


@pytest.mark.parametrize(
    ("world", "packed"),
    [(2, True), pytest.param(2, False, marks=pytest.mark.laws), (4, True)],
    ids=["2", "2 rows", "4"],
)
def test_cut_sequences_equal_whole_ones(ranks: Any, one_rank: dict[str, Any], world: int, packed: bool) -> None:
    """Under windows, sinks, softcap and grouped heads; cp alone, and with tp or copies of the weights."""
    expected = one_rank if packed else ranks(1, probe, cuts=[{}], micro=8, packed=False)[0][0]
    for of_rank in ranks(world, probe, cuts=SPREAD[world], micro=3, packed=packed):
        for cut, found in zip(SPREAD[world], of_rank, strict=True):
            try:
                same(found, expected)
            except AssertionError as error:
                raise AssertionError(f"{cut}: {error}") from error


def test_recomputation_changes_nothing_across_ranks(ranks: Any, one_rank: dict[str, Any]) -> None:
    for of_rank in ranks(2, probe, cuts=[{"cp": 2, "context": "ring"}], micro=3, kept=0.5):
        same(of_rank[0], one_rank)


def test_recomputation_changes_nothing(ranks: Any, one_rank: dict[str, Any]) -> None:
    same(ranks(1, probe, cuts=[{}], micro=2, kept=0.0)[0][0], one_rank)


def test_a_tied_head_is_spread_like_the_embedding(ranks: Any) -> None:
    """Rows of 19 tokens do not divide by 2; recomputation runs tp's exchanges again."""
    plain = ranks(1, probe, cuts=[{}], micro=8, tied=True)[0][0]
    for of_rank in ranks(2, probe, cuts=[{"tp": 2}], micro=3, tied=True, kept=0.5):
        same(of_rank[0], plain)


@pytest.mark.laws
@pytest.mark.parametrize("cut", [{"shard": 2}, {"tp": 2}, {"cp": 2}], ids=["shard", "tp", "cp"])
@pytest.mark.parametrize("kept", [None, 0.0, 0.5])
def test_compilation_changes_nothing(
    ranks: Any, one_rank: dict[str, Any], kept: float | None, cut: dict[str, int]
) -> None:
    """Rotations are fp32 in an fp64 model, and fusing rounds them elsewhere."""
    same(ranks(2, probe, cuts=[cut], micro=3, kept=kept, compiled=True)[0][0], one_rank, 1e-6)


def compilations(kept: float | None, axes: dict[str, int]) -> int:
    """How many graphs ten equal layers are compiled into."""
    graphs = []

    def counting(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compile = torch.compile
    torch.compile = lambda function: compile(function, backend=counting)  # type: ignore[assignment]
    parallel = Parallel(**axes)
    mesh = Mesh(parallel.sizes(dist.get_world_size()), torch.device("cpu"), dist.new_group(backend="gloo"))
    context = runtime(parallel, mesh)
    block = Block(repeat=10, mixer=Softmax(heads=2), ffn=Swiglu(hidden=36))
    with torch.device("meta"):
        built = Decoder(width=16, vocabulary=VOCABULARY, blocks=(block,)).build(VOCABULARY, context)
    engine = Engine(built, list(built.layers), initial(built), mesh, context=context, seed=3, kept=kept, compiled=True)
    engine.forward_backward(batches(0, 1, 8), 1.0)
    return len(graphs)


@pytest.mark.parametrize(
    ("axes", "kept"), [({}, None), ({}, 0.5), ({"tp": 2}, None), ({"tp": 2}, 0.0), ({"cp": 2}, 0.5)]
)
def test_equal_layers_are_compiled_once(ranks: Any, axes: dict[str, int], kept: float | None) -> None:
    """torch gives up on a function after 8 compilations, and runs deeper layers as they are."""
    assert ranks(2 if axes else 1, compilations, kept=kept, axes=axes)[0] == 1


def test_a_step_of_scale_zero_changes_nothing() -> None:
    weight = torch.nn.Parameter(torch.randn(5, 3))
    optimizer = Adamw(rate=0.1).build({"w": weight}, {}, 0)
    weight.grad = torch.full((5, 3), torch.nan)
    before = weight.detach().clone()
    optimizer.update(0.1, torch.tensor(0.0))
    assert torch.equal(weight, before)
    assert all(torch.equal(tensor, torch.zeros_like(tensor)) for tensor in optimizer.state().values())


def test_adamw_is_torchs_adamw() -> None:
    torch.manual_seed(0)
    ours = {"m": torch.nn.Parameter(torch.randn(7, 5)), "v": torch.nn.Parameter(torch.randn(7))}
    theirs = [torch.nn.Parameter(w.detach().clone()) for w in ours.values()]
    config = Adamw(rate=1e-2, weight_decay=0.3)
    optimizer = config.build(ours, {}, 0)
    groups = [{"params": theirs[:1], "weight_decay": 0.3}, {"params": theirs[1:], "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-8)
    for _ in range(5):
        for mine, other in zip(ours.values(), theirs, strict=True):
            mine.grad = torch.randn_like(mine)
            other.grad = mine.grad * 0.25
        optimizer.update(1e-2, torch.tensor(0.25))
        reference.step()
        for mine, other in zip(ours.values(), theirs, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)
