"""A norm equals its formula, gradients included, and loses nothing to bf16 but the rounding of its result."""

import pytest
import torch
from torch import Tensor

from farspan.models.decoder import initial
from farspan.models.norm import Layer, Norm, Rms

NORMS: dict[str, Norm] = {"rms": Rms(eps=1e-3), "layer": Layer(eps=1e-3), "no bias": Layer(bias=False)}


def by_hand(x: Tensor, norm: Norm, weight: Tensor, bias: Tensor | None) -> Tensor:
    centred = x - x.mean(-1, keepdim=True) if isinstance(norm, Layer) else x
    out = centred / (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt() * weight
    return out if bias is None else out + bias


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("width", [1, 7, 130])
def test_equals_its_formula(name: str, width: int) -> None:
    module = NORMS[name].build(width).double()
    weights = list(module.parameters())
    for weight in weights:
        torch.nn.init.normal_(weight, generator=torch.Generator().manual_seed(width))
    x = torch.randn(3, 5, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    upstream = torch.randn(3, 5, width, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    out, wanted = module(x), by_hand(x, NORMS[name], weights[0], weights[1] if len(weights) > 1 else None)
    torch.testing.assert_close(out, wanted)
    for left, right in zip(
        torch.autograd.grad(out, [x, *weights], upstream),
        torch.autograd.grad(wanted, [x, *weights], upstream),
        strict=True,
    ):
        torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", NORMS)
def test_bf16_is_normed_in_fp32(name: str) -> None:
    """A mean of 100 leaves bf16 no digits for the deviation; each result is within one rounding of the exact one."""
    x = (torch.randn(9, 3000, generator=torch.Generator().manual_seed(0)) * 3 + 100).bfloat16()
    module = NORMS[name].build(3000).bfloat16()
    with torch.no_grad():
        for path, weight in module.named_parameters():
            weight.fill_(initial(module)[path].mean)
        exact = by_hand(
            x.double(), NORMS[name], *(weight.double() for weight in (*module.parameters(),)), *_absent(name)
        )
        error = (module(x).double() - exact).abs()
    assert (error <= exact.abs() * 2**-8 + 1e-6).all()


def _absent(name: str) -> tuple[None, ...]:
    return () if name == "layer" else (None,)


def test_gains_begin_at_one_and_biases_at_zero() -> None:
    assert {name: start.mean for name, start in initial(Layer().build(3)).items()} == {"weight": 1.0, "bias": 0.0}
    assert {name: start.std for name, start in initial(Layer().build(3)).items()} == {"weight": 0.0, "bias": 0.0}
    assert list(dict(Layer(bias=False).build(3).named_parameters())) == ["weight"]


@pytest.mark.parametrize("kind", [Rms, Layer])
def test_eps_must_be_positive(kind: type[Rms] | type[Layer]) -> None:
    with pytest.raises(ValueError, match=r"eps=0\.0: must be positive; 1e-5 is usual"):
        kind(eps=0.0)
