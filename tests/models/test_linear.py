"""The choice of a linear layer changes its products, and neither its weight nor where it is kept, cut or saved."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from without_gpu import elsewhere

import farspan.parallel.context.attention  # noqa: F401 - recomputation asks for its operators by name
from farspan.kernels.define import triton_runs
from farspan.kernels.fp8 import PRODUCT, Coded, coded, fp8_linear_ref
from farspan.kernels.fp8_quantise import ROWS
from farspan.kernels.random import key
from farspan.models.block import Block, Layer, NormPlacement
from farspan.models.decoder import initial
from farspan.models.ffns import Ffn, Geglu, PolyNorm, SquaredRelu, Swiglu
from farspan.models.linear import Fp8, Fp8Linear, Linear, Plain, together
from farspan.models.mixers import Softmax
from farspan.models.norm import Layer as LayerNorm
from farspan.models.norm import Norm, Rms
from farspan.parallel import recompute, tensor
from farspan.parallel.context.local import Local
from farspan.platform.config import ConfigError, Source, decode

KINDS: list[Linear] = [Plain(), Fp8(), Fp8(weight_gradient="bf16"), Fp8(recipe="block")]


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@dataclass(frozen=True, kw_only=True)
class Holder:
    linear: Linear = Plain()
    """A choice."""


def test_choices_are_decoded_by_kind() -> None:
    for tree, wanted in (
        ({"kind": "plain"}, Plain()),
        ({"kind": "fp8"}, Fp8()),
        ({"kind": "fp8", "recipe": "block", "weight_gradient": "bf16"}, Fp8(recipe="block", weight_gradient="bf16")),
    ):
        assert decode(Source(tree={"linear": tree}, raw={}), Holder).linear == wanted
    with pytest.raises(ConfigError, match="recipe"):
        decode(Source(tree={"linear": {"kind": "fp8", "recipe": "rows"}}, raw={}), Holder)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_weights_are_those_of_a_plain_layer(kind: Linear) -> None:
    layer = kind.build(128, 256)
    plain = Plain().build(128, 256)
    assert isinstance(layer, nn.Linear) and layer.state_dict().keys() == {"weight"}
    layer.load_state_dict(plain.state_dict())
    x = draw(2, 5, 128)
    error = (layer(x) - plain(x)).norm() / plain(x).norm()
    assert error == 0 if isinstance(kind, Plain) else 0.01 < error < 0.05
    assert layer(x).shape == (2, 5, 256)


def test_a_layer_is_its_kernel_with_the_choices_of_its_config() -> None:
    x, upstream = draw(7, 128), draw(7, 256, seed=1)
    for kind in KINDS[1:]:
        assert isinstance(kind, Fp8)
        layer = kind.build(128, 256)
        wanted = fp8_linear_ref(x, layer.weight, recipe=kind.recipe, weight_gradient=kind.weight_gradient)
        found = layer(x)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
        slopes = [torch.autograd.grad(out, layer.weight, upstream)[0] for out in (found, wanted)]
        torch.testing.assert_close(*slopes, rtol=0, atol=1e-4)


def test_sizes_are_refused_by_name_before_anything_is_built() -> None:
    assert Plain().problems(17, 3, "to_q") == []
    assert Fp8().problems(48, 16, "to_q") == []
    (problem,) = Fp8().problems(40, 16, "ffn.to_out")
    assert problem.startswith("ffn.to_out: inputs=40: must be a multiple of 16") and "kind: plain" in problem
    assert len(Fp8(recipe="block").problems(64, 16, "to_k")) == 2


def test_layers_together_are_each_alone_and_share_their_codes() -> None:
    """Results and all gradients are the same bit for bit; x is quantised and transposed once."""
    x = draw(3, 6, 128, dtype=torch.bfloat16).requires_grad_()
    layers = [kind.build(128, 128).bfloat16() for kind in (Fp8(), Fp8(), Plain(), Fp8(recipe="block"))]
    results = []
    for outs in (together(x, *layers), [layer(x) for layer in layers]):
        loss = sum((out.float() * draw(*out.shape, seed=i)).sum() for i, out in enumerate(outs))
        assert isinstance(loss, Tensor)
        results.append([*outs, *torch.autograd.grad(loss, [x, *(layer.weight for layer in layers)])])
    for left, right in zip(*results, strict=True):
        assert torch.equal(left, right)
    held: dict[int, int] = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: held.update({t.untyped_storage()._cdata: t.untyped_storage().nbytes()}) or t, lambda t: t
    ):
        outs = together(x, *layers[:2])
    weights = 2 * (128 * 128 * 2 + 128 * 4)
    assert sum(held.values()) == weights + 32 * 128 + 128 * 4  # one copy of x's 18 tokens, padded, in eight bits


class Net(nn.Module):
    """Two layers around a bend, with a norm so that both matter."""

    def __init__(self, kind: Linear) -> None:
        super().__init__()
        self.inner, self.outer = kind.build(32, 128), kind.build(128, 16)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.outer(torch.relu(self.inner(x)))
        return out


def learned(kind: Linear) -> tuple[float, float]:
    """First and last loss of a small net that learns another one, in bf16 products under fp32 weights."""
    net, teacher = Net(kind), Net(Plain())
    with torch.no_grad():
        for i, (mine, its) in enumerate(zip(net.parameters(), teacher.parameters(), strict=True)):
            mine.copy_(draw(*mine.shape, seed=i) * mine.shape[1] ** -0.5)
            its.copy_(draw(*its.shape, seed=i + 9) * its.shape[1] ** -0.5)
    optimizer, losses = torch.optim.AdamW(net.parameters(), lr=6e-3), []
    for step in range(80):
        x = draw(64, 32, seed=100 + step)
        weights = {name: weight.bfloat16() for name, weight in net.named_parameters()}
        out = torch.func.functional_call(net, weights, (x.bfloat16(),))
        loss = (out.float() - teacher(x).detach()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses[0], sum(losses[-10:]) / 10


def test_a_net_learns_in_eight_bits_as_in_bf16() -> None:
    first, plain = learned(Plain())
    assert plain < 0.25 * first
    for kind in (Fp8(), Fp8(weight_gradient="bf16")):
        assert learned(kind)[1] < 1.1 * plain


class Layered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(Fp8().build(32, 64), nn.SiLU(), Fp8().build(64, 32))

    def example(self, rows: int, length: int) -> tuple[Tensor]:
        weight = next(self.parameters())
        return (torch.empty(rows, length, 32, dtype=weight.dtype, device=weight.device, requires_grad=True),)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(x)
        return out


@pytest.mark.parametrize(("keep", "products"), [(0.0, 1), (1.0, 0)])
def test_recomputation_gives_the_same_gradients(keep: float, products: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the operator counts as a product, those that are kept do not run again, and the last never does."""
    monkeypatch.setitem(recompute._LEFT, PRODUCT, 0)
    torch.manual_seed(0)
    layer = Layered().bfloat16()
    x, results = draw(2, 9, 32, dtype=torch.bfloat16).requires_grad_(), []
    for _ in range(2):
        out = layer(x)
        with Counted() as counted:
            upstream = draw(*out.shape, dtype=out.dtype)
            results.append(torch.autograd.grad(out, [x, *layer.parameters()], upstream))
        recompute.apply(layer, keep)
    assert counted.products == 4 + products  # two for each layer's gradients
    for plain, again in zip(*results, strict=True):
        assert torch.equal(plain, again)


