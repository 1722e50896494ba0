"""Offloaded state is updated as state on the device is, and no layer runs before its weights are what they must be."""

import random
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from farspan.kernels.random import key, normal
from farspan.models.block import Block
from farspan.models.decoder import Decoder, initial
from farspan.models.ffns import Swiglu
from farspan.models.mixers import Softmax
from farspan.models.roles import Role, roles
from farspan.parallel.context import Local
from farspan.parallel.context.shard import Batch
from farspan.parallel.engine import Engine, Held
from farspan.parallel.fsdp import full
from farspan.parallel.mesh import Mesh, Parallel
from farspan.platform.checkpoint import Saver, load
from farspan.platform.optim import Adamw, Adamw8, stores
from farspan.platform.optim.cost import Place
from farspan.platform.optim.offload import Offloaded, split_for, units_of
from farspan.platform.optim.placement import Interleaved, Streamed
from farspan.platform.optim.queues import Inline, Mark, Queue, queues_of
from farspan.platform.optim.rates import Rates
from farspan.platform.optim.slab import ALIGNED, Layout

UNITS = [["embed", "norm"], ["a"], ["b"], ["c", "d"], ["e"]]
SHAPES = {"embed": (64, 96), "norm": (96,), "a": (96, 64), "b": (128, 96), "c": (96, 96), "d": (70, 64), "e": (64, 128)}
KNOWN = {n: Role("embedding" if n == "embed" else "norm" if n == "norm" else "matrix") for n in SHAPES}
EIGHT = Adamw8(rate=1e-2, betas=(0.9, 0.999), offload=Streamed())
HALVES = Adamw(rate=1e-2, offload=Interleaved())
MIXED: tuple[Place, ...] = ("resident", "streamed", "cpu", "streamed", "cpu")
STREAMED: tuple[Place, ...] = ("streamed",) * 5


Task = tuple[int, Callable[[], object], list[Mark]]


class Late(Inline):
    """Work is done when somebody waits for it, in any order that the queues allow, never sooner."""

    def __init__(self, seed: int) -> None:
        self._waiting: dict[str, list[Task]] = {name: [] for name in (*get_args(Queue), "model")}
        self.streams: list[int] = []
        """How many each `hold` was told."""
        self._done: set[int] = set()
        self.only = set(self._waiting)
        self._count = 0
        self._random = random.Random(seed)
        self._lock = threading.RLock()

    def now(self) -> Mark:
        return self.run("model", lambda: None, ())

    def run(self, queue: str, work: Callable[[], object], after: Iterable[Mark], uses: Sequence[Tensor] = ()) -> Mark:
        with self._lock:
            self._count += 1
            self._waiting[queue].append((self._count, work, [mark for mark in after if mark is not None]))
            return self._count

    def hold(self, mark: Mark, streams: Iterable[Any] = ()) -> None:
        self.streams.append(len(list(streams)))
        self.reached(mark)

    def seconds(self, begin: Mark, end: Mark) -> float | None:
        return float(end - begin) if {begin, end} <= self._done else None

    def reached(self, mark: Mark) -> None:
        with self._lock:
            while mark is not None and mark not in self._done:
                free = {name: of for name, of in self._waiting.items() if of and name in self.only}
                heads = [(name, of[0]) for name, of in free.items() if self._done.issuperset(of[0][2])]
                name, (number, work, _) = self._random.choice(heads)
                self._waiting[name].pop(0)
                work()
                self._done.add(number)

    @property
    def left(self) -> int:
        return sum(map(len, self._waiting.values()))


def weights_of(dtype: torch.dtype) -> dict[str, nn.Parameter]:
    found = {}
    for name, shape in SHAPES.items():
        value = normal(torch.arange(torch.Size(shape).numel()), key(0, name)).view(shape) * 0.02
        found[name] = nn.Parameter(value.to(dtype))
        found[name].grad_dtype = torch.float32  # type: ignore[attr-defined]
    return found


def give_gradients(weights: dict[str, nn.Parameter], step: int) -> None:
    for name, weight in weights.items():
        weight.grad = normal(torch.arange(weight.numel()), key(step, name)).view(weight.shape) * 1e-2


def offloaded(config: Any, weights: dict[str, nn.Parameter], places: Sequence[Place], queues: Any) -> Offloaded:
    units = units_of(config, weights, KNOWN, 7, UNITS)
    return Offloaded(units, places, queues, torch.device("cpu"))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("places", [STREAMED, ("resident", *STREAMED[1:])], ids=["streamed", "partly"])
