"""GaLore and Natural GaLore are what their equations say, and N ranks are one rank."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from farspan.models.roles import Role
from farspan.parallel.fsdp import full
from farspan.parallel.mesh import Mesh, Parallel
from farspan.platform import checkpoint
from farspan.platform.optim import Adamw
from farspan.platform.optim.galore import Galore, LowRankState, NaturalGalore

SHAPES = {"tall": (9, 5), "wide": (6, 12), "square": (5, 5), "experts": (3, 8, 6), "gated": (3, 2, 6, 7)}
SHAPES |= {"thin": (3, 7), "norm": (5,)}
ROLES = {name: Role("norm" if name == "norm" else "matrix") for name in SHAPES}
RANK, EVERY, HISTORY = 3, 3, 3
PROJECTED = ("tall", "wide", "square", "experts", "gated")
"""`thin` has no more than RANK rows, and goes with the rest."""
TP_DIMS = {"wide": 1, "experts": 1, "gated": 2}
CUTS = {
    2: [{"shard": 2}, {"shard": 1}, {"tp": 2}, {"experts": 2}],
    4: [{"shard": 4}, {"shard": 2}, {"tp": 2}, {"tp": 2, "shard": 1}, {"experts": 2}],
}
SKIPPED, STEPS = 3, 8
"""The skipped update is one at which the directions would have been chosen; the next is at 6."""


def numbers(seed: int) -> dict[str, Tensor]:
    """Weights, or the gradients of a step."""
    made = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=made, dtype=torch.float64) for name, shape in SHAPES.items()}


def placed(whole: Tensor, mesh: DeviceMesh, placements: tuple[Placement, ...]) -> DTensor:
    shape, offset = compute_local_shape_and_global_offset(whole.shape, mesh, placements)
    part = whole[tuple(slice(o, o + s) for o, s in zip(offset, shape, strict=True))] if all(shape) else None
    mine = torch.empty(shape, dtype=whole.dtype) if part is None else part.clone()
    return DTensor.from_local(mine, mesh, placements, run_check=False, shape=whole.shape, stride=whole.stride())


def layout(axes: dict[str, int], control: dist.ProcessGroup) -> dict[str, tuple[DeviceMesh, tuple[Placement, ...]]]:
    """As the engine lays weights; `experts`: those are cut over that many ranks, and their rows over the others."""
    world, device = dist.get_world_size(), torch.device("cpu")
    mesh = Mesh(Parallel(**{k: v for k, v in axes.items() if k != "experts"}).sizes(world), device, control)
    if mesh.sizes.tp == 1:
        found = dict.fromkeys(SHAPES, (mesh.weights, (Replicate(), Shard(0))[-mesh.weights.ndim :]))
        if "experts" in axes:
            two = DeviceMesh("cpu", torch.arange(world).view(axes["experts"], -1), mesh_dim_names=("ep", "edp"))
            found |= {"experts": (two, (Shard(0), Shard(1))), "gated": (two, (Shard(0), Shard(2)))}
        return found
    return {
        name: (
            mesh.pieces(1 if name in TP_DIMS else mesh.sizes.tp),
            (Replicate(), Replicate(), Shard(TP_DIMS.get(name, 0)), Replicate(), Shard(0)),
        )
        for name in SHAPES
    }


def config(natural: bool, **fields: Any) -> Galore | NaturalGalore:
    common = {"rate": 0.02, "rest": Adamw(rate=0.01), "rank": RANK, "every": EVERY, "weight_decay": 0.1, **fields}
    return NaturalGalore(history=HISTORY, damping=0.5, **common) if natural else Galore(**common)


def train(optimizer: LowRankState, weights: dict[str, Tensor], steps: range, place: Any) -> None:
    """Update SKIPPED has gradients that are not finite."""
    for step in steps:
        for name, gradient in numbers(step).items():
            weights[name].grad = place(name, gradient if step != SKIPPED else torch.full_like(gradient, torch.inf))
        scale = torch.tensor(0.0 if step == SKIPPED else 0.5, dtype=torch.float64)
        optimizer.update(0.02 * (1 + step), scale)


def alone(natural: bool, steps: int) -> tuple[dict[str, Tensor], LowRankState]:
    weights = {name: torch.nn.Parameter(whole) for name, whole in numbers(99).items()}
    optimizer = config(natural).build(weights, ROLES, 0)
    train(optimizer, weights, range(steps), lambda _, whole: whole)  # type: ignore[arg-type]
    return {name: weight.detach() for name, weight in weights.items()}, optimizer


def reference(natural: bool, weight: Tensor, gradients: list[Tensor]) -> Tensor:
    """One matrix by the papers' equations, one line each; the update SKIPPED is passed over."""
    rows, columns = weight.shape
    first = second = torch.zeros(())
    past: list[Tensor] = []
    taken = 0
    for step, gradient in enumerate(gradients):
        if step == SKIPPED:
            continue
        taken += 1
        g = gradient * 0.5
        if step % EVERY == 0:
            u, _, vh = torch.linalg.svd(g)
            p = vh[:RANK].T if rows >= columns else u[:, :RANK]
            p = p * torch.stack([column[column.abs().argmax()].sign() for column in p.T])
        r = g @ p if rows >= columns else p.T @ g
        if natural:
            past = [*past, r.flatten()][-HISTORY:]
            h = torch.stack(past, dim=1)
            z = torch.linalg.solve(torch.eye(len(past)) + h.T @ h / 0.5, h.T @ r.flatten())
            r = (r.flatten() / 0.5 - h @ z / 0.5**2).view_as(r)
        first, second = 0.9 * first + 0.1 * r, 0.999 * second + 0.001 * r**2
        n = first / (1 - 0.9**taken) / ((second / (1 - 0.999**taken)).sqrt() + 1e-6)
        rate = 0.02 * (1 + step)
        weight = weight - rate * 0.25 * (n @ p.T if rows >= columns else p @ n)
        weight = weight - rate * 0.1 * weight
    return weight


