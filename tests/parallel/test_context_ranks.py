"""Attention cut across processes is attention in one: through the operator, with gradients, recomputed and delayed."""

import random
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from farspan.parallel.comm import Group
from farspan.parallel.context import Axis, Gather, Grid, Ring, Runtime, TokenRing, Ulysses
from farspan.parallel.context.attention import Deal, Spread
from farspan.parallel.context.exchange import Link, Post, Room, Schedule
from farspan.parallel.context.layout import Layout, decode, encode
from farspan.parallel.context.local import Local
from farspan.parallel.context.pinned import Pinned
from farspan.parallel.context.shard import IGNORE, Batch, Documents
from farspan.parallel.context.sums import Grads, Me, Saved
from farspan.parallel.context.ulysses import Alone

ROWS, LENGTH, HEADS, KV_HEADS, KEY_WIDTH, VALUE_WIDTH = 2, 19, 4, 2, 4, 6
DOCUMENTS = (5, 1, 17, 2, 13)
"""The third goes on over the end of the first row."""
PLACES = (0, 7, 18)
GROUPS = (0, 2), (1, 3), (1, 2, 3), (0, 1, 2, 3)
"""Of four processes: a rank's number in its group is not its number in the world."""
CALLS: dict[str, dict[str, Any]] = {
    "rows, window, sinks": {"packed": False, "causal": True, "window": 6, "sinks": True},
    "packed, softcap": {"packed": True, "causal": True, "softcap": 3.0},
    "packed, both ways, sinks": {"packed": True, "causal": False, "sinks": True},
}
OUTERS = Gather(), Ring(), TokenRing()
LAYERS: tuple[dict[str, Any], ...] = ({}, {"window": 6}, {"softcap": 3.0}, {"sinks": True})


def schedules(ranks: int) -> dict[str, Pinned]:
    some: dict[str, Pinned] = {
        "gather": Gather(),
        "gather in groups": Gather(groups=2),
        "ring": Ring(),
        "token ring": TokenRing(),
        "ulysses": Ulysses(),
        "ulysses in groups": Ulysses(groups=2),
        "contiguous ring": Ring(layout="contiguous"),
    }
    if ranks == 4:
        some |= {
            f"grid {type(outer).__name__}": Grid(inner=2, outer=outer) for outer in (Gather(), Ring(), TokenRing())
        }
    return some


def batch(packed: bool) -> Batch:
    made = torch.Generator().manual_seed(3)
    tokens = torch.randint(1, 99, (ROWS, LENGTH), generator=made)
    lengths = DOCUMENTS if packed else (LENGTH,) * ROWS
    bounds = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    bounds += [bounds[-1]] * (8 - len(bounds))
    return Batch(
        tokens=tokens,
        labels=tokens + 1,
        positions=torch.cat([torch.arange(length) for length in lengths]).view(ROWS, LENGTH),
        cu_seqlens=torch.tensor(bounds, dtype=torch.int32) if packed else None,
        lengths=lengths,
        valid=ROWS * LENGTH,
    )


