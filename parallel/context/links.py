"""The ways from rank to rank: messages of a process group, or copies straight out of another GPU's memory."""

import socket
from itertools import count
from typing import Literal

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric_memory
from torch import Tensor

from farspan.parallel.comm import Group
from farspan.parallel.context.exchange import SLOTS, Link, Post, Room, as_bytes

Carrier = Literal["auto", "pairs", "symmetric"]


def connect(carrier: Carrier, group: Group, device: torch.device) -> Link:
    """This rank's link to the others of `group`; all of them call it together.

    Errors: ValueError for `symmetric` where some GPU cannot reach another's memory.
    """
    if carrier == "pairs" or (carrier == "auto" and device.type != "cuda"):
        # A group's first call must be everyone's, and the first messages may be between some ranks only.
        dist.barrier(group=group.handle, device_ids=[device.index or 0] if device.type == "cuda" else None)
        return Pairs(group.handle, device)
    if why := _out_of_reach(group, device):
        if carrier == "symmetric":
            raise ValueError(f"parallel.context.carrier=symmetric: {why}; take carrier=pairs, or auto")
        return Pairs(group.handle, device)
    return Symmetric(group, device)


def _out_of_reach(group: Group, device: torch.device) -> str:
    """Why some rank's memory cannot be read by another; empty where all can. The answer is the same on all ranks."""
    mine = (socket.gethostname(), -1 if device.index is None else device.index, device.type)
    places: list[tuple[str, int, str]] = [mine] * group.size
    dist.all_gather_object(places, mine, group=group.handle)
    why = ""
    if any(kind != "cuda" for _, _, kind in places):
        why = "it needs GPUs"
    elif len({host for host, _, _ in places}) > 1:
        why = f"the ranks are on {len({host for host, _, _ in places})} hosts"
    elif max(index for _, index, _ in places) >= torch.cuda.device_count() or len(set(places)) < group.size:
        why = "the ranks do not see each other's GPUs"
    else:
        blind = [i for _, i, _ in places if i != mine[1] and not torch.cuda.can_device_access_peer(mine[1], i)]
        why = f"GPU {mine[1]} cannot access GPUs {blind}" if blind else ""
    reasons = [why] * group.size
    dist.all_gather_object(reasons, why, group=group.handle)
    return next((reason for reason in reasons if reason), "")


class Pairs:
    """Messages between pairs of ranks over a process group: gloo, or NCCL in one group call a post."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self.group, self.device, self.rank = group, device, group.rank()
        self.tickets = count()
        self.pending: dict[int, tuple[Post, list[dist.Work]]] = {}

    def room(self, asked: Room) -> Tensor:
        return torch.empty(asked.size, dtype=torch.uint8, device=self.device)

    def post(self, post: Post) -> int:
        ops: list[dist.P2POp] = []
        for give in sorted(post.gives):
            if give.stop > give.start and give.to != self.rank:
                part = post.published[give.start : give.stop]
                ops.append(dist.P2POp(dist.isend, part, group=self.group, group_peer=give.to))
        for take in sorted(post.takes, key=lambda take: (take.source, take.start)):
            into = as_bytes(take.into)
            if take.source == self.rank:
                into.copy_(post.published[take.start : take.start + into.numel()])
            elif into.numel():
                ops.append(dist.P2POp(dist.irecv, into, group=self.group, group_peer=take.source))
        ticket = next(self.tickets)
        self.pending[ticket] = post, dist.batch_isend_irecv(ops) if ops else []
        return ticket

    def wait(self, ticket: int) -> None:
        _, works = self.pending.pop(ticket)
        for work in works:
            work.wait()

    def close(self) -> None:
        for ticket in list(self.pending):
            self.wait(ticket)


class Arena:
    """Symmetric memory for SLOTS publications, the same on every rank; all ranks make it together."""

    def __init__(self, capacity: int, group: Group, device: torch.device) -> None:
        self.capacity = capacity
        self.memory = symmetric_memory.empty(SLOTS * capacity, dtype=torch.uint8, device=device)
        self.handle = symmetric_memory.rendezvous(self.memory, group.handle)
        self.rooms = count()
        self.last = [-2] * SLOTS
        """The last post out of each slot."""

    def holds(self, room: Tensor) -> bool:
        return room.untyped_storage().data_ptr() == self.memory.untyped_storage().data_ptr()


class Symmetric:
    """Publications in symmetric memory; who takes copies straight out of it, by copy engine and without a kernel.

    A barrier on the device opens every post: then all ranks have published, and have also done with the posts before.
    Rooms go round in the slots of an arena, and a slot is written again only behind the barrier after its last post.
    """

    def __init__(self, group: Group, device: torch.device) -> None:
        self.group, self.device = group, device
        self.stream = torch.cuda.Stream(device)
        self.arenas = [Arena(1 << 20, group, device)]
        """The present one is the last; a schedule that asks for more may still publish out of one before."""
        self.number = 0
        self.passed: dict[int, torch.cuda.Event] = {}
        """When the barrier of a post was behind this rank."""
        self.done: dict[int, torch.cuda.Event] = {}

    def room(self, asked: Room) -> Tensor:
        if asked.most > self.arenas[-1].capacity:
            self._meet()
            self.arenas.append(Arena(1 << (asked.most - 1).bit_length(), self.group, self.device))
        arena = self.arenas[-1]
        slot = next(arena.rooms) % SLOTS
        if 0 <= arena.last[slot] == self.number - 1:
            raise RuntimeError("context: a schedule asks for more rooms than it posts; post one before the next")
        if behind := self.passed.get(arena.last[slot] + 1):
            torch.cuda.current_stream(self.device).wait_event(behind)
        return arena.memory[slot * arena.capacity : slot * arena.capacity + asked.size]

    def post(self, post: Post) -> int:
        arena = next(arena for arena in self.arenas if arena.holds(post.published))
        number, offset = self.number, post.published.storage_offset()
        self.number += 1
        arena.last[offset // arena.capacity] = number
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            arena.handle.barrier(channel=0)
            self.passed[number] = self.stream.record_event()
            # Everyone begins with the rank above its own, so that no rank is read by all at once.
            for take in sorted(post.takes, key=lambda take: (take.source - self.group.rank) % self.group.size):
                into = as_bytes(take.into)
                if into.numel():
                    size, start = (into.numel(),), int(offset) + take.start
                    theirs = arena.handle.get_buffer(take.source, size, torch.uint8, start)
                    into.copy_(theirs, non_blocking=True)
            self.done[number] = self.stream.record_event()
        self.passed.pop(number - 4 * SLOTS, None)
        return number

    def wait(self, ticket: int) -> None:
        torch.cuda.current_stream(self.device).wait_event(self.done.pop(ticket))

    def close(self) -> None:
        for ticket in list(self.done):
            self.wait(ticket)
        if len(self.arenas) > 1:
            self._meet()
            del self.arenas[:-1]

    def _meet(self) -> None:
        """Waits on the host until every rank is here and nobody reads an arena: once for each time that one grows."""
        torch.cuda.synchronize(self.device)
        self.arenas[-1].handle.barrier(channel=1)
        torch.cuda.synchronize(self.device)
