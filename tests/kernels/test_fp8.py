"""Eight-bit products err by the rounding of their numbers alone, whatever their size; kernels equal their twins."""

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from without_gpu import Compiled, both, compiled, round_as_hardware_does

from farspan.kernels import fp8, fp8_quantise
from farspan.kernels.define import triton_runs
from farspan.kernels.fp8 import (
    Gradient,
    Recipe,
    coded,
    coded_rows,
    dequantise,
    fp8_linear,
    fp8_linear_ref,
    linear_problems,
    quantise,
)
from farspan.kernels.fp8_quantise import (
    BLOCKS,
    CODES,
    COLUMNS,
    ROWS,
    TRANSPOSE,
    blocks_ref,
    rows_ref,
    scale_ref,
    transpose_ref,
)

gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs one NVIDIA GPU")

RECIPES: tuple[Recipe, ...] = ("row", "block")
GRADIENTS: tuple[Gradient, ...] = ("fp8", "bf16")
ROUNDING = 0.042
"""Relative error of a product of two rounded factors; each has about 2.6 %."""


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.bfloat16, device: str = "cpu") -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def factors(
    tokens: int, inputs: int, outputs: int, dtype: torch.dtype = torch.bfloat16, device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor]:
    """x, weight, dy."""
    x, weight = draw(tokens, inputs, seed=0, dtype=dtype, device=device), draw(outputs, inputs, seed=1, device=device)
    dy = draw(tokens, outputs, seed=2, dtype=dtype, device=device)
    return x.requires_grad_(), (weight.to(dtype) * inputs**-0.5).requires_grad_(), dy * 1e-6


def gradients(linear: Callable[..., Tensor], x: Tensor, weight: Tensor, dy: Tensor, **options: Any) -> list[Tensor]:
    """y, dx, dw."""
    y = linear(x, weight, **options)
    return [y, *torch.autograd.grad(y, (x, weight), dy)]


def truth(x: Tensor, weight: Tensor, dy: Tensor) -> list[Tensor]:
    x, weight, dy = x.detach().double(), weight.detach().double(), dy.double()
    return [x @ weight.T, dy @ weight, dy.T @ x]


def apart(found: Tensor, wanted: Tensor) -> float:
    return ((found.double() - wanted).norm() / wanted.norm()).item()


# What the arithmetic is, in plain torch.


def test_a_scale_is_the_smallest_power_of_two_that_fits() -> None:
    amax = torch.cat([torch.tensor([448.0, 448.1, 449.0, 1.75, 1.7500001, 3e38]), torch.rand(200).exp2() * 1e-30])
    scale = scale_ref(amax)
    assert torch.equal(scale.log2(), scale.log2().round())
    assert (amax / scale <= 448).all() and (amax / (scale / 2) > 448).all()
    assert torch.equal(scale_ref(torch.tensor([0.0, 1e-45])), torch.full((2,), 2.0**-126))
    assert scale_ref(torch.tensor([torch.inf, torch.nan])).isnan().all()


@pytest.mark.parametrize("size", [1.0, 1e-6, 1e-30, 1e30])
def test_codes_keep_four_digits_of_all_but_the_smallest(size: float) -> None:
    x = draw(70, 256, seed=3) * size
    turned = [x.t(), x, x.t()]
    for recipe in RECIPES:
        codes = quantise(x, recipe, transposed=True)
        assert codes.transposed is not None and codes.transposed_scale is not None
        for matrix, values, scale in (
            (x, codes.values, codes.scale),
            (turned[0], codes.transposed, codes.transposed_scale),
        ):
            back = dequantise(values, scale)
            assert back.isfinite().all() and not back[matrix.shape[0] :].any() and not back[:, matrix.shape[1] :].any()
            error = (back[: matrix.shape[0], : matrix.shape[1]] - matrix.float()).abs()
            assert (error <= matrix.float().abs() / 16 + scale.max() * 2.0**-10).all()


