"""Tokens go through DeepEP as they go by all-to-all: proved with a stand-in for the package, which needs GPUs.

The stand-in has the signatures of `deep_ep.Buffer` and its contract: what comes is garbage until its event was waited
for, a token comes once, in the order of source ranks and of their tokens, and a handle is good for any number of ways.
"""

import sys
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import farspan.parallel.context.attention  # noqa: F401 - recomputation asks for its operators
from farspan.parallel import recompute
from farspan.parallel.comm import Group
from farspan.parallel.expert import AllToAll, Axes, DeepEp, Visits

TOKENS, WIDTH, HIDDEN, EXPERTS, ACTIVE = 13, 16, 6, 8, 3
LOG: list[str] = []


class EventOverlap:
    def __init__(self, event: Callable[[], None] | None = None) -> None:
        self.event = event

    def current_stream_wait(self) -> None:
        assert self.event is not None, "valid only if async_finish is set"
        LOG.append("wait")
        self.event()


class Config:
    def get_nvl_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        return hidden_bytes * num_ranks

    def get_rdma_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        return 0


class Buffer:
    """rank_prefix_matrix[i, j]: tokens that ranks up to i send to j."""

    made: ClassVar[int] = 0

    def __init__(self, group: dist.ProcessGroup, num_nvl_bytes: int = 0, num_rdma_bytes: int = 0) -> None:
        self.group, self.rank, self.size, self.num_nvl_bytes = group, group.rank(), group.size(), num_nvl_bytes
        Buffer.made += 1

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> Config:
        assert num_ranks in (2, 4, 8)
        return Config()

    get_combine_config = get_dispatch_config

    def get_dispatch_layout(
        self,
        topk_idx: Tensor,
        num_experts: int,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Tensor, None, Tensor, Tensor, EventOverlap]:
        assert topk_idx.dtype == torch.int64 and topk_idx.is_contiguous()
        assert ((topk_idx >= -1) & (topk_idx < num_experts)).all() and num_experts % self.size == 0
        to = (topk_idx.unsqueeze(2) == torch.arange(num_experts)).any(1)
        goes = to.unflatten(1, (self.size, -1)).any(2)
        event = self._event(previous_event, async_finish, allocate_on_comm_stream)
        return goes.sum(0).int(), None, to.sum(0).int(), goes, event

    def dispatch(
        self,
        x: Tensor,
        handle: tuple[Tensor, ...] | None = None,
        num_tokens_per_rank: Tensor | None = None,
        num_tokens_per_rdma_rank: Tensor | None = None,
        is_token_in_rank: Tensor | None = None,
        num_tokens_per_expert: Tensor | None = None,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        expert_alignment: int = 1,
        num_worst_tokens: int = 0,
        config: Config | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, list[int] | None, tuple[Tensor, ...] | None, EventOverlap]:
        self._check(x)
        LOG.append("dispatch")
        done = partial(self._event, previous_event, async_finish, allocate_on_comm_stream)
        if handle is not None:
            assert topk_idx is None and topk_weights is None
            matrix, _, _, source, goes, _ = handle
            came = self._send([x[goes[:, i]] for i in range(self.size)], self._counts(matrix, came=True))
            assert len(came) == len(source)
            return came, None, None, None, None, done(came)
        assert num_tokens_per_rank is not None and is_token_in_rank is not None and num_tokens_per_expert is not None
        assert topk_idx is not None and topk_weights is not None and topk_idx.is_contiguous()
        assert topk_weights.dtype == torch.float32 and topk_weights.is_contiguous()
        assert topk_weights.shape == topk_idx.shape and len(topk_idx) == len(x)
        each = [torch.empty_like(num_tokens_per_rank) for _ in range(self.size)]
        dist.all_gather(each, num_tokens_per_rank, group=self.group)
        matrix = torch.stack(each).cumsum(0).int()
        goes, local = is_token_in_rank, len(num_tokens_per_expert) // self.size
        sent = [goes[:, i].nonzero().flatten() for i in range(self.size)]
        wishes = [topk_idx[rows] - i * local for i, rows in enumerate(sent)]
        wishes = [torch.where((wish >= 0) & (wish < local), wish, -1) for wish in wishes]
        shares = [topk_weights[rows].where(wish >= 0, 0.0) for rows, wish in zip(sent, wishes, strict=True)]
        send = partial(self._send, counts=self._counts(matrix, came=True))
        came, idx, weights, source = (send(x) for x in ([x[rows] for rows in sent], wishes, shares, sent))
        visits = [int((idx == i).sum()) for i in range(local)]
        sizes = torch.zeros(self.size, 1, dtype=torch.int32)
        made = (matrix, sizes, sizes.clone(), source.int(), goes, torch.zeros(goes.shape, dtype=torch.int32))
        return came, idx, weights, visits, made, done(came, idx, weights)

    def combine(
        self,
        x: Tensor,
        handle: tuple[Tensor, ...],
        topk_weights: Tensor | None = None,
        bias: Tensor | None = None,
        config: Config | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Tensor, Tensor | None, EventOverlap]:
        self._check(x)
        LOG.append("combine")
        matrix, _, _, source, goes, _ = handle
        assert len(source) == len(x)
        counts = self._counts(matrix, came=True)
        found = self._sum(x, counts, goes).bfloat16()
        weights = None
        if topk_weights is not None:
            assert topk_weights.dtype == torch.float32 and topk_weights.is_contiguous()
            assert len(topk_weights) == len(x)
            weights = self._sum(topk_weights, counts, goes)
        arrived = (found,) if weights is None else (found, weights)
        return found, weights, self._event(previous_event, async_finish, allocate_on_comm_stream, *arrived)

    def _check(self, x: Tensor) -> None:
        assert x.dtype == torch.bfloat16 and x.ndim == 2 and x.is_contiguous() and x.shape[1] % 16 == 0
        assert self.num_nvl_bytes >= x.shape[1] * 2 * self.size

    def _counts(self, matrix: Tensor, *, came: bool) -> list[int]:
        return matrix.diff(dim=0, prepend=torch.zeros_like(matrix[:1]))[:, self.rank].tolist()

    def _send(self, rows: list[Tensor], counts: list[int]) -> Tensor:
        out = rows[0].new_empty(sum(counts), *rows[0].shape[1:])
        dist.all_to_all_single(out, torch.cat(rows), counts, [len(x) for x in rows], group=self.group)
        return out

    def _sum(self, x: Tensor, counts: list[int], goes: Tensor) -> Tensor:
        back = goes.sum(0).tolist()
        total = torch.zeros(len(goes), x.shape[1])
        for rank, part in enumerate(self._send(list(x.split(counts)), back).split(back)):
            total[goes[:, rank]] += part.float()
        return total

    def _event(
        self, previous: EventOverlap | None, asynchronous: bool, on_comm_stream: bool, *came: Tensor
    ) -> EventOverlap:
        """Until it is waited for, what came is not there."""
        assert asynchronous or not came, "nothing would hide the exchange"
        assert not on_comm_stream or (previous is not None and asynchronous)
        right = [x.clone() for x in came]
        for x in came:
            x.fill_(float("nan") if x.is_floating_point() else 1 << 40)

        def arrive() -> None:
            for x, there in zip(came, right, strict=True):
                x.data.copy_(there)  # which autograd knows no more of than of a kernel's writes

        return EventOverlap(arrive if asynchronous else None)


