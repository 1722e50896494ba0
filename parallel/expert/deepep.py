"""DeepEP as the way of tokens to experts: its kernels keep NVLink and RDMA busy where small exchanges do not.

Written to `deep_ep.Buffer` of DeepEP 1.2.1, which 2.x keeps: its normal kernels, within a node and between nodes. The
gradient of a dispatch is a combine, that of a combine is a dispatch along the same handle. Proved against a stand-in
that honours the documented contract (tests/parallel/test_expert_deep_ep.py); the real package has never run with it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any
from weakref import WeakValueDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from farspan.kernels.permute import sort
from farspan.parallel.clock import Clock, Waits
from farspan.parallel.comm import Group
from farspan.parallel.expert.dispatch import Axes, Beside, Dispatcher, Local, Visits, through
from farspan.parallel.expert.travel import Crossing

RANKS = (2, 4, 8, 16, 32, 64, 128, 144, 160)
"""Sizes of ep that DeepEP has kernels for: up to 8 ranks are one node, and from 16 on every 8 are."""
WIDEST = 8176
"""Channels of a token that a warp's shared memory holds."""
WISHES = 32
"""Experts that a token may choose: a thread of a warp for each."""


class Buffered(Local):
    """A token goes once to each rank of ep that has experts of its own, through DeepEP's buffers."""

    def __init__(self, axes: Axes, ep: Group) -> None:
        super().__init__(axes)
        self.ep, self.clock = ep, Clock()
        self.link = _LINKS.get(ep.name) or _Link(ep)

    def waited(self) -> Waits:
        return self.clock.take()

    @torch.compiler.disable  # sizes come from the device, and a compiler would not know what may hide behind what
    def _meet(self, visits: Visits, w13: Tensor, w2: Tensor, beside: Beside | None) -> tuple[Tensor, Tensor | None]:
        tokens, chosen, probability = visits[:3]
        if tokens.dtype != torch.bfloat16:
            raise ValueError(
                f"parallel.dispatch.kind=deep_ep: sends bf16 tokens, not {tokens.dtype}; set train.precision: bf16, or "
                "parallel.dispatch: {kind: all_to_all}"
            )
        here, name = len(w13), self.ep.name
        chosen = torch.where((chosen >= 0) & (chosen < here * self.ep.size), chosen, -1).long()
        trip = _Trip(chosen.contiguous(), here * self.ep.size, name, self.clock)
        pending = _Leave.apply(tokens, probability.float(), trip)
        extra = None if beside is None else beside()
        guests, share = _Come.apply(*pending, trip)
        found = through(guests, w13, w2, share, sort(trip.wishes, here, trip.room))
        there, back = (partial(start, handle=trip.handle, group=name) for start in (COMBINE, _again))
        return Crossing(found, there, back, self.clock).arrive(), extra


class _Link:
    """The buffers between the ranks of ep, of which there is one set however many layers ask."""

    def __init__(self, ep: Group) -> None:
        self.ep = ep
        self._width, self._buffer = 0, None
        _LINKS[ep.name] = self

    def buffer(self, width: int) -> Any:
        """With room for tokens so wide: all ranks of ep ask together for the first, and for each that is wider."""
        if width > self._width:
            from deep_ep import Buffer  # whoever does not ask for it need not have it

            configs = [get(self.ep.size) for get in (Buffer.get_dispatch_config, Buffer.get_combine_config)]
            row = width * torch.bfloat16.itemsize
            near = max(config.get_nvl_buffer_size_hint(row, self.ep.size) for config in configs)
            far = max(config.get_rdma_buffer_size_hint(row, self.ep.size) for config in configs)
            self._width, self._buffer = width, Buffer(self.ep.handle, near, far)
        return self._buffer


_LINKS: WeakValueDictionary[str, _Link] = WeakValueDictionary()
"""By group: an operator takes no objects, so that it finds them by name, as torch's own exchanges do."""


class _Arrival(dist.Work):
    """DeepEP's event as what torch's `wait_tensor` waits for, on the device's stream."""

    def __init__(self, event: Any) -> None:
        super().__init__()
        self.event = event

    def wait(self, timeout: timedelta = timedelta()) -> bool:
        self.event.current_stream_wait()
        return True


def _pending(came: Tensor, event: Any) -> Tensor:
    torch._C._distributed_c10d._register_work(came, _Arrival(event))
    return came


def _dispatch(tokens: Tensor, chosen: Tensor, share: Tensor, experts: int, group: str) -> list[Tensor]:
    """N D bf16, N K int64 with -1 for nobody, N K fp32 -> the guests of this rank: R D, R K of its own experts, R K;
    how many visits they pay, on the host; and the handle. All but the number is there when the first is."""
    buffer = _LINKS[group].buffer(tokens.shape[1])
    per_rank, per_node, per_expert, goes, counted = buffer.get_dispatch_layout(chosen, experts, async_finish=True)
    came, wishes, shares, visits, handle, event = buffer.dispatch(
        tokens,
        topk_idx=chosen,
        topk_weights=share,
        num_tokens_per_rank=per_rank,
        num_tokens_per_rdma_rank=per_node,
        is_token_in_rank=goes,
        num_tokens_per_expert=per_expert,
        previous_event=counted,
        async_finish=True,
        allocate_on_comm_stream=True,
    )
    return [_pending(came, event), wishes, shares, torch.tensor(sum(visits)), *handle]


