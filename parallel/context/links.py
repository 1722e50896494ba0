"""The ways from rank to rank: messages of a process group, or copies straight out of another GPU's memory."""

from itertools import count
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from farspan.parallel.comm import Group
from farspan.parallel.context.exchange import Link, Post, Room, as_bytes

Carrier = Literal["auto", "pairs", "symmetric"]


def connect(carrier: Carrier, group: Group, device: torch.device) -> Link:
    """This rank's link to the others of `group`; all of them call it together.

    Errors: RuntimeError for `symmetric` where some GPU cannot reach another's memory.
    """
    return Pairs(group.handle, device)


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
