"""Every matrix comes whole to one rank, is dealt by its cost, and its result is back, bit for bit, wherever it lies."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from farspan.parallel.fsdp import full, local
from farspan.parallel.mesh import Mesh, Parallel
from farspan.parallel.whole_matrices import WholeMatrices

SHAPES = {"odd": (7, 5), "flat": (3, 16), "row": (6, 12), "tall": (20, 4), "tiny": (1, 2), "experts": (6, 8, 4)}
"""Some ranks hold nothing of `flat` and `tiny`."""
TP_DIMS = {"odd": None, "flat": 1, "row": 1, "tall": 0, "tiny": None, "experts": 1}


def placed(whole: Tensor, mesh: DeviceMesh, placements: tuple[Placement, ...]) -> DTensor:
    shape, offset = compute_local_shape_and_global_offset(whole.shape, mesh, placements)
    part = whole[tuple(slice(o, o + s) for o, s in zip(offset, shape, strict=True))] if all(shape) else None
    mine = torch.empty(shape) if part is None else part.clone()
    return DTensor.from_local(
        mine, mesh, placements, run_check=False, shape=whole.shape, stride=whole.contiguous().stride()
    )


def layouts(world: int) -> list[dict[str, tuple[DeviceMesh, tuple[Placement, ...]]]]:
    """Sharded, hybrid, tp with copies, with and without sharding, and experts cut along two of their axes."""
    control = dist.new_group(backend="gloo")
    sizes = [{"shard": world}, {"shard": world // 2}, {"tp": 2, "shard": 1}, {"tp": 2}, {"tp": world}]
    found = []
    for axes in sizes:
        mesh = Mesh(Parallel(**axes).sizes(world), torch.device("cpu"), control)
        of: dict[str, tuple[DeviceMesh, tuple[Placement, ...]]] = {}
        for name, dim in TP_DIMS.items():
            if mesh.sizes.tp == 1:
                of[name] = (mesh.weights, (Replicate(), Shard(0))[-mesh.weights.ndim :])
            else:
                copies = mesh.sizes.tp if dim is None else 2 if name == "tall" and mesh.sizes.tp == 4 else 1
                cut = (Replicate(), Replicate(), Shard(dim or 0), Replicate(), Shard(0))
                of[name] = (mesh.pieces(copies), cut)
        found.append(of)
    two = DeviceMesh("cpu", torch.arange(world).view(2, -1), mesh_dim_names=("ep", "edp"))
    for cut in ((Shard(0), Shard(1)), (Shard(1), Shard(0)), (Replicate(), Shard(2))):
        found.append({**found[0], "experts": (two, cut)})
    return found


def probe() -> dict[str, Any]:
    made = torch.Generator().manual_seed(3)
    wholes = {name: torch.randn(shape, generator=made) for name, shape in SHAPES.items()}
    results = []
    for layout in layouts(dist.get_world_size()):
        parts = {name: placed(whole, *layout[name]) for name, whole in wholes.items()}
        into = {name: placed(torch.full_like(whole, torch.nan), *layout[name]) for name, whole in wholes.items()}
        matrices = WholeMatrices(parts, lambda rows, columns: rows * columns, limit=40)
        result: dict[str, Any] = {"gathered": [], "rounds": len(matrices.rounds)}
        for stacks in matrices.rounds:
            found = matrices.gather(stacks, parts, torch.float32)
            for stack, whole in found.items():
                result["gathered"].append(list(stack))
                wanted = wholes[stack.name].view(-1, *SHAPES[stack.name][-2:])
                assert torch.equal(whole, wanted[stack.first : stack.first + stack.size]), stack
            matrices.scatter(stacks, {s: whole.exp() for s, whole in found.items()}, into, torch.float32)
        for name, whole in wholes.items():
            assert torch.equal(full(into[name]), whole.exp()), name
            box = matrices.cut(parts[name]).boxes[dist.get_rank()]
            assert (box is None) == (local(parts[name]).numel() == 0)
        halves = {s: w.to(torch.bfloat16) for s, w in matrices.gather(matrices.rounds[0], parts, torch.float32).items()}
        assert all(
            torch.equal(whole, halves[s])
            for s, whole in matrices.gather(matrices.rounds[0], parts, torch.bfloat16).items()
        )
        results.append(result)
    return {"moved": results, "dealt": dealt()}


@pytest.mark.parametrize("world", [pytest.param(2, marks=pytest.mark.laws), 4])
def test_whole_on_one_rank_dealt_evenly_and_back_on_all(ranks: Any, world: int) -> None:
    of_ranks = ranks(world, probe)
    for found in zip(*(told["moved"] for told in of_ranks), strict=True):
        gathered = [tuple(stack) for result in found for stack in result["gathered"]]
        assert len(gathered) == len(set(gathered)), "a matrix was computed twice"
        experts = [i for name, first, size in gathered if name == "experts" for i in range(first, first + size)]
        assert sorted(experts) == list(range(6))
        assert {name for name, _, _ in gathered} == set(SHAPES)
        assert all(result["gathered"] for result in found), "a rank has nothing to do"
        assert found[0]["rounds"] > 1
    told = of_ranks[0]["dealt"]
    assert all(other["dealt"] == told for other in of_ranks), "ranks differ about who owns what"
    assert max(told["work"]) < 1.05 * min(told["work"])
    assert told["experts"] == [(2 * rank, 2, rank) for rank in range(world)], "experts went elsewhere without need"


def dealt() -> dict[str, Any]:
    """Who owns 60 matrices of random sizes, and a stack of experts of which each rank holds some."""
    made = torch.Generator().manual_seed(5)
    sizes = torch.randint(8, 64, (60, 2), generator=made).tolist()
    weights = {str(i): torch.empty(*size) for i, size in enumerate(sizes)}
    owners = WholeMatrices(weights, lambda rows, columns: rows * columns * min(rows, columns)).owners
    world = dist.get_world_size()
    experts = {"experts": placed(torch.zeros(2 * world, 3, 3), DeviceMesh("cpu", torch.arange(world)), (Shard(0),))}
    work = [0] * world
    for stack, owner in owners.items():
        work[owner] += weights[stack.name].numel() * min(weights[stack.name].shape)
    of_experts = WholeMatrices(experts, lambda rows, columns: rows * columns).owners
    return {
        "work": work,
        "owners": [(s.name, owner) for s, owner in owners.items()],
        "experts": [(s.first, s.size, owner) for s, owner in of_experts.items()],
    }


def test_one_rank_copies_nothing() -> None:
    weights = {"w": torch.randn(5, 3), "e": torch.randn(4, 2, 3)}
    matrices = WholeMatrices(weights, lambda rows, columns: rows * columns)
    (stacks,) = matrices.rounds
    found = matrices.gather(stacks, weights, torch.float32)
    assert {s.name: s.size for s in stacks} == {"w": 1, "e": 4}
    assert all(found[s].data_ptr() == weights[s.name].data_ptr() for s in stacks)
    matrices.scatter(stacks, {s: torch.ones_like(whole) for s, whole in found.items()}, weights, torch.float32)
    assert all(bool((weight == 1).all()) for weight in weights.values())


def test_what_holds_no_matrices_is_refused() -> None:
    with pytest.raises(ValueError, match=r"norm of \(5,\): holds no matrices"):
        WholeMatrices({"norm": torch.ones(5)}, lambda rows, columns: rows)
