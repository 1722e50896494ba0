"""Muon is torch's Muon on one rank, N ranks are one rank, and int8 momentum stays near fp32's."""

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
from farspan.platform.optim import Adamw, Adamw8
from farspan.platform.optim.muon import Muon, MuonState, orthogonal

SHAPES = {"odd": (7, 5), "row": (6, 256), "wide": (4, 48), "experts": (3, 8, 16), "embed": (9, 5), "norm": (5,)}
"""`row`, `wide` and `experts` have blocks of codes, of 32, 16 and 16; `odd` is too narrow for any."""
ROLES = {
    "odd": Role("matrix"),
    "row": Role("matrix", cut_inputs=True),
    "wide": Role("matrix"),
    "experts": Role("matrix"),
    "embed": Role("embedding"),
    "norm": Role("norm"),
}
TP_DIMS = {"row": 1, "wide": 0, "experts": 1}
CUTS = {
    2: [{"shard": 2}, {"shard": 1}, {"tp": 2}],
    4: [{"shard": 4}, {"shard": 2}, {"tp": 2}, {"tp": 2, "shard": 1}, {"tp": 4}, {"experts": 2}],
}
SKIPPED = 2


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
            found["experts"] = (two, (Shard(0), Shard(1)))
        return found
    return {
        name: (
            mesh.pieces(1 if name in TP_DIMS else mesh.sizes.tp),
            (Replicate(), Replicate(), Shard(TP_DIMS.get(name, 0)), Replicate(), Shard(0)),
        )
        for name in SHAPES
    }


def config(**fields: Any) -> Muon:
    return Muon(rate=0.05, rest=Adamw(rate=0.01), **fields)


def train(optimizer: MuonState, weights: dict[str, Tensor], steps: range, place: Any) -> None:
    """Step SKIPPED has gradients that are not finite."""
    for step in steps:
        for name, gradient in numbers(step).items():
            weights[name].grad = place(name, gradient if step != SKIPPED else torch.full_like(gradient, torch.nan))
        scale = torch.tensor(0.0 if step == SKIPPED else 0.5, dtype=torch.float64)
        optimizer.update(0.05 * (1 + step), scale)


def alone(steps: int, **fields: Any) -> tuple[dict[str, Tensor], MuonState]:
    weights = {name: torch.nn.Parameter(whole) for name, whole in numbers(99).items()}
    optimizer = config(**fields).build(weights, ROLES, 0)
    train(optimizer, weights, range(steps), lambda _, whole: whole)  # type: ignore[arg-type]
    return {name: weight.detach() for name, weight in weights.items()}, optimizer


def probe(root: str, goes_on: bool) -> list[dict[str, Tensor]]:
    """On each cut five steps under int8, and on the first again after a checkpoint that another world may have left."""
    control = dist.new_group(backend="gloo")
    results = []
    for axes in [*CUTS[dist.get_world_size()], None]:
        where = layout(axes if axes is not None else CUTS[dist.get_world_size()][2], control)
        weights: dict[str, Tensor] = {
            name: torch.nn.Parameter(placed(whole, *where[name])) for name, whole in numbers(99).items()
        }
        optimizer = config(momentum="int8").build(weights, ROLES, 0)

        def state(weights: Any = weights, optimizer: Any = optimizer) -> dict[str, Tensor]:
            return {f"model.{n}": w.detach() for n, w in weights.items()} | optimizer.state()

        first, last = 0, 5
        if axes is None and goes_on:
            checkpoint.load(Path(root), 3, state(), control)
            first = 3
        elif axes is None:
            last = 3
        train(optimizer, weights, range(first, last), lambda name, whole, where=where: placed(whole, *where[name]))
        if axes is None and not goes_on:
            assert checkpoint.Saver(Path(root), 2, control, print).save(3, state(), {"format": 1})
        results.append({name: full(tensor).clone() for name, tensor in state().items()})
    return results


def same(found: dict[str, Tensor], wanted: dict[str, Tensor], optimizer: MuonState) -> None:
    for name, whole in wanted.items():
        torch.testing.assert_close(
            found[f"model.{name}"], whole, rtol=1e-9, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}"
        )
    for name, tensor in optimizer.state().items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-9)


