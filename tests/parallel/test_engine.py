"""N ranks are one rank: loss, every gradient, the norm and one optimizer step, however the weights are cut."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from farspan.models.block import Block
from farspan.models.decoder import Decoder, initial
from farspan.models.ffns import Swiglu
from farspan.models.mixers import Softmax
from farspan.parallel.context.local import Local
from farspan.parallel.context.shard import IGNORE, Batch
from farspan.parallel.engine import Engine
from farspan.parallel.mesh import Mesh, Parallel
from farspan.platform.optim import Adamw

WIDTH, VOCABULARY, LENGTH, ROWS = 24, 61, 19, 8
"""Odd sizes: neither the vocabulary, the norms nor the sinks divide by the ranks."""


def batches(rank: int, dp: int, micro: int) -> list[Batch]:
    """This rank's micro-batches of one step of 8 rows, whose numbers of valid labels differ from row to row."""
    made = torch.Generator().manual_seed(7)
    tokens = torch.randint(VOCABULARY, (ROWS, LENGTH), generator=made)
    labels = torch.randint(VOCABULARY, (ROWS, LENGTH), generator=made)
    for row in range(ROWS):
        labels[row, : 2 * row] = IGNORE
    mine = range(rank * ROWS // dp, (rank + 1) * ROWS // dp)
    return [_batch(tokens[part], labels[part]) for part in torch.tensor(mine).split(micro)]


def _batch(tokens: Tensor, labels: Tensor) -> Batch:
    """Each row is two documents, of 7 and 12 tokens."""
    rows = len(tokens)
    lengths = (7, 12) * rows
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    positions = torch.cat([torch.arange(length) for length in lengths]).view(rows, LENGTH)
    return Batch(
        tokens=tokens,
        labels=labels,
        positions=positions,
        cu_seqlens=bounds,
        lengths=lengths,
        valid=int((labels != IGNORE).sum()),
    )


def model() -> Decoder:
    rich = Softmax(heads=4, kv_heads=2, head_dim=8, qk_norm=True, window=5, sinks=True)
    plain = Softmax(heads=2, rope=None)
    return Decoder(
        width=WIDTH,
        vocabulary=VOCABULARY,
        blocks=(
            Block(repeat=2, mixer=rich, ffn=Swiglu(hidden=37)),
            Block(mixer=plain, ffn=None),
            Block(mixer=None, ffn=Swiglu(hidden=10)),
        ),
    )


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def probe(shards: list[int], micro: int, recompute: str = "none", compiled: bool = False) -> list[dict[str, Any]]:
    """On each cut of the weights: loss, gradients, norm, and the weights after one step."""
    torch.set_default_dtype(torch.float64)
    world = dist.get_world_size()
    control = dist.new_group(backend="gloo")
    results = []
    for shard in shards:
        mesh = Mesh(Parallel(shard=shard).sizes(world), torch.device("cpu"), control)
        with torch.device("meta"):
            built = model().build(VOCABULARY, Local())
        layers = list(built.layers)
        engine = Engine(
            built,
            layers,
            initial(built),
            mesh,
            seed=3,
            recomputing=recompute,
            compiled=compiled,  # type: ignore[arg-type]
        )
        optimizer = Adamw(rate=1e-2).build(engine.weights)
        work = batches(mesh.index("dp"), world, micro)
        labels = torch.tensor(float(sum(batch.valid for batch in work)))
        dist.all_reduce(labels)
        found: dict[str, Any] = {"start": {n: whole(w) for n, w in engine.weights.items()}}
        found["loss"] = engine.sum(engine.forward_backward(work, labels.item()))
        found["norm"] = engine.gradient_norm()
        found["gradients"] = {n: whole(w.grad) for n, w in engine.weights.items() if w.grad is not None}
        optimizer.update(1e-2, torch.tensor(0.5))
        found["end"] = {n: whole(w) for n, w in engine.weights.items()}
        results.append(found)
    return results


def same(left: Any, right: Any) -> None:
    if isinstance(left, dict):
        assert left.keys() == right.keys()
        for key in left:
            same(left[key], right[key])
    else:
        torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-11)


@pytest.fixture(scope="module")
def one_rank(ranks: Any) -> dict[str, Any]:
    found: dict[str, Any] = ranks(1, probe, shards=[1], micro=8)[0][0]
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


@pytest.mark.parametrize(("world", "shards", "micro"), [(2, [2, 1], 3), (4, [4, 2], 1)])
def test_ranks_equal_one_rank(ranks: Any, one_rank: dict[str, Any], world: int, shards: list[int], micro: int) -> None:
    for of_rank in ranks(world, probe, shards=shards, micro=micro):
        for found in of_rank:
            same(found, one_rank)


def test_recomputation_changes_nothing(ranks: Any, one_rank: dict[str, Any]) -> None:
    same(ranks(1, probe, shards=[1], micro=2, recompute="block")[0][0], one_rank)


@pytest.mark.laws
@pytest.mark.parametrize("recompute", ["none", "block"])
def test_compilation_changes_nothing(ranks: Any, one_rank: dict[str, Any], recompute: str) -> None:
    same(ranks(2, probe, shards=[2], micro=3, recompute=recompute, compiled=True)[0][0], one_rank)


def test_a_step_of_scale_zero_changes_nothing() -> None:
    weight = torch.nn.Parameter(torch.randn(5, 3))
    optimizer = Adamw(rate=0.1).build({"w": weight})
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
    optimizer = config.build(ours)
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
