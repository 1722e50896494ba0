"""Norms equal torch's and their twins, gradients included, at any width; kernels write nothing but their results."""

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from without_gpu import both, compiled, round_as_hardware_does

from farspan.kernels import column_sums as sums
from farspan.kernels import norm as ops
from farspan.kernels import norm_tiles as tiles
from farspan.kernels.fp8 import Coded, quantise
from farspan.kernels.norm import (
    add_layer_norm,
    add_layer_norm_ref,
    add_rms_norm,
    add_rms_norm_ref,
    coded_layer_norm,
    coded_rms_norm,
    layer_norm,
    layer_norm_ref,
    rms_norm,
    rms_norm_ref,
)
from farspan.parallel import recompute
from farspan.parallel.context import attention  # noqa: F401 - makes the operators that recompute always keeps

gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs one NVIDIA GPU")

EPS = 1e-3
EPSILON = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}

Op = Callable[..., Tensor | tuple[Tensor, Tensor]]
CASES: dict[str, tuple[Op, Op, str]] = {
    "rms": (rms_norm, rms_norm_ref, "xw"),
    "layer": (layer_norm, layer_norm_ref, "xwb"),
    "layer without bias": (
        lambda x, w, e: layer_norm(x, w, None, e),
        lambda x, w, e: layer_norm_ref(x, w, None, e),
        "xw",
    ),
    "add rms": (add_rms_norm, add_rms_norm_ref, "xrw"),
    "add layer": (add_layer_norm, add_layer_norm_ref, "xrwb"),
}
"""Name: the op, its twin, and its arguments: x, residual branch, weight, bias."""


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    """Normal numbers that bf16 holds exactly, in a tensor whose rows lie apart, with NaN between them."""
    drawn = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()
    room = torch.full((*shape[:-1], 3, shape[-1]), torch.nan, dtype=dtype, device=device)
    room[..., 1, :] = drawn.to(device, dtype)
    return room[..., 1, :]


def arguments(
    case: str, shape: tuple[int, ...], dtype: torch.dtype, vectors: torch.dtype, device: str = "cpu"
) -> list[Tensor]:
    kinds = {"x": (shape, dtype), "r": (shape, dtype), "w": (shape[-1:], vectors), "b": (shape[-1:], vectors)}
    drawn = [draw(*kinds[k][0], seed=i, dtype=kinds[k][1], device=device) for i, k in enumerate(CASES[case][2])]
    return [x.requires_grad_() for x in drawn]