def test_ranks_equal_one_rank_and_state_is_cut_anew(ranks: Any, tmp_path: Path) -> None:
    """Sharded, hybrid, tp with copies, experts cut twice; four ranks of tp save, and two go on."""
    wanted, optimizer = alone(5, momentum="int8")
    kinds = {name: tensor.dtype for name, tensor in optimizer.state().items()}
    assert kinds["momentum.row"] == torch.int8 and kinds["momentum_scale.row"] == torch.float32
    assert kinds["momentum.odd"] == torch.float64 and "momentum_scale.odd" not in kinds
    four = ranks(4, probe, root=str(tmp_path), goes_on=False)
    two = ranks(2, probe, root=str(tmp_path), goes_on=True)
    for of_rank in [found[:-1] for found in four] + two:
        for found in of_rank:
            same(found, wanted, optimizer)
    for cut in range(len(four[0])):
        for other in four[1:]:
            assert all(torch.equal(other[cut][name], tensor) for name, tensor in four[0][cut].items())


@pytest.mark.parametrize("scaling", ["match_rms_adamw", "original"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_is_torchs_muon(monkeypatch: pytest.MonkeyPatch, scaling: str, nesterov: bool) -> None:
    """Beyond the iteration itself, which torch makes in bf16 everywhere, and ours in bf16 on a GPU only."""
    import torch.optim._muon as theirs

    monkeypatch.setattr(theirs, "_zeropower_via_newtonschulz", lambda g, *_: orthogonal(g[None])[0])
    torch.manual_seed(0)
    weights = {"tall": torch.nn.Parameter(torch.randn(17, 5)), "wide": torch.nn.Parameter(torch.randn(6, 11))}
    others = [torch.nn.Parameter(w.detach().clone()) for w in weights.values()]
    muon = Muon(rate=0.02, rest=Adamw(rate=1.0), beta=0.9, nesterov=nesterov, scaling=scaling, weight_decay=0.3)  # type: ignore[arg-type]
    optimizer = muon.build(weights, dict.fromkeys(weights, Role("matrix")), 0)
    reference = torch.optim.Muon(
        others, lr=0.02, weight_decay=0.3, momentum=0.9, nesterov=nesterov, adjust_lr_fn=scaling
    )
    for _ in range(5):
        for mine, other in zip(weights.values(), others, strict=True):
            mine.grad = torch.randn_like(mine)
            other.grad = mine.grad * 0.25
        optimizer.update(0.02, torch.tensor(0.25))
        reference.step()
    for mine, other in zip(weights.values(), others, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(17, 5), (5, 17), (8, 8), (1, 3)])
def test_directions_are_torchs_and_nearly_orthogonal(shape: tuple[int, int]) -> None:
    from torch.optim._muon import _zeropower_via_newtonschulz

    torch.manual_seed(1)
    x = torch.randn(3, *shape)
    ours = orthogonal(x)
    for matrix, direction in zip(x, ours, strict=True):
        theirs = _zeropower_via_newtonschulz(matrix, (3.4445, -4.7750, 2.0315), 5, 1e-7)
        torch.testing.assert_close(direction, theirs.float(), rtol=0.05, atol=0.02)
        torch.testing.assert_close(orthogonal(matrix[None].bfloat16())[0], theirs, rtol=0.03, atol=0.01)
    values = torch.linalg.svdvals(ours)
    assert values.min() > 0.6 and values.max() < 1.3
    assert torch.equal(orthogonal(torch.zeros(2, *shape)), torch.zeros(2, *shape))


def test_the_rest_is_its_own_optimizer_at_its_own_rate() -> None:
    """embed and norm move as under Adamw alone; rates keep their ratio under the schedule."""
    found, _ = alone(2)
    weights = {name: torch.nn.Parameter(numbers(99)[name]) for name in ("embed", "norm")}
    optimizer = Adamw(rate=0.01).build(weights, ROLES, 0)
    for step in range(2):
        for name, weight in weights.items():
            weight.grad = numbers(step)[name]
        optimizer.update(0.01 * (1 + step), torch.tensor(0.5))
    for name, weight in weights.items():
        torch.testing.assert_close(found[name], weight.detach())


@pytest.mark.parametrize("momentum", ["fp32", "int8"])
def test_a_skipped_step_leaves_every_bit(momentum: str) -> None:
    weights = {name: torch.nn.Parameter(whole) for name, whole in numbers(99).items()}
    optimizer = config(momentum=momentum).build(weights, ROLES, 0)
    train(optimizer, weights, range(2), lambda _, whole: whole)  # type: ignore[arg-type]
    before = {**{n: w.detach().clone() for n, w in weights.items()}}
    state = {name: tensor.clone() for name, tensor in optimizer.state().items()}
    train(optimizer, weights, range(SKIPPED, SKIPPED + 1), lambda _, whole: whole)  # type: ignore[arg-type]
    assert all(torch.equal(weight, before[name]) for name, weight in weights.items())
    assert all(torch.equal(tensor, state[name]) for name, tensor in optimizer.state().items())
    assert any(bool(tensor.any()) for tensor in state.values())


def test_int8_momentum_is_within_half_a_code_and_trains_as_well() -> None:
    """Least squares with noise on 24 x 32: the losses at the end differ by less than 2 %."""
    ends = {}
    for momentum in ("fp32", "int8"):
        torch.manual_seed(2)
        target, weight = torch.randn(24, 32), torch.nn.Parameter(torch.zeros(24, 32))
        muon = config(momentum=momentum, weight_decay=0.0)
        optimizer = muon.build({"w": weight}, {"w": Role("matrix")}, 0)
        for step in range(80):
            weight.grad = weight.detach() - target + torch.randn(24, 32)
            exact = optimizer.momentum["w"].read().lerp(weight.grad, 0.05)
            optimizer.update(0.3 * (1 - step / 80), torch.tensor(1.0))
            off = (optimizer.momentum["w"].read() - exact).abs()
            assert bool((off <= exact.abs().amax(-1, keepdim=True) / 253).all())
        ends[momentum] = float((weight.detach() - target).square().mean())
    assert ends["fp32"] < 0.1
    assert abs(ends["int8"] - ends["fp32"]) < 0.02 * ends["fp32"]


def test_an_8_bit_rest_trains_fp32_weights() -> None:
    weights = {name: torch.nn.Parameter(whole.float()) for name, whole in numbers(99).items()}
    muon = Muon(rate=0.05, rest=Adamw8(rate=0.01, master="fp32"), momentum="int8")
    optimizer = muon.build(weights, ROLES, 0)
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    for name, gradient in numbers(0).items():
        weights[name].grad = gradient.float()
    optimizer.update(0.05, torch.tensor(1.0))
    assert all(not torch.equal(weight, before[name]) for name, weight in weights.items())
    assert any(name.startswith("rest.") for name in optimizer.state())


@pytest.mark.parametrize("momentum", ["fp32", "int8"])
def test_state_bytes_are_what_the_state_holds(momentum: str) -> None:
    weights: dict[str, Tensor] = {name: torch.nn.Parameter(torch.zeros(shape)) for name, shape in SHAPES.items()}
    muon = config(momentum=momentum)
    held = sum(t.nbytes for name, t in muon.build(weights, ROLES, 0).state().items() if not name.endswith("step"))
    assert held == sum(muon.state_bytes(shape, ROLES[name]) for name, shape in SHAPES.items())


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"rate": 0.0}, "rate=0.0"),
        ({"beta": 1.0}, "beta=1.0: must be in"),
        ({"weight_decay": -1.0}, "weight_decay=-1.0"),
        ({"max_norm": 0.0}, "max_norm=0.0: must be positive; null"),
        ({"rest": Adamw8(rate=0.1)}, "rest: keeps its weights in bf16.*set rest.master: fp32"),
    ],
)
def test_mistakes_are_named(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Muon(**{"rate": 0.1, "rest": Adamw(rate=0.1), **fields})