def test_streamed_is_resident(places: tuple[Place, ...], seed: int) -> None:
    """Bit for bit, clipped and skipped steps included, whatever order the queues work in; a layer that waits for its
    weights, and nothing else, sees them updated."""
    ours, theirs = weights_of(torch.bfloat16), weights_of(torch.bfloat16)
    queues = Late(seed)
    optimizer = offloaded(EIGHT, ours, places, queues)
    reference = EIGHT.build(theirs, KNOWN, 7)
    before: dict[str, Tensor] = {}
    for step in range(1, 6):
        for weights in (ours, theirs):
            give_gradients(weights, step)
        real = {name: weight.grad for name, weight in theirs.items()}
        for name, weight in ours.items():  # the device has not made them yet
            weight.grad = torch.full_like(real[name], torch.nan)
            queues.run("model", partial(weight.grad.copy_, real[name]), ())
        scale = torch.tensor(0.0 if step == 3 else 0.5)
        before = {name: weight.detach().clone() for name, weight in ours.items()}
        optimizer.update(1e-2, scale)
        reference.update(1e-2, scale)
        assert optimizer.seconds() is None if step == 1 else step % 2 or optimizer.seconds()
        assert queues.left and all(torch.equal(before[n], w) for n, w in ours.items()), "it is only begun"
        for i in range(len(UNITS)) if step % 2 else (4, 1):  # not all are asked for in every pass
            optimizer.ready(i)
            assert all(torch.equal(ours[name], theirs[name]) for name in UNITS[i])
    found, expected = optimizer.state(), reference.state()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert all(torch.equal(weight, theirs[name]) for name, weight in ours.items())


@pytest.mark.parametrize("piece", [1, 5000, 40_000, 1 << 28])
def test_pieces_change_nothing(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A unit's state goes through a window of three pieces, be they single rows; weights of one axis as well."""
    monkeypatch.setattr(stores, "PIECE", piece)
    ours, theirs = weights_of(torch.bfloat16), weights_of(torch.bfloat16)
    optimizer, reference = offloaded(EIGHT, ours, STREAMED, Late(5)), EIGHT.build(theirs, KNOWN, 7)
    rows = max(10 * 96, piece) + 8 * ALIGNED
    assert len(optimizer.window.slabs) == 3 and all(slab.numel() < rows for slab in optimizer.window.slabs)
    for step in (1, 2):
        for weights in (ours, theirs):
            give_gradients(weights, step)
        optimizer.update(1e-2, torch.tensor(1.0))
        reference.update(1e-2, torch.tensor(1.0))
    found = optimizer.state()
    assert all(torch.equal(found[name], tensor) for name, tensor in reference.state().items())
    assert all(torch.equal(weight, theirs[name]) for name, weight in ours.items())


def test_whole_weights_travel_together() -> None:
    """One copy where only padding is between; rows of one weight lie elsewhere beside their scales."""
    layout = Layout.of({name: torch.empty(4, 24, dtype=torch.uint8, device="meta") for name in "abcd"})
    device, host = (torch.randint(256, (layout.size,), dtype=torch.uint8) for _ in range(2))
    ours, theirs = layout.views(device), layout.views(host)
    assert len(stores.joined([(ours[name], theirs[name], True) for name in "abcd"])) == 1
    cut = [(ours[name], theirs[name], name in "ab") for name in "abcd"]
    copies = stores.joined(cut)
    assert [a.numel() for a, _ in copies] == [256 + 96, 96, 96]
    for a, b in copies:
        a.copy_(b)
    assert all(torch.equal(ours[name], theirs[name]) for name in "abcd")


@pytest.mark.parametrize("places", [MIXED, ("cpu",) * 5, STREAMED], ids=["mixed", "cpu", "streamed"])
@pytest.mark.parametrize("queues", [Inline(), Late(1)], ids=["at once", "late"])
def test_fp32_state_is_torch_adamw(places: tuple[Place, ...], queues: Any) -> None:
    """Over bf16 weights and the other half of fp32, on either side of the link."""
    ours, theirs = weights_of(torch.bfloat16), weights_of(torch.float32)
    for name, weight in theirs.items():
        weight.data = ours[name].detach().float()
    optimizer = offloaded(HALVES, ours, places, queues)
    groups = [
        {"params": [w for w in theirs.values() if w.dim() > 1], "weight_decay": HALVES.weight_decay},
        {"params": [theirs["norm"]], "weight_decay": 0.0},
    ]
    reference = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=HALVES.eps)
    for step in range(1, 6):
        for weights in (ours, theirs):
            give_gradients(weights, step)
        if step == 2:
            ours["b"].grad = torch.full_like(theirs["b"], torch.nan)
            optimizer.update(1e-2, torch.tensor(0.0))
            optimizer.settle()
            give_gradients(ours, step)
        norm = nn.utils.clip_grad_norm_(theirs.values(), 0.05)
        optimizer.update(1e-2, (0.05 / (norm + 1e-6)).clamp(max=1.0))
        reference.step()
        for i in range(len(UNITS)):
            optimizer.ready(i)
    state = optimizer.state()
    for name, weight in theirs.items():
        whole = (ours[name].detach().view(torch.int16).int() << 16) + state[f"residual.{name}"].int()
        torch.testing.assert_close(whole.view(torch.float32), weight.detach(), rtol=2e-6, atol=1e-7)
        torch.testing.assert_close(state[f"first.{name}"], reference.state[weight]["exp_avg"], rtol=2e-6, atol=1e-8)


