"""Tokens travel to the experts of other ranks and back, with all they have to say to them; meanwhile ranks work.

An exchange is two operations: it departs, and is waited for where it arrives. Autograd goes through what was done in
reverse order, so that what lies between the two lies between them on the way back as well: an exchange hides behind
the same work in both directions.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from farspan.kernels.permute import Order, permute, sort, unpermute
from farspan.parallel.clock import Clock, Waits
from farspan.parallel.comm import Group
from farspan.parallel.expert.dispatch import Axes, Beside, Dispatcher, Local, Visits, through

_OPS = torch.ops._c10d_functional

Start = Callable[[Tensor], Tensor]
"""Begins an exchange of rows; what it returns is to be waited for."""


@dataclass(frozen=True)
class _Trip:
    """Tokens that are under way to their experts."""

    tokens: "Crossing"
    share: "Crossing"
    """Tokens' probabilities."""
    wishes: Tensor
    """Whom they choose; pending."""
    there: Start
    back: Start
    """Rows of guests become rows of those who sent them."""
    room: int
    """Visits of this rank's experts at most."""
    home: Callable[[Tensor], Tensor] | None = None
    """What came back -> N D, of the tokens that left; None: it is that."""


class Travelling(Local):
    """Tokens go to the ranks of ep that have their experts; of several chunks, one travels while another works."""

    def __init__(self, axes: Axes, ep: Group, chunks: int = 1) -> None:
        super().__init__(axes)
        self.ep, self.chunks, self.clock = ep, chunks, Clock()

    def waited(self) -> Waits:
        return self.clock.take()

    @torch.compiler.disable  # a compiler would not know what may hide behind what, nor some of the sizes
    def _meet(self, visits: Visits, w13: Tensor, w2: Tensor, beside: Beside | None) -> tuple[Tensor, Tensor | None]:
        trips = self._leave(self._chunks(visits), len(w13))
        extra = None if beside is None else beside()
        homewards = [self._work(trip, w13, w2) for trip in trips]
        found = [
            crossing.arrive() if trip.home is None else trip.home(crossing.arrive())
            for trip, crossing in zip(trips, homewards, strict=True)
        ]
        return torch.cat(found) if len(found) > 1 else found[0], extra

    def _leave(self, chunks: Sequence[Visits], experts: int) -> list[_Trip]:
        """experts: those of this rank."""
        raise NotImplementedError

    def _chunks(self, visits: Visits) -> list[Visits]:
        """All ranks make as many, of sizes of their own."""
        if self.chunks == 1:
            return [visits]
        tokens, chosen, probability = visits[:3]
        count = len(tokens)
        ends = [count * i // self.chunks for i in range(self.chunks + 1)]
        sizes = [end - begin for begin, end in pairwise(ends)]
        parts = zip(tokens.split(sizes), chosen.split(sizes), probability.split(sizes), strict=True)
        return [Visits(*part, *visits[3:]) for part in parts]

    def _departed(self, visits: Visits, there: Start, back: Start, room: int) -> _Trip:
        """visits: as they travel. Wishes go first: they are put in order while tokens are under way."""
        wishes = there(visits.chosen)
        share, tokens = (Crossing(x, there, back, self.clock) for x in (visits.probability, visits.tokens))
        return _Trip(tokens=tokens, share=share, wishes=wishes, there=there, back=back, room=room)

    def _work(self, trip: _Trip, w13: Tensor, w2: Tensor) -> "Crossing":
        """What the guests of this rank make of its experts, on its way back."""
        experts = len(w13)
        seats = sort(self.clock.wait(trip.wishes) - self.ep.rank * experts, experts, trip.room)
        found = through(trip.tokens.arrive(), w13, w2, trip.share.arrive(), seats)
        return Crossing(found, trip.back, trip.there, self.clock)


class Gathered(Travelling):
    """Every rank of ep sees all their tokens, and gives its experts' part of each to the sum: sizes never vary."""

    ragged = False

    def __init__(self, axes: Axes, ep: Group) -> None:
        super().__init__(axes, ep)
        self.guests *= ep.size

    def _leave(self, chunks: Sequence[Visits], experts: int) -> list[_Trip]:
        there, back = (partial(start, size=self.ep.size, name=self.ep.name) for start in (_gather, _sum))
        return [
            self._departed(visits, there, back, self._room(visits, experts, self.ep.size * visits.chosen.numel()))
            for visits in chunks
        ]


class Exchanged(Travelling):
    """A token travels once to each rank of ep that has experts of its own.

    The host learns the counts of a layer in one read, while the device puts the tokens in order; where exchanges are
    padded, nobody has to know them.
    """

    def __init__(self, axes: Axes, ep: Group, chunks: int = 1, padded: bool = False) -> None:
        super().__init__(axes, ep, chunks)
        self.padded, self.ragged = padded, not padded

    def _leave(self, chunks: Sequence[Visits], experts: int) -> list[_Trip]:
        rides = self._padded(chunks, experts) if self.padded else self._counted(chunks, experts)
        return [self._send(visits, ride) for visits, ride in zip(chunks, rides, strict=True)]

    def _counted(self, chunks: Sequence[Visits], experts: int) -> list["_Ride"]:
        """As long as tokens need."""
        ranks = self.ep.size
        owners = [visits.chosen.div(experts, rounding_mode="floor") for visits in chunks]
        orders = [sort(_once(owner, ranks), ranks) for owner in owners]
        each = [
            (o.ends.diff(prepend=o.ends[:1] * 0), _given(owner, ranks)) for o, owner in zip(orders, owners, strict=True)
        ]
        leaving = torch.stack(
            [torch.stack(counts, dim=1) for counts in each], dim=1
        )  # ranks, chunks, tokens and visits
        coming = self.clock.wait(_exchange(leaving, sent=[1] * ranks, received=[1] * ranks, name=self.ep.name))
        numbers = _read(torch.stack((leaving, coming), dim=2))
        rides = []
        for order, ((sent, _), (received, visits)) in zip(orders, numbers.permute(1, 2, 3, 0).tolist(), strict=True):
            rides.append(_Ride(replace(order, rows=order.rows[: sum(sent)]), sent, received, sum(visits)))
        return rides

    def _padded(self, chunks: Sequence[Visits], experts: int) -> list["_Ride"]:
        """As long as tokens may need at most: where nobody sits travels whatever memory held, and wishes for nobody."""
        ranks, rides = self.ep.size, []
        for visits in chunks:
            (count, k), chosen = visits.chosen.shape, visits.chosen
            paid = self._room(visits, experts, count * min(k, experts))  # by a rank's tokens to another one's experts
            room = min(count, paid)
            owner = _once(chosen.div(experts, rounding_mode="floor"), ranks)
            order = sort(owner, ranks)
            seat = order.places - F.pad(order.ends[:-1], (1, 0))[owner.clamp(0, ranks - 1)]
            sits = (owner >= 0) & (owner < ranks)
            nowhere = ranks * room + (sits & (seat >= room)).int()  # where a bound was none: an error, not silence
            seat = torch.where(sits & (seat < room), owner * room + seat, nowhere)
            numbers = torch.arange(seat.numel(), dtype=torch.int32, device=seat.device)
            rows = seat.new_full((ranks * room + 1,), -1).scatter_(0, seat.flatten().long(), numbers)[:-1]
            seats = Order(rows, seat, seat.new_full((1,), ranks * room))
            rides.append(_Ride(seats, [room] * ranks, [room] * ranks, ranks * min(paid, room * k)))
        return rides

    def _send(self, visits: Visits, ride: "_Ride") -> _Trip:
        tokens, chosen, probability = visits[:3]
        rows, sent, received, name = ride.order.rows, ride.sent, ride.received, self.ep.name
        there = partial(_exchange, sent=sent, received=received, name=name)
        back = partial(_exchange, sent=received, received=sent, name=name)
        wishes = chosen[rows.clamp(min=0).long().div(chosen.shape[1], rounding_mode="floor")]
        wishes = torch.where(rows.unsqueeze(1) < 0, -1, wishes)
        leaving = Visits(permute(tokens, ride.order), wishes, permute(probability, ride.order))
        return replace(self._departed(leaving, there, back, ride.room), home=partial(unpermute, order=ride.order))


@dataclass(frozen=True)
class _Ride:
    """Where the tokens of a chunk sit on their way."""

    order: Order
    """By ranks; rows are -1 where nobody sits."""
    sent: Sequence[int]
    received: Sequence[int]
    """Seats for each rank, and from each."""
    room: int
    """Visits that those who come pay to experts, at most."""


def _once(owner: Tensor, ranks: int) -> Tensor:
    """owner: N K, with -1 for all but the first of those in a row that are the same rank."""
    place = torch.where((owner >= 0) & (owner < ranks), owner, ranks).long()
    turn = torch.arange(owner.shape[1], dtype=torch.int32, device=owner.device).expand_as(owner)
    first = turn.new_full((len(owner), ranks + 1), owner.shape[1]).scatter_reduce(1, place, turn, "amin")
    return torch.where(first.gather(1, place) == turn, owner, -1)


def _given(owner: Tensor, ranks: int) -> Tensor:
    """How many visits each rank is given, int32."""
    return (owner.flatten().unsqueeze(0) == torch.arange(ranks, device=owner.device).unsqueeze(1)).sum(1).int()


def _read(numbers: Tensor) -> Tensor:
    """The numbers on the host, which alone waits for them: the device goes on."""
    if not numbers.is_cuda:
        return numbers
    side = torch.cuda.Stream(numbers.device)
    side.wait_stream(torch.cuda.current_stream(numbers.device))
    with torch.cuda.stream(side):
        here = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
        here.copy_(numbers, non_blocking=True)
        done = side.record_event()
    numbers.record_stream(side)
    done.synchronize()
    return here


def _exchange(x: Tensor, *, sent: Sequence[int], received: Sequence[int], name: str) -> Tensor:
    """Rows for every rank, one rank's after the other's, become every rank's rows for this one."""
    out: Tensor = _OPS.all_to_all_single(x.contiguous(), list(received), list(sent), name)
    return out


def _gather(x: Tensor, *, size: int, name: str) -> Tensor:
    out: Tensor = _OPS.all_gather_into_tensor(x.contiguous(), size, name)
    return out


def _sum(x: Tensor, *, size: int, name: str) -> Tensor:
    out: Tensor = _OPS.reduce_scatter_tensor(x.contiguous(), "sum", size, name)
    return out


class Crossing:
    """One exchange of rows with a gradient: what departs, and backward what departs the other way."""

    def __init__(self, x: Tensor, there: Start, back: Start, clock: Clock) -> None:
        self.there, self.back, self.clock = there, back, clock
        self.returning: Tensor | None = None
        """The gradient, under way between the two backwards; its rows are those of x."""
        self._pending: Tensor | None = _Depart.apply(x, self)

    def arrive(self) -> Tensor:
        """The rows that came; to be called once."""
        pending, self._pending = self._pending, None  # which knows this object, and would live on with it
        out: Tensor = _Arrive.apply(pending, self)
        return out


class _Depart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, crossing: Crossing) -> Tensor:
        ctx.crossing = crossing
        return crossing.there(x)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        crossing: Crossing = ctx.crossing
        returning, crossing.returning = crossing.returning, None
        assert returning is not None
        return crossing.clock.wait(returning), None


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pending: Tensor, crossing: Crossing) -> Tensor:
        ctx.crossing = crossing
        return crossing.clock.wait(pending)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        ctx.crossing.returning = ctx.crossing.back(upstream)
        return upstream, None  # for its shape: nobody reads it


@dataclass(frozen=True, kw_only=True)
class AllToAll:
    """Tokens travel to the ranks that have their experts, and back: least bytes where micro-batches are small."""

    chunks: int = 1
    """Parts of a micro-batch's tokens that travel one after the other: one is with its experts while the next one
    travels. More than 1 pays where exchanges take longer than what hides them, and experts have many tokens."""
    padded: bool = False
    """Every exchange has room for as many tokens as may go at most, by the layer's capacity, or for all where it has
    none: more bytes, and no host reads how many there are."""

    def __post_init__(self) -> None:
        if self.chunks < 1:
            raise ValueError(f"chunks={self.chunks}: must be at least 1, which is all tokens together")

    def build(self, axes: Axes) -> Dispatcher:
        return Local(axes) if axes.ep is None else Exchanged(axes, axes.ep, self.chunks, self.padded)


@dataclass(frozen=True, kw_only=True)
class AllGather:
    """Every rank of ep sees all their tokens: nothing varies in size and no host waits, for more bytes and rows."""

    def build(self, axes: Axes) -> Dispatcher:
        return Local(axes) if axes.ep is None else Gathered(axes, axes.ep)
