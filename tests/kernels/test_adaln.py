"""adaLN equals torch's layer norm, scaled, shifted and gated by sample; kernels write nothing but their results."""

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from without_gpu import both, compiled

from farspan.kernels import adaln as ops
from farspan.kernels.adaln import adaln, adaln_ref, add_adaln, add_adaln_ref
from farspan.kernels.column_sums import walk

gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs one NVIDIA GPU")

EPS = 1e-3
EPSILON = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}

Op = Callable[..., Tensor | tuple[Tensor, Tensor]]
PAIRS: tuple[tuple[Op, Op], ...] = ((adaln, adaln_ref), (add_adaln, add_adaln_ref))


def torch_adaln(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale[:, None]) + shift[:, None]


def torch_add_adaln(
    x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    total = x + gate[:, None] * branch
    return total, torch_adaln(total, shift, scale, eps)


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    """Normal numbers that bf16 holds exactly, in a tensor whose rows lie apart, with NaN between them."""
    drawn = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()
    room = torch.full((shape[0], 2, *shape[1:-1], 3 * shape[-1]), torch.nan, dtype=dtype, device=device)
    inside = room[:, 1, ..., shape[-1] : 2 * shape[-1]]
    inside.copy_(drawn)
    return inside


def arguments(
    op: Op, shape: tuple[int, int, int], dtype: torch.dtype, vectors: torch.dtype, device: str = "cpu"
) -> list[Tensor]:
    tokens = 1 if op is adaln else 2
    modulation = [draw(shape[0], shape[2], seed=9 + i, dtype=vectors, device=device) for i in range(tokens + 1)]
    drawn = [*(draw(*shape, seed=i, dtype=dtype, device=device) for i in range(tokens)), *modulation]
    return [x.requires_grad_() for x in drawn]


def everything(op: Op, inputs: list[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    """Results and gradients; in `dtype`, where it is given, but for the same numbers."""
    inputs = inputs if dtype is None else [x.detach().to(dtype).requires_grad_() for x in inputs]
    out = op(*inputs, EPS)
    out = out if isinstance(out, tuple) else (out,)
    upstream = [draw(*x.shape, seed=5 + i, dtype=x.dtype, device=str(x.device)) for i, x in enumerate(out)]
    return [x.detach() for x in (*out, *torch.autograd.grad(out, inputs, upstream))]


def close(op: Op, twin: Op, inputs: list[Tensor], *, slack: float = 1.0) -> None:
    """The op's error against fp64 is at most twice that of `twin`, and the last bit."""
    truth = everything(add_adaln_ref if op is add_adaln else adaln_ref, inputs, torch.float64)
    for i, (mine, other, true) in enumerate(zip(everything(op, inputs), everything(twin, inputs), truth, strict=True)):
        assert mine.dtype == other.dtype and mine.shape == other.shape
        error, bound = ((x.double() - true).abs().max().item() for x in (mine, other))
        last = slack * EPSILON[mine.dtype] * max(1.0, true.abs().max().item())
        assert error <= 2 * bound + last, f"{tuple(inputs[0].shape)} {mine.dtype} result {i}: {error}, {bound}"


@pytest.mark.parametrize("width", [1, 63, 1000])
def test_adaln_is_torchs_layer_norm_modulated(width: int) -> None:
    for (op, _), plain in zip(PAIRS, (torch_adaln, torch_add_adaln), strict=True):
        inputs = arguments(op, (2, 5, width), torch.float64, torch.float64)
        torch.testing.assert_close(everything(op, inputs), everything(plain, inputs), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("pair", PAIRS, ids=["adaln", "add_adaln"])
def test_twins_have_the_right_gradients(pair: tuple[Op, Op]) -> None:
    inputs = arguments(pair[0], (2, 3, 5), torch.float64, torch.float64)
    assert torch.autograd.gradcheck(lambda *x: pair[1](*x, EPS), inputs)


def test_results_are_rounded_once() -> None:
    inputs = [x.detach() for x in arguments(add_adaln, (2, 9, 130), torch.bfloat16, torch.float32)]
    total, normed = add_adaln(*inputs, EPS)
    assert total.dtype == normed.dtype == torch.bfloat16
    wide_total, _ = add_adaln(*(x.double() for x in inputs), EPS)
    wide = adaln(total.double(), *(x.double() for x in inputs[3:]), EPS)
    # Once in some thousand entries fp32 lies on the other side of a tie.
    assert (total != wide_total.bfloat16()).sum() <= 2 and (normed != wide.bfloat16()).sum() <= 2


def test_zero_gates_and_scales_leave_the_stream_and_its_norm() -> None:
    """The Zero of adaLN-Zero: a new block is the identity, and its gate's gradient is not zero."""
    x, branch = draw(2, 5, 24, seed=0), draw(2, 5, 24, seed=1)
    gate, shift, scale = (torch.zeros(2, 24, requires_grad=True) for _ in range(3))
    total, normed = add_adaln(x, branch, gate, shift, scale, EPS)
    assert torch.equal(total, x)
    torch.testing.assert_close(normed, F.layer_norm(x, (24,), eps=EPS), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.autograd.grad(total.sum(), gate)[0], branch.sum(1))


def test_sizes_that_do_not_fit_are_refused() -> None:
    x, rows = torch.ones(2, 3, 8), torch.ones(2, 8)
    with pytest.raises(ValueError, match="B T D alike"):
        adaln(x[0], rows, rows, EPS)
    with pytest.raises(ValueError, match="B T D alike"):
        add_adaln(x, x[:, :1], rows, rows, rows, EPS)
    with pytest.raises(ValueError, match="one row of them for each sample"):
        adaln(x, torch.ones(3, 8), rows, EPS)


def test_programs_fill_the_device_and_no_more() -> None:
    for samples, tiles, slots in product((1, 2, 7, 100, 264, 300, 5000), (1, 3, 256, 4096), (2, 264)):
        programs = ops._programs(samples, tiles, slots)
        assert 1 <= programs <= tiles
        assert programs == 1 or samples * programs <= 4 * slots
        # The busiest slot does at most 1.5 of its share of the tiles, and a start or two.
        rounds = -(-samples * programs // slots) * -(-tiles // programs)
        assert rounds <= 1.5 * samples * tiles / slots + 2 * ops.START + tiles / programs


Kinds = tuple[tuple[torch.dtype, torch.dtype], ...]
"""Types of tokens and of their modulation."""
MIXED: Kinds = ((torch.bfloat16, torch.float32),)
OTHERS: Kinds = (
    (torch.float32, torch.float32),
    (torch.float16, torch.float16),
    (torch.bfloat16, torch.bfloat16),
    (torch.float32, torch.bfloat16),
)


def kernels_equal_their_twins(
    device: str, kinds: Kinds, shapes: tuple[tuple[int, int, int], ...], *, slack: float = 1.0
) -> None:
    for (dtype, vectors), shape, (op, twin) in product(kinds, shapes, PAIRS):
        close(op, twin, arguments(op, shape, dtype, vectors, device), slack=slack)


def no_tokens_have_no_gradient(device: str) -> None:
    for op, _ in PAIRS:
        for shape in ((2, 0, 8), (0, 3, 8)):
            inputs = arguments(op, shape, torch.float32, torch.float32, device)
            found = everything(op, inputs)[-len(inputs) :]
            assert [x.shape for x in found] == [x.shape for x in inputs] and all(not x.any() for x in found)


def nothing_else_is_written(device: str, samples: int, length: int, width: int) -> None:
    """Results lie in memory full of NaN: all of theirs is written and nothing beside it; upstream gradients stay."""
    shape = samples, length, width
    inputs = arguments(add_adaln, shape, torch.float32, torch.float32, device)
    x, branch, gate, shift, scale = (y.detach() for y in inputs)

    def banded(*size: int) -> tuple[Tensor, Tensor]:
        count = torch.Size(size).numel()
        room = torch.full((count + 256,), torch.nan, device=device)
        return room, room[128 : count + 128].view(size)

    forward = [banded(*shape), banded(2, samples, length), banded(*shape)]
    ops._launch_forward(x, branch, (gate, shift, scale), EPS, [view for _, view in forward])
    backward = [banded(*shape), banded(samples, width), banded(samples, width), banded(*shape), banded(samples, width)]
    upstream = draw(*shape, seed=7, device=device), draw(*shape, seed=8, device=device)
    copies = [y.clone() for y in upstream]
    stats, total = forward[1][1], forward[2][1]
    ops._launch_backward(*upstream, total, stats, branch, gate, scale, [view for _, view in backward])
    assert all(torch.equal(y, copy) for y, copy in zip(upstream, copies, strict=True))
    for room, view in (*forward, *backward):
        assert not view.isnan().any() and room.isnan().sum() == 256


def blocks_agree(device: str) -> None:
    """Where everything has another consumer: the twins, a checkpoint, compiling, and once more."""
    inputs = arguments(add_adaln, (3, 7, 40), torch.float32, torch.float32, device)

    def block(x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        first = adaln(x, shift, scale, EPS)
        total, normed = add_adaln(x, branch * first, gate, shift, scale, EPS)
        return total * normed + first * x + branch

    def gradients(forward: Callable[..., Tensor]) -> list[Tensor]:
        return [y.detach() for y in torch.autograd.grad(forward(*inputs).square().sum(), inputs)]

    ours = gradients(block)
    again = [gradients(block), gradients(lambda *x: checkpoint(block, *x, use_reentrant=False))]
    again.append(gradients(torch.compile(block, fullgraph=True, backend="aot_eager")))
    runs, ops.triton_runs = ops.triton_runs, lambda *_: False
    twin = gradients(block)
    ops.triton_runs = runs
    for other in again:
        assert all(torch.equal(a, b) for a, b in zip(ours, other, strict=True))
    for a, b in zip(ours, twin, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * b.abs().max().item())


def one_gradient_may_be_missing(device: str) -> None:
    """Where only the total, or only what is normed, goes on."""
    for chosen in (0, 1):
        found = []
        for op in PAIRS[1]:
            inputs = arguments(add_adaln, (2, 5, 33), torch.float32, torch.float32, device)
            op(*inputs, EPS)[chosen].backward(draw(2, 33, 5, seed=5, device=device).mT)
            found.append([x.grad if x.grad is not None else torch.zeros_like(x) for x in inputs])
        torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)


@gpu
@needs_gpu
@pytest.mark.parametrize("width", [1, 88, 256, 1000, 1152, 1536, 3072, 4096, 8192, 8200])
def test_gpu_kernels_equal_their_twins(width: int) -> None:
    kinds = MIXED + (OTHERS if width in (88, 1152, 8192) else ())
    kernels_equal_their_twins("cuda", kinds, ((3, 257, width), (1, 1025, width), (301, 5, width)))


@gpu
@needs_gpu
@pytest.mark.parametrize("shape", [(32, 256, 1152), (4, 4096, 3072)])
def test_gpu_kernels_are_as_exact_as_torch(shape: tuple[int, int, int]) -> None:
    for dtype, ((op, _), plain) in product(
        (torch.bfloat16, torch.float32), zip(PAIRS, (torch_adaln, torch_add_adaln), strict=True)
    ):
        inputs = arguments(op, shape, dtype, dtype, "cuda")
        close(op, plain, inputs)
        first, second = everything(op, inputs), everything(op, inputs)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@gpu
@needs_gpu
def test_gpu_kernels_write_nothing_else_and_agree_with_themselves() -> None:
    for width in (6, 256, 1152, 3072, 8192):
        nothing_else_is_written("cuda", 3, 101, width)
    no_tokens_have_no_gradient("cuda")
    one_gradient_may_be_missing("cuda")
    blocks_agree("cuda")


@gpu
@needs_gpu
def test_gpu_kernels_reach_samples_beyond_32_bits() -> None:
    """Two samples of a tensor as seen with a stride of 2^31 elements."""
    whole = torch.zeros((1 << 31) + 3 * 256, dtype=torch.bfloat16, device="cuda")
    far = whole.as_strided((2, 3, 256), (1 << 31, 256, 1))
    far.copy_(draw(2, 3, 256, seed=0, dtype=torch.bfloat16, device="cuda"))
    near, rows = far.clone(), draw(2, 256, seed=1, device="cuda")
    found = [add_adaln(x, x, rows, rows, rows, EPS) for x in (far, near)]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    gradients = []
    for x in (far, near):
        leaf = x.detach().requires_grad_()
        total, normed = add_adaln(leaf, x, rows, rows, rows, EPS)
        gradients.append(torch.autograd.grad((total, normed), leaf, (x, x))[0])
    assert torch.equal(*gradients)


def run_interpreted() -> None:
    assert ops.triton_runs(torch.zeros(1))
    kernels_equal_their_twins("cpu", OTHERS[:2], ((3, 37, 6), (1, 1, 130)))
    kernels_equal_their_twins("cpu", OTHERS[:1], ((3, 3, 1000),))
    truncating = MIXED + OTHERS[2:3]  # interpreted stores of bf16 are not rounded
    kernels_equal_their_twins("cpu", truncating, ((2, 41, 72),), slack=2.0)
    close(add_adaln, add_adaln_ref, arguments(add_adaln, (1, 2, ops.WIDEST + 8), torch.float32, torch.float32))
    nothing_else_is_written("cpu", 2, 13, 6)
    nothing_else_is_written("cpu", 3, 5, 1152)
    no_tokens_have_no_gradient("cpu")
    one_gradient_may_be_missing("cpu")
    blocks_agree("cpu")
    x, m = draw(3, 5, 20, seed=0), draw(3, 20, seed=1)
    normed, stats, total = ops.modulate(x, x.flip(0), m, m, m, EPS)
    torch.library.opcheck(ops.modulate, (x, x.flip(0), m, m, m, EPS))
    torch.library.opcheck(ops.modulate, (x, None, None, m, m, EPS))
    torch.library.opcheck(ops.modulate_backward, (normed, normed, total, stats, x, m, m, m))


def run_compiled() -> None:
    """Every kernel compiles for Hopper, in registers, its loads of 16 bytes on their way before their turn."""
    kernels: tuple[tuple[Any, Any, dict[str, Any], tuple[int, int]], ...] = (
        (ops._forward, ops.FORWARD, {"eps": EPS}, (1, 2)),
        (ops._backward, ops.BACKWARD, {}, (2, 4)),
    )
    branchless = ("p_branch", "p_d_branch", "p_gate")
    vectors = ("p_gate", "p_shift", "p_scale")
    for (kernel, pace, fixed, streams), (width, x, branch) in product(
        kernels,
        (
            (384, "bf16", True),
            (1152, "bf16", True),
            (1152, "bf16", False),
            (3072, "bf16", True),
            (3072, "fp32", True),
            (8192, "bf16", True),
        ),
    ):
        way = walk(pace, width, streams[branch] * {"bf16": 2, "fp32": 4}[x], torch.device("cpu"))
        chosen = fixed | {"width": width, "b_r": way.b_r, "b_d": way.b_d, "stages": way.stages}
        absent = () if branch else ("p_total" if kernel is ops._forward else "p_d_total", *branchless)
        chosen |= {name: None for name in absent if name in kernel.arg_names}
        pointers = {"p_stats": "*fp32", "p_parts": "*fp32"} | dict.fromkeys(vectors, "*fp32")
        types = {
            n: pointers.get(n, f"*{x}") if n.startswith("p_") else "i64" if n.endswith("_row") else "i32"
            for n in kernel.arg_names
            if n not in chosen
        }
        found = compiled(kernel, types, chosen, num_warps=way.warps)
        assert found.stack == 0, (kernel, width, found.registers, found.stack)
        assert "cp.async.cg" in found.ptx and "st.global.v4" in found.ptx, (kernel, width)


test_kernels_without_a_gpu = both(run_interpreted, run_compiled)