@pytest.mark.parametrize("places", [MIXED, STREAMED], ids=["mixed", "streamed"])
def test_restored_state_goes_on_elsewhere(places: tuple[Place, ...]) -> None:
    """What one split left, another takes up: state names and shapes do not know where it lived."""
    first, second = weights_of(torch.bfloat16), weights_of(torch.bfloat16)
    before, never = offloaded(HALVES, first, places, Inline()), offloaded(HALVES, second, STREAMED, Inline())
    for step in (1, 2):
        for weights, optimizer in ((first, before), (second, never)):
            give_gradients(weights, step)
            optimizer.update(1e-2, torch.tensor(1.0))
    third = weights_of(torch.bfloat16)
    after = offloaded(HALVES, third, MIXED[::-1], Late(2))
    give_gradients(third, 9)
    after.update(1.0, torch.tensor(1.0))  # what it was in the middle of is forgotten
    for name, tensor in after.state().items():
        tensor.copy_(before.state()[name])
    before.settle()
    with torch.no_grad():
        for name, weight in third.items():
            weight.copy_(first[name])
    after.restored()
    for weights, optimizer in ((third, after), (second, never)):
        give_gradients(weights, 3)
        optimizer.update(1e-2, torch.tensor(1.0))
        optimizer.settle()
    for name, weight in third.items():
        torch.testing.assert_close(weight.float(), second[name].float(), rtol=2.0**-7, atol=1e-6)


def test_a_weight_without_gradient_is_named() -> None:
    weights = weights_of(torch.bfloat16)
    give_gradients(weights, 1)
    weights["c"].grad = None
    with pytest.raises(ValueError, match="c has no gradient"):
        offloaded(EIGHT, weights, STREAMED, Inline()).update(1e-2, torch.tensor(1.0))
    units = units_of(EIGHT, weights, KNOWN, 7, UNITS)
    optimizer = Offloaded(units, STREAMED, Inline(), torch.device("cpu"), torch.float32)
    for step in (1, 2):
        for name in SHAPES if step == 1 else [name for name in SHAPES if name != "d"]:
            optimizer.take(name, torch.ones(SHAPES[name]))
        if step == 1:
            optimizer.update(1e-2, torch.tensor(1.0))
    with pytest.raises(ValueError, match="d has no gradient"):
        optimizer.update(1e-2, torch.tensor(1.0))


@pytest.mark.parametrize(("unit", "name"), [(0, "embed"), (2, "b")])
def test_what_the_cpu_updates_does_not_queue_behind_the_stream(unit: int, name: str) -> None:
    """A layer's gradients come and its weights go when nothing else has come in or gone out: neither the CPU nor that
    layer's forward waits for the others' state."""
    weights = weights_of(torch.bfloat16)
    queues = Late(3)
    optimizer = offloaded(HALVES, weights, ("cpu", "streamed", "cpu", "streamed", "streamed"), queues)
    give_gradients(weights, 1)
    optimizer.update(1e-2, torch.tensor(1.0))
    queues.only = {"out", "send", "model"}  # no state is updated, so that none can leave
    before = weights[name].detach().clone()
    optimizer.ready(unit)
    assert not torch.equal(before, weights[name])


