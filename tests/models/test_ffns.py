"""Every feed-forward kind equals its formula, counts its products, and begins at a size that adds up over depth."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from without_gpu import elsewhere

from farspan.models.block import Block
from farspan.models.decoder import initial
from farspan.models.ffns import Ffn, Geglu, PolyNorm, SquaredRelu, Swiglu
from farspan.models.norm import Rms
from farspan.parallel import recompute
from farspan.parallel.context.local import Local
from farspan.platform.config import kind

KINDS: dict[str, type[Ffn]] = {"swiglu": Swiglu, "geglu": Geglu, "squared_relu": SquaredRelu, "poly_norm": PolyNorm}


def polynomial(u: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    powers = [u**i / (u ** (2 * i)).mean(-1, keepdim=True).add(1e-6).sqrt() for i in (1, 2, 3)]
    return bias + weight[0] * powers[0] + weight[1] * powers[1] + weight[2] * powers[2]


def between(name: str) -> Callable[..., Tensor]:
    """The formula between the products, of them and of weights of its own."""
    return {
        "swiglu": lambda gate, up: gate * torch.sigmoid(gate) * up,
        "geglu": lambda gate, up: F.gelu(gate, approximate="tanh") * up,
        "squared_relu": lambda up: torch.where(up > 0, up**2, 0),
        "poly_norm": polynomial,
    }[name]


@pytest.mark.parametrize("name", KINDS)
def test_is_a_choice_of_that_name(name: str) -> None:
    assert kind(KINDS[name]) == name


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(("width", "hidden"), [(3, 1), (8, 21)])
def test_equals_its_formula(name: str, width: int, hidden: int) -> None:
    module = KINDS[name](hidden=hidden).build(width, 2).double()
    made = torch.Generator().manual_seed(0)
    weights = dict(module.named_parameters())
    with torch.no_grad():
        for weight in weights.values():
            weight.normal_(generator=made)
    x = torch.randn(2, 5, width, dtype=torch.float64, generator=made).requires_grad_()
    products = [x @ weights[f"{to}.weight"].T for to in ("to_gate", "to_up") if f"{to}.weight" in weights]
    own = [weight for path, weight in weights.items() if weight.dim() == 1]
    wanted = between(name)(*products, *own) @ weights["to_out.weight"].T
    out = module(x)
    torch.testing.assert_close(out, wanted)
    leaves = [x, *weights.values()]
    found = torch.autograd.grad(out.sin().sum(), leaves)
    torch.testing.assert_close(found, torch.autograd.grad(wanted.sin().sum(), leaves))


@pytest.mark.parametrize("name", KINDS)
def test_flops_are_what_torch_counts(name: str) -> None:
    module = KINDS[name](hidden=21).build(8, 2)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(torch.randn(1, 13, 8))
    assert module.flops((4, 9)) == counter.get_total_flops()


@pytest.mark.parametrize(
    ("name", "size"), [("swiglu", 0.356), ("geglu", 0.425), ("squared_relu", 1.5), ("poly_norm", 0.505)]
)
def test_scales_keep_the_sum_of_all_branches_near_one(name: str, size: float) -> None:
    depth, width = 3, 128
    module = KINDS[name](hidden=1024).build(width, depth)
    made = torch.Generator().manual_seed(0)
    starts = initial(module)
    assert set(starts) == {path for path, _ in module.named_parameters()}
    with torch.no_grad():
        for path, weight in module.named_parameters():
            weight.normal_(starts[path].mean, starts[path].std, generator=made)
        out = module(torch.randn(400, width, generator=made))
    assert 2 * depth * out.square().mean() == pytest.approx(size, rel=0.1)


@pytest.mark.parametrize("name", KINDS)
def test_a_hidden_size_of_zero_is_refused(name: str) -> None:
    usual = "8/3 of" if name in ("swiglu", "geglu") else "4 times"
    with pytest.raises(ValueError, match=f"hidden=0: must be at least 1; {usual} the width is usual"):
        KINDS[name](hidden=0)


def test_an_eps_of_zero_is_refused() -> None:
    with pytest.raises(ValueError, match=r"eps=0: must be positive; 1e-6 is usual"):
        PolyNorm(hidden=8, eps=0)


def test_ranks_that_would_cut_wrongly_are_named() -> None:
    for cls in (Swiglu, Geglu, SquaredRelu):
        assert cls(hidden=8).tensor_problems(4) == []
        assert cls(hidden=6).tensor_problems(4) == ["hidden=6: must be a multiple of parallel.tp=4"]
    problem = "kind=poly_norm: takes means over all hidden channels, which parallel.tp=2 would deal out; set "
    assert PolyNorm(hidden=8).tensor_problems(2) == [f"{problem}parallel.tp=1, or another kind"]


def recomputation_is_exact(device: str) -> None:
    """On kernels: selective recomputation of a layer gives the same bits as none, and nearly those of fp64's twins."""
    documents = Local().example(2, 9)
    for cls in KINDS.values():
        layers = [Block(mixer=None, ffn=cls(hidden=40)).build(24, 2, Rms(), "pre", Local()) for _ in range(3)]
        made = torch.Generator().manual_seed(0)
        for path, weight in layers[0].named_parameters():
            drawn = torch.randn(weight.shape, generator=made) * 24**-0.5
            for layer in layers:
                layer.get_parameter(path).data = drawn.to(device)
        recompute.apply(layers[1], 0.5)
        layers[2].double()
        found = []
        for layer in layers:
            x = torch.randn(2, 9, 24, generator=torch.Generator().manual_seed(1)).to(device)
            x = x.to(next(layer.parameters()).dtype).requires_grad_()
            out = layer(x, None, documents)
            found.append([out, *torch.autograd.grad(out.square().sum(), [x, *layer.parameters()])])
        assert all(map(torch.equal, found[0], found[1])), cls
        torch.testing.assert_close(found[0], [x.float() for x in found[2]], rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs one NVIDIA GPU")
def test_gpu_recomputation_is_exact() -> None:
    recomputation_is_exact("cuda")


def run_interpreted() -> None:
    recomputation_is_exact("cpu")


def test_recomputation_is_exact_without_a_gpu() -> None:
    if torch.cuda.is_available():
        pytest.skip("the kernels themselves run here")
    elsewhere(run_interpreted, interpret=True)
