"""Exchanges of tokens are under way while a rank works, in both directions, and padded ones never depend on counts."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from farspan.models.ffns import Moe
from farspan.parallel.comm import Group
from farspan.parallel.context.shard import Documents
from farspan.parallel.expert import AllGather, AllToAll, Axes, Local, Visits, travel
from farspan.parallel.mesh import Mesh, Parallel

TOKENS, WIDTH, HIDDEN, EXPERTS, ACTIVE = 13, 6, 5, 4, 3


class _Noted(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, log: list[str]) -> Tensor:
        ctx.log = log
        log.append("beside")
        return 2 * x

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        ctx.log.append("beside")
        return 2 * upstream, None


def given(seed: int = 0) -> list[Tensor]:
    """Tokens, their choice and its probabilities, w13 and w2 of all experts."""
    made = torch.Generator().manual_seed(seed)
    draw = partial(torch.randn, generator=made, dtype=torch.float64)
    chosen = torch.rand(TOKENS, EXPERTS, generator=made).topk(ACTIVE).indices.int()
    chosen[3], chosen[5, 1] = -1, EXPERTS
    weights = draw(EXPERTS, 2, HIDDEN, WIDTH), draw(EXPERTS, WIDTH, HIDDEN)
    return [draw(TOKENS, WIDTH), chosen, draw(TOKENS, ACTIVE), *weights]


def noted(kinds: list[tuple[dict[str, Any], int | None]]) -> list[Any]:
    """For each: departures, arrivals and work beside in their order; sizes of what departs; result and gradients;
    seconds waited."""
    torch.set_default_dtype(torch.float64)
    group, results = Group(dist.group.WORLD), []
    tokens, wanted, probability = given(group.rank)[:3]
    count = EXPERTS // group.size
    mine = [given()[i][group.rank * count : (group.rank + 1) * count] for i in (3, 4)]
    for kind, most in kinds:
        log: list[str] = []
        sizes: list[int] = []
        chosen = wanted if most in (None, -1) else first_visits(wanted, most)
        gathers = kind == {"gathered": True}
        dispatcher = (AllGather() if gathers else AllToAll(**kind)).build(Axes(ep=group))
        dispatcher.expect(TOKENS, 1, TOKENS)
        leaves = [x.clone().requires_grad_() for x in (tokens, probability, *mine)]
        beside = partial(_Noted.apply, leaves[0], log)
        with logged(dispatcher, log, sizes):
            at_most = None if most is None else partial(_at_most, most)
            out = dispatcher.run(
                Visits(leaves[0], chosen, leaves[1], at_most),
                *leaves[2:],
                beside,
            )
            log.append("back")
            found = [out.detach(), *torch.autograd.grad(out, leaves, given(7)[0])]
        waits = dispatcher.waited()
        assert waits is not None and dispatcher.waited().seconds() == 0  # type: ignore[union-attr]
        results.append((" ".join(log), sizes, found, waits.seconds()))
    return results


def _at_most(most: int, rows: int, length: int) -> int:
    """-1: what is not so."""
    assert (rows, length) == (1, TOKENS)
    return 1 if most < 0 else most


def first_visits(chosen: Tensor, most: int) -> Tensor:
    """Those of the first `most` tokens that chose an expert; -1 in place of others."""
    kept = chosen.clone()
    for expert in range(EXPERTS):
        rows, columns = (chosen == expert).nonzero(as_tuple=True)
        kept[rows[most:], columns[most:]] = -1
    return kept


@contextmanager
def logged(dispatcher: Any, log: list[str], sizes: list[int]) -> Iterator[None]:
    """Notes what departs and arrives, counts and choices left out."""
    with pytest.MonkeyPatch.context() as patch:
        wait = dispatcher.clock.wait

        def arrive(pending: Tensor) -> Tensor:
            log.extend(["arrive"] * pending.is_floating_point())
            return wait(pending)

        def depart(x: Tensor, start: Callable[..., Tensor], **rest: Any) -> Tensor:
            if x.is_floating_point():
                log.append("depart")
                sizes.append(len(x))
            return start(x, **rest)

        patch.setattr(dispatcher.clock, "wait", arrive)
        for name in ("_exchange", "_gather", "_sum"):
            patch.setattr(travel, name, partial(depart, start=getattr(travel, name)))
        yield


KINDS: list[tuple[dict[str, Any], int | None]] = [
    ({}, None), ({"gathered": True}, None), ({"padded": True}, None), ({"chunks": 2}, None),
    ({}, 3), ({"padded": True}, 3), ({"chunks": 2, "padded": True}, 3),
]  # fmt: skip


def test_tokens_travel_while_a_rank_works(ranks: Any) -> None:
    """Tokens and their probabilities depart, then comes what is beside, and only then somebody waits; of two chunks one
    is under way while the other is with its experts. Backward likewise. Room is for all, or for what may come."""
    there, back = "depart depart beside arrive arrive", "depart arrive"
    whole = f"{there} {back} back {back} {there}"
    forward = "depart depart depart depart beside arrive arrive depart arrive arrive depart arrive arrive"
    backward = "depart depart arrive depart depart arrive depart depart beside arrive arrive arrive arrive"
    halves = f"{forward} back {backward}"
    for of_rank in ranks(2, noted, kinds=KINDS):
        plain = {most: found for (kind, most), (_, _, found, _) in zip(KINDS, of_rank, strict=True) if not kind}
        for (kind, most), (log, sizes, found, waited) in zip(KINDS, of_rank, strict=True):
            assert log == (halves if "chunks" in kind else whole) and waited > 0, kind
            if "padded" in kind:
                assert set(sizes) == {2 * (TOKENS if most is None else 2 * most)}, kind
            if "gathered" not in kind:
                for ours, theirs in zip(found, plain[most], strict=True):
                    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12, msg=str(kind))
    assert not any(torch.equal(a, b) for a, b in zip(plain[None], plain[3], strict=True))


def uneven(kinds: list[dict[str, Any]], etp: int) -> list[list[Tensor]]:
    """Rank by rank one row more, of 6 tokens, of which 2 choose an expert: results and gradients of each kind."""
    torch.set_default_dtype(torch.float64)
    control = dist.new_group(backend="gloo")
    axes = Mesh(Parallel(ep=2, etp=etp).sizes(2 * etp), torch.device("cpu"), control).expert_axes
    rank, results = dist.get_rank(), []
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(rank))
    rows = rank + 1
    chosen = torch.tensor([[0], [1], [2], [3], [0], [1]], dtype=torch.int32).repeat(rows, 1)
    chosen[chosen == rank] = 2  # 4 of these in a row, in which the last two stay away
    chosen[4::6], chosen[5::6] = -1, -1
    leaves = [draw(6 * rows, WIDTH), torch.rand(6 * rows, 1), draw(2, 2, HIDDEN, WIDTH), draw(2, WIDTH, HIDDEN)]
    upstream = draw(6 * rows, WIDTH)
    for kind in kinds:
        dispatcher = AllToAll(**kind).build(axes)
        dispatcher.expect(6 * rows, rows, 6)
        inputs = [x.detach().requires_grad_() for x in leaves]
        out = dispatcher.run(Visits(inputs[0], chosen, inputs[1], _two_of_a_row), *inputs[2:])
        results.append([out.detach(), *torch.autograd.grad(out, inputs, upstream)])
    return results


def _two_of_a_row(rows: int, length: int) -> int:
    assert length == 6
    return 2 * rows


@pytest.mark.parametrize("etp", [1, pytest.param(2, marks=pytest.mark.laws)])
def test_ranks_with_other_rows_agree_how_much_room_there_is(ranks: Any, etp: int) -> None:
    for plain, *padded in ranks(2 * etp, uneven, kinds=[{}, {"padded": True}, {"padded": True, "chunks": 2}], etp=etp):
        for found in padded:
            for ours, wanted in zip(found, plain, strict=True):
                torch.testing.assert_close(ours, wanted, rtol=1e-12, atol=1e-12)


def test_a_bound_that_is_none_is_no_secret(ranks: Any) -> None:
    with pytest.raises(AssertionError, match="out of bounds"):
        ranks(2, noted, kinds=[({"padded": True}, -1)])


def test_chunks_are_at_least_one() -> None:
    with pytest.raises(ValueError, match="chunks=0: must be at least 1"):
        AllToAll(chunks=0)


SYNCS = ("cudaStreamSynchronize", "cudaEventSynchronize", "cudaDeviceSynchronize", "cudaMemcpy")


def host_waits(layer: Callable[[], Tensor]) -> list[str]:
    """The calls in which the host waits for the device, in a forward and a backward of the layer."""
    for _ in range(2):  # kernels are compiled and memory is found
        layer().sum().backward()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        with record_function("the layer"):
            layer().sum().backward()
        torch.cuda.synchronize()
    [span] = [e.time_range for e in found.events() if e.name == "the layer" and e.device_type == DeviceType.CPU]
    inside = [e for e in found.events() if span.start <= e.time_range.start <= span.end]
    assert any("LaunchKernel" in e.name for e in inside)
    return [e.name for e in inside if e.name in SYNCS]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs one NVIDIA GPU")
def test_gpu_host_waits_once_for_counts_or_never() -> None:
    """A layer with a shared expert, a capacity and a bias: where all experts are here, where tokens are gathered or
    padded, no host waits; where they are sent by their counts, it waits once for these."""
    torch.cuda.set_device(0)
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1, device_id=torch.device("cuda", 0))
    try:
        axes = Axes(ep=Group(dist.group.WORLD))
        config = Moe(experts=16, active=4, hidden=128, shared=64, shared_gate=True, bias="aux_free", capacity=1.5)
        with torch.device("cuda"):
            layer = config.build(256, 1).bfloat16()
        for weight in layer.parameters():
            torch.nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)
        x = torch.randn(2, 512, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        kinds = {"here": Local(), "gathered": AllGather().build(axes), "padded": AllToAll(padded=True).build(axes)}
        kinds |= {"sent": AllToAll().build(axes), "chunks": AllToAll(chunks=4).build(axes)}
        outs = {}
        for name, dispatcher in kinds.items():
            layer.experts.dispatcher = dispatcher
            dispatcher.expect(1024, 2, 512)
            outs[name] = layer(x, Documents())[0].detach()
            waits = host_waits(lambda: layer(x, Documents())[0])
            assert waits == (["cudaEventSynchronize"] if name in ("sent", "chunks") else []), (name, waits)
        for name, out in outs.items():
            torch.testing.assert_close(out, outs["here"], rtol=2e-2, atol=2e-2, msg=name)
    finally:
        dist.destroy_process_group()
