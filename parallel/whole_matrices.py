"""Matrices that are cut over ranks come whole to one rank each, are computed there once, and go back to their parts."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from farspan.parallel.fsdp import local

Box = tuple[slice, slice, slice]
"""A part of a tensor of three axes: matrices, rows, columns. Of tensors of four the first two count matrices."""


class Stack(NamedTuple):
    """Matrices of one weight that one rank computes: all there is of two axes, some experts of three (E out in)."""

    name: str
    first: int
    size: int


@dataclass(frozen=True)
class Cut:
    """How a tensor lies on the ranks: the box that each holds, None for nothing, and in which copy of the whole."""

    boxes: tuple[Box | None, ...]
    copies: tuple[int, ...]


class WholeMatrices:
    """Deals the matrices of `weights` out to the ranks, and moves tensors that are cut like them there and back.

    The dealing is greedy by cost, the same on all ranks: the dearest first, each to the rank with the least to do and,
    among those, to the one that holds most of it already. Copies of a weight, of hybrid sharding or of tensor
    parallelism, share the work: each matrix is computed once, and all copies receive the same bits. A stack of experts
    is dealt in as many runs as there are ranks.

    What moves is cut into `rounds`, so that a rank holds about `limit` numbers of whole matrices at once. One exchange
    of a round is one all-to-all over all ranks, however its weights are cut; with one rank nothing moves.
    """

    def __init__(self, weights: Mapping[str, Tensor], cost: Callable[[int, int], int], limit: int = 1 << 26) -> None:
        """weights: DTensors of two to four axes (of four the second is never cut), sharded or replicated over all ranks
        in any order, in this order on every rank; cost: operations for one matrix of (rows, columns). ValueError: a
        weight is cut otherwise."""
        self.ranks = dist.get_world_size() if dist.is_initialized() else 1
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self._cuts: dict[tuple[object, ...], Cut] = {}
        self.owners: dict[Stack, int] = {}
        """Which rank computes each stack."""
        self.rounds: list[list[Stack]] = []
        """The stacks that move together."""
        self._deal(weights, cost, limit)

    def gather(self, stacks: Sequence[Stack], parts: Mapping[str, Tensor], dtype: torch.dtype) -> dict[Stack, Tensor]:
        """The whole matrices of those `stacks` that this rank owns, by stack: size rows columns, of `dtype`.

        parts: by name a tensor for each weight, of any matrix size, cut over the same ranks. All ranks call together.
        """
        if self.ranks == 1:
            return {s: _three(local(parts[s.name]))[s.first : s.first + s.size].to(dtype) for s in stacks}
        leaving, coming = self._lanes(), self._lanes()
        wholes = {}
        for stack in stacks:
            part, owner = parts[stack.name], self.owners[stack]
            copies, mine = self.cut(part).copies, _three(local(part))
            if owner == self.rank:
                wholes[stack] = torch.empty(stack.size, *part.shape[-2:], dtype=dtype, device=mine.device)
            for rank, in_whole, in_part in self._pieces(stack, part):
                if copies[rank] == copies[owner]:  # the owner's own copy of the weight has it all
                    if rank == self.rank:
                        leaving[owner].append(mine[in_part])
                    if owner == self.rank:
                        coming[rank].append(wholes[stack][in_whole])
        _exchange(leaving, coming, dtype, local(parts[stacks[0].name]).device)
        return wholes

    def scatter(
        self, stacks: Sequence[Stack], wholes: Mapping[Stack, Tensor], parts: Mapping[str, Tensor], dtype: torch.dtype
    ) -> None:
        """Writes whole matrices into the `parts` of all ranks that hold some of them; the reverse of `gather`.

        wholes: what this rank owns of `stacks`, of `dtype`; parts may be of another type.
        """
        if self.ranks == 1:
            for s in stacks:
                _three(local(parts[s.name]))[s.first : s.first + s.size] = wholes[s]
            return
        leaving, coming = self._lanes(), self._lanes()
        for stack in stacks:
            part, owner = parts[stack.name], self.owners[stack]
            mine = _three(local(part))
            for rank, in_whole, in_part in self._pieces(stack, part):
                if owner == self.rank:
                    leaving[rank].append(wholes[stack][in_whole])
                if rank == self.rank:
                    coming[owner].append(mine[in_part])
        _exchange(leaving, coming, dtype, local(parts[stacks[0].name]).device)

    def cut(self, tensor: Tensor) -> Cut:
        """How a tensor of two to four axes lies on the ranks. What is no DTensor is whole on each."""
        if not isinstance(tensor, DTensor):
            whole = _box([(0, size) for size in tensor.shape], tensor.shape)
            return Cut((whole,) * self.ranks, tuple(range(self.ranks)))
        key = (tensor.shape, tensor.device_mesh, tensor.placements)
        if key not in self._cuts:
            self._cuts[key] = _cut(tuple(tensor.shape), tensor.device_mesh, tensor.placements, self.ranks)
        return self._cuts[key]

    def _deal(self, weights: Mapping[str, Tensor], cost: Callable[[int, int], int], limit: int) -> None:
        stacks = [stack for name, weight in weights.items() for stack in _stacks(name, weight, self.ranks)]
        costs = {s: s.size * cost(*weights[s.name].shape[-2:]) for s in stacks}
        work, filled = [0] * self.ranks, [0] * self.ranks
        rounds: dict[int, list[Stack]] = {}
        for stack in sorted(stacks, key=lambda s: -costs[s]):
            boxes = [_within(box, stack) for box in self.cut(weights[stack.name]).boxes]
            held = [0 if box is None else prod(side.stop - side.start for side in box) for box in boxes]
            owner = min(range(self.ranks), key=lambda rank: (work[rank], -held[rank], rank))
            rounds.setdefault(filled[owner] // limit, []).append(stack)
            self.owners[stack] = owner
            work[owner] += costs[stack]
            filled[owner] += stack.size * prod(weights[stack.name].shape[-2:])
        self.rounds = [rounds[i] for i in sorted(rounds)]

    def _lanes(self) -> list[list[Tensor]]:
        return [[] for _ in range(self.ranks)]

    def _pieces(self, stack: Stack, part: Tensor) -> Iterator[tuple[int, Box, Box]]:
        """Where a stack's matrices lie, as far as this rank has to do with them: (rank, in the whole, in its part)."""
        boxes = self.cut(part).boxes
        for rank in range(self.ranks) if self.owners[stack] == self.rank else (self.rank,):
            held, box = boxes[rank], _within(boxes[rank], stack)
            if held is not None and box is not None:
                yield rank, _seen_from(box, (stack.first, 0, 0)), _seen_from(box, tuple(side.start for side in held))


