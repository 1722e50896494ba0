"""Logits of bf16 tokens are as good as fp32's, and their gradients good to 2⁻¹⁶ before they are rounded."""

from collections.abc import Callable
from functools import partial
from itertools import product

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from without_gpu import both, compiled

from farspan.kernels import router_logits as ops
from farspan.kernels.define import triton_runs
from farspan.kernels.router_logits import router_logits, router_logits_ref

gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs one NVIDIA GPU")

Op = Callable[..., Tensor]
Shape = tuple[int, int, int]


def draw(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def inputs(shape: Shape, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """x, weights and the logits' gradient for tokens, width and experts. The weights' sizes span many powers of two."""
    tokens, width, experts = shape
    weight = draw(experts, width, device=device, seed=1) * draw(experts, width, device=device, seed=2).exp2()
    return draw(tokens, width, dtype=dtype, device=device), weight, draw(tokens, experts, device=device, seed=3)


def gradients(op: Op, given: tuple[Tensor, Tensor], dout: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The result, then the gradients."""
    leaves = [t.detach().requires_grad_() for t in given]
    out = op(*leaves)
    dx, dweight = torch.autograd.grad(out, leaves, dout)
    return out.detach(), dx, dweight


def errors_are_small(device: str, shapes: list[Shape]) -> None:
    """Of each number, in parts of what its terms amount to, with their sums' errors, which grow like √D at worst."""
    for shape, kind in product(shapes, (torch.float32, torch.bfloat16)):
        x, weight, dlogits = inputs(shape, torch.bfloat16, device)
        weight = weight.to(kind)
        wide = x.double(), weight.double()
        exact = gradients(router_logits_ref, wide, dlogits.double())
        terms = gradients(router_logits_ref, (wide[0].abs(), wide[1].abs()), dlogits.double().abs())
        found = gradients(router_logits, (x, weight), dlogits)
        again = gradients(partial(checkpoint, router_logits, use_reentrant=False), (x, weight), dlogits)
        assert all(map(torch.equal, found, again))
        assert [t.dtype for t in found] == [torch.float32, torch.bfloat16, kind]
        rounding = (0, 2**-8, 2**-8 if kind == torch.bfloat16 else 0)
        for ours, wanted, size, part, rounded in zip(found, exact, terms, (20, 16, 16), rounding, strict=True):
            assert ours.is_contiguous() and ours.shape == wanted.shape
            assert ((ours.double() - wanted).abs() <= 2**-part * size + rounded * wanted.abs()).all(), (shape, part)
        one = x.bfloat16().double() @ weight.bfloat16().double().T
        if x.shape[1] > 8 and kind == torch.float32:  # that one bf16 product would not pass
            assert ((one - exact[0]).abs() > 2**-20 * terms[0]).any()


def parts_sum_to_the_whole(device: str) -> None:
    """Every bit of a number is in one of its three parts, and nothing else is written."""
    x = torch.cat([draw(7, 33, device=device), draw(7, 33, device=device, seed=1) * 1e-20]).T
    for beside, which in product((True, False), ((2, 1, 0), (0, 0, 1), (0, 1, 0))):
        parts = ops._parts(x, which, beside=beside).double().chunk(3, 1 if beside else 0)
        a = parts[which.index(0)]
        assert ((a - x).abs() <= 2**-7 * x.abs()).all()  # the interpreter cuts, a GPU rounds
        if 2 in which:
            assert ((sum(parts) - x.double()).abs() <= 2**-21 * x.abs()).all()
        else:
            b = parts[which.index(1)]
            assert ((a + b - x).abs() <= 2**-14 * x.abs()).all()
            assert sum(torch.equal(p, a) for p in parts) == 2
    given = draw(5, 21, device=device)
    assert torch.equal(ops._joined(given), (given[:, :7] + given[:, 7:14]) + given[:, 14:])


def it_is_one_node_among_others(device: str, dtype: torch.dtype) -> None:
    x, weight, _ = inputs((11, 24, 5), dtype, device)
    ones = torch.ones((), device=device).expand(11, 5)

    def shared(op: Op, x: Tensor, weight: Tensor) -> Tensor:
        out = op(x, weight)
        return out + torch.sin(out) + x.sum() + weight.sum()

    found, twin = (gradients(partial(shared, op), (x, weight), ones) for op in (router_logits, router_logits_ref))
    for ours, wanted in zip(found, twin, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-2 if ours.dtype == torch.bfloat16 else 2e-4, atol=2e-3)
    torch._dynamo.reset()
    whole = torch.compile(shared, fullgraph=True, backend="aot_eager")
    assert all(map(torch.equal, found, gradients(partial(whole, router_logits), (x, weight), ones)))
    strided = x.T.contiguous().T, weight.T.contiguous().T
    for ours, same in zip(gradients(partial(shared, router_logits), strided, ones), found, strict=True):
        torch.testing.assert_close(ours, same, rtol=1e-2 if ours.dtype == torch.bfloat16 else 1e-4, atol=1e-3)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(ops.ROUTER_LOGITS, strided, test_utils=tests)
    torch.library.opcheck(ops._BACKWARD, (ones, *strided), test_utils=tests)
    out, dx, dweight = gradients(router_logits, (x[:0], weight), ones[:0])
    assert out.shape == (0, 5) and dx.shape == (0, 24) and not dweight.any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_other_types_are_the_plain_product(dtype: torch.dtype) -> None:
    x, weight, dlogits = inputs((37, 21, 5), dtype, "cpu")
    dlogits = dlogits.to(torch.promote_types(dtype, torch.float32))
    found, twin = (gradients(op, (x, weight), dlogits) for op in (router_logits, router_logits_ref))
    for ours, wanted in zip(found, twin, strict=True):
        torch.testing.assert_close(ours, wanted)
    assert found[0].dtype == dlogits.dtype and found[1].dtype == dtype


def test_errors_are_small() -> None:
    errors_are_small("cpu", [(1, 1, 1), (63, 100, 7)])


def test_gradients_are_those_of_differences() -> None:
    leaves = [draw(*shape, dtype=torch.float64).requires_grad_() for shape in ((5, 3), (4, 3))]
    assert torch.autograd.gradcheck(router_logits, leaves)


def test_it_is_one_node_among_others() -> None:
    it_is_one_node_among_others("cpu", torch.float32)
    it_is_one_node_among_others("cpu", torch.bfloat16)


def test_operations_are_counted() -> None:
    x, weight, _ = inputs((9, 16, 4), torch.bfloat16, "cpu")
    with FlopCounterMode(display=False) as counter:
        router_logits(x.requires_grad_(), weight.requires_grad_()).sum().backward()
    assert counter.get_total_flops() == 6 * 9 * 16 * 4


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"router_logits: x \(5, 3\) and weight \(4, 2\) must be T D and E D"):
        router_logits(torch.zeros(5, 3), torch.zeros(4, 2))


def run_interpreted() -> None:
    assert triton_runs(torch.zeros(1))
    parts_sum_to_the_whole("cpu")
    it_is_one_node_among_others("cpu", torch.bfloat16)
    errors_are_small("cpu", [(1, 1, 1), (63, 100, 7), (130, 16, 64)])


def run_compiled() -> None:
    """Nothing is spilled, and 16 bytes move at a time where numbers of experts are even."""
    for which, (b_r, b_d) in product(((2, 1, 0), (0, 0, 1), (0, 1, 0)), ((1, 1024), (8, 128), (1024, 1))):
        parts = dict(zip(("first", "second", "third"), which, strict=True))
        types = {"p_out": "*bf16", "p_x": "*fp32", "rows": "i32", "width": "i32", "out_row": "i32", "step": "i32"}
        built = compiled(ops._take_apart, types, {**parts, "b_r": b_r, "b_d": b_d}, num_warps=4)
        assert built.stack == 0 and built.registers <= 64, (which, b_d, built.registers)
        assert b_d == 1 or "ld.global.v4" in built.ptx
    types = {"p_out": "*fp32", "p_x": "*fp32", "rows": "i32", "width": "i32"}
    built = compiled(ops._join, types, {"b_r": 8, "b_d": 128}, num_warps=4)
    assert built.stack == 0 and built.registers <= 64 and "ld.global.v4" in built.ptx, built.registers


test_kernels_without_a_gpu = both(run_interpreted, run_compiled)


@gpu
@needs_gpu
def test_gpu_errors_are_small() -> None:
    parts_sum_to_the_whole("cuda")
    shapes = [(1, 1, 1), (63, 100, 7), (4097, 4096, 128), (1000, 2048, 64), (3000, 7168, 256), (515, 1000, 9)]
    errors_are_small("cuda", shapes)


@gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gpu_it_is_one_node_among_others(dtype: torch.dtype) -> None:
    it_is_one_node_among_others("cuda", dtype)
