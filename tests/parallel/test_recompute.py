"""Recomputation changes no gradient, holds the bytes it foretells, and runs the products it foretells again."""

import gc
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from without_gpu import elsewhere

from farspan.kernels.define import triton_runs
from farspan.kernels.random import key
from farspan.models.block import Block, Layer, NormPlacement
from farspan.models.decoder import Decoder, initial
from farspan.models.ffns import Ffn, SquaredRelu, Swiglu
from farspan.models.linear import Fp8
from farspan.models.mixers import Softmax
from farspan.models.norm import Layer as LayerNorm
from farspan.models.norm import Norm, Rms
from farspan.parallel import recompute, tensor
from farspan.parallel.context import Gather, Runtime
from farspan.parallel.context.attention import Deal, Spread
from farspan.parallel.context.local import Local
from farspan.parallel.context.shard import Documents
from farspan.parallel.lane import Plain
from farspan.parallel.stash import Stash

WIDTH, ROWS, LENGTH = 24, 2, 37
MIXER = Softmax(heads=4, kv_heads=2, head_dim=8, qk_norm=True, sinks=True)
LAYERS: dict[str, tuple[NormPlacement, Norm, Softmax | None, Ffn | None]] = {
    "pre": ("pre", Rms(), MIXER, Swiglu(hidden=52)),
    "post": ("post", LayerNorm(), MIXER, SquaredRelu(hidden=100)),
    "peri": ("peri", Rms(), Softmax(heads=3, rope=None), Swiglu(hidden=52)),
    "mixer only": ("pre", Rms(), MIXER, None),
    "ffn only": ("peri", LayerNorm(bias=False), None, SquaredRelu(hidden=100)),
}
mm = torch.ops.aten.mm.default


def build(name: str, device: str = "cpu", context: Runtime | None = None) -> Layer:
    placement, norm, mixer, ffn = LAYERS[name]
    with torch.device(device):
        layer = Block(mixer=mixer, ffn=ffn).build(WIDTH, 2, norm, placement, context or Local())
    with torch.no_grad():
        for path, weight in layer.named_parameters():
            initial(layer)[path].fill(weight, key(0, path), tuple(weight.shape), (0,) * weight.dim())
    return layer


def arguments(layer: Layer) -> tuple[Any, ...]:
    """Real ones: two rows of two documents each."""
    drawn = torch.randn(ROWS, LENGTH, WIDTH, generator=torch.Generator().manual_seed(1))
    x = drawn.to(next(layer.parameters()).dtype).requires_grad_()
    positions = torch.cat([torch.arange(11), torch.arange(LENGTH - 11)]).expand(ROWS, -1)
    angles = None if layer.rotation is None else layer.rotation[0].angles(positions, layer.rotation[1])
    bounds = torch.tensor([0, 11, LENGTH, LENGTH + 11, 2 * LENGTH], dtype=torch.int32)
    return x, angles, Documents(bounds)


def gradients(layer: Layer) -> tuple[Tensor, ...]:
    given = arguments(layer)
    return torch.autograd.grad(layer(*given).square().sum(), [given[0], *layer.parameters()])


def traced(name: str) -> recompute.Trace:
    layer = build(name, "meta")
    return recompute.trace(layer, *layer.example(ROWS, LENGTH))


class Alive(TorchDispatchMode):
    """Every memory that operations made, weights and arguments apart, without holding it."""

    def __init__(self, *given: Tensor) -> None:
        super().__init__()
        self.given = {tensor.untyped_storage()._cdata for tensor in given}
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in torch.utils._pytree.tree_leaves(out):
            if isinstance(leaf, Tensor) and (leaf.untyped_storage()._cdata not in self.made or self.dead(leaf)):
                storage = leaf.untyped_storage()
                self.made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return out

    def dead(self, leaf: Tensor) -> bool:
        return bool(self.made[leaf.untyped_storage()._cdata][0].expired())

    def bytes(self) -> int:
        alive = {memory: size for memory, (storage, size) in self.made.items() if not storage.expired()}
        return sum(size for memory, size in alive.items() if memory not in self.given)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("keep", [0.0, 0.4, 1.0])