class Counted(TorchDispatchMode):
    """Counts eight-bit products, and matrices of which codes were made by nobody who had them at hand."""

    def __init__(self) -> None:
        super().__init__()
        self.products = self.quantised = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.products += func is PRODUCT
        self.quantised += func is ROWS
        return func(*args, **(kwargs or {}))


def test_layers_live_on_the_meta_device() -> None:
    with torch.device("meta"):
        layer = Fp8().build(64, 32)
    assert isinstance(layer, Fp8Linear)
    x = torch.empty(2, 3, 64, device="meta", requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None and x.grad.shape == x.shape and layer.weight.grad is not None


# Whole layers, whose norms and activations leave codes behind in place of numbers.

LAYERS: dict[str, tuple[NormPlacement, Norm, Softmax | None, Ffn]] = {
    "pre": ("pre", Rms(), Softmax(heads=4, kv_heads=2), Swiglu(hidden=48)),
    "peri": ("peri", LayerNorm(), Softmax(heads=2, qk_norm=True), Geglu(hidden=48)),
    "post": ("post", Rms(), Softmax(heads=2), Swiglu(hidden=48)),
    "cubic": ("pre", LayerNorm(bias=False), None, PolyNorm(hidden=48)),
    "squared": ("peri", Rms(), Softmax(heads=2), SquaredRelu(hidden=48)),
}


def layer_of(name: str, linear: Linear = Fp8(), device: str = "cpu") -> Layer:  # noqa: B008 - frozen
    placement, norm, mixer, ffn = LAYERS[name]
    with torch.device(device):
        layer = Block(mixer=mixer, ffn=ffn, linear=linear).build(32, 2, norm, placement, Local())
    with torch.no_grad():
        for path, weight in layer.named_parameters():
            initial(layer)[path].fill(weight, key(0, path), tuple(weight.shape), (0,) * weight.dim())
    return layer.bfloat16()


def results(layer: Layer) -> list[Tensor]:
    """What comes out, and all gradients."""
    x = draw(2, 11, 32, seed=1, dtype=torch.bfloat16).requires_grad_()
    out = layer(x, *layer.example(2, 11)[1:])
    return [out, *torch.autograd.grad(out.square().sum(), [x, *layer.parameters()])]


@contextmanager
def numbers_everywhere() -> Iterator[None]:
    """As if no layer were content with codes."""
    before = Fp8.reads_codes
    Fp8.reads_codes = property(lambda self: False)  # type: ignore[assignment, method-assign]
    yield
    Fp8.reads_codes = before  # type: ignore[method-assign]


def test_codes_alone_are_enough_for_rows_in_eight_bits_only() -> None:
    assert [kind.reads_codes for kind in KINDS] == [False, True, False, False]
    layer = Fp8().build(32, 16).bfloat16()
    x = draw(5, 32, dtype=torch.bfloat16)
    both = coded(x, "row", transposed=True)
    nothing = Coded(torch.full((), torch.nan, dtype=x.dtype).expand(5, 32), both.codes)
    assert torch.equal(layer(nothing), layer(x))
    assert all(torch.equal(out, layer(x)) for out in together(nothing, layer, layer))


@pytest.mark.parametrize("name", LAYERS)
def test_layers_read_codes_as_they_read_numbers(name: str) -> None:
    """Bit for bit; a norm under post feeds a sum as well, and leaves numbers behind."""
    layer = layer_of(name)
    fused = results(layer)
    with numbers_everywhere():
        plain = results(layer_of(name))
    assert all(map(torch.equal, fused, plain))
    with torch.no_grad():
        out = layer(draw(2, 11, 32, seed=1, dtype=torch.bfloat16), *layer.example(2, 11)[1:])
    assert torch.equal(out, fused[0])


def test_across_ranks_numbers_travel() -> None:
    """Under tensor parallelism what a layer gathers is a tensor."""
    for name in ("pre", "squared"):
        for part in (layer_of(name).mixer, layer_of(name).ffn):
            assert part is not None and part.reads_codes
            part.__class__ = tensor._exchanging(type(part))
            assert not part.reads_codes


def run_interpreted() -> None:
    """Through the kernels: as with numbers, in every bit, when much runs again, and in one graph."""
    assert triton_runs(torch.zeros(1))
    with Counted() as counted:
        fused = results(layer_of("pre"))
    with Counted() as usual, numbers_everywhere():
        plain = results(layer_of("pre"))
    assert all(map(torch.equal, fused, plain))
    assert counted.quantised == 7 + 7 + 1  # weights, upstream gradients, and what attention found
    assert usual.quantised == counted.quantised + 3
    again, traced = layer_of("pre"), layer_of("pre")
    recompute.apply(again, 0.5)
    traced.forward = torch.compile(traced.forward, fullgraph=True, backend="aot_eager")  # type: ignore[method-assign]
    for layer in (again, traced):
        assert all(map(torch.equal, fused, results(layer)))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs one NVIDIA GPU")
@pytest.mark.parametrize("placement", ["pre", "peri"])
@pytest.mark.parametrize(("norm", "ffn"), [(Rms(), Swiglu(hidden=2816)), (LayerNorm(), Geglu(hidden=14336))], ids=str)
def test_gpu_layers_read_codes_as_they_read_numbers(placement: NormPlacement, norm: Norm, ffn: Ffn) -> None:
    """Without attention, whose backward is never twice the same: in every bit, when much runs again, and compiled."""

    def made(keep: float | None = None) -> Layer:
        with torch.device("cuda"):
            layer = Block(mixer=None, ffn=ffn, linear=Fp8()).build(1024, 2, norm, placement, Local())
        with torch.no_grad():
            for path, weight in layer.named_parameters():
                initial(layer)[path].fill(weight, key(0, path), tuple(weight.shape), (0,) * weight.dim())
        recompute.apply(layer.bfloat16(), keep)
        return layer

    x = draw(2, 515, 1024, seed=1, dtype=torch.bfloat16).cuda().requires_grad_()
    traced = made()
    traced.forward = torch.compile(traced.forward, fullgraph=True, backend="aot_eager")  # type: ignore[method-assign]
    found: list[list[Tensor]] = []
    for layer in (made(), made(0.0), made(0.5), traced):
        out = layer(x, *layer.example(2, 515)[1:])
        found.append([out, *torch.autograd.grad(out.square().sum(), [x, *layer.parameters()])])
    with numbers_everywhere():
        plain = made()
        out = plain(x, *plain.example(2, 515)[1:])
        wanted = [out, *torch.autograd.grad(out.square().sum(), [x, *plain.parameters()])]
    for results_of_one in found:
        assert all(map(torch.equal, results_of_one, wanted))


@pytest.mark.laws
def test_layers_through_the_kernels() -> None:
    if torch.cuda.is_available():
        pytest.skip("the kernels themselves run here")
    elsewhere(run_interpreted, interpret=True)
