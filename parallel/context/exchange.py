"""What ranks say to each other in a schedule, and the ways to carry it.

A schedule is a generator: it asks for room, posts what it gives and takes, goes on computing, and waits for a post when
it needs what it took. So one text runs on one rank over a real link, on all ranks of one process (`loopback`), and on
ghosts that only count time. Every rank makes the same number of posts in the same order, with nothing to say or not.
"""

from collections.abc import Generator, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

ALIGNMENT = 16
"""Bytes: every part of a publication begins at a multiple, so that it can be read as any type."""


class Room(NamedTuple):
    """Asks for bytes to publish: the answer is a uint8 tensor, not filled."""

    size: int
    most: int
    """The largest that any rank asks for here."""


class Give(NamedTuple):
    """Bytes `start` to `stop` of what is published go to rank `to`."""

    to: int
    start: int
    stop: int


class Take(NamedTuple):
    """From byte `start` of what rank `source` publishes, as many as `into` holds; it is contiguous."""

    source: int
    start: int
    into: Tensor


class Post(NamedTuple):
    """One exchange, begun: the answer is its ticket. `published` comes from Room and stays as it is."""

    published: Tensor
    gives: Sequence[Give]
    takes: Sequence[Take]


class Wait(NamedTuple):
    """Until everything taken under a ticket is there."""

    ticket: int


T = TypeVar("T")
Asked = Room | Post | Wait
Schedule = Generator[Asked, Any, T]


def renumbered(schedule: Schedule[T], ranks: Sequence[int]) -> Schedule[T]:
    """A schedule of some ranks within one of more: its rank i is the outer one's ranks[i]."""
    answer: Any = None
    while True:
        try:
            asked = schedule.send(answer)
        except StopIteration as done:
            result: T = done.value
            return result
        if isinstance(asked, Post):
            gives = [give._replace(to=ranks[give.to]) for give in asked.gives]
            takes = [take._replace(source=ranks[take.source]) for take in asked.takes]
            asked = Post(asked.published, gives, takes)
        answer = yield asked


class Link(Protocol):
    """Carries the exchanges of one rank."""

    def room(self, asked: Room) -> Tensor: ...

    def post(self, post: Post) -> int: ...

    def wait(self, ticket: int) -> None: ...

    def close(self) -> None:
        """After a schedule: whatever was posted is done, or ordered before what comes next."""


def drive(schedule: Schedule[T], link: Link) -> T:
    """Runs one rank's schedule over a link."""
    answer: Any = None
    try:
        while True:
            asked = schedule.send(answer)
            if isinstance(asked, Room):
                answer = link.room(asked)
            elif isinstance(asked, Post):
                answer = link.post(asked)
            else:
                link.wait(asked.ticket)
                answer = None
    except StopIteration as done:
        link.close()
        result: T = done.value
        return result


SLOTS = 4
"""Publications that a link keeps room for: the next but SLOTS overwrites one that every rank has passed."""


class Loopback:
    """Carries the exchanges of all ranks in one process, as soon as both sides have posted, and counts their bytes.

    Rooms are used again as over symmetric memory, and spoilt before: who still reads an old publication reads NaN.
    """

    def __init__(self, ranks: int, device: torch.device) -> None:
        self.ranks, self.device = ranks, device
        self.posts: list[list[Post]] = [[] for _ in range(ranks)]
        self.sent = [[0] * ranks for _ in range(ranks)]
        self.slots: list[list[tuple[Tensor, int]]] = [[] for _ in range(ranks)]

    def room(self, rank: int, asked: Room) -> Tensor | None:
        """None: not before the ranks have posted more."""
        slots = self.slots[rank]
        if len(slots) == SLOTS:
            old, last = slots[0]
            if min(len(posts) for posts in self.posts) <= last + 1:
                return None
            slots.pop(0)
            old.fill_(255)
        new = torch.full((asked.size,), 255, dtype=torch.uint8, device=self.device)
        if asked.size > asked.most:
            raise RuntimeError(f"loopback: rank {rank} asks for {asked.size} bytes, and says {asked.most} is the most")
        slots.append((new, len(self.posts[rank])))
        return new

    def post(self, rank: int, post: Post) -> int:
        number = len(self.posts[rank])
        self.posts[rank].append(post)
        self.slots[rank] = [(t, number if t is post.published else last) for t, last in self.slots[rank]]
        for other in range(self.ranks):
            if len(self.posts[other]) > number:
                self._carry(other, rank, number)
                if other != rank:
                    self._carry(rank, other, number)
        return number

    def arrived(self, rank: int, ticket: int) -> bool:
        return all(len(self.posts[take.source]) > ticket for take in self.posts[rank][ticket].takes)

    def _carry(self, source: int, to: int, number: int) -> None:
        given, taken = self.posts[source][number], self.posts[to][number]
        takes = [(t.start, t.start + as_bytes(t.into).numel(), t.into) for t in taken.takes if t.source == source]
        if source != to:
            offered = sorted((g.start, g.stop) for g in given.gives if g.to == to and g.stop > g.start)
            if offered != sorted(t[:2] for t in takes if t[1] > t[0]):
                raise RuntimeError(
                    f"loopback: post {number}: rank {source} gives {offered} to rank {to}, which takes "
                    f"{sorted(t[:2] for t in takes)}"
                )
            self.sent[source][to] += sum(stop - start for start, stop in offered)
        for start, stop, into in takes:
            as_bytes(into).copy_(given.published[start:stop])