def test_gradients_are_the_same_bits(name: str, keep: float) -> None:
    plain, wrapped = build(name), build(name)
    recompute.apply(wrapped, keep)
    for left, right in zip(gradients(plain), gradients(wrapped), strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize("name", LAYERS)
def test_bytes_held_are_those_foretold(name: str) -> None:
    """Between forward and backward lives what `held` says, the input included: less with every step of the dial."""
    seen = []
    for keep in (None, 1.0, 0.5, 0.0):
        layer = build(name)
        recompute.apply(layer, keep)
        x, *others = arguments(layer)
        with Alive(x, *others[0] or (), *layer.parameters()) as alive:
            out = layer(x, *others)
        trace = traced(name)
        holds_input = keep is not None or trace.input in trace.saved  # LayerNorm in plain torch needs it no more
        input_bytes = x.untyped_storage().nbytes() if holds_input else 0
        seen.append(alive.bytes() - out.untyped_storage().nbytes() + input_bytes)
        assert seen[-1] == trace.held(keep)[0], keep
        out.sum().backward()
    assert seen == sorted(seen, reverse=True) and len(set(seen)) >= 3
    back = [traced(name).held(keep)[1] for keep in (0.0, 0.5, 1.0)]
    assert back == sorted(back, reverse=True) and back[-1] > 0


@pytest.mark.parametrize("keep", [0.0, 0.5, 1.0])
def test_bytes_in_host_memory_are_those_foretold(keep: float) -> None:
    """With a stash: when a layer ends, of all before it only the small memories are still on the device."""
    depth, least = 4, 2048
    trace = traced("peri")
    held, large = trace.held(keep)[0], trace.large(keep, least)
    stash = Stash(Plain(torch.device("cpu")), least)
    layers = [build("peri") for _ in range(depth)]
    for layer in layers:
        recompute.apply(layer, keep, store=stash)
    stash.watch(layers)
    x, *others = arguments(layers[0])
    seen = []
    with Alive(x, *nn.ModuleList(layers).parameters()) as alive:
        out = x
        for layer in layers:
            out = layer(out, *others)
            seen.append(alive.bytes() - stash.pool.bytes - out.untyped_storage().nbytes())
    seen[0] += x.untyped_storage().nbytes()  # the test's own
    assert 0 < held - large < large
    assert seen == [large + (1 + place) * (held - large) for place in range(depth)]
    out.sum().backward()
    assert stash.pool.taken == 0


def run_interpreted() -> None:
    """Layers in eight bits, whose kernels leave codes behind: the meta device foretells what those hold as well."""
    assert triton_runs(torch.zeros(1))
    given = torch.zeros(1, 16, 32, dtype=torch.bfloat16, requires_grad=True)
    for mixer, keep in ((None, None), (None, 0.5), (Softmax(heads=2), 1.0)):
        layers = []
        for device in ("meta", "cpu"):
            with torch.device(device):
                block = Block(mixer=mixer, ffn=Swiglu(hidden=48), linear=Fp8())
                layers.append(block.build(32, 2, Rms(), "pre", Local()).bfloat16())
        meta, layer = layers
        trace = recompute.trace(meta, *meta.example(1, 16))
        recompute.apply(layer, keep)
        others = layer.example(1, 16)[1:]
        with Alive(given, *others[0] or (), *layer.parameters()) as alive:
            out = layer(given, *others)
        gc.collect()  # the interpreter leaves circles behind
        input_bytes = given.untyped_storage().nbytes() if keep is not None or trace.input in trace.saved else 0
        held = alive.bytes() - out.untyped_storage().nbytes() + input_bytes
        assert held == trace.held(keep)[0], (keep, held, trace.held(keep))


def test_bytes_of_kernels_are_those_foretold() -> None:
    if torch.cuda.is_available():
        pytest.skip("the kernels themselves run here")
    elsewhere(run_interpreted, interpret=True)


@pytest.mark.parametrize("name", LAYERS)
def test_products_run_again_are_those_foretold(name: str) -> None:
    found = {}
    for keep in (None, 0.0, 0.5, 1.0):
        layer = build(name)
        recompute.apply(layer, keep)
        with FlopCounterMode(display=False) as counter:  # its hooks are operations: forward and backward must have them
            layer(*arguments(layer)).sum().backward()
        found[keep] = counter.get_total_flops()
    trace = traced(name)
    for keep in (0.0, 0.5, 1.0):
        kept = recompute.choose(trace, keep) if keep else frozenset()
        assert found[keep] - found[None] == trace.flops(kept)
    assert found[0.0] > found[0.5] > found[1.0] == found[None]


def test_what_no_backward_needs_is_not_kept() -> None:
    """The ffn's last product only feeds the sum in a pre-norm layer; an outer norm needs it, and it is dearest."""
    pre, peri = traced("pre"), traced("peri")
    assert recompute.choose(pre, 1.0) == {(mm, i) for i in range(6)}
    assert recompute.choose(peri, 1.0) == {(mm, i) for i in range(7)}
    least = WIDTH / (5 * WIDTH + 2 * 52)  # numbers a token: q, k, v, the mixer's out, the ffn's out; gate and up
    assert recompute.choose(peri, 1.01 * least) == {(mm, 6)}  # 52 products summed for a number; 24 for all others


@pytest.mark.parametrize("keep", [None, 0.0, 0.5, 1.0])
def test_attention_across_ranks_is_kept_like_that_of_one(keep: float | None) -> None:
    """Its exchanges never run again, and the products that stay are the same."""
    spread = Spread(0, 2, lambda _: Gather(), Deal("zigzag", "documents"), None)  # type: ignore[arg-type]
    layer = build("pre", "meta", spread)
    across = recompute.trace(layer, *layer.example(ROWS, LENGTH))
    assert across.held(keep) == traced("pre").held(keep)
    kept = recompute.choose(across, keep) if keep else frozenset()
    attention = torch.ops.farspan.attend_spread.default
    assert attention in {step.call[0] for step in across.steps}
    assert attention not in {step.call[0] for step in across.again(kept)}


def test_the_dial_bounds_the_bytes() -> None:
    trace = traced("pre")
    sizes = {step.call: trace.bytes(step.writes) for step in trace.steps}
    every = sum(sizes[call] for call in recompute.choose(trace, 1.0))
    before = -1
    for keep in (0.1, 0.25, 0.5, 0.75, 0.99):
        size = sum(sizes[call] for call in recompute.choose(trace, keep))
        assert before <= size <= keep * every
        assert size >= 0.5 * keep * every, "little of the room is left unused"
        before = size


@pytest.mark.parametrize("keep", [0.0, 0.5])
def test_a_compiler_keeps_the_same_products(keep: float) -> None:
    """Through torch.compile's own partition of forward and backward, run without code generation."""
    torch._dynamo.reset()
    plain, wrapped = build("peri").double(), build("peri").double()
    recompute.apply(wrapped, keep)
    wrapped.forward = torch.compile(wrapped.forward, backend="aot_eager_decomp_partition")  # type: ignore[method-assign]
    for left, right in zip(gradients(plain), gradients(wrapped), strict=True):
        torch.testing.assert_close(left, right)
    flops = []
    for layer in (plain, wrapped):
        out = layer(*arguments(layer)).sum()
        with FlopCounterMode(display=False) as counter:
            out.backward()
        flops.append(counter.get_total_flops())
    trace = traced("peri")
    assert flops[1] - flops[0] == trace.flops(recompute.choose(trace, keep) if keep else frozenset())


def test_bf16_weights_are_kept_in_bf16() -> None:
    layer = build("pre", "meta")
    whole = recompute.trace(layer, *layer.example(ROWS, LENGTH))
    half = recompute.trace(layer.bfloat16(), *layer.example(ROWS, LENGTH))
    assert recompute.choose(half, 0.5) == recompute.choose(whole, 0.5)
    products = {step.call: half.bytes(step.writes) for step in half.steps if step.flops}
    assert all(2 * size == whole.bytes(s.writes) for s in whole.steps for c, size in products.items() if s.call == c)


def test_a_sum_over_tensor_ranks_spares_its_product() -> None:
    """Under tensor parallelism the sum that leaves a module is a rank's part of the tokens, the product all of them."""

    class Two:
        size, rank, name = 2, 0, "nobody"

    config = Decoder(width=WIDTH, vocabulary=64, blocks=(Block(mixer=MIXER, ffn=Swiglu(hidden=52)),))
    with torch.device("meta"):
        model = config.build(64, Local())
    tensor.cut(model, 2)
    tensor.spread(model, Two())  # type: ignore[arg-type]
    layer = model.layers[0]
    x, *others = layer.example(1, 16)  # type: ignore[operator]
    trace = recompute.trace(layer, x[:, :8].detach().clone().requires_grad_(), *others)
    kept = recompute.choose(trace, 1.0)
    assert kept == {(mm, i) for i in (0, 1, 2, 4, 5)} | {(torch.ops._c10d_functional.reduce_scatter_tensor.default, 0)}
    recompute.apply(layer, 0.5, parts=2)