@pytest.mark.parametrize(("recipe", "gradient"), list(product(RECIPES, GRADIENTS)), ids=str)
@pytest.mark.parametrize("tokens", [1, 63, 1000])
def test_products_err_by_rounding_alone(recipe: Recipe, gradient: Gradient, tokens: int) -> None:
    given = factors(tokens, 256, 384)
    found = gradients(fp8_linear, *given, recipe=recipe, weight_gradient=gradient)
    limits = [ROUNDING, ROUNDING, 0.004 if gradient == "bf16" else ROUNDING]
    for mine, wanted, limit in zip(found, truth(*given), limits, strict=True):
        assert mine.dtype == torch.bfloat16 and apart(mine, wanted) < limit * (1.2 if tokens == 1 else 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("recipe", "gradient"), list(product(RECIPES, GRADIENTS)), ids=str)
def test_the_layer_is_its_twin(dtype: torch.dtype, recipe: Recipe, gradient: Gradient) -> None:
    for tokens in (0, 1, 17, 130):
        given = factors(tokens, 128, 256, dtype)
        results = [
            gradients(linear, *given, recipe=recipe, weight_gradient=gradient)
            for linear in (fp8_linear, fp8_linear_ref)
        ]
        for mine, wanted in zip(*results, strict=True):
            close = 2e-2 if dtype == torch.bfloat16 else 1e-5
            torch.testing.assert_close(
                mine, wanted, rtol=close, atol=close * float(wanted.detach().abs().max() if tokens else 0)
            )