def _exchange(
    leaving: list[list[Tensor]], coming: list[list[Tensor]], dtype: torch.dtype, device: torch.device
) -> None:
    """One all-to-all: `leaving` are each rank's pieces, in the order in which it has room for them in its `coming`."""
    pieces = [piece.reshape(-1) for of_rank in leaving for piece in of_rank]
    sent = torch.cat(pieces).to(dtype) if pieces else torch.empty(0, dtype=dtype, device=device)
    places = [place for of_rank in coming for place in of_rank]
    received = torch.empty(sum(place.numel() for place in places), dtype=dtype, device=device)
    to_come, to_leave = ([sum(piece.numel() for piece in of) for of in lanes] for lanes in (coming, leaving))
    dist.all_to_all_single(received, sent, to_come, to_leave)
    for place, piece in zip(places, received.split([place.numel() for place in places]), strict=True):
        place.copy_(piece.view_as(place))


def _stacks(name: str, weight: Tensor, ranks: int) -> list[Stack]:
    """A weight's matrices in at most one run for each rank."""
    if weight.dim() not in (2, 3, 4):
        raise ValueError(f"{name} of {tuple(weight.shape)}: holds no matrices; give weights of two to four axes only")
    count = prod(weight.shape[:-2])
    run = -(-count // ranks)
    return [Stack(name, first, min(run, count - first)) for first in range(0, count, run)]


def _cut(shape: tuple[int, ...], mesh: DeviceMesh, placements: Sequence[Placement], ranks: int) -> Cut:
    """Each axis of the mesh in turn cuts what the ones before left into equal parts, the last ones shorter or empty."""
    found: dict[int, tuple[Box | None, int]] = {}
    for place in product(*(range(size) for size in mesh.shape)):
        sides, copy = [(0, size) for size in shape], 0
        for at, of, placement in zip(place, mesh.shape, placements, strict=True):
            if isinstance(placement, Replicate):
                copy = copy * of + at
            elif type(placement) is Shard:
                start, stop = sides[placement.dim]
                step = -(-(stop - start) // of)
                sides[placement.dim] = (min(start + at * step, stop), min(start + (at + 1) * step, stop))
            else:
                raise ValueError(f"a weight lies as {placement} on its mesh; each axis must be Shard or Replicate")
        found[int(mesh.mesh[place])] = (_box(sides, shape), copy)
    if sorted(found) != list(range(ranks)):
        raise ValueError(f"a weight lies on ranks {sorted(found)}; its mesh must cover all {ranks}")
    return Cut(tuple(found[r][0] for r in range(ranks)), tuple(found[r][1] for r in range(ranks)))


def _box(sides: Sequence[tuple[int, int]], shape: Sequence[int]) -> Box | None:
    """(start, stop) of two to four axes as three; None where nothing is inside."""
    if any(start == stop for start, stop in sides):
        return None
    if len(sides) == 4:
        (start, stop), second, *sides = sides
        if second != (0, shape[1]):
            raise ValueError(f"a weight {tuple(shape)} is cut along its second axis; its first and its last two may be")
        sides = [(start * shape[1], stop * shape[1]), *sides]
    first, rows, columns = (slice(*side) for side in ([(0, 1)] * (3 - len(sides)) + list(sides)))
    return first, rows, columns


def _within(box: Box | None, stack: Stack) -> Box | None:
    """The part of a box that belongs to a stack's matrices."""
    if box is None:
        return None
    start, stop = max(box[0].start, stack.first), min(box[0].stop, stack.first + stack.size)
    return (slice(start, stop), *box[1:]) if start < stop else None


def _seen_from(box: Box, corner: tuple[int, ...]) -> Box:
    first, rows, columns = (slice(side.start - c, side.stop - c) for side, c in zip(box, corner, strict=True))
    return first, rows, columns


def _three(part: Tensor) -> Tensor:
    return part.flatten(0, 1) if part.dim() == 4 else part if part.dim() == 3 else part.unsqueeze(0)