@pytest.mark.parametrize("natural", [False, True])
def test_one_rank_is_the_papers_equations(natural: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    found, _ = alone(natural, STEPS)
    monkeypatch.setattr(torch, "eye", lambda n: torch.ones(n, dtype=torch.float64).diag())
    start, steps = numbers(99), [numbers(step) for step in range(STEPS)]
    for name in PROJECTED:
        matrices = start[name].view(-1, *SHAPES[name][-2:])
        for i, matrix in enumerate(matrices):
            wanted = reference(natural, matrix, [step[name].view_as(matrices)[i] for step in steps])
            torch.testing.assert_close(found[name].view_as(matrices)[i], wanted, rtol=1e-8, atol=1e-9)


class Run:
    """Weights on a cut, and what moves them."""

    def __init__(self, natural: bool, axes: dict[str, int], control: dist.ProcessGroup) -> None:
        self.where = layout(axes, control)
        self.weights: dict[str, Tensor] = {
            name: torch.nn.Parameter(placed(whole, *self.where[name])) for name, whole in numbers(99).items()
        }
        self.optimizer = config(natural).build(self.weights, ROLES, 0)

    def train(self, steps: range) -> None:
        train(self.optimizer, self.weights, steps, lambda name, whole: placed(whole, *self.where[name]))

    def state(self) -> dict[str, Tensor]:
        return {f"model.{n}": w.detach() for n, w in self.weights.items()} | self.optimizer.state()

    def whole(self) -> dict[str, Tensor]:
        return {name: full(tensor).clone() for name, tensor in self.state().items()}


def probe(root: str) -> dict[str, list[dict[str, Tensor]]]:
    """What all updates end in: of both kinds on every cut, and of the natural one saved on one cut for another."""
    control = dist.new_group(backend="gloo")
    found: dict[str, list[dict[str, Tensor]]] = {"False": [], "True": []}
    cuts = CUTS[dist.get_world_size()]
    for axes in cuts:
        for natural in (False, True):
            run = Run(natural, axes, control)
            run.train(range(STEPS))
            found[str(natural)].append(run.whole())
    stopped, resumed = Run(True, cuts[2], control), Run(True, cuts[0], control)
    stopped.train(range(5))
    assert checkpoint.Saver(Path(root), 2, control, print).save(5, stopped.state(), {"format": 1})
    checkpoint.load(Path(root), 5, resumed.state(), control)
    resumed.train(range(5, STEPS))
    found["True"].append(resumed.whole())
    return found


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.laws)])
def test_ranks_equal_one_rank_and_state_is_cut_anew(ranks: Any, tmp_path: Path, world: int) -> None:
    """Sharded, hybrid, tp with copies, experts cut twice; saved under tp between two decompositions, and sharded."""
    of_ranks = ranks(world, probe, root=str(tmp_path))
    for natural in (False, True):
        weights, optimizer = alone(natural, STEPS)
        wanted = {f"model.{n}": w for n, w in weights.items()} | optimizer.state()
        for found in of_ranks[0][str(natural)]:
            assert found.keys() == wanted.keys()
            for name, tensor in wanted.items():
                torch.testing.assert_close(found[name], tensor, rtol=1e-7, atol=1e-8)
        for other in of_ranks[1:]:
            for found, same in zip(other[str(natural)], of_ranks[0][str(natural)], strict=True):
                assert all(torch.equal(found[name], tensor) for name, tensor in same.items())


