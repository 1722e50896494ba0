"""Where activations wait shows in no gradient, and their memory on the device is free from forward to backward."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from farspan.kernels.random import key
from farspan.models.block import Block, Layer
from farspan.models.decoder import Decoder, initial
from farspan.models.ffns import Swiglu
from farspan.models.mixers import Softmax
from farspan.models.norm import Rms
from farspan.parallel import recompute
from farspan.parallel.context import Axis, Gather
from farspan.parallel.context.local import Local
from farspan.parallel.context.shard import Batch, Documents
from farspan.parallel.engine import Engine
from farspan.parallel.fsdp import local
from farspan.parallel.lane import FIRST, Plain, Pool, lane_to
from farspan.parallel.mesh import Mesh, Parallel
from farspan.parallel.stash import Stash

WIDTH, ROWS, LENGTH = 24, 2, 37
BLOCK = Block(mixer=Softmax(heads=4, kv_heads=2, head_dim=8, qk_norm=True), ffn=Swiglu(hidden=52))
CPU = torch.device("cpu")


class Late(Plain):
    """Copies are done only when somebody waits for them: what did not wait finds rubbish, or memory that is gone."""

    def __init__(self, said: list[str] | None = None) -> None:
        super().__init__(CPU)
        self.said: list[str] = [] if said is None else said
        self._pending: list[Copy] = []

    def slab(self, size: int) -> Tensor:
        return torch.full((size,), 255, dtype=torch.uint8)

    def store(self, source: Tensor, target: Tensor) -> Any:
        return self._copy("store", source, target)

    def load(self, source: Tensor, target: Tensor) -> Any:
        target.fill_(255)  # NaN
        return self._copy("load", source, target)

    def wait(self, mark: Any) -> None:
        if mark in self._pending:
            self._pending.remove(mark)
            mark.run()

    def stored(self) -> list[str]:
        return sorted(said.removeprefix("store ") for said in self.said if said.startswith("store"))

    def loaded(self) -> list[str]:
        return sorted(said.removeprefix("load ") for said in self.said if said.startswith("load"))

    def _copy(self, kind: str, source: Tensor, target: Tensor) -> "Copy":
        self.said.append(f"{kind} {source.numel()}")
        copy = Copy(source, target)
        for other in self._pending:
            other.check()
            assert not {end[:2] for end in other.ends} & {end[:2] for end in copy.ends}, "nobody waited for a copy"
        self._pending.append(copy)
        return copy


class Copy:
    """What is still to be copied. It holds no memory, as a device's queue holds none."""

    def __init__(self, source: Tensor, target: Tensor) -> None:
        self.ends = [(t.untyped_storage()._cdata, t.storage_offset(), t.numel()) for t in (source, target)]
        self._places = [StorageWeakRef(t.untyped_storage()) for t in (source, target)]

    def check(self) -> None:
        assert not any(place.expired() for place in self._places), "memory is gone before it was copied"

    def run(self) -> None:
        self.check()
        source, target = (
            torch.empty(0, dtype=torch.uint8).set_(
                torch.UntypedStorage._new_with_weak_ptr(place.cdata), start, (size,), (1,)
            )
            for place, (_, start, size) in zip(self._places, self.ends, strict=True)
        )
        target.copy_(source)


@torch.no_grad()
def fill(layer: Layer, number: int) -> None:
    for path, weight in layer.named_parameters():
        initial(layer)[path].fill(weight, key(number, path), tuple(weight.shape), (0,) * weight.dim())


def stack(stash: Stash | None, keep: float | None = 0.5, depth: int = 4, compiled: bool = False) -> list[Layer]:
    layers = [BLOCK.build(WIDTH, depth, Rms(), "pre", Local()) for _ in range(depth)]
    for number, layer in enumerate(layers):
        fill(layer, number)
        recompute.apply(layer, keep, store=None if compiled else stash)
        if compiled:
            layer.forward = torch.compile(layer.forward, backend="aot_eager_decomp_partition")  # type: ignore[method-assign]
    if stash is not None:
        stash.watch(layers)
    return layers