def _combine(x: Tensor, handle: Sequence[Tensor], group: str) -> Tensor:
    """R D of guests -> N D, the sum of what their hosts send; pending."""
    came, _, event = _LINKS[group].buffer(x.shape[1]).combine(x.contiguous(), tuple(handle), async_finish=True)
    return _pending(came, event)


def _again(x: Tensor, handle: Sequence[Tensor], group: str) -> Tensor:
    """N D -> R D, along a way that was gone before; pending."""
    buffer = _LINKS[group].buffer(x.shape[1])
    came, *_, event = buffer.dispatch(x.contiguous(), handle=tuple(handle), async_finish=True)
    return _pending(came, event)


def _combine_both(x: Tensor, share: Tensor, handle: Sequence[Tensor], group: str) -> tuple[Tensor, Tensor]:
    """R D and R K -> N D and N K; both are there when the first is."""
    buffer, rows = _LINKS[group].buffer(x.shape[1]), (x.contiguous(), tuple(handle))
    came, shares, event = buffer.combine(*rows, topk_weights=share.contiguous(), async_finish=True)
    return _pending(came, event), shares


_LIBRARY = torch.library.Library("farspan", "FRAGMENT")
_LIBRARY.define("deep_ep_dispatch(Tensor tokens, Tensor chosen, Tensor share, int experts, str group) -> Tensor[]")
_LIBRARY.impl("deep_ep_dispatch", _dispatch, "CompositeExplicitAutograd")
_LIBRARY.define("deep_ep_combine(Tensor x, Tensor[] handle, str group) -> Tensor")
_LIBRARY.impl("deep_ep_combine", _combine, "CompositeExplicitAutograd")
DISPATCH, COMBINE = torch.ops.farspan.deep_ep_dispatch.default, torch.ops.farspan.deep_ep_combine.default
"""Operators, so that recomputation sees them and keeps what they brought; no tracer ever does."""


class _Trip:
    """Tokens on their way to their experts, and backward the gradients on theirs."""

    wishes: Tensor
    """R K: whom this rank's guests choose of its experts; -1: nobody."""
    room: int
    """Visits that they pay."""
    handle: list[Tensor]
    returning: tuple[Tensor, Tensor]
    """The gradients, under way between the two backwards."""

    def __init__(self, chosen: Tensor, experts: int, group: str, clock: Clock) -> None:
        self.chosen, self.experts, self.group, self.clock = chosen, experts, group, clock


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, share: Tensor, trip: _Trip) -> tuple[Tensor, Tensor]:
        ctx.trip, rows = trip, (tokens.contiguous(), trip.chosen, share.contiguous())
        came, trip.wishes, shares, visits, *trip.handle = DISPATCH(*rows, trip.experts, trip.group)
        trip.room = int(visits)
        return came, shares

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, Tensor, None]:
        tokens, share = ctx.trip.returning
        del ctx.trip.returning
        return ctx.trip.clock.wait(tokens), share, None


class _Come(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pending: Tensor, share: Tensor, trip: _Trip) -> tuple[Tensor, Tensor]:
        ctx.trip = trip
        return trip.clock.wait(pending), share

    @staticmethod
    def backward(ctx: Any, guests: Tensor, share: Tensor) -> tuple[Tensor, Tensor, None]:
        ctx.trip.returning = _combine_both(guests, share, ctx.trip.handle, ctx.trip.group)
        return guests, share, None  # for their shapes: nobody reads them


@dataclass(frozen=True, kw_only=True)
class DeepEp:
    """As all_to_all, by the kernels of the package deep_ep: bf16 tokens on GPUs, over NVLink in a node and RDMA
    between nodes."""

    def problems(self, ep: int, width: int, wishes: int) -> list[str]:
        """What its kernels cannot do. wishes: of a token, the most that a layer has."""
        step, found = 16 if ep <= 8 else 256, []
        if ep not in RANKS:
            found.append(f"parallel.ep={ep}: DeepEP is for {', '.join(map(str, RANKS))} ranks; set one of these")
        if width % step or width > WIDEST:
            found.append(f"model.width={width}: DeepEP's tokens have a multiple of {step} channels, at most {WIDEST}")
        if wishes > WISHES:
            found.append(
                f"model.blocks: ffn: a token may wish for {wishes} experts, with DeepEP for {WISHES}; set fewer"
            )
        return found

    def build(self, axes: Axes) -> Dispatcher:
        return Local(axes) if axes.ep is None else Buffered(axes, axes.ep)