def numbers(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()


class Shard:
    """A rank's part of a batch, or all of it: cuts whole tensors, and puts what it holds back in its place."""

    def __init__(self, runtime: Runtime, whole: Batch) -> None:
        self.runtime, self.batch = runtime, runtime.cut(whole)
        self.places, self.tokens = torch.arange(ROWS * LENGTH), ROWS * LENGTH
        if self.batch.layout is not None:
            layout: Layout = decode(torch.tensor(self.batch.layout), runtime.ranks)
            self.places, self.tokens = layout.places(runtime.rank), layout.tokens

    def cut(self, x: Tensor, padding: float) -> Tensor:
        """B T … of all tokens -> the same of this rank's."""
        rows = x.flatten(0, 1)[self.places]
        if self.batch.layout is None:
            return rows.view(x.shape)
        return torch.cat([rows, rows.new_full((self.tokens - len(rows), *rows.shape[1:]), padding)]).unsqueeze(0)

    def held(self, x: Tensor) -> Tensor:
        return x.flatten(0, 1)[: len(self.places)]

    def put(self, x: Tensor) -> Tensor:
        """This rank's of all tokens, 0 elsewhere: the sum over ranks is the whole."""
        held = self.held(x.detach())
        return held.new_zeros(ROWS * LENGTH, *held.shape[1:]).index_copy(0, self.places, held)


def attention(runtime: Runtime, packed: bool, causal: bool, sinks: bool = False, **more: Any) -> dict[str, Tensor]:
    """Out of this rank's tokens, and their share of the gradients. Padding holds NaN."""
    shard = Shard(runtime, batch(packed))
    shapes = (HEADS, KEY_WIDTH), (KV_HEADS, KEY_WIDTH), (KV_HEADS, VALUE_WIDTH), (HEADS, VALUE_WIDTH)
    *leaves, dout = (numbers(ROWS, LENGTH, *shape, seed=i) for i, shape in enumerate(shapes))
    sink = numbers(HEADS, seed=9) if sinks else None
    q, k, v = (shard.cut(x, torch.nan) for x in leaves)
    out = runtime.attend(q, k, v, causal=causal, documents=shard.batch.documents, sinks=sink, **more)
    assert (out.flatten(0, 1)[len(shard.places) :] == 0).all(), "padding"
    loss = (shard.held(out) * shard.held(shard.cut(dout, 0.0))).sum()
    grads = torch.autograd.grad(loss, leaves if sink is None else [*leaves, sink])
    at = torch.tensor(PLACES)
    here, found = runtime.find(shard.batch, at)
    asked = torch.where(found[:, None, None], out.detach()[0, here], 0.0)
    names = "dq", "dk", "dv", "dsinks"
    return {"out": shard.put(out), "at places": asked, **dict(zip(names, grads, strict=False))}


def stack(runtime: Runtime, recomputed: bool) -> dict[str, Tensor]:
    """Four layers over packed documents: the result and the gradients of their weights."""
    shard = Shard(runtime, batch(packed=True))
    width, sizes = 5, (HEADS * KEY_WIDTH, KV_HEADS * KEY_WIDTH, KV_HEADS * VALUE_WIDTH)
    weights = [numbers(len(LAYERS), width, size, seed=i) for i, size in enumerate(sizes)]
    weights += [numbers(len(LAYERS), HEADS * VALUE_WIDTH, width, seed=3), numbers(len(LAYERS), HEADS, seed=4)]
    documents = shard.batch.documents

    def layer(x: Tensor, i: int) -> Tensor:
        q, k, v = (torch.tanh(x @ weight[i]) for weight in weights[:3])
        options = LAYERS[i] | ({"sinks": weights[4][i]} if "sinks" in LAYERS[i] else {})
        heads = q.unflatten(-1, (HEADS, -1)), k.unflatten(-1, (KV_HEADS, -1)), v.unflatten(-1, (KV_HEADS, -1))
        out = runtime.attend(*heads, causal=True, documents=documents, **options)
        return x + out.flatten(-2) @ weights[3][i]

    start = numbers(ROWS, LENGTH, width, seed=7)
    x = shard.cut(start, 0.0)
    for i in range(len(LAYERS)):
        x = checkpoint(layer, x, i, use_reentrant=False) if recomputed else layer(x, i)
    grads = torch.autograd.grad(shard.held(x).square().sum(), [start, *weights])
    return {"out": shard.put(x), **{f"gradient {i}": grad for i, grad in enumerate(grads)}}


class Hesitant:
    """A link that takes its time."""

    def __init__(self, link: Link) -> None:
        self.link, self.drawn = link, random.Random(1)

    def room(self, asked: Room) -> Tensor:
        return self.link.room(asked)

    def post(self, post: Post) -> int:
        time.sleep(self.drawn.random() * 0.002)
        return self.link.post(post)

    def wait(self, ticket: int) -> None:
        time.sleep(self.drawn.random() * 0.002)
        self.link.wait(ticket)

    def close(self) -> None:
        self.link.close()


Found = dict[str, dict[str, dict[str, Tensor]]]
"""By schedule, by what was asked, and by name."""


def probe() -> dict[str, Found]:
    """What every schedule finds on this rank of two, of three and of four."""
    found = {}
    for members in GROUPS:
        group = dist.new_group(list(members))
        if dist.get_rank() in members:
            found[str(len(members))] = span(Group(group))
    return found


def span(group: Group) -> Found:
    """Of four ranks one is late at the end, and layers are recomputed then."""
    results = {}
    for name, schedule in schedules(group.size).items():
        runtime = schedule.build(Axis(group=group, device=torch.device("cpu"), multiple=4))
        assert isinstance(runtime, Spread)
        found = {call: attention(runtime, **CALLS[call]) for call in CALLS}
        found["stack"] = stack(runtime, recomputed=False)
        if group.size == 4:
            runtime.link = Hesitant(runtime.link) if group.rank == 1 else runtime.link
            found["late"] = stack(runtime, recomputed=True)
        for packed in (False, True):
            shard = Shard(runtime, batch(packed))
            cut, count = shard.batch, len(shard.places)
            assert cut.tokens.shape == cut.labels.shape == cut.positions.shape == (1, shard.tokens)
            assert (cut.labels[0, count:] == IGNORE).all() and shard.tokens % 4 == 0
            parts = {"tokens": cut.tokens, "labels": cut.labels, "positions": cut.positions}
            here, there = runtime.find(cut, torch.tensor(PLACES))
            sums = {"found": there.long(), "token": torch.where(there, cut.tokens[0, here], 0)}
            found[f"cut {packed}"] = {key: shard.put(part) for key, part in parts.items()} | sums
        results[name] = found
    return results


@pytest.fixture(scope="module")
def alone() -> dict[str, dict[str, Tensor]]:
    """What one rank finds."""
    found = {call: attention(Local(), **CALLS[call]) for call in CALLS}
    found["stack"] = stack(Local(), recomputed=False)
    for packed in (False, True):
        whole = batch(packed)
        parts = {"tokens": whole.tokens, "labels": whole.labels, "positions": whole.positions}
        sums = {"found": torch.ones(len(PLACES)).long(), "token": whole.tokens[0, list(PLACES)]}
        found[f"cut {packed}"] = {key: part.flatten() for key, part in parts.items()} | sums
    return found


@pytest.fixture(scope="module")
def of_rank(ranks: Any) -> list[dict[str, Found]]:
    """What four processes find, in groups of several sizes."""
    found: list[dict[str, Found]] = ranks(4, probe)
    return found


@pytest.mark.parametrize("members", GROUPS, ids=str)
def test_processes_are_one_process(
    of_rank: list[dict[str, Found]], alone: dict[str, dict[str, Tensor]], members: tuple[int, ...]
) -> None:
    parts = [of_rank[rank][str(len(members))] for rank in members]
    for name in schedules(len(members)):
        for case, wanted in alone.items():
            for key, whole in wanted.items():
                total = sum(part[name][case][key] for part in parts)
                at = f"{name}, {case}: {key}"
                torch.testing.assert_close(total, whole, rtol=1e-10, atol=1e-10, msg=lambda m, at=at: f"{at}: {m}")


def test_neither_recomputation_nor_a_late_rank_changes_a_bit(of_rank: list[dict[str, Found]]) -> None:
    for found in of_rank:
        for name in schedules(4):
            for key, tensor in found["4"][name]["stack"].items():
                assert torch.equal(found["4"][name]["late"][key], tensor), f"{name}: {key}"


def one_of_two(rank: int = 0) -> Spread:
    """A rank that has nobody to talk to."""
    return Spread(rank, 2, lambda _: Ring(), Deal("zigzag", "documents"), Mute())


class Mute:
    def room(self, asked: Room) -> Tensor:
        return torch.empty(asked.size, dtype=torch.uint8)

    def post(self, post: Post) -> int:
        return 0

    def wait(self, ticket: int) -> None:
        pass

    def close(self) -> None:
        pass


def test_a_batch_that_was_not_cut_is_refused() -> None:
    q = torch.zeros(1, 4, 2, 4)
    with pytest.raises(ValueError, match=r"needs a batch that was cut; call Spread.cut first"):
        one_of_two().attend(q, q, q, causal=True, documents=Documents())


def test_a_prefix_is_refused() -> None:
    whole = batch(packed=True)
    prefixed = Batch(**{**vars(whole), "prefix": torch.arange(3)})
    with pytest.raises(ValueError, match=r"cannot be cut across parallel.cp ranks; set parallel.cp=1"):
        one_of_two().cut(prefixed)


@pytest.mark.parametrize("packed", [False, True])
def test_the_parts_of_a_batch_are_the_batch(packed: bool) -> None:
    """What a batch counts stays that of the whole; each place of its first row is on one rank, where its token is."""
    whole = batch(packed)
    parts = [one_of_two(rank).cut(whole) for rank in range(2)]
    at = torch.arange(LENGTH)
    found = [one_of_two(rank).find(part, at) for rank, part in enumerate(parts)]
    assert torch.equal(found[0][1], ~found[1][1])
    tokens = [torch.where(here, part.tokens[0, place], 0) for part, (place, here) in zip(parts, found, strict=True)]
    assert torch.equal(tokens[0] + tokens[1], whole.tokens[0])
    assert all(part.valid == whole.valid and part.lengths == whole.lengths for part in parts)
    assert parts[0].layout == parts[1].layout is not None and parts[0].cu_seqlens is None


def test_a_rank_without_tokens_finds_nothing() -> None:
    tokens = torch.tensor([[7]])
    whole = Batch(tokens=tokens, labels=tokens, positions=tokens, cu_seqlens=None, lengths=(1,), valid=1)
    runtimes = [one_of_two(rank) for rank in range(2)]
    found = [runtime.find(runtime.cut(whole), torch.tensor([0])) for runtime in runtimes]
    assert sorted(bool(here) for _, here in found) == [False, True]
    assert all(int(place) == 0 for place, _ in found)


class Strided(Alone):
    """Gives what packed buffers give: heads and values side by side."""

    def forward(self, me: Me, q: Tensor, k: Tensor, v: Tensor) -> Schedule[tuple[Tensor, Tensor]]:
        out, lse = yield from super().forward(me, q, k, v)
        return torch.stack((out, out), 1)[:, 1], torch.stack((lse, lse), 2)[..., 0]

    def backward(self, me: Me, saved: Saved) -> Schedule[Grads]:
        dq, dk, dv = yield from super().backward(me, saved)
        both = torch.stack((dk, dv), 1)
        return torch.cat((dq, dq), 1)[:, : dq.shape[1]], both[:, 0], both[:, 1]


def test_the_operator_gives_dense_tensors_as_compiled_code_counts_on() -> None:
    runtime = Spread(0, 1, lambda _: Strided(), Deal("zigzag", "documents"), Mute())
    table = torch.tensor(encode("zigzag", (6,), 1, 1))
    q, k = (torch.randn(1, 6, heads, 4) for heads in (4, 2))
    options = None, table, runtime.name, True, None, None, None
    out, lse = torch.ops.farspan.attend_spread(q, k, k, *options)
    grads = torch.ops.farspan.attend_spread_backward(out, q, k, k, out, lse, *options)
    assert all(tensor.is_contiguous() for tensor in (out, lse, *grads))


def test_the_operator_keeps_torchs_contract() -> None:
    """Its schema, fake tensors and gradients agree: what compilation and recomputation rely on."""
    runtime = Spread(0, 1, lambda _: Ring(), Deal("zigzag", "documents"), Mute())
    table = torch.tensor(encode("zigzag", (6,), 1, 1))
    q, k = (torch.randn(1, 6, heads, 4, dtype=torch.float64, requires_grad=True) for heads in (4, 2))
    sinks = torch.randn(4, dtype=torch.float64, requires_grad=True)
    arguments = q, k, torch.randn_like(k, requires_grad=True), sinks, table, runtime.name, True, None, None, None
    torch.library.opcheck(torch.ops.farspan.attend_spread.default, arguments)
