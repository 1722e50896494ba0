"""Where a layer's norms stand: names of its weights, and what the placements promise."""

import pytest
import torch
from torch import Tensor

from farspan.kernels.random import key
from farspan.models.block import Block, Layer, NormPlacement
from farspan.models.decoder import Decoder, initial
from farspan.models.ffns import SquaredRelu, Swiglu
from farspan.models.mixers import Softmax
from farspan.models.norm import Layer as LayerNorm
from farspan.models.norm import Rms
from farspan.parallel.context.local import Local
from farspan.parallel.context.shard import Documents

INNER = {"mixer_norm.weight", "ffn_norm.weight"}
OUTER = {"mixer_norm_out.weight", "ffn_norm_out.weight"}


def filled(layer: Layer, seed: int = 0) -> Layer:
    with torch.no_grad():
        for name, weight in layer.named_parameters():
            initial(layer)[name].fill(weight, key(seed, name), tuple(weight.shape), (0,) * weight.dim())
    return layer


@pytest.mark.parametrize(("placement", "norms"), [("pre", INNER), ("post", INNER), ("peri", INNER | OUTER)])
def test_names_of_the_norms(placement: NormPlacement, norms: set[str]) -> None:
    block = Block(mixer=Softmax(heads=2), ffn=SquaredRelu(hidden=9))
    layer = block.build(8, 1, Rms(), placement, Local())
    assert {name for name in layer.state_dict() if "norm" in name} == norms
    assert initial(layer).keys() == layer.state_dict().keys()
    layer = Block(mixer=None, ffn=SquaredRelu(hidden=9)).build(8, 1, LayerNorm(), placement, Local())
    half = {name for name in norms if name.startswith("ffn")}
    assert {name for name in layer.state_dict() if "norm" in name} == half | {n.replace("weight", "bias") for n in half}


@pytest.mark.parametrize(
    ("placement", "norms"),
    [("pre", {"norm.weight"}), ("post", set()), ("peri", {"embed_norm.weight", "norm.weight"})],
)
def test_norms_at_the_ends_of_the_model(placement: NormPlacement, norms: set[str]) -> None:
    blocks = (Block(mixer=Softmax(heads=2), ffn=None),)
    model = Decoder(width=8, blocks=blocks, placement=placement).build(64, Local())
    assert {name for name in model.state_dict() if "norm" in name and "layers" not in name} == norms


def through(placement: NormPlacement, depth: int) -> tuple[Tensor, Tensor]:
    """A stream of variance one, 24 tokens of 48 channels, through `depth` fresh layers: what comes in and goes out."""
    block = Block(mixer=Softmax(heads=4), ffn=SquaredRelu(hidden=192))
    x = out = torch.randn(1, 24, 48, generator=torch.Generator().manual_seed(0)).requires_grad_()
    for seed in range(depth):
        layer = filled(block.build(48, depth, Rms(), placement, Local()), seed)
        out = layer(out, layer.example(1, 24)[1], Documents())
    return x, out


def test_variance_of_the_stream() -> None:
    """pre: one is added over the whole depth. post: stays one. peri: each branch adds one (Kim et al., 2025)."""
    variances = {placement: through(placement, 8)[1].square().mean().item() for placement in ("pre", "post", "peri")}
    assert 1.2 < variances["pre"] < 2.5
    assert variances["post"] == pytest.approx(1.0, abs=1e-3)
    assert variances["peri"] == pytest.approx(17.0, rel=0.15)


@pytest.mark.parametrize("depth", [2, 24])
def test_post_norm_passes_gradients_at_any_depth(depth: int) -> None:
    """Each branch begins as a small step; branches as large as x would make 24 layers' gradient six times larger."""
    x, out = through("post", depth)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    gradient = torch.autograd.grad(out, x, upstream)[0]
    assert 0.7 < gradient.norm() / upstream.norm() < 1.5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs one NVIDIA GPU")
def test_gpu_a_captured_step_takes_documents_of_any_lengths() -> None:
    """Forward and backward of a layer in a CUDA graph, replayed with other numbers in the same x and cu_seqlens."""
    block = Block(mixer=Softmax(heads=4, kv_heads=2, qk_norm=True), ffn=Swiglu(hidden=512))
    with torch.device("cuda"):
        layer = filled(block.build(256, 2, Rms(), "pre", Local())).bfloat16()
    generator = torch.Generator().manual_seed(0)
    bounds = torch.zeros(17, dtype=torch.int32, device="cuda")
    x = torch.zeros(2, 512, 256, dtype=torch.bfloat16, device="cuda").requires_grad_()
    upstream = torch.randn(x.shape, generator=generator).bfloat16().cuda()
    angles = layer.example(2, 512)[1]
    leaves = [x, *layer.parameters()]

    def refill() -> None:
        ends = (torch.randperm(1023, generator=generator)[:13] + 1).sort().values.tolist()
        ends = sorted({0, *ends, 512, 1024})
        bounds.copy_(torch.tensor(ends + [1024] * (17 - len(ends)), dtype=torch.int32))
        x.detach().copy_(torch.randn(x.shape, generator=generator))

    def step() -> tuple[Tensor, ...]:
        return torch.autograd.grad(layer(x, angles, Documents(bounds)), leaves, upstream)

    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    refill()
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(3):
        refill()
        graph.replay()
        for found, wanted in zip(captured, step(), strict=True):
            torch.testing.assert_close(found, wanted, rtol=0, atol=2e-2 * wanted.abs().max().item())
