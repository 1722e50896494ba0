"""Gated activations and squared ReLU equal their formulas, round once, and never touch what is not theirs."""

from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from without_gpu import both, compiled, round_as_hardware_does

from farspan.kernels import column_sums
from farspan.kernels import swiglu as ops
from farspan.kernels import swiglu_codes as codes_ops
from farspan.kernels.define import triton_runs
from farspan.kernels.fp8 import Coded, quantise
from farspan.kernels.swiglu import geglu, geglu_ref, squared_relu, squared_relu_ref, swiglu, swiglu_ref
from farspan.kernels.swiglu_codes import coded_geglu, coded_swiglu

gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs one NVIDIA GPU")

Op = Callable[..., Tensor]
EPSILON = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
OPS: dict[str, tuple[Op, Op, int]] = {
    "swiglu": (swiglu, swiglu_ref, 2),
    "geglu": (geglu, geglu_ref, 2),
    "squared_relu": (squared_relu, squared_relu_ref, 1),
}


def torchs(name: str) -> Op:
    """What torch itself would do, a rounding after each operation."""
    return {
        "swiglu": lambda gate, up: F.silu(gate) * up,
        "geglu": lambda gate, up: F.gelu(gate, approximate="tanh") * up,
        "squared_relu": lambda x: F.relu(x).square(),
    }[name]