def noise(found: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """The error of left · right in units of the root of its summed squared terms: the same wherever sums cancel."""
    left, right = left.detach().double(), right.detach().double()
    return (found.double() - left @ right) / (left.square() @ right.square()).sqrt().clamp(min=1e-300)


@pytest.mark.parametrize("recipe", RECIPES)
def test_outliers_leave_the_others_their_digits(recipe: Recipe) -> None:
    """Tokens, channels and outputs up to a thousand times the rest, even at once: every row and column is right."""
    x, weight, dy = (matrix.detach().clone() for matrix in factors(256, 256, 256))
    x[5] *= 1000
    x[:, 9] *= 1000
    dy[7] *= 1000
    dy[:, 15] *= 100
    weight[:, 11] *= 100
    weight[13] *= 100
    dy[5] = 0  # so that only the other tokens count for the weight's gradient
    y, dx, dw = gradients(fp8_linear, x.requires_grad_(), weight.requires_grad_(), dy, recipe=recipe)
    for error in (noise(y, x, weight.T), noise(dx, dy, weight), noise(dw, dy.T, x)):
        assert error.square().mean().sqrt() < 0.05
        for axis in (0, 1):
            assert error.square().mean(axis).sqrt().max() < 0.12  # one number may be all there is to a sum


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("size", [1e-6, 1e-12, 1e-25])
def test_small_gradients_do_not_vanish(recipe: Recipe, size: float) -> None:
    x, weight, dy = factors(200, 256, 128)
    dy = (dy.double() * size * 1e6).bfloat16()
    for mine, wanted in zip(gradients(fp8_linear, x, weight, dy, recipe=recipe), truth(x, weight, dy), strict=True):
        assert apart(mine, wanted) < ROUNDING


@pytest.mark.parametrize("recipe", RECIPES)
def test_tokens_of_small_gradient_keep_their_digits_beside_large_ones(recipe: Recipe) -> None:
    """In the weight's gradient all tokens of a channel share a scale: a thousandth of the largest is still exact."""
    x, weight, dy = (matrix.detach().clone() for matrix in factors(200, 256, 128))
    dy[:100] *= 1000
    x[:100] = 0
    dw = gradients(fp8_linear, x.requires_grad_(), weight.requires_grad_(), dy, recipe=recipe)[2]
    assert apart(dw, truth(x, weight, dy)[2]) < ROUNDING


@pytest.mark.parametrize("recipe", RECIPES)
def test_zeros_and_huge_numbers(recipe: Recipe) -> None:
    x, weight, dy = (matrix.detach().clone() for matrix in factors(40, 128, 128))
    x[3], x[4], x[8], dy[5] = 0, 1e-40, 0, 0
    x[8, 2] = 3e38  # alone in its row, at the end of bf16
    weight[:, 2] = 2.0**-9
    weight[6] = 0
    y, dx, dw = gradients(fp8_linear, x.requires_grad_(), weight.requires_grad_(), dy, recipe=recipe)
    assert all(result.isfinite().all() for result in (y, dx, dw))
    assert not y[3].any() and not y[:, 6].any() and not dx[5].any()
    others = torch.arange(128) != 6
    torch.testing.assert_close(y[8, others].double(), torch.full((127,), 3e38 / 512.0).double(), rtol=0.07, atol=0)
    nothing = [torch.zeros_like(matrix) for matrix in (x, weight, dy)]
    zero = gradients(fp8_linear, nothing[0].requires_grad_(), nothing[1].requires_grad_(), nothing[2], recipe=recipe)
    assert not any(result.any() for result in zero)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_what_is_not_finite_stays_so(recipe: Recipe, bad: float) -> None:
    """The guard of the training step sees it."""
    x, weight, dy = (matrix.detach().clone() for matrix in factors(40, 128, 128))
    x[3, 5], dy[7, 9] = bad, bad
    y, dx, dw = gradients(fp8_linear, x.requires_grad_(), weight.requires_grad_(), dy, recipe=recipe)
    assert not y[3].isfinite().any() and y[4].isfinite().all()
    assert not dx[7].isfinite().any() and dx[8].isfinite().all()
    assert not dw.isfinite().all()


def test_layouts_of_inputs_do_not_matter() -> None:
    x, weight, dy = factors(24, 64, 48)
    wanted = gradients(fp8_linear, x, weight, dy)
    apart_rows = torch.full((24, 3, 64), torch.nan, dtype=x.dtype)
    apart_rows[:, 1] = x.detach()
    across = x.detach().t().contiguous().t()
    turned = weight.detach().t().contiguous().t().requires_grad_()
    for mine in (apart_rows[:, 1].requires_grad_(), across.requires_grad_()):
        for found, want in zip(gradients(fp8_linear, mine, turned, dy.t().contiguous().t()), wanted, strict=True):
            assert torch.equal(found, want)
    same = torch.ones((), dtype=x.dtype).expand(24, 48)
    for found, want in zip(
        gradients(fp8_linear, x, weight, same), gradients(fp8_linear, x, weight, same.contiguous()), strict=True
    ):
        assert torch.equal(found, want)
    deep = fp8_linear(x.detach().view(2, 3, 4, 64), weight)
    assert torch.equal(deep.flatten(0, 2), wanted[0]) and deep.shape == (2, 3, 4, 48)


@pytest.mark.parametrize("recipe", RECIPES)
def test_codes_from_elsewhere_take_the_place_of_x(recipe: Recipe) -> None:
    """x is then only who the gradient goes to: a tensor of NaN without memory does."""
    x, weight, dy = factors(37, 128, 128)
    wanted = gradients(fp8_linear, x, weight, dy, recipe=recipe)
    codes = quantise(x.detach(), recipe, transposed=True)
    handle = torch.full((), torch.nan, dtype=x.dtype).expand(37, 128).requires_grad_()
    for found, want in zip(
        gradients(fp8_linear, handle, weight, dy, recipe=recipe, quantised=codes), wanted, strict=True
    ):
        assert torch.equal(found, want)
    beside = coded(x.view(1, 37, 128), recipe, transposed=True)
    assert beside.place.data_ptr() == x.data_ptr()
    for code, want in zip(beside.codes, codes, strict=True):
        assert code is not None and want is not None and torch.equal(code.float(), want.float())
    lacking = codes._replace(transposed=None, transposed_scale=None)
    for found, want in zip(gradients(fp8_linear, x, weight, dy, recipe=recipe, quantised=lacking), wanted, strict=True):
        assert torch.equal(found, want)
    with pytest.raises(ValueError, match="are not those of x"):
        fp8_linear(x.repeat(9, 1), weight, recipe=recipe, quantised=codes)


@pytest.mark.parametrize("transposed", [True, False])
def test_a_producers_codes_are_complete(transposed: bool) -> None:
    """Of codes, scales and the columns' largest comes all that the products read, as from x itself."""
    x = draw(37, 64, seed=4)
    made = coded_rows(x, *ROWS(x, True), transposed=transposed).codes
    for found, wanted in zip(made, quantise(x, "row", transposed=transposed), strict=True):
        assert found is wanted is None or torch.equal(found.float(), wanted.float())


def test_only_what_is_asked_for_is_saved_and_computed() -> None:
    x, weight, dy = factors(32, 128, 64)
    saved: list[Tensor] = []

    def hold(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    for gradient in GRADIENTS:
        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(hold, lambda t: t):
            fp8_linear(x, weight, weight_gradient=gradient)
        codes = [t.numel() for t in saved if t.dtype == CODES]
        assert codes == ([128 * 32] if gradient == "fp8" else [])
        assert any(t.data_ptr() == x.data_ptr() for t in saved) == (gradient == "bf16")
    y = fp8_linear(x.detach(), weight)
    assert torch.equal(torch.autograd.grad(y, weight, dy)[0], gradients(fp8_linear, x, weight, dy)[2])
    y = fp8_linear(x, weight.detach())
    assert torch.equal(torch.autograd.grad(y, x, dy)[0], gradients(fp8_linear, x, weight, dy)[1])
    assert not fp8_linear(x.detach(), weight.detach()).requires_grad


def test_a_second_consumer_a_checkpoint_and_a_second_run_change_nothing() -> None:
    x, weight, dy = factors(33, 64, 64)
    wanted = gradients(fp8_linear, x, weight, dy)
    for found, want in zip(gradients(fp8_linear, x, weight, dy), wanted, strict=True):
        assert torch.equal(found, want)
    y = checkpoint(fp8_linear, x, weight, use_reentrant=False)
    assert isinstance(y, Tensor)
    for found, want in zip(torch.autograd.grad(y, (x, weight), dy), wanted[1:], strict=True):
        assert torch.equal(found, want)
    kept = x.detach().clone(), weight.detach().clone(), dy.clone()
    y = fp8_linear(x, weight)
    dx = torch.autograd.grad((y * dy).sum() + x.sum(), x)[0]
    assert torch.equal(dx, wanted[1] + 1)
    assert all(torch.equal(now, then) for now, then in zip((x, weight, dy), kept, strict=True))


def test_it_is_one_graph() -> None:
    for recipe in RECIPES:
        x, weight, dy = factors(20, 128, 128)
        wanted = gradients(fp8_linear, x, weight, dy, recipe=recipe)
        whole = torch.compile(fp8_linear, fullgraph=True, backend="aot_eager")
        for found, want in zip(gradients(whole, x, weight, dy, recipe=recipe), wanted, strict=True):
            assert torch.equal(found, want)


def test_operators_keep_their_word() -> None:
    x, tests = draw(20, 128, seed=0), ("test_schema", "test_faketensor")
    values, scale, columns = rows_ref(x, True)
    for wanted in (True, False):
        torch.library.opcheck(ROWS, (x, wanted), test_utils=tests)
    for side, straight, transposed in product((1, 128), (True, False), (True, False)):
        torch.library.opcheck(BLOCKS, (draw(128, 256, seed=1), side, straight, transposed), test_utils=tests)
    torch.library.opcheck(TRANSPOSE, (draw(32, 128, seed=2), None, columns), test_utils=tests)
    fake = ("test_faketensor",)  # the other test compares inputs, and torch cannot compare fp8
    torch.library.opcheck(COLUMNS, (values, scale), test_utils=fake)
    torch.library.opcheck(TRANSPOSE, (values, scale, columns), test_utils=fake)
    torch.library.opcheck(fp8.PRODUCT, (values, scale, values, scale, torch.bfloat16, False), test_utils=fake)


def test_sizes_and_types_are_refused() -> None:
    assert linear_problems(48, 16, "row") == []
    assert [problem.partition(":")[0] for problem in linear_problems(40, 192, "block")] == ["inputs=40", "outputs=192"]
    x, weight, _ = factors(4, 64, 32)
    with pytest.raises(ValueError, match="inputs=40: must be a multiple of 16"):
        fp8_linear(x[:, :40], weight[:, :40])
    with pytest.raises(ValueError, match="inputs differ"):
        fp8_linear(x, weight[:, :32])
    with pytest.raises(ValueError, match=r"x is torch.float32 .* linear: \{kind: plain\}"):
        fp8_linear(x.float(), weight)


# The kernels against their twins: interpreted here, compiled for Hopper, and on a GPU.


def surrounded(x: Tensor) -> Tensor:
    """x with NaN before, between and behind its rows."""
    room = torch.full((x.shape[0] + 2, 3, x.shape[1]), torch.nan, dtype=x.dtype, device=x.device)
    room[1:-1, 1] = x
    return room[1:-1, 1]


def same(found: Tensor, wanted: Tensor) -> None:
    """Equal in every bit; a zero may have either sign."""
    assert found.dtype == wanted.dtype and found.shape == wanted.shape
    assert torch.equal(found.float(), wanted.float()), (found.float() != wanted.float()).nonzero()[:8]


def mixed(rows: int, width: int, device: str, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Numbers of many sizes, with a row and a column of zeros, and one of huge ones."""
    x = draw(rows, width, seed=rows, dtype=torch.float32) * torch.exp2(draw(rows, 1, seed=7, dtype=torch.float32) * 4)
    x[rows // 2 : rows // 2 + 1] = 0
    x[:, width // 3] = 0
    x[rows // 3 : rows // 3 + 1] *= 1e30
    return surrounded(x.to(device, dtype))


def kernels_equal_their_twins(device: str, rows: list[tuple[int, int]], blocks: list[tuple[int, int]]) -> None:
    for count, width in rows:
        for dtype in (torch.bfloat16, torch.float32) if width < 4096 else (torch.bfloat16,):
            x = mixed(count, width, device, dtype)
            values, scale, columns = rows_ref(x, True)
            for found, wanted in zip(ROWS(x, True), (values, scale, columns), strict=True):
                same(found, wanted)
            for found, wanted in zip(ROWS(x, False)[:2], (values, scale), strict=True):
                same(found, wanted)
            same(COLUMNS(values, scale), columns)
            for found, wanted in zip(
                TRANSPOSE(values, scale, columns), transpose_ref(values, scale, columns), strict=True
            ):
                same(found, wanted)
            even = x[: count // 16 * 16]
            if even.numel():
                for found, wanted in zip(
                    TRANSPOSE(even, None, columns), transpose_ref(even, None, columns), strict=True
                ):
                    same(found, wanted)
    for count, width in blocks:
        x = mixed(count, width, device)
        for straight, transposed in ((True, True), (True, False), (False, True)):
            for side in (1, 128) if count % 128 == 0 else (1,):
                options = side, straight, transposed
                for codes, twin in zip(BLOCKS(x, *options), blocks_ref(x, *options), strict=True):
                    same(codes, twin)
                    assert codes.stride() == twin.stride() or 1 in codes.shape


def stores_stay_inside(device: str) -> None:
    """Kernels that write into the middle of a room leave its walls alone."""
    x = mixed(19, 48, device)
    values, scale, columns = rows_ref(x, True)
    room = torch.full((32 * 48 + 64,), 1, dtype=torch.uint8, device=device)
    scales, parts = (torch.full((size,), torch.nan, device=device) for size in (48, 4 * 48))
    codes, sizes = room[32:-32].view(CODES), (19, 32, 48, x.stride(0), 7)
    fp8_quantise._rows[(2,)](codes, scales[8:-8], parts[48:-48], x, *sizes, columns=True, stages=3, b_r=4, b_k=64)
    assert (room[:32] == 1).all() and (room[-32:] == 1).all()
    for numbers, wall in ((scales, 8), (parts, 48)):
        assert numbers[:wall].isnan().all() and numbers[-wall:].isnan().all() and numbers[wall:-wall].isfinite().all()
    same(codes.view(32, 48), values)
    same(parts[48:-48].view(2, 48).amax(0), columns)
    parts.fill_(torch.nan)
    fp8_quantise._columns[(2, 3)](parts[48:-48], values, scale, 32, 48, 3, b_t=8, b_k=16)
    assert parts[:48].isnan().all() and parts[-48:].isnan().all()
    same(parts[48:-48].view(2, 48).amax(0), columns)
    room.fill_(1)
    fours, scales = room[32:-32].view(torch.int32), torch.full((64,), torch.nan, device=device)
    given = (values, scale, columns, 2, 48, 48)
    fp8_quantise._transpose[(1, 1)](fours, scales[8:-8], *given, scaled=True, b_t=32, b_k=128)
    assert (room[:32] == 1).all() and (room[-32:] == 1).all()
    assert scales[:8].isnan().all() and scales[-8:].isnan().all()
    wanted = transpose_ref(values, scale, columns)
    same(codes.view(48, 32), wanted[0])
    same(scales[8:-8, None], wanted[1])


def layers_equal_their_twins(device: str, sizes: list[tuple[int, int, int]], limit: float) -> None:
    for (tokens, inputs, outputs), recipe, gradient in product(sizes, RECIPES, GRADIENTS):
        if linear_problems(inputs, outputs, recipe):
            continue
        given = factors(tokens, inputs, outputs, device=device)
        options: dict[str, Any] = {"recipe": recipe, "weight_gradient": gradient}
        mine, twin = (gradients(linear, *given, **options) for linear in (fp8_linear, fp8_linear_ref))
        for name, found, wanted in zip(("y", "dx", "dw"), mine, twin, strict=True):
            assert found.isfinite().all() and found.dtype == wanted.dtype
            if tokens:
                error = apart(found, wanted.double())
                assert error < limit, (name, error, tokens, inputs, outputs, recipe, gradient)
        for found, again in zip(mine, gradients(fp8_linear, *given, **options), strict=True):
            assert torch.equal(found, again)


@gpu
@needs_gpu
def test_gpu_kernels_equal_their_twins() -> None:
    rows = [
        (1, 16),
        (63, 48),
        (1000, 1008),
        (257, 4096),
        (130, 14336),
        (33, 16400),
        (17, 53248),
        (20000, 4096),
        (0, 64),
    ]
    kernels_equal_their_twins("cuda", rows, [(1, 128), (130, 384), (1000, 4096), (256, 14336), (384, 640)])
    stores_stay_inside("cuda")


@gpu
@needs_gpu
def test_gpu_layers_equal_their_twins() -> None:
    """All products of every recipe; the forward's short accumulator is within 2 % at the longest sum."""
    sizes = [(1, 128, 256), (63, 144, 48), (1000, 640, 384), (4096, 4096, 1024), (2040, 14336, 4096), (0, 64, 32)]
    layers_equal_their_twins("cuda", sizes, limit=0.02)


@gpu
@needs_gpu
def test_gpu_errors_are_those_of_rounding() -> None:
    for recipe, gradient in product(RECIPES, GRADIENTS):
        given = factors(2048, 4096, 4096, device="cuda")
        found = gradients(fp8_linear, *given, recipe=recipe, weight_gradient=gradient)
        for mine, wanted in zip(found, truth(*given), strict=True):
            assert apart(mine, wanted) < ROUNDING + 0.003


@gpu
@needs_gpu
def test_gpu_refuses_other_types() -> None:
    x, weight, _ = factors(32, 64, 64, torch.float32, "cuda")
    with pytest.raises(ValueError, match="both must be bfloat16"):
        fp8_linear(x, weight)


@gpu
@needs_gpu
def test_gpu_rows_beyond_32_bits() -> None:
    whole = torch.zeros((1 << 31) + 4096, dtype=torch.bfloat16, device="cuda")
    far = whole.as_strided((2, 256), (1 << 31, 1))
    far.copy_(draw(2, 256, seed=0))
    for found, wanted in zip(ROWS(far, True), rows_ref(far, True), strict=True):
        same(found, wanted)
    for found, wanted in zip(BLOCKS(far, 1, True, True), blocks_ref(far, 1, True, True), strict=True):
        same(found, wanted)


def run_interpreted() -> None:
    assert triton_runs(torch.zeros(1))
    round_as_hardware_does()
    kernels_equal_their_twins(
        "cpu", [(0, 64), (1, 16), (63, 48), (2, 16400), (150, 272)], [(1, 128), (130, 384), (256, 640)]
    )
    stores_stay_inside("cpu")
    layers_equal_their_twins("cpu", [(0, 64, 32), (37, 128, 256)], limit=1e-3)


def run_compiled() -> None:
    """Every kernel in every form that a launch can choose fits, keeps its values in registers and stores 16 bytes."""
    pointers = {"p_values": "*fp8e4nv", "p_fours": "*i32", "p_x": "*bf16"}

    def build(name: str, limit: int, warps: int, given: str = "*fp8e4nv", **fixed: Any) -> Compiled:
        kernel = getattr(fp8_quantise, name)
        names = [argument for argument in kernel.arg_names if argument not in fixed]
        kinds = {**pointers, "p_values": given}
        types = {n: kinds.get(n, "*fp32" if n.startswith("p_") else "i32") for n in names}
        made = compiled(kernel, types, fixed, num_warps=warps)
        assert made.stack == 0 and made.registers <= limit, (name, fixed, made.registers, made.stack)
        return made

    for width, columns in product((16, 128, 1024, 2048, 4096, 14336), (True, False)):
        b_k = 1 << (width - 1).bit_length()
        b_r = min(16, max(1, (8192 if columns else 4096) // b_k))
        warps = max(4, b_r * b_k // (512 if columns else 1024))
        made = build("_rows", 64, warps, columns=columns, stages=3 if columns else 1, b_r=b_r, b_k=b_k)
        assert made.shared < 110_000
        assert "cvt.rn.satfinite.e4m3x2.f32" in made.ptx and (width < 1024 or "st.global.v4.b32" in made.ptx)
    build("_wide_rows", 64, 8, b_k=8192)
    build("_columns", 128, 4, b_t=32, b_k=128)
    for scaled, given in ((True, "*fp8e4nv"), (False, "*bf16")):
        made = build("_transpose", 64, 8, given, scaled=scaled, b_t=32, b_k=128)
        assert "st.global.v4.b32" in made.ptx and "ld.global.v4.b32" in made.ptx and "shared.b8" not in made.ptx
    for square, (straight, transposed) in product((False, True), ((True, True), (True, False), (False, True))):
        made = build("_blocks", 128, 8, square=square, straight=straight, transposed=transposed, side=128)
        assert "st.global.v4.b32" in made.ptx


test_kernels_without_a_gpu = both(run_interpreted, run_compiled)
