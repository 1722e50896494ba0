"""The chunked divergence is the whole divergence, and a student that is its teacher has nothing to learn."""

from itertools import product
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.nn.functional import kl_div
from without_gpu import both, compiled

from farspan.kernels import linear_cross_entropy as room
from farspan.kernels import linear_kl as ops
from farspan.kernels.define import triton_runs
from farspan.kernels.linear_kl import linear_kl, linear_kl_ref

gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs one NVIDIA GPU")


def inputs(
    tokens: int, vocabulary: int, dtype: torch.dtype, device: str = "cpu", widths: tuple[int, int] = (24, 40)
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Student, a wider teacher, and which tokens count."""
    generator, found = torch.Generator().manual_seed(tokens), []
    for width in widths:
        found.append(torch.randn(tokens, width, generator=generator))
        found.append(2 * torch.randn(vocabulary, width, generator=generator) / width**0.5)
    moved = [x.to(device, dtype) for x in found]
    counted = torch.arange(tokens, device=device) % 3 != 1
    return moved[0].requires_grad_(), moved[1].requires_grad_(), moved[2], moved[3], counted


def drawn_weights(tokens: int, device: str) -> Tensor:
    return torch.rand(tokens, generator=torch.Generator().manual_seed(1)).mul(3).floor().div(2).to(device)


def chunked(tokens: int) -> Any:
    return mock.patch.object(room, "_most", lambda hidden, weight: 2 * tokens)


def apart(left: Tensor, right: Tensor) -> float:
    return float((left.double() - right.double()).norm() / right.double().norm().clamp(min=1e-9))


def equals_reference(
    device: str, dtype: torch.dtype, sizes: tuple[tuple[int, int], ...], chunk: int, tolerance: float
) -> None:
    for (tokens, vocabulary), temperature in product(sizes, (1.0, 2.5)):
        student, *teacher, counted = [inputs(tokens, vocabulary, dtype, device)[i] for i in (0, 1, 2, 3, 4)]
        hidden, weight, teacher = student, teacher[0], teacher[1:]
        for weights in (None, drawn_weights(tokens, device)):
            options: dict[str, Any] = {"temperature": temperature, "weights": weights}
            with chunked(chunk):
                ours = linear_kl(hidden, weight, *teacher, counted, **options)
            double = [x.double() for x in (hidden, weight, *teacher)]
            theirs = linear_kl_ref(*double, counted, **options)
            assert ours.dtype == torch.promote_types(dtype, torch.float32)
            torch.testing.assert_close(ours.double(), theirs, rtol=tolerance, atol=tolerance)
            mine = torch.autograd.grad(ours * 0.37, (hidden, weight))
            for left, right in zip(mine, torch.autograd.grad(theirs * 0.37, (hidden, weight)), strict=True):
                assert left.dtype == dtype and apart(left, right) < tolerance, (tokens, vocabulary, temperature)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4), (torch.bfloat16, 2e-2)], ids=str
)
@pytest.mark.parametrize("chunk", [7, 63, 4096])
def test_equals_reference(dtype: torch.dtype, tolerance: float, chunk: int) -> None:
    equals_reference("cpu", dtype, ((1, 131), (63, 131), (1000, 57)), chunk, tolerance)


def test_the_specification_is_torchs_own_divergence() -> None:
    *given, counted = inputs(33, 57, torch.float64)
    log_q, log_p = (torch.log_softmax(h @ w.T / 2, 1)[counted] for h, w in (given[:2], given[2:]))
    theirs = 4 * kl_div(log_q, log_p.detach(), reduction="sum", log_target=True)
    ours = linear_kl_ref(*given, counted, temperature=2.0)
    torch.testing.assert_close(ours, theirs)
    grads = (torch.autograd.grad(x, given[:2]) for x in (ours, theirs))
    torch.testing.assert_close(*grads)


def test_gradients_are_those_of_the_value() -> None:
    hidden, weight, *teacher, counted = inputs(5, 7, torch.float64)
    for function in (linear_kl, linear_kl_ref):
        with chunked(2):
            assert torch.autograd.gradcheck(
                lambda h, w, f=function: f(h, w, *teacher, counted, temperature=1.7), (hidden, weight)
            )


def a_student_that_is_its_teacher_learns_nothing(device: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        hidden, weight, _, _, counted = inputs(9, 50, dtype, device)
        loss = linear_kl(hidden, weight, hidden.detach(), weight.detach(), counted)
        assert abs(loss.item()) < 1e-5
        for gradient in torch.autograd.grad(loss, (hidden, weight)):
            assert gradient.abs().max() < 1e-5


def test_a_student_that_is_its_teacher_learns_nothing() -> None:
    a_student_that_is_its_teacher_learns_nothing("cpu")


def the_teacher_and_frozen_parts_get_no_gradient(device: str) -> None:
    hidden, weight, *teacher, counted = inputs(9, 11, torch.float32, device)
    teacher = [x.requires_grad_() for x in teacher]
    both = linear_kl(hidden, weight, *teacher, counted)
    wanted = torch.autograd.grad(both, (hidden, weight, *teacher), allow_unused=True)
    assert wanted[2] is None and wanted[3] is None
    left = torch.autograd.grad(linear_kl(hidden, weight.detach(), *teacher, counted), hidden)[0]
    right = torch.autograd.grad(linear_kl(hidden.detach(), weight, *teacher, counted), weight)[0]
    assert torch.equal(left, wanted[0]) and torch.equal(right, wanted[1])
    with torch.no_grad():
        alone = linear_kl(hidden, weight, *teacher, counted)
    torch.testing.assert_close(alone, both.detach())


def test_the_teacher_and_frozen_parts_get_no_gradient() -> None:
    the_teacher_and_frozen_parts_get_no_gradient("cpu")


def nothing_counted_is_zero(device: str) -> None:
    hidden, weight, *teacher, counted = inputs(9, 11, torch.float32, device)
    with torch.no_grad():
        hidden[1::3], teacher[0][1::3] = 1e30, -1e30  # not counted: may hold anything
    loss = linear_kl(hidden, weight, *teacher, counted)
    assert loss.isfinite() and not torch.autograd.grad(loss, hidden)[0][1::3].any()
    loss = linear_kl(hidden, weight, *teacher, torch.zeros_like(counted))
    assert loss == 0 and not any(g.any() for g in torch.autograd.grad(loss, (hidden, weight)))
    none = hidden.detach()[:0].requires_grad_()
    loss = linear_kl(none, weight, teacher[0][:0], teacher[1], counted[:0])
    assert loss == 0 and not torch.autograd.grad(loss, weight)[0].any()


def test_nothing_counted_is_zero() -> None:
    nothing_counted_is_zero("cpu")


def test_compilers_change_nothing() -> None:
    hidden, weight, *teacher, counted = inputs(13, 17, torch.float32)

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_kl(2 * hidden, weight, *teacher, counted, temperature=2.0) / 7

    plain, found = (f(hidden, weight) for f in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")))
    grads = [(x, *torch.autograd.grad(x, (hidden, weight))) for x in (plain, found)]
    assert all(torch.equal(left, right) for left, right in zip(*grads, strict=True))
    for flags in ((True, True), (False, False)):
        arguments = (hidden.detach(), weight.detach(), *teacher, counted, None, 2.0, torch.float32, *flags)
        torch.library.opcheck(torch.ops.farspan.linear_kl.default, arguments)


def test_what_does_not_fit_is_refused() -> None:
    hidden, weight, *teacher, counted = inputs(9, 11, torch.bfloat16)
    wrong: list[tuple[str, tuple[Tensor, ...], dict[str, Any]]] = [
        ("the student's N and V", (hidden, weight, teacher[0][1:], teacher[1], counted), {}),
        ("the student's N and V", (hidden, weight, teacher[0], teacher[1][1:], counted), {}),
        ("teacher_hidden torch.float32", (hidden, weight, teacher[0].float(), teacher[1], counted), {}),
        ("counted is torch.int64", (hidden, weight, *teacher, counted.long()), {}),
        ("weights .* one a token", (hidden, weight, *teacher, counted), {"weights": torch.ones(8)}),
        ("temperature=0", (hidden, weight, *teacher, counted), {"temperature": 0.0}),
    ]
    for message, arguments, options in wrong:
        with pytest.raises(ValueError, match=message):
            linear_kl(*arguments, **options)


def rows_equal_their_twin(device: str, dtypes: tuple[torch.dtype, ...], widths: tuple[int, ...], count: int) -> None:
    """With NaN around both sides' logits: what lies outside is neither used nor written."""
    for dtype, width in product(dtypes, widths):
        room, wholes, views = -(-width // 16) * 16, [], []
        for seed in (0, 1):
            drawn = 4 * torch.randn(count, width, generator=torch.Generator().manual_seed(width + seed))
            wholes.append(torch.full((count + 2, room + 32), torch.nan, dtype=dtype, device=device))
            wholes[-1][1:-1, 16 : 16 + width] = drawn.to(device, dtype)
            views.append(wholes[-1][1:-1, 16 : 16 + width])
        weights = torch.linspace(0, 2, count, device=device)
        wanted = ops._rows_ref(*(x.double() for x in views), weights.double(), 1.5)
        teacher = views[1].clone()
        for gradient in (False, True):
            before = wholes[0].clone()
            losses = ops._rows_fused(*views, weights, 1.5, gradient=gradient)
            torch.testing.assert_close(losses.double(), wanted[0], rtol=1e-5, atol=2e-5)
            assert torch.equal(views[1], teacher) and (
                gradient or torch.equal(wholes[0].nan_to_num(), before.nan_to_num())
            )
        epsilon = torch.finfo(dtype).eps * (2 if device == "cpu" else 1)  # the interpreter cuts bf16 off
        torch.testing.assert_close(views[0].double(), wanted[1], rtol=epsilon + 1e-5, atol=2e-6)
        for band in (wholes[0][0], wholes[0][-1], wholes[0][:, :16], wholes[0][:, 16 + room :]):
            assert band.isnan().all()


@gpu
@needs_gpu
def test_gpu_kernels_equal_their_twins() -> None:
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    rows_equal_their_twin("cuda", dtypes, (1, 16, 997, 4096, 8191, 50264, 128256), count=99)


@gpu
@needs_gpu
def test_gpu_equals_reference() -> None:
    equals_reference("cuda", torch.float32, ((1, 997), (63, 5026), (1025, 997)), 256, 1e-3)
    equals_reference("cuda", torch.bfloat16, ((63, 5026), (1025, 997)), 256, 3e-2)
    equals_reference("cuda", torch.float64, ((63, 131),), 256, 1e-9)
    a_student_that_is_its_teacher_learns_nothing("cuda")
    the_teacher_and_frozen_parts_get_no_gradient("cuda")
    nothing_counted_is_zero("cuda")


@gpu
@needs_gpu
def test_gpu_memory_and_no_wait() -> None:
    """16384 tokens of 128256 words: two times 4.2 GB of logits, of which an eighth lives at a time."""
    hidden, weight, *teacher, counted = inputs(16384, 128256, torch.bfloat16, "cuda", (256, 512))
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.cuda.set_sync_debug_mode("error")
    try:
        (linear_kl(hidden, weight, *teacher, counted) / 16384).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    sums = 6 * weight.numel() + 4 * hidden.numel()  # the weight's gradient in fp32 and bf16, hidden's twice
    assert torch.cuda.max_memory_allocated() - before <= (1 << 30) + sums + (64 << 20)
    assert weight.grad is not None and weight.grad.isfinite().all()


def run_interpreted() -> None:
    assert triton_runs(torch.zeros(1))
    rows_equal_their_twin("cpu", (torch.float32, torch.float16, torch.bfloat16), (1, 16, 997), count=5)
    rows_equal_their_twin("cpu", (torch.bfloat16,), (20007,), count=3)
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 4e-2)):
        equals_reference("cpu", dtype, ((1, 97), (33, 131)), 20, tolerance)
    a_student_that_is_its_teacher_learns_nothing("cpu")
    the_teacher_and_frozen_parts_get_no_gradient("cpu")
    nothing_counted_is_zero("cpu")
    test_compilers_change_nothing()


def run_compiled() -> None:
    """The kernel compiles for Hopper in every shape that is chosen, and keeps its values in registers."""
    numbers = {"p_weights": "*fp32", "p_losses": "*fp32", "temperature": "fp32"}
    for vocabulary, dtype in product((320, 2048, 4096, 50257, 128256), ("*bf16", "*fp32")):
        shape = ops._shape(vocabulary)
        fixed = {"gradient": True, **{k: v for k, v in shape.items() if k != "num_warps"}}
        names = [name for name in ops._rows.arg_names if name not in fixed]
        types = {n: numbers.get(n, dtype if n.startswith("p_") else "i32") for n in names}
        built = compiled(ops._rows, types, fixed, num_warps=int(shape["num_warps"]))
        assert built.stack <= (0 if dtype == "*bf16" else 16), (vocabulary, dtype, built.registers, built.stack)
        assert "cp.async.cg" in built.ptx and "st.global.v4.b32" in built.ptx  # ahead of time, and whole


test_kernels_without_a_gpu = both(run_interpreted, run_compiled)