def test_gradients_stay_until_every_unit_was_waited_for() -> None:
    """Their memory is used again by streams that wait for what they wait for, and no more."""
    weights = weights_of(torch.bfloat16)
    optimizer = offloaded(EIGHT, weights, STREAMED, Inline())
    give_gradients(weights, 1)
    optimizer.update(1e-2, torch.tensor(1.0))
    kept = [weakref.ref(weight.grad) for weight in weights.values() if weight.grad is not None]
    for weight in weights.values():
        weight.grad = None
    for unit in (4, 0, 2, 1):
        optimizer.ready(unit)
        assert all(gradient() is not None for gradient in kept)
    optimizer.ready(3)
    assert all(gradient() is None for gradient in kept)
    optimizer.close()


def test_chance_begins_at_a_beta_of_099() -> None:
    assert not Adamw8(rate=1.0).adam.stochastic
    assert Adamw8(rate=1.0, betas=(0.9, 0.999)).adam.stochastic


def test_the_split_follows_what_is_asked_for() -> None:
    """Twelve layers alike: the window is three of them, and what is asked for stays besides."""
    names = [[f"w{i}"] for i in range(12)]
    weights = {name: nn.Parameter(torch.zeros(64, 64, dtype=torch.bfloat16)) for [name] in names}
    known = {name: Role("matrix") for name in weights}
    both = {"cpu_beside": 1.7e9, "duplex_beside": 48e9}
    rates = Rates(h2d=50e9, d2h=50e9, duplex=48e9, cpu=1.7e9, gpu=200e9, **both)
    eight, halves = (units_of(config, weights, known, 7, names) for config in (EIGHT, HALVES))
    layer = eight[0].layout.size * 1e-9
    stay, away = split_for(Streamed(), eight, rates), split_for(Streamed(), eight, rates, torch.bfloat16)
    assert stay.code == away.code == "s" * 12
    assert away.predicted.update > 1.4 * stay.predicted.update, "gradients come back with state"
    assert split_for(Streamed(device_gb=2.01 * layer), eight, rates).code == "rr" + "s" * 10
    assert split_for(Streamed(device_gb=9.01 * layer), eight, rates).code == "r" * 12, "the window is not needed"
    assert split_for(Interleaved(pattern="stride"), halves, rates).code == "cs" * 6
    assert set(split_for(Interleaved(), halves, rates).code) == {"c", "s"}
    assert set(split_for(Interleaved(pattern="optimum"), halves, rates).code) == {"c", "s"}


MODEL = Decoder(
    width=64,
    vocabulary=64,
    blocks=(Block(repeat=3, mixer=Softmax(heads=4, kv_heads=2, head_dim=16), ffn=Swiglu(hidden=136)),),
)


def trains(cuts: list[dict[str, Any]], folder: str, first: int, last: int, save: int) -> list[dict[str, Any]]:
    """Steps of a model whose layers wait for their own updates, from the checkpoint before, if there is one."""
    control, found = dist.new_group(backend="gloo"), []
    for cut in cuts:
        seed, away = cut.pop("seed", None), cut.pop("gradients", False)
        mesh = Mesh(Parallel(**cut).sizes(dist.get_world_size()), torch.device("cpu"), control)
        with torch.device("meta"):
            model, whole = (MODEL.build(64, Local()) for _ in range(2))
        held = Held(torch.bfloat16, torch.float32)
        start, layers = initial(model), list(model.layers)
        engine = Engine(model, layers, start, mesh, context=Local(), seed=3, held=held)
        config = Adamw8(rate=1e-2, max_tp=2, exact=("norm",), offload=Streamed())
        if seed is None:
            optimizer: Any = config.build(engine.weights, roles(whole), 5)
        else:
            units = units_of(config, engine.weights, roles(whole), 5, engine.units)
            queues: Any = Late(seed) if seed else queues_of(mesh.device)
            places: tuple[Place, ...] = ("streamed", "resident", "streamed", "streamed")
            optimizer = Offloaded(units, places, queues, mesh.device, torch.float32 if away else None)
            assert optimizer.units[1].adam.stochastic == (config.betas[1] >= 0.99)
            engine.gate(optimizer.ready)
            if away:
                engine.give_away(optimizer.taken, optimizer.take)
        tensors = {f"model.{n}": w.detach() for n, w in engine.weights.items()}
        saver = Saver(Path(folder), 2, control, lambda _: None)
        if first > 1:
            load(Path(folder), first - 1, tensors | optimizer.state(), control)
            if seed is not None:
                optimizer.restored()
        losses = []
        for step in range(first, last + 1):
            rows = 4 // mesh.sizes.dp
            generator = torch.Generator().manual_seed(step)
            tokens = torch.randint(64, (4, 33), generator=generator)[mesh.index("dp") * rows :][:rows]
            loss = engine.sum(engine.forward_backward([batch_of(row) for row in tokens.split(1)], 4 * 32.0))
            if away:
                kept = {name for name, weight in engine.weights.items() if weight.grad is not None}
                assert kept == set(engine.units[1]), "of the resident layer only"
            norm = engine.gradient_norm()
            optimizer.update(1e-2, (0.3 / norm).clamp(max=1.0))
            engine.clear()
            losses.append(loss.item())
            if step == save:
                assert saver.save(step, tensors | optimizer.state(), {"format": 1})
        told = engine.evaluate(batch_of(tokens)).item()
        if seed:
            assert queues.streams[-4:] == [2, 2, 2, 2], "both streams that gather weights wait for each unit's"
        state = {n: full(t).clone() for n, t in optimizer.state().items() if t.dtype != torch.int16}
        weights = {name: full(tensor).clone() for name, tensor in tensors.items()}
        found.append({"losses": losses, "told": told, "state": state, "weights": weights})
    return found