def stand_in() -> ModuleType:
    package = ModuleType("deep_ep")
    package.__dict__.update(Buffer=Buffer, EventOverlap=EventOverlap, Config=Config)
    return package


class Noted(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        LOG.append("beside")
        return x.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Tensor:
        LOG.append("beside")
        return upstream


class Layer(nn.Module):
    """Experts, and a product beside them."""

    def __init__(self, dispatcher: Any, w13: Tensor, w2: Tensor, shared: Tensor) -> None:
        super().__init__()
        self.dispatcher = dispatcher
        self.w13, self.w2, self.shared = (nn.Parameter(w.to("meta")) for w in (w13, w2, shared))

    def forward(self, x: Tensor, chosen: Tensor, probability: Tensor) -> Tensor:
        tokens = x[0] * 2
        beside = partial(self._beside, tokens)
        return self.dispatcher.run(Visits(tokens, chosen, probability.sigmoid()), self.w13, self.w2, beside)[None]

    def _beside(self, tokens: Tensor) -> Tensor:
        return Noted.apply(tokens @ self.shared)

    def example(self, rows: int, length: int) -> tuple[Tensor, ...]:
        with torch.device("meta"):
            x = torch.empty(1, length, WIDTH, dtype=torch.bfloat16)
            return x, torch.empty(length, ACTIVE, dtype=torch.int32), torch.empty(length, ACTIVE)


class Elsewhere:
    """A store that copies what stays at once."""

    def pack(self, tensor: Tensor) -> Tensor:
        return tensor.clone()

    def unpack(self, packed: Tensor) -> Tensor:
        return packed


def axes_of(etp: int) -> Axes:
    """etp ranks next to each other have parts of the same experts."""
    world = torch.arange(dist.get_world_size())
    whole = Group(dist.group.WORLD)
    if etp == 1:
        return Axes(ep=whole, hosts=whole)
    parts, _ = dist.new_subgroups_by_enumeration(world.view(-1, etp).tolist())
    ep, _ = dist.new_subgroups_by_enumeration(world.view(-1, etp).T.tolist())
    return Axes(ep=Group(ep), etp=Group(parts), hosts=whole)


def choice(idle: bool, count: int, made: torch.Generator) -> Tensor:
    """Whom tokens choose: some nobody; where experts idle, the first three alone, so that ranks have no guests."""
    chosen = torch.rand(count, EXPERTS // 4 + 1 if idle else EXPERTS, generator=made).topk(ACTIVE).indices.int()
    chosen[chosen == 1] = -1  # expert 1 waits in vain
    chosen[3], chosen[5, 1], chosen[6, 0] = -1, EXPERTS, -1
    return chosen


def passed(axes: Axes, kind: Any, idle: bool, kept: float | None, stored: bool) -> tuple[list[Tensor], list[str]]:
    """What comes of a forward and a backward of the layer, and in which order it was done."""
    assert axes.ep is not None
    rank, etp = dist.get_rank(), axes.etp
    made = torch.Generator().manual_seed(rank)
    count = TOKENS + rank  # ranks have different numbers of tokens
    x, upstream = (torch.randn(1, count, WIDTH, generator=made).bfloat16() for _ in range(2))
    chosen, probability = choice(idle, count, made), torch.randn(count, ACTIVE, generator=made)
    same = torch.Generator().manual_seed(99)
    w13, w2, shared = (
        torch.randn(shape, generator=same).bfloat16()
        for shape in ((EXPERTS, 2, HIDDEN, WIDTH), (EXPERTS, WIDTH, HIDDEN), (WIDTH, WIDTH))
    )
    w13, w2 = w13.chunk(axes.ep.size)[axes.ep.rank], w2.chunk(axes.ep.size)[axes.ep.rank]
    if etp is not None:
        w13, w2 = w13.chunk(etp.size, 2)[etp.rank], w2.chunk(etp.size, 2)[etp.rank]
    dispatcher = kind.build(axes)
    layer = Layer(dispatcher, w13, w2, shared)
    recompute.apply(layer, kept, store=Elsewhere() if stored else None)
    for name, weight in (("w13", w13), ("w2", w2), ("shared", shared)):
        setattr(layer, name, nn.Parameter(weight.clone()))
    leaves = [x.requires_grad_(), probability.requires_grad_(), *layer.parameters()]
    dispatcher.expect(count, 1, count)
    LOG.clear()
    out = layer.forward(x, chosen, probability)
    LOG.append("back")
    found = [out.detach(), *torch.autograd.grad(out, leaves, upstream)]
    waited = dispatcher.waited()
    assert waited is not None and waited.seconds() > 0
    return found, LOG.copy()


def both(cases: list[tuple[int, bool, float | None, bool]]) -> list[tuple[Any, ...]]:
    """By all-to-all and through DeepEP; a case: etp, idle experts, what recomputation keeps, and whether elsewhere."""
    sys.modules["deep_ep"] = stand_in()
    results = []
    for etp, *case in cases:
        axes = axes_of(etp)
        wanted, _ = passed(axes, AllToAll(), *case)
        found, log = passed(axes, DeepEp(), *case)
        results.append((wanted, found, log))
    return results


PLAIN = "dispatch beside wait combine wait back dispatch wait combine beside wait"
AGAIN = "dispatch beside wait combine wait back dispatch wait beside combine beside wait"
AWAY = "dispatch wait beside combine wait back dispatch wait beside combine beside wait"  # what leaves has to be there
CASES = [(1, False, None, False), (1, True, None, False), (1, False, 0.5, False), (1, True, 0.0, True)]


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.laws)])
def test_tokens_go_as_they_go_by_all_to_all(ranks: Any, world: int) -> None:
    """Results and every gradient; a rank works beside while tokens travel, both ways; none travels twice."""
    cases = CASES + ([(2, False, None, False), (2, True, 0.5, False)] if world == 4 else [])
    for of_rank in ranks(world, both, cases=cases):
        for (_, _, kept, stored), (wanted, found, log) in zip(cases, of_rank, strict=True):
            assert " ".join(log) == (PLAIN if kept is None else AWAY if stored else AGAIN)
            for ours, theirs in zip(found, wanted, strict=True):
                assert ours.dtype == theirs.dtype and ours.isfinite().all()
                torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-2)


def wide() -> tuple[int, list[str]]:
    """How many buffers two layers had, the second of them wider; what tokens of fp32 are told."""
    sys.modules["deep_ep"] = stand_in()
    axes, said = Axes(ep=Group(dist.group.WORLD)), []
    first, second = DeepEp().build(axes), DeepEp().build(axes)
    for dispatcher, width in ((first, 16), (second, 32), (first, 16)):
        tokens, w13, w2 = torch.ones(3, width), torch.ones(4, 2, 5, width), torch.ones(4, width, 5)
        chosen = torch.tensor([[0, 4]] * 3, dtype=torch.int32)
        dispatcher.run(Visits(tokens.bfloat16(), chosen, torch.ones(3, 2)), w13.bfloat16(), w2.bfloat16())
        with pytest.raises(ValueError) as refused:
            dispatcher.run(Visits(tokens, chosen, torch.ones(3, 2)), w13, w2)
        said.append(str(refused.value))
    return Buffer.made, said


def test_a_buffer_grows_with_its_tokens_and_takes_bf16_alone(ranks: Any) -> None:
    for made, said in ranks(2, wide):
        assert made == 2
        assert all("sends bf16 tokens, not torch.float32; set train.precision: bf16, or" in line for line in said)