@pytest.mark.parametrize("natural", [False, True])
@pytest.mark.parametrize("before", [0, 3])
def test_a_skipped_update_leaves_every_bit(natural: bool, before: int) -> None:
    """At the first update and at a later one, both of which would choose the directions."""
    weights = {name: torch.nn.Parameter(whole) for name, whole in numbers(99).items()}
    optimizer = config(natural).build(weights, ROLES, 0)
    train(optimizer, weights, range(before), lambda _, whole: whole)  # type: ignore[arg-type]
    held = {n: w.detach().clone() for n, w in weights.items()}
    state = {name: tensor.clone() for name, tensor in optimizer.state().items()}
    for weight in weights.values():
        weight.grad = torch.full_like(weight, torch.nan)
    optimizer.update(0.1, torch.tensor(0.0))
    assert all(torch.equal(weight, held[name]) for name, weight in weights.items())
    after = optimizer.state()
    assert after.pop("updates") == state.pop("updates") + 1
    assert all(torch.equal(tensor, state[name]) for name, tensor in after.items())
    assert all(bool(state[f"basis.{name}"].any()) for name in PROJECTED)


def test_training_goes_on_in_random_directions_when_the_first_update_is_skipped() -> None:
    """Until the next decomposition: a basis of zeros would leave the matrices where they are."""
    weights = {"w": torch.nn.Parameter(torch.randn(24, 16, generator=torch.Generator().manual_seed(0)))}
    optimizer = config(False, every=1000, weight_decay=0.0).build(weights, {"w": Role("matrix")}, 0)
    weights["w"].grad = torch.full((24, 16), torch.nan)
    optimizer.update(0.1, torch.tensor(0.0))
    before = float(weights["w"].detach().square().sum())
    for _ in range(20):
        weights["w"].grad = weights["w"].detach().clone()
        optimizer.update(0.1, torch.tensor(1.0))
    assert float(weights["w"].detach().square().sum()) < 0.95 * before


@pytest.mark.parametrize("natural", [False, True])
def test_state_bytes_are_what_the_state_holds(natural: bool) -> None:
    weights: dict[str, Tensor] = {name: torch.nn.Parameter(torch.zeros(shape)) for name, shape in SHAPES.items()}
    chosen = config(natural)
    state = chosen.build(weights, ROLES, 0).state()
    held = sum(t.nbytes for name, t in state.items() if not name.endswith(("step", "updates")))
    assert held == sum(chosen.state_bytes(shape, ROLES[name]) for name, shape in SHAPES.items())


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"rate": 0.0}, "rate=0.0"),
        ({"rank": 0}, "rank=0: must be at least 1"),
        ({"every": 0}, "every=0: must be at least 1"),
        ({"betas": (0.9,)}, "betas="),
        ({"scale": 0.0}, "scale=0.0: must be positive"),
        ({"history": 0}, "history=0"),
        ({"damping": 0.0}, "damping=0.0"),
    ],
)
def test_mistakes_are_named(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        NaturalGalore(**{"rate": 0.1, "rest": Adamw(rate=0.1), **fields})


def test_a_rank_that_projects_nothing_is_refused() -> None:
    weights: dict[str, Tensor] = {"square": torch.nn.Parameter(torch.zeros(5, 5))}
    with pytest.raises(ValueError, match=r"optim\.rank=8: every matrix has a side no longer"):
        NaturalGalore(rate=0.1, rank=8, rest=Adamw(rate=0.1)).build(weights, ROLES, 0)