def given(seed: int = 1) -> Tensor:
    return torch.randn(ROWS, LENGTH, WIDTH, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def run(layers: Sequence[Layer], x: Tensor) -> Tensor:
    positions = torch.arange(LENGTH).expand(ROWS, -1)
    rotation = layers[0].rotation
    assert rotation is not None
    angles = rotation[0].angles(positions, rotation[1])
    for layer in layers:
        x = layer(x, angles, Documents())
    return x


def gradients(layers: Sequence[Layer], seed: int = 1, loss: Callable[[Tensor], Tensor] = torch.sum) -> list[Tensor]:
    x = given(seed)
    return list(torch.autograd.grad(loss(run(layers, x).square()), [x, *nn.ModuleList(layers).parameters()]))


def same(left: Sequence[Tensor], right: Sequence[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize(
    ("keep", "lane"), [(None, Late()), (0.0, Late()), (0.5, Late()), (1.0, Late()), (0.5, Plain(CPU))]
)
def test_gradients_are_the_same_bits(keep: float | None, lane: Plain) -> None:
    """Step after step, in the same host memory, all of which is back after each; what leaves comes back once."""
    stash = Stash(lane, least=1)
    plain, stashed = stack(None, keep), stack(stash, keep)
    for step in range(2):
        assert same(gradients(plain, step), gradients(stashed, step))
        assert stash.pool.taken == 0
    assert stash.pool.bytes == FIRST
    if isinstance(lane, Late):
        assert lane.said and lane.loaded() == lane.stored()


@pytest.mark.laws
def test_compiled_layers_are_stashed_alike() -> None:
    torch._dynamo.reset()
    late = Late()
    stash = Stash(late, least=1)
    for left, right in zip(gradients(stack(None)), gradients(stack(stash, compiled=True)), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-4)  # other rounding, as without a stash
    size = str(given().untyped_storage().nbytes())
    assert late.stored().count(size) >= 3 and late.loaded() == late.stored() and stash.pool.taken == 0


class Noted(nn.Module):
    """A layer that keeps one tensor of a size of its own, for a backward that says when it runs."""

    def __init__(self, number: int, said: list[str]) -> None:
        super().__init__()
        self.number, self.said = number, said

    def forward(self, x: Tensor) -> Tensor:
        self.said.append(f"forward {self.number}")
        return x + _Sum.apply(x.repeat(self.number + 1), self.number, self.said)


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, many: Tensor, number: int, said: list[str]) -> Tensor:
        ctx.save_for_backward(many)
        ctx.number, ctx.said = number, said
        return many.square().sum()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        (many,) = ctx.saved_tensors
        assert not many.isnan().any()
        ctx.said.append(f"backward {ctx.number}")
        return 2 * many * upstream, None, None


def test_each_leaves_at_once_and_comes_back_a_layer_early() -> None:
    said: list[str] = []
    stash = Stash(Late(said), least=9)  # numbers of 4 bytes
    layers = [Noted(number, said) for number in range(4)]
    stash.watch(layers)
    x = out = torch.ones(3, requires_grad=True)
    for layer in layers:
        out = layer(out)
    forward = "forward 0, store 12, forward 1, store 24, forward 2, store 36, forward 3"
    assert ", ".join(said) == forward, "each once, the last not at all"
    assert stash.pool.taken == 3
    said.clear()
    out.sum().backward()
    assert ", ".join(said) == "load 36, backward 3, load 24, backward 2, load 12, backward 1, backward 0"
    assert stash.pool.taken == 0 and x.grad is not None


def test_without_gradients_nothing_leaves() -> None:
    late = Late()
    stash = Stash(late, least=1)
    layers = stack(stash)
    with torch.no_grad():
        shown = run(layers, given())
    assert not late.said and torch.equal(shown, run(stack(None), given()))


def test_layers_whose_backward_never_comes_give_all_back() -> None:
    stash = Stash(Late(), least=1)
    layers = stack(stash)
    out = run(layers, given())
    assert stash.pool.taken > 3
    del out
    assert stash.pool.taken == 0
    middle = run(layers[:3], given())  # the last that leaves is still on its way when another pass begins
    del middle
    assert same(gradients(layers), gradients(stack(None))) and stash.pool.taken == 0


def test_failures_give_all_back() -> None:
    """In a layer's forward, and in a backward that has called memories it will not look at."""
    stash = Stash(Late(), least=1)
    layers = stack(stash)
    own = layers[2].forward
    expected = gradients(stack(None))

    def broken(*_: Any) -> Any:
        raise ArithmeticError

    layers[2].forward = broken  # type: ignore[assignment, method-assign]
    with pytest.raises(ArithmeticError):
        gradients(layers)
    layers[2].forward = own  # type: ignore[method-assign]
    assert same(gradients(layers), expected) and stash.pool.taken == 0

    def fail(_: Tensor) -> None:
        raise ArithmeticError

    x = given()
    first = run(layers[:3], x)
    first.register_hook(fail)
    out = layers[3](first, None, Documents())
    with pytest.raises(ArithmeticError):
        out.sum().backward()
    del first, out
    assert stash.pool.taken == 0
    assert same(gradients(layers), expected)


def test_graphs_may_be_kept_and_passes_may_overlap() -> None:
    stash = Stash(Late(), least=1)
    plain, stashed = stack(None), stack(stash)
    x = given()
    weights = [x, *nn.ModuleList(stashed).parameters()]
    loss = run(stashed, x).square().sum()
    twice = [torch.autograd.grad(loss, weights, retain_graph=again) for again in (True, False)]
    del loss
    expected = gradients(plain)
    assert same(twice[0], expected) and same(twice[1], expected) and stash.pool.taken == 0
    both = []
    for layers in (plain, stashed):
        left, right = (run(layers, x).square().sum() for _ in range(2))
        both.append(torch.autograd.grad(left + right, [x, *nn.ModuleList(layers).parameters()]))
    assert same(*both)


class Tangled(nn.Module):
    """Keeps two views of one memory, one of them transposed, and a product with a weight that is everyone's."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 5))
        self.shown: list[tuple[Any, ...]] = []

    def forward(self, x: Tensor) -> Tensor:
        both = x.repeat(1, 2)
        left, right = both[:, :5].T, both[:, 5:]
        out: Tensor = _Views.apply(left, right, self.shown)
        return out @ self.weight.T @ self.weight


class _Views(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, left: Tensor, right: Tensor, shown: list[tuple[Any, ...]]) -> Tensor:
        ctx.save_for_backward(left, right)
        ctx.shown = shown
        shown.append((left.stride(), right.stride(), left.storage_offset(), right.storage_offset()))
        return left.T * right

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor, None]:
        left, right = ctx.saved_tensors
        ctx.shown.append((left.stride(), right.stride(), left.storage_offset(), right.storage_offset()))
        assert left.untyped_storage()._cdata == right.untyped_storage()._cdata
        return (upstream * right).T, upstream * left.T, None


def test_views_come_back_as_views_and_weights_never_leave() -> None:
    late = Late()
    stash = Stash(late, least=1)
    layers = [Tangled() for _ in range(2)]
    stash.watch(layers)
    x = torch.randn(7, 5, requires_grad=True)
    layers[1](layers[0](x)).sum().backward()
    assert layers[0].shown[0] == layers[0].shown[1]
    assert late.stored() == late.loaded() == ["140", "168", "280"]  # the products' left factors; both views at once


class Overwriting(Noted):
    """Keeps a tensor and then writes to it."""

    def forward(self, x: Tensor) -> Tensor:
        kept = x + 1
        out = _Sum.apply(kept, self.number, self.said)
        kept.add_(1)
        return x + out


@pytest.mark.parametrize("place", [0, 2])
def test_what_is_overwritten_before_its_backward_is_an_error(place: int) -> None:
    """Of a layer whose memory leaves, and of the last, whose stays."""
    layers: list[Noted] = [Noted(number, []) for number in range(3)]
    layers[place] = Overwriting(place, [])
    Stash(Late(), least=1).watch(layers)
    x = torch.ones(3, requires_grad=True)
    with pytest.raises(RuntimeError, match="overwritten; copy it first"):
        layers[2](layers[1](layers[0](x))).sum().backward()


@pytest.mark.parametrize("place", [0, 1])
def test_a_product_that_is_overwritten_is_an_error_too(place: int) -> None:
    """What recomputation hands over is made below autograd, where a tensor and its alias easily lose each other."""

    class Product(nn.Module):
        def __init__(self, number: int) -> None:
            super().__init__()
            self.number, self.weight = number, nn.Parameter(torch.randn(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            y = x @ self.weight
            return (y.add_(1) if self.number == place else y).sin() + x

        def example(self, rows: int, length: int) -> tuple[Tensor]:
            return (torch.zeros(rows * length, 4, requires_grad=True),)

    stash, layers = Stash(Late(), least=1), [Product(number) for number in range(2)]
    for layer in layers:
        recompute.apply(layer, 1.0, store=stash)
    stash.watch(layers)
    with pytest.raises(RuntimeError, match="overwritten; copy it first"):
        layers[1](layers[0](torch.randn(3, 4, requires_grad=True))).sum().backward()


def test_pieces_are_used_again_and_waste_an_eighth_at_most() -> None:
    pool = Pool(Plain(CPU).slab)
    sizes = [1, 4097, 5_000_000, 2**20 + 1, FIRST // 2, FIRST + 5]
    pieces = [pool.take(size) for size in sizes]
    for size, piece in zip(sizes, pieces, strict=True):
        assert size <= piece.numel() <= max(size + 4095, 1.125 * size)
    for number, piece in enumerate(pieces):
        piece[[0, -1]] = number
    assert [piece[[0, -1]].tolist() for piece in pieces] == [[number] * 2 for number in range(len(sizes))]
    before, memories = pool.bytes, {piece.data_ptr() for piece in pieces}
    assert before == FIRST + 2 * FIRST and pool.taken == len(sizes)
    for piece in pieces:
        pool.give(piece)
    again = [pool.take(size) for size in reversed(sizes)]
    assert {piece.data_ptr() for piece in again} == memories and pool.bytes == before


def test_a_host_without_memory_says_what_to_lower() -> None:
    def none(size: int) -> Tensor:
        raise RuntimeError("CUDA error: out of memory")

    with pytest.raises(RuntimeError, match=r"no 67,108,864 bytes more to pin, after 0; lower train.micro_batch"):
        Pool(none).take(100)


def probe(cuts: list[dict[str, int]], compiled: bool) -> list[bool]:
    """On each cut: whether two steps of micro-batches give the same bits with and without, and something left."""
    control, found = dist.new_group(backend="gloo"), []
    for cut in cuts:
        parallel = Parallel(**{**cut, "context": Gather()})  # type: ignore[arg-type]
        mesh = Mesh(parallel.sizes(dist.get_world_size()), CPU, control)
        axis = Axis(group=mesh.context, device=CPU, multiple=mesh.sizes.tp) if mesh.sizes.cp > 1 else None
        context = parallel.context.build(axis)
        results = []
        for stashed in (False, True):
            with torch.device("meta"):
                config = Decoder(
                    width=WIDTH, vocabulary=60, blocks=(Block(repeat=3, mixer=BLOCK.mixer, ffn=BLOCK.ffn),)
                )
                model = config.build(60, context)
            engine = Engine(
                model,
                list(model.layers),
                initial(model),
                mesh,
                context=context,
                seed=3,
                kept=0.5,
                stashed=stashed,
                compiled=compiled,
            )
            if engine.stash is not None:
                engine.stash.least = 1
            losses = [engine.forward_backward([batch(n) for n in range(3)], 50.0), engine.evaluate(batch(0))]
            losses.append(engine.forward_backward([batch(n) for n in range(2)], 50.0))
            results.append(
                losses + [local(weight.grad) for weight in engine.weights.values() if weight.grad is not None]
            )
            sizes = None if engine.stash is None else (engine.stash.pool.bytes, engine.stash.pool.taken)
        found.append(sizes == (FIRST, 0) and len(results[0]) > 10 and same(*results))
    return found


def batch(seed: int) -> Batch:
    made = torch.Generator().manual_seed(seed)
    tokens, labels = (torch.randint(60, (ROWS, LENGTH), generator=made) for _ in range(2))
    places = torch.arange(LENGTH).expand(ROWS, -1)
    return Batch(
        tokens=tokens,
        labels=labels,
        positions=places,
        cu_seqlens=None,
        lengths=(LENGTH,) * ROWS,
        valid=ROWS * LENGTH,
    )


def test_ranks_that_share_weights_tokens_or_heads(ranks: Any) -> None:
    """FSDP frees and gathers weights around the layers, cp and tp exchange what layers keep."""
    for found in ranks(2, probe, cuts=[{"shard": 2}, {"tp": 2}, {"cp": 2}], compiled=False):
        assert found == [True, True, True]


@pytest.mark.laws
def test_ranks_with_compiled_layers(ranks: Any) -> None:
    for found in ranks(2, probe, cuts=[{"shard": 2}, {"tp": 2}, {"cp": 2}], compiled=True):
        assert found == [True, True, True]


def large(stashed: bool, compiled: bool) -> tuple[list[Tensor], int, int]:
    """Eight layers on a GPU: gradients, the most bytes at once above what was there, and those of the host."""
    device = torch.device("cuda")
    stash = Stash(lane_to(device)) if stashed else None
    block = Block(mixer=Softmax(heads=8, kv_heads=4, head_dim=64), ffn=Swiglu(hidden=1408))
    with torch.device("meta"):
        layers = [block.build(512, 8, Rms(), "pre", Local()).bfloat16() for _ in range(8)]
    for number, layer in enumerate(layers):
        recompute.apply(layer, 0.5, store=None if compiled else stash)
        if compiled:
            layer.forward = torch.compile(layer.forward)  # type: ignore[method-assign]
        fill(layer.to_empty(device=device), number)
    x = torch.randn(4, 2048, 512, generator=torch.Generator().manual_seed(1)).to(device, torch.bfloat16)
    if stash is not None:
        stash.watch(layers)
    rotation = layers[0].rotation
    assert rotation is not None
    angles = rotation[0].angles(torch.arange(2048, device=device).expand(4, -1), rotation[1])
    weights = list(nn.ModuleList(layers).parameters())
    found: list[Tensor] = []
    most, host = 0, set()
    for _ in range(3):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out = x.detach().requires_grad_()
        for layer in layers:
            out = layer(out, angles, Documents())
        found = list(torch.autograd.grad(out.float().square().mean(), weights))
        most = torch.cuda.max_memory_allocated() - before
        del out
        host.add(0 if stash is None else stash.pool.bytes)
        assert stash is None or stash.pool.taken == 0
    assert len(host) == 1, "later steps pin nothing"
    return found, most, host.pop()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("compiled", [False, True])
def test_on_a_gpu_the_bits_are_the_same_and_the_peak_is_lower(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)  # flash attention heeds it only where it is an error not to
    try:
        (plain, whole, _), (stashed, less, host) = (large(stashed, compiled) for stashed in (False, True))
    finally:
        torch.use_deterministic_algorithms(False)
    assert same(plain, stashed)
    assert host > 0
    size = 4 * 2048 * 512 * 2
    assert less < whole - 5 * 2 * size, "of eight layers' inputs and attention's outputs alone six leave at a time"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_memory_is_let_go_in_order() -> None:
    """Copies take longer than the layers: one that did not hold its memory back would read or write later numbers."""
    device = torch.device("cuda")
    stash = Stash(lane_to(device), least=1)

    class Squares(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x * 1.01).sin().square() + x

    layers = [Squares() for _ in range(12)]
    x = torch.rand(1 << 22, device=device, requires_grad=True)
    out = x
    for layer in layers:
        out = layer(out)
    (expected,) = torch.autograd.grad(out.sum(), x)
    stash.watch(layers)
    for _ in range(3):
        out = x
        for layer in layers:
            out = layer(out)
        (found,) = torch.autograd.grad(out.sum(), x)
        assert torch.equal(found, expected)
