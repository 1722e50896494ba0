"""PolyNorm equals its formula at every width, and its weights' gradients are the same bits at every run."""

from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from without_gpu import both, compiled

from farspan.kernels import poly_norm as ops
from farspan.kernels.define import triton_runs
from farspan.kernels.poly_norm import poly_norm, poly_norm_ref

gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs one NVIDIA GPU")

EPSILON = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
Op = Callable[..., Tensor]


def written_out(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-6) -> Tensor:
    """The published formula, in x's own type."""
    powers = [x, x * x, x * x * x]
    return bias + sum(w * p / (p.square().mean(-1, keepdim=True) + eps).sqrt() for w, p in zip(weight, powers))  # noqa: B905


def draw(
    *shape: int, dtype: torch.dtype, device: str = "cpu", how: str = "dense"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, weight, bias, dout; x and dout amid NaN: `dense`, `rows` that lie apart, or `columns` that do."""
    made = torch.Generator().manual_seed(shape[-1])
    width, found = shape[-1], []
    for _ in range(2):
        if how == "dense":
            room = torch.full((torch.Size(shape).numel() + 64,), torch.nan, dtype=dtype, device=device)
            view = room[32:-32].view(shape)
        elif how == "rows":
            view = torch.full((*shape[:-1], width + 8), torch.nan, dtype=dtype, device=device)[..., :width]
        else:
            view = torch.full((*shape, 2), torch.nan, dtype=dtype, device=device)[..., 1]
        found.append(view.copy_(torch.randn(shape, generator=made).to(device, dtype)))
    weight, bias = torch.tensor([0.4, -0.3, 0.2]), torch.tensor([0.1])
    return found[0], weight.to(device, dtype), bias.to(device, dtype), found[1]


def gradients(op: Op, leaves: tuple[Tensor, ...], dout: Tensor) -> tuple[Tensor, ...]:
    leaves = tuple(x.detach().requires_grad_() for x in leaves)
    out = op(*leaves)
    return out.detach(), *torch.autograd.grad(out, leaves, dout)


@pytest.mark.parametrize("width", [1, 2, 63])
def test_equals_its_formula(width: int) -> None:
    *leaves, dout = draw(2, 3, width, dtype=torch.float64)
    for op in (poly_norm, poly_norm_ref):
        for ours, wanted in zip(
            gradients(op, tuple(leaves), dout), gradients(written_out, tuple(leaves), dout), strict=True
        ):
            torch.testing.assert_close(ours, wanted)
    x, weight, bias, _ = (y.detach().requires_grad_() for y in draw(2, 5, dtype=torch.float64))
    assert torch.autograd.gradcheck(partial(poly_norm_ref, eps=1e-2), (x, weight, bias))


def test_each_power_alone_has_a_mean_square_of_one() -> None:
    x, _, bias, _ = draw(7, 300, dtype=torch.float64)
    for i in range(3):
        out = poly_norm(1000 * x, torch.eye(3, dtype=x.dtype)[i], 0 * bias)
        torch.testing.assert_close(out.square().mean(-1), torch.ones(7, dtype=x.dtype), rtol=1e-9, atol=0)


def test_rounds_once() -> None:
    x, weight, bias, _ = draw(9, 37, dtype=torch.bfloat16)
    wanted = poly_norm(x.float(), weight.float(), bias.float()).bfloat16()
    assert torch.equal(poly_norm(x, weight, bias), wanted)


def test_what_does_not_fit_is_refused() -> None:
    x, weight, bias, _ = draw(2, 5, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"weight \(2,\) must be \(3,\), bias \(1,\) must be \(1,\)"):
        poly_norm(x, weight[:2], bias)
    with pytest.raises(ValueError, match=r"eps=0.0 positive; 1e-6 is usual"):
        poly_norm(x, weight, bias, 0.0)


def kernels_equal_their_twins(device: str, dtypes: tuple[torch.dtype, ...], shapes: list[tuple[int, ...]]) -> None:
    """Within twice torch's own error in that type, and what one rounding and fp32 sums leave."""
    for dtype, shape, how in product(dtypes, shapes, ("dense", "rows", "columns")):
        x, weight, bias, dout = draw(*shape, dtype=dtype, device=device, how=how)
        if how == "rows":
            weight, bias = weight.float(), bias.float()
        wanted = gradients(poly_norm_ref, tuple(y.double() for y in (x, weight, bias)), dout.double())
        usual = gradients(written_out, (x, weight.to(dtype), bias.to(dtype)), dout)
        found = gradients(poly_norm, (x, weight, bias), dout)
        steep = (dout / x.float().square().mean(-1, keepdim=True).sqrt()).abs().amax()
        scales = (wanted[0].abs().amax(), steep, 1 + x.numel() ** 0.5, 1 + x.numel() ** 0.5)  # before anything cancels
        for i, (ours, torchs, exact) in enumerate(zip(found, usual, wanted, strict=True)):
            assert ours.dtype == (x, x, weight, bias)[i].dtype and ours.is_contiguous() and ours.shape == exact.shape
            allowed = 2 * (torchs.double() - exact).abs().nan_to_num(torch.inf) + EPSILON[ours.dtype] * exact.abs()
            allowed += 3e-6 * scales[i]
            assert ((ours.double() - exact).abs() <= allowed).all(), (i, dtype, shape, how)
        assert all(map(torch.equal, found, gradients(poly_norm, (x, weight, bias), dout))), "not the same bits again"


def kernels_write_nothing_else(device: str, dtype: torch.dtype) -> None:
    """Between guard bands the results are whole, the bands NaN as before, and the inputs as they were."""
    for shape, most in product([(1, 1), (3, 63), (2, 5000)], (1, 8192)):
        x, weight, bias, dout = draw(*shape, dtype=dtype, device=device)
        before, (rows, width) = [x.clone(), dout.clone()], shape
        numbers = {"out": x.numel(), "dx": x.numel(), "scales": 3 * rows, "sums": 4 * rows}
        types = {"out": dtype, "dx": dtype}
        rooms = {
            name: torch.full((count + 8192,), torch.nan, dtype=types.get(name, torch.float32), device=device)
            for name, count in numbers.items()
        }
        inner = {name: room[4096:-4096] for name, room in rooms.items()}
        sizes = ops._sizes(width, most)
        ops._forward[(rows,)](inner["out"], inner["scales"], x, weight, bias, width, width, eps=1e-6, **sizes)
        given = (dout, x, weight, inner["scales"], rows, width, width, width)
        ops._backward[(rows,)](inner["dx"], inner["sums"], *given, **sizes)
        for name, room in rooms.items():
            assert inner[name].isfinite().all(), name
            assert room[:4096].isnan().all() and room[-4096:].isnan().all(), name
        torch.testing.assert_close(inner["out"].view(shape), poly_norm(x, weight, bias), rtol=1e-2, atol=1e-2)
        assert torch.equal(x, before[0]) and torch.equal(dout, before[1])


def kernels_are_one_node_among_others(device: str, dtype: torch.dtype) -> None:
    """A second user of the input and of the upstream gradient, checkpointing, expanded gradients, no rows."""
    x, weight, bias, _ = draw(5, 24, dtype=dtype, device=device)

    def shared(op: Op, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        out = op(x, weight, bias)
        return out + out.sin() + x

    ones = torch.ones((), dtype=dtype, device=device).expand(5, 24)
    leaves = (x, weight, bias)
    found, twin = (gradients(partial(shared, which), leaves, ones) for which in (poly_norm, poly_norm_ref))
    torch.testing.assert_close(found, twin, rtol=8 * EPSILON[dtype], atol=64 * EPSILON[dtype])
    again = gradients(partial(checkpoint, partial(shared, poly_norm), use_reentrant=False), leaves, ones)
    assert all(map(torch.equal, found, again))
    out, dx, *rest = gradients(poly_norm, (x[:0], weight, bias), ones[:0])
    assert out.shape == dx.shape == (0, 24) and not any(y.any() for y in rest)


def kernels_stay_whole_under_a_compiler(device: str) -> None:
    *leaves, dout = draw(2, 3, 24, dtype=torch.float32, device=device)
    torch._dynamo.reset()
    whole = torch.compile(poly_norm, fullgraph=True, backend="aot_eager")
    found, wanted = (gradients(op, tuple(leaves), dout) for op in (whole, poly_norm))
    assert all(map(torch.equal, found, wanted))
    x, weight, bias = leaves
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(ops._POLY_NORM, (x, weight, bias, 1e-6), test_utils=tests)
    scales = ops._POLY_NORM(x, weight, bias, 1e-6)[1]
    torch.library.opcheck(ops._POLY_NORM_BACKWARD, (dout.mT.contiguous().mT, x, weight, scales), test_utils=tests)


@gpu
@needs_gpu
def test_gpu_kernels_equal_their_twins() -> None:
    """Widths of one stretch and of several, forward and backward, full and not."""
    shapes = [(2, 515, 14336), (67, 8192), (33, 16384), (19, 28673), (1003, 352), (1001, 63), (3, 1)]
    kernels_equal_their_twins("cuda", (torch.bfloat16,), shapes)


@gpu
@needs_gpu
@pytest.mark.parametrize("dtype", EPSILON, ids=str)
def test_gpu_kernels_in_every_type(dtype: torch.dtype) -> None:
    kernels_equal_their_twins("cuda", (dtype,), [(8200,), (35, 1000)])
    kernels_write_nothing_else("cuda", dtype)
    kernels_are_one_node_among_others("cuda", dtype)


@gpu
@needs_gpu
def test_gpu_kernels_stay_whole_under_a_compiler() -> None:
    kernels_stay_whole_under_a_compiler("cuda")


@gpu
@needs_gpu
def test_gpu_kernels_reach_beyond_32_bits() -> None:
    """Rows that begin 2^31 elements apart, and more than 2^31 elements in all."""
    room = torch.randn((1 << 31) + 4096 * 8, dtype=torch.bfloat16, device="cuda")
    weight, bias = torch.full((3,), 0.3, device="cuda"), torch.zeros(1, device="cuda")
    for view in (room.as_strided((2, 4096), (1 << 31, 1)), room.view(-1, 4096)):
        out, dx, *_ = gradients(poly_norm, (view, weight, bias), view)
        alone = gradients(poly_norm, (view[-1:].clone(), weight, bias), view[-1:].clone())
        torch.testing.assert_close((out[-1:], dx[-1:]), alone[:2], rtol=8e-3, atol=1e-3)
        del out, dx


def run_interpreted() -> None:
    assert triton_runs(torch.zeros(1))
    kernels_equal_their_twins("cpu", tuple(EPSILON), [(1, 1), (2, 3, 21), (5, 64), (300,)])
    kernels_equal_their_twins("cpu", (torch.float32,), [(2, 8200), (1, 16400)])
    for dtype in EPSILON:
        kernels_write_nothing_else("cpu", dtype)
    kernels_are_one_node_among_others("cpu", torch.float32)
    kernels_stay_whole_under_a_compiler("cpu")


def run_compiled() -> None:
    """Rows of every length stay in registers, few enough for two rows at once."""
    pointers = dict.fromkeys(("p_weight", "p_bias", "p_scales", "p_sums"), "*fp32")
    kernels: list[tuple[Any, int, dict[str, Any]]] = [
        (ops._forward, ops._MOST_FORWARD, {"eps": 1e-6}),
        (ops._backward, ops._MOST_BACKWARD, {}),
    ]
    for (kernel, most, fixed), width in product(kernels, (63, 1024, 8192, 14336, 28672)):
        sizes = ops._sizes(width, most)
        warps = sizes.pop("num_warps")
        names = [n for n in kernel.arg_names if n not in fixed and n not in sizes]
        types = {n: pointers.get(n, "*bf16") if n.startswith("p_") else "i32" for n in names}
        built = compiled(kernel, types, fixed | sizes, num_warps=warps)
        assert built.stack == 0 and built.registers * warps * 32 <= 32768, (kernel, width, built.registers)


test_kernels_without_a_gpu = both(run_interpreted, run_compiled)