def draw(count: int, *shape: int, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> list[Tensor]:
    """Normal numbers, wide enough for both tails of an activation, in tensors of their own."""
    made = torch.Generator().manual_seed(seed)
    return [(4 * torch.randn(*shape, generator=made)).to(device, dtype) for _ in range(count)]


def gradients(op: Op, inputs: list[Tensor], dout: Tensor) -> tuple[Tensor, ...]:
    """The result, then the gradients."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = op(*leaves)
    return out.detach(), *torch.autograd.grad(out, leaves, dout)


def truth(name: str, inputs: list[Tensor], dout: Tensor) -> tuple[Tensor, ...]:
    return gradients(OPS[name][1], [x.double() for x in inputs], dout.double())


@pytest.mark.parametrize("name", OPS)
def test_equals_torchs_own_formula(name: str) -> None:
    op, ref, count = OPS[name]
    *inputs, dout = draw(count + 1, 3, 37, dtype=torch.float64)
    for ours in (op, ref):
        torch.testing.assert_close(gradients(ours, inputs, dout), gradients(torchs(name), inputs, dout))
    assert torch.autograd.gradcheck(ref, [x[:1, :9].detach().requires_grad_() for x in inputs])


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_rounds_once(name: str, dtype: torch.dtype) -> None:
    op, ref, count = OPS[name]
    inputs = [x.clamp(-30, 30) for x in draw(count, 40, 25, dtype=dtype)]
    assert torch.equal(op(*inputs), ref(*(x.float() for x in inputs)).to(dtype))


def test_unlike_inputs_are_refused() -> None:
    gate, up = draw(2, 3, 8, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"swiglu: gate \(3, 8\) of torch.float32 and up \(2, 8\)"):
        swiglu(gate, up[:2])
    with pytest.raises(ValueError, match=r"geglu: .* of torch.float16 must have one shape and one type; cast"):
        geglu(gate, up.half())


def poisoned(x: Tensor, how: str) -> Tensor:
    """The same numbers amid NaN: `dense`; `rows`: one half of wider rows; `columns`: not even dense along a row."""
    if how == "dense":
        room = x.new_full((x.numel() + 64,), torch.nan)
        inner = room[32:-32].view(x.shape)
    elif how == "rows":
        inner = x.new_full((*x.shape[:-1], 2 * x.shape[-1]), torch.nan)[..., x.shape[-1] :]
    else:
        inner = x.new_full((*x.shape, 2), torch.nan)[..., 1]
    return inner.copy_(x)


def kernels_equal_their_twins(device: str, dtypes: tuple[torch.dtype, ...], shapes: list[tuple[int, ...]]) -> None:
    """Within twice torch's own error in that type, for dense and strided inputs and upstream gradients."""
    for name, dtype, shape, how in product(OPS, dtypes, shapes, ("dense", "rows", "columns")):
        op, _, count = OPS[name]
        *inputs, dout = draw(count + 1, *shape, dtype=dtype, device=device)
        wanted, usual = truth(name, inputs, dout), gradients(torchs(name), inputs, dout)
        found = gradients(op, [poisoned(x, how) for x in inputs], poisoned(dout, how))
        for ours, torchs_own, exact in zip(found, usual, wanted, strict=True):
            assert ours.dtype == dtype and ours.is_contiguous() and ours.shape == exact.shape
            allowed = 2 * (torchs_own.double() - exact).abs() + EPSILON[dtype] * exact.abs()
            allowed += 3e-7 * exact.abs().amax()  # where fp32 inside cancels; and bf16 below 1e-38 is nothing
            assert ((ours.double() - exact).abs() <= allowed).all(), (name, dtype, shape, how)


def kernels_write_nothing_else(device: str, dtype: torch.dtype) -> None:
    """Between guard bands the results are whole, the bands NaN as before, and the inputs as they were."""
    for (name, (_, _, count)), shape in product(OPS.items(), [(1, 1), (7, 63), (3, 1000)]):
        kind = {"swiglu": "silu", "geglu": "gelu"}.get(name, name)
        *inputs, dout = (poisoned(x, "dense") for x in draw(count + 1, *shape, dtype=dtype, device=device))
        before = [x.clone() for x in (*inputs, dout)]
        rooms = [torch.full((dout.numel() + 8192,), torch.nan, dtype=dtype, device=device) for _ in range(3)]
        out, *grads = (room[4096:-4096].view(shape) for room in rooms)
        gate, up, *_ = (*inputs, *inputs)
        dgate, dup = grads if count == 2 else (grads[0], grads[0])
        ops._launch(ops._forward, (out,), (gate, up), kind)
        ops._launch(ops._backward, (dgate, dup), (dout, gate, up), kind)
        for room in rooms[: count + 1]:
            assert room[4096:-4096].isfinite().all() and room[:4096].isnan().all() and room[-4096:].isnan().all()
        assert all(map(torch.equal, (*inputs, dout), before)), name


def kernels_are_one_node_among_others(device: str, dtype: torch.dtype) -> None:
    """A second user of the inputs and of the upstream gradient, checkpointing, expanded gradients, empty inputs."""
    for op, ref, count in OPS.values():
        inputs = draw(count, 5, 24, dtype=dtype, device=device)

        def shared(op: Op, *inputs: Tensor) -> Tensor:
            out = op(*inputs)
            return out + torch.sin(out) + sum(inputs)

        ones = torch.ones((), dtype=dtype, device=device).expand(5, 24)
        found, twin = (gradients(partial(shared, which), inputs, ones) for which in (op, ref))
        torch.testing.assert_close(found, twin, rtol=4 * EPSILON[dtype], atol=64 * EPSILON[dtype])
        again = gradients(partial(checkpoint, partial(shared, op), use_reentrant=False), inputs, ones)
        assert all(map(torch.equal, found, again))
        empty = [x[:0] for x in inputs]
        assert all(x.shape == (0, 24) for x in gradients(op, empty, ones[:0]))


def kernels_survive_extremes(device: str, dtype: torch.dtype) -> None:
    """Large numbers overflow nothing inside, and NaN is never hidden."""
    largest = torch.finfo(dtype).max
    x = torch.tensor([0.0, -0.0, 17, -17, 90, -90, 1e4, -1e4, largest, -largest, torch.nan], device=device).to(dtype)
    for op, ref, count in OPS.values():
        inputs, dout = [x, torch.ones_like(x)][:count], torch.ones_like(x)
        found, twin = gradients(op, inputs, dout), gradients(ref, inputs, dout)
        for ours, wanted in zip(found, twin, strict=True):
            assert ours[-1].isnan(), (op, dtype)
            assert (ours.isfinite() | wanted.isinf())[:-1].all(), (op, dtype, ours, wanted)
            torch.testing.assert_close(ours[:8], wanted[:8], rtol=2 * EPSILON[dtype], atol=1e-6)


def kernels_stay_whole_under_a_compiler(device: str) -> None:
    for op, _, count in OPS.values():
        *inputs, dout = draw(count + 1, 6, 40, dtype=torch.float32, device=device)
        torch._dynamo.reset()
        whole = torch.compile(op, fullgraph=True, backend="aot_eager")
        assert all(map(torch.equal, gradients(op, inputs, dout), gradients(whole, inputs, dout)))
    gate, up, dout = draw(3, 6, 40, dtype=torch.float32, device=device)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(ops._GATED, (gate, up, "gelu"), test_utils=tests)
    torch.library.opcheck(ops.GATED_BACKWARD, (dout.T.contiguous().T, gate, up, "silu"), test_utils=tests)
    torch.library.opcheck(ops._SQUARED_RELU, (gate,), test_utils=tests)
    torch.library.opcheck(ops._SQUARED_RELU_BACKWARD, (dout, gate), test_utils=tests)


CODED: dict[str, tuple[Op, Callable[..., Coded]]] = {
    "swiglu": (swiglu, coded_swiglu),
    "geglu": (geglu, coded_geglu),
}


def codes_are_those_of_the_result(
    device: str, dtypes: tuple[torch.dtype, ...], shapes: list[tuple[int, ...]], hows: tuple[str, ...]
) -> None:
    """In every bit, as are the gradients; nothing but codes and scales has memory."""
    for (op, coded_op), dtype, shape, how, transposed in product(CODED.values(), dtypes, shapes, hows, (True, False)):
        *inputs, dout = (poisoned(x, how) for x in draw(3, *shape, dtype=dtype, device=device))
        if inputs[0].numel():
            inputs[0].view(-1, shape[-1])[0] *= 1e30  # inf and NaN in some types, and huge numbers
        leaves = [x.detach().requires_grad_() for x in inputs]
        out, (place, codes) = op(*leaves), coded_op(*leaves, transposed=transposed)
        wanted = quantise(out.detach().reshape(-1, shape[-1]), "row", transposed=transposed)
        for found, want in zip(codes, wanted, strict=True):
            assert (found is None) == (want is None)
            if found is not None and want is not None:
                assert found.dtype == want.dtype
                assert found.shape == want.shape
                if out.numel():  # a scale of nothing is whatever it is
                    torch.testing.assert_close(found.float(), want.float(), rtol=0, atol=0, equal_nan=True)
        assert place.shape == out.shape and place.dtype == out.dtype
        assert not triton_runs(place) or place.untyped_storage().nbytes() == place.element_size()
        slopes = [torch.autograd.grad(end, leaves, dout) for end in (out, place)]
        for mine, plain in zip(*slopes, strict=True):
            torch.testing.assert_close(mine, plain, rtol=0, atol=0, equal_nan=True)


def codes_stay_inside(device: str, rows: int, width: int) -> None:
    """Codes, scales and columns fill their room, padding included, and leave its walls alone."""
    gate, up = (poisoned(x, "rows") for x in draw(2, rows, width, dtype=torch.float32, device=device))
    padded = -(-rows // 16) * 16
    shapes = (padded, width), (padded, 1), (width,)
    rooms = [torch.full((torch.Size(shape).numel() + 256,), torch.nan, device=device) for shape in shapes]
    rooms[0] = rooms[0].to(torch.float8_e4m3fn)
    values, scale, largest = (room[128:-128].view(shape) for room, shape in zip(rooms, shapes, strict=True))
    codes_ops._launch(gate, up, "gelu", (values, scale, largest))
    for room, view in zip(rooms, (values, scale, largest), strict=True):
        assert not view.float().isnan().any() and room.float().isnan().sum() == 256
    assert not values[rows:].float().any()
    torch.testing.assert_close(largest, (values.float() * scale).abs().amax(0), rtol=0, atol=0)


def test_codes_of_a_twin_are_those_of_its_result() -> None:
    codes_are_those_of_the_result("cpu", (torch.float64, torch.bfloat16), [(3, 7, 32), (0, 16)], ("dense", "columns"))
    gate, up = draw(2, 3, 8, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"coded_swiglu: gate \(3, 8\)"):
        coded_swiglu(gate, up[:2], transposed=False)


@gpu
@needs_gpu
@pytest.mark.parametrize("width", [16, 64, 352, 1024, 4096, 8192, 11008, 14336, 16384, 28672])
def test_gpu_codes_are_those_of_the_result(width: int) -> None:
    shapes = [(1, width), (max(67, min(4099, (1 << 24) // width)), width)]
    codes_are_those_of_the_result("cuda", (torch.bfloat16,), shapes, ("dense", "rows", "columns"))
    codes_stay_inside("cuda", 1003, width)


@gpu
@needs_gpu
def test_gpu_codes_reach_beyond_32_bits() -> None:
    """Rows that begin 2^31 elements apart, and more than 2^31 codes in all."""
    room = torch.randn((1 << 31) + 4096 * 8, dtype=torch.bfloat16, device="cuda")
    for view in (room.as_strided((2, 4096), (1 << 31, 1)), room.view(-1, 4096)):
        codes = coded_swiglu(view, view, transposed=False).codes
        last = quantise(swiglu(view[-1:].clone(), view[-1:].clone()), "row")
        at = view.shape[0] - 1
        assert torch.equal(codes.values[at].float(), last.values[0].float()) and codes.scale[at] == last.scale[0]
        del codes


@gpu
@needs_gpu
def test_gpu_kernels_equal_their_twins() -> None:
    """Widths whose tiles differ: 2048, 4096, 256, 8 and 1 columns of dense inputs, and cut rows of strided ones."""
    shapes = [(3, 343, 14336), (517, 4096), (1003, 11008), (2, 515, 1000), (1001, 63), (4097,)]
    kernels_equal_their_twins("cuda", (torch.bfloat16,), shapes)


@gpu
@needs_gpu
@pytest.mark.parametrize("dtype", EPSILON, ids=str)
def test_gpu_kernels_in_every_type(dtype: torch.dtype) -> None:
    kernels_equal_their_twins("cuda", (dtype,), [(1, 1), (515, 1000)])
    kernels_write_nothing_else("cuda", dtype)
    kernels_are_one_node_among_others("cuda", dtype)
    kernels_survive_extremes("cuda", dtype)


@gpu
@needs_gpu
def test_gpu_kernels_stay_whole_under_a_compiler() -> None:
    kernels_stay_whole_under_a_compiler("cuda")


@gpu
@needs_gpu
def test_gpu_kernels_reach_beyond_32_bits() -> None:
    """Rows that begin 2^31 elements apart, and more than 2^31 elements in all."""
    room = torch.randn((1 << 31) + 4096 * 8, dtype=torch.bfloat16, device="cuda")
    for view in (room.as_strided((2, 4096), (1 << 31, 1)), room.view(-1, 4096)):
        last = view[-1:].clone()
        out, dgate, dup = gradients(swiglu, [view, view], view)
        for ours, wanted in zip((out, dgate, dup), gradients(swiglu_ref, [last, last], last), strict=True):
            torch.testing.assert_close(ours[-1:], wanted, rtol=8e-3, atol=1e-3)
        del out, dgate, dup


def run_interpreted() -> None:
    assert triton_runs(torch.zeros(1))
    kernels_equal_their_twins("cpu", tuple(EPSILON), [(1, 1), (3, 5, 21), (9, 64), (2, 1000)])
    for dtype in EPSILON:
        kernels_write_nothing_else("cpu", dtype)
        kernels_survive_extremes("cpu", dtype)
    kernels_are_one_node_among_others("cpu", torch.float32)
    kernels_stay_whole_under_a_compiler("cpu")
    round_as_hardware_does()
    codes_are_those_of_the_result("cpu", (torch.float32,), [(1, 1), (0, 16), (2, 3, 6)], ("columns",))
    codes_are_those_of_the_result("cpu", (torch.bfloat16,), [(3, 7, 48)], ("rows",))
    codes_stay_inside("cpu", 13, 130)
    gate, up = draw(2, 5, 32, dtype=torch.bfloat16)
    torch.library.opcheck(codes_ops.GATED_CODES, (gate, up, "gelu", True), test_utils=("test_faketensor",))
    codes_ops.WIDEST = codes_ops.BLOCK = 64  # as if registers held no more
    codes_are_those_of_the_result("cpu", (torch.bfloat16,), [(5, 80)], ("rows",))
    codes_stay_inside("cpu", 13, 130)


def run_compiled() -> None:
    """Every tile compiles for Hopper, keeps its values in registers, and moves 16 bytes at a time where it can."""
    cases = product((ops._forward, ops._backward), ("silu", "gelu", "squared_relu"), (1, 8, 64, 1024, 2048, 4096))
    for kernel, kind, width in cases:
        fixed: dict[str, Any] = {"kind": kind, "b_r": 4096 // width, "b_i": width}
        if width == 1:
            fixed |= dict.fromkeys((n for n in kernel.arg_names if n.endswith("_row") or n == "width"), 1)
        types = {n: "*bf16" if n.startswith("p_") else "i32" for n in kernel.arg_names if n not in fixed}
        built = compiled(kernel, types, fixed, num_warps=8)
        assert built.stack == 0, (kernel, kind, width)
        assert width == 1 or ("ld.global.v4" in built.ptx and "ld.global.b16" not in built.ptx), (kernel, kind, width)
        assert width == 1 or built.registers <= (72 if kind == "gelu" else 64), (kernel, kind, width, built.registers)
    for kind, width, columns, most in (
        ("silu", 64, True, 64),
        ("silu", 4096, True, 64),
        ("gelu", 8192, True, 80),
        ("silu", 14336, True, 128),
        ("gelu", 14336, True, 128),
        ("silu", 14336, False, 64),
        ("silu", 28672, False, 64),
    ):
        wide = width > codes_ops.WIDEST
        kernel = codes_ops._forward_wide if wide else codes_ops._forward
        way = column_sums.walk(codes_ops.PACE, width, 4, torch.device("cpu"))
        fixed = {"kind": kind, "width": width, "b_i": codes_ops.BLOCK if wide else way.b_d}
        fixed |= {} if wide else {"b_r": way.b_r, "stages": way.stages}
        fixed |= {} if wide or columns else {"p_columns": None}
        pointers = {
            "p_values": "*fp8e4nv",
            "p_scale": "*fp32",
            "p_columns": "*fp32",
            "p_gate": "*bf16",
            "p_up": "*bf16",
        }
        types = {n: pointers.get(n, "i32") for n in kernel.arg_names if n not in fixed}
        built = compiled(kernel, types, fixed, num_warps=8 if wide else way.warps)
        assert built.stack == 0 and built.registers <= most, (kind, width, columns, built.registers, built.stack)
        assert "cvt.rn.satfinite.e4m3x2.f32" in built.ptx and "st.global.v4" in built.ptx, (kind, width, columns)
        assert wide or "cp.async.cg" in built.ptx


test_kernels_without_a_gpu = both(run_interpreted, run_compiled)