def everything(op: Op, inputs: list[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    """Results and gradients; in `dtype`, where it is given, but for the same numbers."""
    inputs = inputs if dtype is None else [x.detach().to(dtype).requires_grad_() for x in inputs]
    out = op(*inputs, EPS)
    out = out if isinstance(out, tuple) else (out,)
    upstream = [draw(*x.shape, seed=9 + i, dtype=x.dtype, device=str(x.device)) for i, x in enumerate(out)]
    return [x.detach() for x in (*out, *torch.autograd.grad(out, inputs, upstream))]


def close(case: str, inputs: list[Tensor], twin: Op, *, slack: float = 1.0) -> None:
    """The op's error against fp64 is at most twice that of `twin`, and the last bit."""
    ours, theirs = everything(CASES[case][0], inputs), everything(twin, inputs)
    truth = everything(CASES[case][1], inputs, torch.float64)
    for i, (mine, other, true) in enumerate(zip(ours, theirs, truth, strict=True)):
        assert mine.dtype == other.dtype and mine.shape == other.shape
        error, bound = ((x.double() - true).abs().max().item() for x in (mine, other))
        last = slack * EPSILON[mine.dtype] * max(1.0, true.abs().max().item())
        assert error <= 2 * bound + last, f"{case} {tuple(inputs[0].shape)} {mine.dtype} result {i}: {error}, {bound}"


@pytest.mark.parametrize("width", [1, 63, 1000, 4097])
def test_norms_are_those_of_torch(width: int) -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        x, r, w, b = arguments("add layer", (2, 5, width), dtype, dtype)
        size = (width,)
        tight = {"rtol": 2 * EPSILON[dtype], "atol": 2e2 * EPSILON[torch.promote_types(dtype, torch.float32)]}
        torch.testing.assert_close(rms_norm(x, w, EPS), F.rms_norm(x, size, w, EPS), **tight)
        torch.testing.assert_close(layer_norm(x, w, b, EPS), F.layer_norm(x, size, w, b, EPS), **tight)
        torch.testing.assert_close(layer_norm(x, w, None, EPS), F.layer_norm(x, size, w, None, EPS), **tight)
        total, normed = add_rms_norm(x, r, w, EPS)
        assert torch.equal(total, x + r) and torch.equal(normed, rms_norm(x + r, w, EPS))
        total, normed = add_layer_norm(x, r, w, b, EPS)
        assert torch.equal(total, x + r) and torch.equal(normed, layer_norm(x + r, w, b, EPS))


@pytest.mark.parametrize("case", CASES)
def test_twins_have_the_right_gradients(case: str) -> None:
    for width in (1, 7):
        inputs = arguments(case, (3, width), torch.float64, torch.float64)
        assert torch.autograd.gradcheck(lambda *x: CASES[case][1](*x, EPS), inputs)


def test_a_weight_of_fp32_is_not_rounded_to_the_type_of_x() -> None:
    x, w, b = arguments("layer", (7, 130), torch.bfloat16, torch.float32)
    w = (w * 1.001).detach()
    for ours, wide in (
        (rms_norm(x, w, EPS), rms_norm(x.double(), w.double(), EPS)),
        (layer_norm(x, w, b, EPS), layer_norm(x.double(), w.double(), b.double(), EPS)),
    ):
        assert ours.dtype == torch.bfloat16
        # Once in some thousand entries fp32 lies on the other side of a tie.
        assert (ours != wide.bfloat16()).sum() <= 2 and ((ours - wide).abs() <= 4e-3 * wide.abs() + 1e-6).all()


def test_sizes_that_do_not_fit_are_refused() -> None:
    x, w = torch.ones(3, 8), torch.ones(8)
    for call in (
        lambda: rms_norm(x, torch.ones(7), EPS),
        lambda: layer_norm(x, w, torch.ones(1), EPS),
        lambda: add_rms_norm(x, torch.ones(8), w, EPS),
        lambda: add_layer_norm(x, torch.ones(3, 1), w, w, EPS),
    ):
        with pytest.raises(ValueError, match="must be"):
            call()


Kinds = tuple[tuple[torch.dtype, torch.dtype], ...]
"""Types of x and of its vectors."""
MIXED: Kinds = ((torch.bfloat16, torch.float32),)
OTHERS: Kinds = (
    (torch.float32, torch.float32),
    (torch.float16, torch.float16),
    (torch.bfloat16, torch.bfloat16),
    (torch.float32, torch.bfloat16),
)


def kernels_equal_their_twins(
    device: str, kinds: Kinds, shapes: tuple[tuple[int, ...], ...], *, slack: float = 1.0
) -> None:
    for (dtype, vectors), shape, case in product(kinds, shapes, CASES):
        close(case, arguments(case, shape, dtype, vectors, device), CASES[case][1], slack=slack)


def no_rows_have_no_gradient(device: str) -> None:
    for case in CASES:
        inputs = arguments(case, (0, 8), torch.float32, torch.float32, device)
        found = everything(CASES[case][0], inputs)
        assert all(not x.any() for x in found)
        assert [x.shape for x in found[-len(inputs) :]] == [x.shape for x in inputs]


def nothing_else_is_written(device: str, width: int, rows: int = 13) -> None:
    """Results lie in memory full of NaN: all of theirs is written and nothing beside it; upstream gradients stay."""
    x, r, w, b = (y.detach() for y in arguments("add layer", (rows, width), torch.float32, torch.float32, device))

    def banded(*shape: int) -> tuple[Tensor, Tensor]:
        size = torch.Size(shape).numel()
        room = torch.full((size + 256,), torch.nan, device=device)
        return room, room[128 : size + 128].view(shape)

    for centred in (False, True):
        bias = b if centred else None
        forward = [banded(rows, width), banded(1 + centred, rows), banded(rows, width)]
        tiles.launch_forward(x, r, w, bias, EPS, centred, [view for _, view in forward])
        backward = [banded(rows, width), *(banded(width) for _ in range(1 + centred))]
        upstream = draw(rows, width, seed=7, device=device), draw(rows, width, seed=8, device=device)
        copies = [y.clone() for y in upstream]
        tiles.launch_backward(*upstream, forward[2][1], forward[1][1], w, [view for _, view in backward])
        assert all(torch.equal(y, copy) for y, copy in zip(upstream, copies, strict=True))
        for room, view in (*forward, *backward):
            assert not view.isnan().any() and room.isnan().sum() == 256
    parts = torch.randn(3, 2, 19, width, device=device)
    totals = [banded(2, width) for _ in range(3)]
    sums.column_sums(parts, [view for _, view in totals])
    for part, (room, view) in zip(parts, totals, strict=True):
        torch.testing.assert_close(view, part.sum(1))
        assert room.isnan().sum() == 256


def codes_of(case: str, inputs: list[Tensor], *, transposed: bool) -> tuple[Tensor, Coded]:
    given = dict(zip(CASES[case][2], inputs, strict=True))
    if "rms" in case:
        return coded_rms_norm(given["x"], given.get("r"), given["w"], EPS, transposed=transposed)
    return coded_layer_norm(given["x"], given.get("r"), given["w"], given.get("b"), EPS, transposed=transposed)


def codes_are_those_of_what_is_normed(
    device: str, dtype: torch.dtype, shapes: tuple[tuple[int, ...], ...], turns: tuple[bool, ...] = (True, False)
) -> None:
    """In every bit, as are the total and all gradients; nothing but codes, scales and statistics has memory."""
    for shape, case, transposed in product(shapes, CASES, turns):
        inputs = arguments(case, shape, dtype, torch.float32, device)
        with torch.no_grad():
            if inputs[0].numel():
                inputs[0][(0,) * (len(shape) - 1)] *= 1e30  # whose square is inf
        results = CASES[case][0](*inputs, EPS)
        total, normed = results if isinstance(results, tuple) else (inputs[0], results)
        mine, (place, codes) = codes_of(case, inputs, transposed=transposed)
        wanted = quantise(normed.detach().reshape(-1, shape[-1]), "row", transposed=transposed)
        for found, want in zip((mine, *codes), (total, *wanted), strict=True):
            assert (found is None) == (want is None)
            if found is not None and want is not None:
                assert found.dtype == want.dtype and found.is_contiguous() == want.is_contiguous()
                assert found.shape == want.shape
                if normed.numel():  # a scale of nothing is whatever it is
                    torch.testing.assert_close(found.float(), want.float(), rtol=0, atol=0, equal_nan=True)
        assert place.shape == normed.shape and place.dtype == normed.dtype
        assert not ops.triton_runs(place) or place.untyped_storage().nbytes() == place.element_size()
        upstream = [draw(*shape, seed=9 + i, dtype=dtype, device=device) for i in range(2)]
        ends = [[normed, total], [place, mine]] if "add" in case else [[normed], [place]]
        slopes = [torch.autograd.grad(end, inputs, upstream[: len(end)]) for end in ends]
        for found, want in zip(*slopes, strict=True):
            torch.testing.assert_close(found, want, rtol=0, atol=0, equal_nan=True)


def codes_stay_inside(device: str, width: int, rows: int = 13) -> None:
    """Codes, scales and columns fill their room, padding included, and leave its walls alone."""
    x, r, w, b = (y.detach() for y in arguments("add layer", (rows, width), torch.float32, torch.float32, device))
    padded = -(-rows // 16) * 16
    shapes = ((padded, width), (padded, 1), (width,), (2, rows), (rows, width))
    rooms = [torch.full((torch.Size(shape).numel() + 256,), torch.nan, device=device) for shape in shapes]
    rooms[0] = rooms[0].to(torch.float8_e4m3fn)
    views = [room[128:-128].view(shape) for room, shape in zip(rooms, shapes, strict=True)]
    tiles.launch_codes(x, r, w, b, EPS, True, views)
    for room, view in zip(rooms, views, strict=True):
        assert not view.float().isnan().any() and room.float().isnan().sum() == 256
    assert not views[0][rows:].float().any()
    torch.testing.assert_close(views[2], (views[0].float() * views[1]).abs().amax(0), rtol=0, atol=0)


class Layer(nn.Module):
    """A product and both kinds of norm, where x, the branch and the total have other consumers as well."""

    def __init__(self, width: int, device: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(draw(width, width, seed=0, device=device).clone())
        self.gain = nn.Parameter(draw(width, seed=1, device=device).clone())
        self.bias = nn.Parameter(draw(width, seed=2, device=device).clone())

    def forward(self, x: Tensor) -> Tensor:
        branch = x @ self.weight
        total, normed = add_rms_norm(x, branch, self.gain, EPS)
        total, again = add_layer_norm(total, normed + branch, self.gain, self.bias, EPS)
        return total * again + layer_norm(total, self.gain, self.bias, EPS) + x * branch

    def example(self, rows: int, length: int) -> tuple[Tensor]:
        return (torch.zeros(rows, length, self.gain.shape[0], device=self.gain.device),)


def layers_agree(device: str) -> None:
    """With other consumers of everything: the twins, checkpointing of all and of a part, compiling, once more."""
    x = draw(2, 9, 24, seed=3, device=device).requires_grad_()

    def gradients(forward: Callable[[Tensor], Tensor], layer: Layer) -> list[Tensor]:
        found = torch.autograd.grad(forward(x).square().sum(), [x, *layer.parameters()])
        return [y.detach() for y in found]

    plain, layer = Layer(24, device), Layer(24, device)
    ours = gradients(plain, plain)
    again = [
        gradients(plain, plain),
        gradients(lambda y: checkpoint(plain, y, use_reentrant=False), plain),
    ]
    recompute.apply(layer, 0.5)
    again.append(gradients(layer, layer))
    again.append(gradients(torch.compile(plain, fullgraph=True, backend="aot_eager"), plain))
    runs, ops.triton_runs = ops.triton_runs, lambda *_: False
    twin = gradients(plain, plain)
    ops.triton_runs = runs
    for other in again:
        assert all(torch.equal(a, b) for a, b in zip(ours, other, strict=True))
    for a, b in zip(ours, twin, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * b.abs().max().item())


def one_gradient_may_be_missing(device: str) -> None:
    """Where only the total, or only what is normed, goes on."""
    for case, chosen in product(("add rms", "add layer"), (0, 1)):
        found = []
        for op in CASES[case][:2]:
            inputs = arguments(case, (5, 33), torch.float32, torch.float32, device)
            out = op(*inputs, EPS)[chosen]
            out.backward(draw(5, 33, seed=5, device=device).T.contiguous().T)
            found.append([x.grad if x.grad is not None else torch.zeros_like(x) for x in inputs])
        torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)


@gpu
@needs_gpu
@pytest.mark.parametrize("width", [1, 64, 88, 128, 1000, 1024, 1152, 4096, 8192, 16384, 65536])
def test_gpu_kernels_equal_their_twins(width: int) -> None:
    shape = max(67, min(4099, (1 << 21) // width)), width
    kernels_equal_their_twins("cuda", MIXED + (OTHERS if width in (88, 4096, 16384) else ()), (shape,))


@gpu
@needs_gpu
@pytest.mark.parametrize("width", [128, 1024, 4096, 8192, 16384])
def test_gpu_kernels_are_as_exact_as_torch(width: int) -> None:
    def torch_rms(x: Tensor, w: Tensor, eps: float) -> Tensor:
        return F.rms_norm(x, w.shape, w, eps)

    def torch_layer(x: Tensor, w: Tensor, b: Tensor, eps: float) -> Tensor:
        return F.layer_norm(x, w.shape, w, b, eps)

    for dtype in (torch.bfloat16, torch.float32):
        rows = (1 << 24) // width + 3
        close("rms", arguments("rms", (rows, width), dtype, dtype, "cuda"), torch_rms)
        close("layer", arguments("layer", (rows, width), dtype, dtype, "cuda"), torch_layer)


@gpu
@needs_gpu
def test_gpu_kernels_write_nothing_else_and_agree_with_themselves() -> None:
    for width in (6, 128, 1152, 4096, 16384, 20000):
        nothing_else_is_written("cuda", width, rows=1003)
    no_rows_have_no_gradient("cuda")
    one_gradient_may_be_missing("cuda")
    layers_agree("cuda")
    for case, width in product(CASES, (128, 4096, 16384)):
        inputs = arguments(case, (5001, width), torch.bfloat16, torch.bfloat16, "cuda")
        first, second = everything(CASES[case][0], inputs), everything(CASES[case][0], inputs)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)), (case, width)


@gpu
@needs_gpu
@pytest.mark.parametrize("width", [16, 64, 128, 1000, 1024, 2048, 4096, 5120, 8192, 16384, 20480])
def test_gpu_codes_are_those_of_what_is_normed(width: int) -> None:
    shapes = ((1, width), (max(67, min(4099, (1 << 23) // width)), width))
    codes_are_those_of_what_is_normed("cuda", torch.bfloat16, shapes)
    codes_stay_inside("cuda", min(width, 16384), rows=1003)


@gpu
@needs_gpu
def test_gpu_kernels_reach_rows_beyond_32_bits() -> None:
    """Rows of a tensor as seen with a stride of 2^31 elements and more, and more than 2^31 elements in all."""
    whole = torch.zeros((1 << 31) + 128, dtype=torch.bfloat16, device="cuda")
    far = whole.as_strided((2, 128), (1 << 31, 1))
    far.copy_(draw(2, 128, seed=0, dtype=torch.bfloat16, device="cuda"))
    weight = torch.ones(128, device="cuda", requires_grad=True)
    x, near = far.requires_grad_(), far.detach().clone().requires_grad_()
    found = [rms_norm(y, weight, EPS) for y in (x, near)]
    assert torch.equal(*found)
    gradients = [torch.autograd.grad(y, (inner, weight), y) for y, inner in zip(found, (x, near), strict=True)]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    del whole, far, x, found, gradients
    x = torch.ones((1 << 24) + 5, 128, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    normed = rms_norm(x, weight, EPS)
    d_x, d_weight = torch.autograd.grad(normed, (x, weight), torch.ones(128, device="cuda").bfloat16().expand_as(x))
    assert torch.equal(normed[-9:], normed[:9]) and torch.equal(d_x[-9:], d_x[:9])
    torch.testing.assert_close(d_weight, torch.full_like(d_weight, x.shape[0] * (1 + EPS) ** -0.5), rtol=1e-4, atol=0)


def run_interpreted() -> None:
    assert ops.triton_runs(torch.zeros(1))
    kernels_equal_their_twins("cpu", OTHERS[:2], ((61, 1), (3, 37, 6), (5, 130)))
    truncating = MIXED + OTHERS[2:3]  # interpreted stores of bf16 are not rounded
    kernels_equal_their_twins("cpu", truncating, ((3, 41, 6), (7, 1000)), slack=2.0)
    for width in (6, 130):
        nothing_else_is_written("cpu", width)
    no_rows_have_no_gradient("cpu")
    one_gradient_may_be_missing("cpu")
    layers_agree("cpu")
    x, w = draw(3, 5, 20, seed=0), draw(20, seed=1)
    normed, stats, total = ops.norm(x, x.flip(0), w, w, EPS, True)
    torch.library.opcheck(ops.norm, (x, x.flip(0), w, w, EPS, True))
    torch.library.opcheck(ops.norm_backward, (normed, None, total, stats, w, w, True))
    round_as_hardware_does()
    codes_are_those_of_what_is_normed("cpu", torch.float32, ((1, 6), (0, 16)), (False,))
    codes_are_those_of_what_is_normed("cpu", torch.bfloat16, ((3, 7, 48),), (True,))
    codes_stay_inside("cpu", 130)
    torch.library.opcheck(ops.norm_codes, (x, None, w, w, EPS, True, True), test_utils=("test_faketensor",))
    tiles.WIDEST_COLUMNS = 8
    codes_stay_inside("cpu", 48, rows=5)
    # Rows in blocks, as if registers held 64 columns.
    tiles.WIDEST_FORWARD = tiles.WIDEST_RMS = tiles.WIDEST_LAYER = tiles.BLOCK = ops.WIDEST_FORWARD = 64
    codes_are_those_of_what_is_normed("cpu", torch.float32, ((5, 80),), (True,))
    kernels_equal_their_twins("cpu", OTHERS[:1], ((5, 150), (2, 128)))
    nothing_else_is_written("cpu", 150)


def types(kernel: Any, fixed: dict[str, Any], x: str, vectors: str) -> dict[str, str]:
    """The types of a kernel's arguments that are not fixed."""
    fp32 = ("p_stats", "p_sums", "p_parts", "p_scale", "p_columns")
    pointers = dict.fromkeys(fp32, "*fp32") | dict.fromkeys(
        ("p_weight", "p_bias", "p_first", "p_second", "p_third"), f"*{vectors}"
    )
    names = [name for name in kernel.arg_names if name not in fixed]
    return {
        n: pointers.get(n, f"*{x}") if n.startswith("p_") else "i64" if n.endswith("_row") else "i32" for n in names
    }


def run_compiled() -> None:
    """Every kernel compiles for Hopper, in registers, its loads of 16 bytes; those of walks are on their way before
    their turn."""
    sizes, device = {"bf16": 2, "fp32": 4}, torch.device("cpu")
    bare = {"p_total": None, "p_branch": None, "p_bias": None}
    numbers, added = {"p_scale": None, "p_columns": None}, {}
    for width, x, vectors, centred in (
        (64, "bf16", "bf16", False),
        (1024, "bf16", "fp32", True),
        (4096, "bf16", "bf16", False),
        (4096, "fp32", "fp32", True),
        (8192, "bf16", "fp32", True),
        (16384, "bf16", "fp32", True),
    ):
        way = tiles.forward_walk(width, sizes[x] * (1 + centred), device)
        fixed = {"eps": EPS, "width": width, "centred": centred, "b_r": way.b_r, "b_d": way.b_d, "stages": way.stages}
        fixed |= numbers if centred else bare | numbers
        found = compiled(tiles._forward, types(tiles._forward, fixed, x, vectors), fixed, num_warps=way.warps)
        assert found.stack == 0 and "st.global.v4" in found.ptx, (width, found.registers)
        assert ("cp.async.cg" in found.ptx) == (not 2048 <= width <= 8192) and "ld.global.v4" in found.ptx
        added[width, x, centred] = found.sums
    # Registers of a thread; programs of an SM have 64K: 2 of 128 threads at 4096, one of 256 or 512 beyond.
    for width, vectors, centred, columns, most in (
        (1024, "fp32", True, True, 96),
        (4096, "bf16", False, True, 128),
        (4096, "bf16", False, False, 96),
        (8192, "fp32", True, True, 192),
        (16384, "fp32", True, False, 128),
    ):
        way = sums.walk(tiles.CODES, width, 2 * (1 + centred), device)
        fixed = {"eps": EPS, "width": width, "centred": centred, "b_r": way.b_r, "b_d": way.b_d, "stages": way.stages}
        fixed |= ({} if centred else bare) | ({} if columns else {"p_columns": None})
        kinds = types(tiles._forward, fixed, "bf16", vectors) | {"p_normed": "*fp8e4nv"}
        found = compiled(tiles._forward, kinds, fixed, num_warps=way.warps)
        assert found.stack == 0 and found.registers <= most, (width, centred, columns, found.registers, found.stack)
        assert "cvt.rn.satfinite.e4m3x2.f32" in found.ptx and "cp.async.cg" in found.ptx
        assert found.sums == added[width, "bf16", centred] and "#ttg.blocked" in found.sums[0]  # hence the same bits
    for width, x, vectors, centred, total in (
        (64, "bf16", "bf16", False, False),
        (128, "bf16", "fp32", True, True),
        (1024, "bf16", "bf16", False, False),
        (2048, "fp32", "fp32", True, True),
        (4096, "bf16", "fp32", False, True),
        (4096, "bf16", "bf16", True, True),
        (8192, "bf16", "bf16", False, False),
        (8192, "bf16", "fp32", True, True),
        (16384, "bf16", "bf16", False, False),
        (16384, "bf16", "fp32", False, True),
        (65536, "bf16", "fp32", True, True),
    ):
        wide = width == 65536
        held = wide or width <= tiles.WIDEST_LAYER
        entry = sizes[x] * (2 + total) + (0 if held else sizes[vectors])
        way = sums.walk(tiles.BACKWARD, tiles.BLOCK if wide else width, entry, device)
        fixed = {"width": width, "centred": centred, "biased": centred, "held": held}
        fixed |= {"b_r": way.b_r, "b_d": way.b_d, "stages": way.stages}
        fixed |= ({} if total else {"p_d_total": None}) | ({} if wide else {"p_sums": None})
        found = compiled(tiles._backward, types(tiles._backward, fixed, x, vectors), fixed, num_warps=way.warps)
        # At the widest, three vectors of a row and some addresses are more than all registers: a few bytes spill.
        assert found.stack <= (16 if width == 16384 else 0), (width, found)
        assert "cp.async.cg" in found.ptx and "st.global.v4" in found.ptx, width
    for kernel, fixed in (
        (tiles._forward_wide, {"eps": EPS, "width": 65536, "centred": True, "b_d": tiles.BLOCK}),
        (tiles._row_sums, {"width": 65536, "centred": True, "b_d": tiles.BLOCK}),
        (sums._column_sums, {"b_p": 128, "b_d": 32, "p_third": None}),
        (sums._column_sums, {"b_p": 16, "b_d": 256, "p_second": None, "p_third": None}),
    ):
        warps = 4 if kernel is sums._column_sums else 8
        assert compiled(kernel, types(kernel, fixed, "bf16", "fp32"), fixed, num_warps=warps).stack == 0, kernel


test_kernels_without_a_gpu = both(run_interpreted, run_compiled)