def loopback(schedules: Sequence[Schedule[T]], device: torch.device) -> tuple[list[T], list[list[int]]]:
    """Runs all ranks' schedules in one process; returns their results, and the bytes each sent to each.

    RuntimeError: a rank takes what none gives or the other way round, waits for ever, or posts less often than others.
    """
    link = Loopback(len(schedules), device)
    results: dict[int, T] = {}
    answers: dict[int, Any] = dict.fromkeys(range(len(schedules)))
    held: dict[int, Room | Wait] = {}
    while len(results) < len(schedules):
        moved = False
        for rank, schedule in enumerate(schedules):
            while rank not in results:
                asked = held.get(rank)
                if isinstance(asked, Room):
                    answers[rank] = link.room(rank, asked)
                if (isinstance(asked, Room) and answers[rank] is None) or (
                    isinstance(asked, Wait) and not link.arrived(rank, asked.ticket)
                ):
                    break
                held.pop(rank, None)
                moved = True
                try:
                    said = schedule.send(answers[rank])
                except StopIteration as done:
                    results[rank] = done.value
                    break
                answers[rank] = None
                if isinstance(said, Post):
                    answers[rank] = link.post(rank, said)
                else:
                    held[rank] = said
        if not moved:
            raise RuntimeError(f"loopback: ranks {sorted(held)} wait for ever: {held}")
    if len({len(posts) for posts in link.posts}) > 1:
        raise RuntimeError(f"loopback: ranks posted {[len(posts) for posts in link.posts]} times; all must as often")
    return [results[rank] for rank in range(len(schedules))], link.sent


def aligned(size: int) -> int:
    """Bytes, rounded up to ALIGNMENT."""
    return size + -size % ALIGNMENT


def as_bytes(tensor: Tensor) -> Tensor:
    """A contiguous tensor as uint8 [bytes], sharing its memory."""
    assert tensor.is_contiguous(), "what is taken lands in contiguous memory"
    return tensor.view(-1).view(torch.uint8)


class Packing:
    """Tensors T … of one type side by side, token after token: one message carries a stretch of tokens of them all."""

    def __init__(self, *like: Tensor) -> None:
        self.shapes = [tensor.shape[1:] for tensor in like]
        self.widths = [shape.numel() for shape in self.shapes]
        self.dtype = like[0].dtype
        self.row = sum(self.widths) * like[0].element_size()
        """Bytes of a token."""

    def views(self, room: Tensor) -> list[Tensor]:
        """The tensors over bytes."""
        rows = room.numel() // self.row if self.row else 0  # tensors of no heads have no rows either
        parts = room.view(self.dtype).view(rows, sum(self.widths)).split(self.widths, 1)
        return [part.unflatten(1, shape) for part, shape in zip(parts, self.shapes, strict=True)]


class Sections:
    """Token-major tensors of several types one after the other in a publication, so that stretches of rows travel."""

    def __init__(self, *groups: Sequence[Tensor]) -> None:
        self.packings = [Packing(*group) for group in groups]

    def size(self, rows: int) -> int:
        return self.bounds(rows, (0, rows))[-1][1]

    def bounds(self, rows: int, stretch: tuple[int, int]) -> list[tuple[int, int]]:
        """Where a stretch of the rows lies in the bytes of `rows` rows, section by section."""
        out, at = [], 0
        for packing in self.packings:
            out.append((at + stretch[0] * packing.row, at + stretch[1] * packing.row))
            at = aligned(at + rows * packing.row)
        return out

    def parts(self, room: Tensor, rows: int) -> list[Tensor]:
        """The bytes of each section."""
        return [room[low:high] for low, high in self.bounds(rows, (0, rows))]

    def views(self, room: Tensor, rows: int) -> list[Tensor]:
        """The tensors over bytes, section after section."""
        parts = zip(self.packings, self.parts(room, rows), strict=True)
        return [tensor for packing, part in parts for tensor in packing.views(part)]