def batch_of(rows: Tensor) -> Batch:
    count, length = rows.shape[0], rows.shape[1] - 1
    positions = torch.arange(length).expand(count, length).contiguous()
    tokens, labels = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
    lengths, valid = (length,) * count, count * length
    return Batch(tokens=tokens, labels=labels, positions=positions, cu_seqlens=None, lengths=lengths, valid=valid)


def same(left: Any, right: Any) -> None:
    assert left["losses"] == right["losses"] and left["told"] == right["told"]
    for kind in ("state", "weights"):
        assert left[kind].keys() == right[kind].keys()
        assert all(torch.equal(left[kind][name], tensor) for name, tensor in right[kind].items())


@pytest.mark.parametrize("cut", [{}, pytest.param({"tp": 2}, marks=pytest.mark.laws)], ids=["sharded", "tp"])
def test_training_with_streamed_state(ranks: Any, tmp_path: Path, cut: dict[str, Any]) -> None:
    """The same losses, weights and state bit for bit as with state on the device; stopped and resumed as well, and with
    gradients that leave the device during the backward."""
    cuts = [cut, {**cut, "seed": 0}, {**cut, "seed": 4}]
    told = {"folder": str(tmp_path), "save": 2}
    cuts += [] if "tp" in cut else [{**cut, "seed": 3, "gradients": True}]
    resident, *others = ranks(2, trains, cuts=cuts, first=1, last=4, **told)[0]
    for other in others:
        same(other, resident)
    [resumed] = ranks(2, trains, cuts=[{**cut, "seed": 1}], first=3, last=4, **told)[0]
    same(resumed, {**resident, "losses": resident["losses"][2:]})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("slow", ["in", "update", "out", "model"])
def test_gpu_streamed_is_resident(slow: str) -> None:
    """With each queue held up in turn: whoever does not wait reads what is not there yet."""
    device = torch.device("cuda")
    queues: Any = queues_of(device)
    run = queues.run

    def slowly(queue: Queue, work: Callable[[], object], *rest: Any) -> Mark:
        def late() -> None:
            torch.cuda._sleep(20_000_000 if queue == slow else 0)
            work()

        return run(queue, late, *rest)

    queues.run = slowly
    ours, theirs = ({n: nn.Parameter(w.data.to(device)) for n, w in weights_of(torch.bfloat16).items()} for _ in "ab")
    for weights in (ours, theirs):
        for weight in weights.values():
            weight.grad_dtype = torch.float32  # type: ignore[attr-defined]
    optimizer = Offloaded(units_of(EIGHT, ours, KNOWN, 7, UNITS), STREAMED, queues, device)
    reference = EIGHT.build(theirs, KNOWN, 7)
    for step in range(1, 5):
        torch.cuda._sleep(20_000_000 if slow == "model" else 0)
        for name, weight in ours.items():
            real = normal(torch.arange(weight.numel()), key(step, name)).view(weight.shape).to(device)
            weight.grad = real * 1.0  # made on the device, after the sleep
            theirs[name].grad = real
        optimizer.update(1e-2, torch.tensor(0.5, device=device))
        reference.update(1e-2, torch.tensor(0.5, device=device))
        for weight in ours.values():
            weight.grad = None  # its memory may be given to others at once
        for i, unit in enumerate(UNITS):
            optimizer.ready(i)
            assert all(torch.equal(ours[name], theirs[name]) for name in unit)
    found = optimizer.state()
    assert all(torch.equal(found[name].to(device), tensor) for name, tensor in reference.state().items())
