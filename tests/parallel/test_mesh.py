"""Every cut of the ranks is a partition, and impossible cuts are refused with a way out."""

from itertools import product
from typing import Any

import pytest
import torch
import torch.distributed as dist

from farspan.parallel.mesh import DENSE, EXPERT, Mesh, Parallel, Sizes


def cuts(world: int) -> list[Sizes]:
    """Every way to cut `world` ranks that both views allow."""
    divisors = [d for d in range(1, world + 1) if world % d == 0]
    found = []
    for pp, cp, tp, ep, etp, shard in product(divisors, repeat=6):
        inner = world // pp
        if world % pp or inner % (cp * tp) or inner % (ep * etp):
            continue
        dp = inner // (cp * tp)
        if (dp * cp) % shard == 0 and (shard * tp) % (ep * etp) == 0:
            found.append(Sizes(pp=pp, dp=dp, cp=cp, tp=tp, ep=ep, etp=etp, shard=shard))
    return found


@pytest.mark.parametrize("world", [1, 2, 6, 8])
def test_all_views_cover_the_same_ranks(world: int) -> None:
    for sizes in cuts(world):
        for axes in (DENSE, EXPERT):
            view = torch.arange(world).view(sizes.view(axes))
            assert sorted(view.flatten().tolist()) == list(range(world))
        dense = torch.arange(world).view(sizes.view(DENSE))
        expert = torch.arange(world).view(sizes.view(EXPERT))
        assert torch.equal(dense.flatten(1), expert.flatten(1)), (
            "pipeline stages must hold the same ranks in both views"
        )
        experts, whole = sizes.experts(), sizes.pieces(1)
        assert sorted(experts.flatten().tolist()) == list(range(world))
        for copy in range(sizes.replicate):
            one, other = (set(view[:, copy].flatten().tolist()) for view in (experts, whole))
            assert one == other, "a copy of the experts lies where a copy of all else does"
        for copies in (n for n in range(1, sizes.tp + 1) if sizes.tp % n == 0):
            pieces = sizes.pieces(copies).permute(0, 1, 4, 2, 3)  # shard, then what it shares a node with
            assert torch.equal(dense.flatten(1, 2), pieces.flatten(1, 2).flatten(2)), "dp·cp and tp split, nothing else"


@pytest.mark.parametrize(
    ("parallel", "world", "message"),
    [
        (Parallel(dp=3), 4, r"dp=3.*must be the 4 ranks of launch; try dp=4, or launch.ranks=3 in all"),
        (Parallel(dp=1, tp=2), 1, r"must be the 1 ranks of launch; launch.ranks=2 in all$"),
        (Parallel(shard=3), 4, r"parallel.shard=3: must divide dp·cp=4; try [24]"),
        (Parallel(dp=0), 4, r"parallel.dp=0: must be at least 1"),
        (Parallel(cp=4, tp=2), 4, r"cp=4 · tp=2 must be the 4 ranks of launch; launch.ranks=8 in all"),
        (Parallel(pp=2), 4, r"parallel.pp=2: this version trains with pp=1 only; give the ranks to dp, cp or tp"),
        (Parallel(pp=2, dp=0), 4, r"parallel.dp=0.*\n.*parallel.pp=2"),
        (Parallel(ep=2, etp=3), 4, r"ep=2 · etp=3 must divide the 4 ranks that hold one copy .*; try ep=2, etp=1"),
        (Parallel(shard=2, ep=4), 4, r"ep=4 · etp=1 must divide the 2 ranks"),
    ],
)
def test_impossible_cuts_are_refused(parallel: Parallel, world: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parallel.sizes(world)


def test_auto_takes_what_is_left() -> None:
    assert Parallel().sizes(4) == Sizes(pp=1, dp=4, cp=1, tp=1, ep=1, etp=1, shard=4)
    assert Parallel(dp=4, shard=2).sizes(4).replicate == 2
    assert Parallel(cp=2).sizes(4) == Sizes(pp=1, dp=2, cp=2, tp=1, ep=1, etp=1, shard=4)


def groups_of() -> dict[str, list[int]]:
    sizes = Sizes(pp=1, dp=2, cp=1, tp=2, ep=2, etp=1, shard=2)
    mesh = Mesh(sizes, torch.device("cpu"), dist.new_group(backend="gloo"))
    named = {**dict.fromkeys(DENSE, mesh.dense), **dict.fromkeys(("edp", "ep"), mesh.expert)}
    found = {axis: dist.get_process_group_ranks(view.get_group(axis)) for axis, view in named.items()}
    one = torch.ones(1) * mesh.rank
    dist.all_reduce(one, group=mesh.dense.get_group("tp"))
    cut = Mesh(Sizes(pp=1, dp=1, cp=2, tp=2, ep=1, etp=1, shard=2), torch.device("cpu"), mesh.control)
    found["cp"] = dist.get_process_group_ranks(cut.context.handle)
    return {**found, "sum": [int(one)], "index": [mesh.index("dp"), mesh.index("tp")]}


def test_groups_on_four_ranks(ranks: Any) -> None:
    found = ranks(4, groups_of)
    assert [f["tp"] for f in found] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert [f["dp"] for f in found] == [[0, 2], [1, 3], [0, 2], [1, 3]]
    assert [f["cp"] for f in found] == [[0, 2], [1, 3], [0, 2], [1, 3]], "next to each other but for tp"
    assert [f["ep"] for f in found] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert [f["edp"] for f in found] == [[0, 2], [1, 3], [0, 2], [1, 3]]
    assert [f["sum"] for f in found] == [[1], [1], [5], [5]]
    assert [f["index"] for f in found] == [[0, 0], [0, 1], [1, 0], [1, 1]]
