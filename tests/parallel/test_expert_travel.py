"""Exchanges of tokens are under way while a rank works, in both directions, and padded ones never depend on counts."""

from collections.abc import Callable
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
from farspan.parallel.expert import AllGather, AllToAll, Axes, Local, travel

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


def noted(kind: dict[str, Any], most: int | None) -> tuple[list[str], list[list[int]], list[Tensor], float]:
    """Departures, arrivals and work beside in their order; sizes of what departs; results and gradients; waits."""
    torch.set_default_dtype(torch.float64)
    log: list[str] = []
    sizes: list[list[int]] = []
    group = Group(dist.group.WORLD)
    dispatcher = (AllGather() if kind.pop("gathered", False) else AllToAll(**kind)).build(Axes(ep=group))
    dispatcher.expect(TOKENS)
    wait = dispatcher.clock.wait  # type: ignore[attr-defined]

    def arrived(pending: Tensor) -> Tensor:
        if pending.is_floating_point():
            log.append("arrive")
        return wait(pending)

    def departing(name: str) -> None:
        start = getattr(travel, name)

        def depart(x: Tensor, **rest: Any) -> Tensor:
            if x.is_floating_point():
                log.append("depart")
                sizes.append(list(x.shape))
            return start(x, **rest)

        setattr(travel, name, depart)

    dispatcher.clock.wait = arrived  # type: ignore[attr-defined]
    for name in ("_exchange", "_gather", "_sum"):
        departing(name)
    tokens, chosen, probability, w13, w2 = given(group.rank)
    count = EXPERTS // group.size
    mine = slice(group.rank * count, (group.rank + 1) * count)
    w13, w2 = given()[3][mine], given()[4][mine]
    leaves = [x.clone().requires_grad_() for x in (tokens, probability, w13, w2)]
    out = dispatcher.run(leaves[0], chosen, *leaves[1:], beside=lambda: _Noted.apply(leaves[0], log), most=most)
    log.append("back")
    found = [out.detach(), *torch.autograd.grad(out, leaves, given(7)[0])]
    waited = dispatcher.waited()
    assert waited is not None
    return log, sizes, found, waited.seconds()


@pytest.mark.parametrize("kind", [{}, {"gathered": True}, {"padded": True}], ids=["sent", "gathered", "padded"])
def test_a_rank_works_while_tokens_travel(ranks: Any, kind: dict[str, Any]) -> None:
    """Tokens and their probabilities depart, then comes what is beside, and only then somebody waits."""
    for log, _, _, waited in ranks(2, noted, kind=kind, most=None):
        there, back = "depart depart beside arrive arrive", "depart arrive"
        assert " ".join(log) == f"{there} {back} back {back} {there}"
        assert waited > 0


def test_a_chunk_travels_while_another_is_with_its_experts(ranks: Any) -> None:
    for log, _, found, _ in ranks(2, noted, kind={"chunks": 2}, most=None):
        forward = "depart depart depart depart beside arrive arrive depart arrive arrive depart arrive arrive"
        backward = "depart depart arrive depart depart arrive depart depart beside arrive arrive arrive arrive"
        assert " ".join(log) == f"{forward} back {backward}"
        for ours, whole in zip(found, ranks(2, noted, kind={}, most=None)[0][2], strict=True):
            assert ours.shape == whole.shape


def test_padded_exchanges_have_room_for_what_may_come_and_no_more(ranks: Any) -> None:
    """Without a limit all tokens may go to a rank; with one, an expert's most times the rank's experts."""
    plain = ranks(2, noted, kind={}, most=None)
    for most, room in ((None, TOKENS), (TOKENS, TOKENS), (TOKENS - 1, TOKENS)):
        for (_, sizes, found, _), (_, _, wanted, _) in zip(
            ranks(2, noted, kind={"padded": True}, most=most), plain, strict=True
        ):
            assert {size[0] for size in sizes} == {2 * room}
            for ours, theirs in zip(found, wanted, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


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
            dispatcher.expect(1024)
            outs[name] = layer(x, Documents())[0].detach()
            waits = host_waits(lambda: layer(x, Documents())[0])
            assert waits == (["cudaEventSynchronize"] if name in ("sent", "chunks") else []), (name, waits)
        for name, out in outs.items():
            torch.testing.assert_close(out, outs["here"], rtol=2e-2, atol=2e-2, msg=name)
    finally:
        dist.destroy_process_group()
