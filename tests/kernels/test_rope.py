"""Rotations keep lengths and relative places, norms before them round nowhere between, and views stay untouched."""

from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from without_gpu import both, compiled

from farspan.kernels import rope as ops
from farspan.kernels import rope_tiles as tiles
from farspan.kernels.define import triton_runs
from farspan.kernels.rope import qk_norm_rope, qk_norm_rope_ref, rope, rope_, rope_ref

gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs one NVIDIA GPU")

EPSILON = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
Shape = tuple[int, int, int, int, int]
"""B T H Hkv K."""
Op = Callable[..., tuple[Tensor, Tensor]]


def angles(shape: Shape, device: str = "cpu", *, shared: bool = False, amplitude: float = 1.3) -> tuple[Tensor, Tensor]:
    """Tables of packed documents in fp32: positions begin again, and rows differ unless one serves all."""
    b, t, _, _, key_dim = shape
    positions = torch.arange(t).add(17 * torch.arange(1 if shared else b)[:, None]) % max(2, t - 3)
    turns = positions.double()[..., None] * 100.0 ** (-torch.arange(0, key_dim, 2).double() / key_dim)
    return tuple((amplitude * x).float().unsqueeze(2).to(device) for x in (turns.cos(), turns.sin()))  # type: ignore[return-value]


def draw(shape: Shape, dtype: torch.dtype, device: str = "cpu", *, how: str = "views") -> list[Tensor]:
    """q and k; their upstream gradients. `views`: of one projection with NaN around; `columns`: not dense anywhere."""
    b, t, heads, kv_heads, key_dim = shape
    made, found = torch.Generator().manual_seed(sum(shape)), []
    for _ in range(2):
        if how == "views":
            room = torch.full((b, t, heads + kv_heads + 2, key_dim), torch.nan, dtype=dtype, device=device)
            found += [room[:, :, 1 : 1 + heads], room[:, :, 1 + heads : -1]]
        else:
            rooms = (torch.full((key_dim, n, b, t, 2), torch.nan, dtype=dtype, device=device) for n in shape[2:4])
            found += [room[..., 1].permute(2, 3, 1, 0) for room in rooms]
    for x in found:
        x.copy_(torch.randn(x.shape, generator=made).to(device, dtype))
    return found


def gains(shape: Shape, dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
    made = torch.Generator().manual_seed(5)
    return [(1 + 0.5 * torch.randn(shape[4], generator=made)).to(device, dtype) for _ in range(2)]


def gradients(op: Op, leaves: list[Tensor], upstream: list[Tensor]) -> tuple[Tensor, ...]:
    """The two results, then the gradients of all leaves."""
    leaves = [x.detach().requires_grad_() for x in leaves]
    out = op(*leaves)
    return *(x.detach() for x in out), *torch.autograd.grad(out, leaves, upstream)


def turning(op: Op, table: tuple[Tensor, Tensor]) -> Op:
    """`rope` or its twin as a function of q, k."""
    return lambda q, k: op(q, k, *table)


def norming(op: Op, table: tuple[Tensor, Tensor], eps: float = 1e-2) -> Op:
    """`qk_norm_rope` or its twin as a function of q, k and weights."""
    return lambda q, k, weight_q, weight_k: op(q, k, weight_q, weight_k, eps, *table)


def apart(
    q: Tensor, k: Tensor, weight_q: Tensor, weight_k: Tensor, eps: float, *table: Tensor
) -> tuple[Tensor, Tensor]:
    """What torch itself would do: a norm that is rounded, then a rotation."""
    normed = (F.rms_norm(x, w.shape, w.to(x.dtype), eps) for x, w in ((q, weight_q), (k, weight_k)))
    turned_q, turned_k = rope_ref(*normed, *table)
    return turned_q, turned_k


def test_a_pair_is_a_complex_number_that_turns() -> None:
    shape = (2, 9, 5, 1, 6)
    q, k, dq, dk = (x.double() for x in draw(shape, torch.float32))
    cos, sin = (x.double() for x in angles(shape))

    def turned(x: Tensor) -> Tensor:
        z = torch.complex(*x.chunk(2, -1)) * torch.complex(cos, sin)
        return torch.cat((z.real, z.imag), -1)

    wanted = gradients(lambda q, k: (turned(q), turned(k)), [q, k], [dq, dk])
    for op in (rope, rope_ref):
        torch.testing.assert_close(gradients(turning(op, (cos, sin)), [q, k], [dq, dk]), wanted)


def test_a_norm_and_a_rotation_are_one_after_the_other() -> None:
    shape = (2, 4, 3, 2, 8)
    q, k, dq, dk = (x.double() for x in draw(shape, torch.float32))
    weights, table = gains(shape, torch.float64), tuple(x.double() for x in angles(shape))
    wanted = gradients(norming(apart, table), [q, k, *weights], [dq, dk])  # type: ignore[arg-type]
    for op in (qk_norm_rope, qk_norm_rope_ref):
        torch.testing.assert_close(gradients(norming(op, table), [q, k, *weights], [dq, dk]), wanted)  # type: ignore[arg-type]
    leaves = [x[:1, :2].detach().requires_grad_() for x in (q, k)] + [w.detach().requires_grad_() for w in weights]
    assert torch.autograd.gradcheck(norming(qk_norm_rope_ref, tuple(x[:1, :2] for x in table)), leaves)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_rounds_once(dtype: torch.dtype) -> None:
    shape = (2, 9, 5, 1, 6)
    q, k, *_ = draw(shape, dtype)
    table, weights = angles(shape), gains(shape, torch.float32)
    for short, long in (
        (rope(q, k, *table), rope(q.float(), k.float(), *table)),
        (qk_norm_rope(q, k, *weights, 1e-2, *table), qk_norm_rope(q.float(), k.float(), *weights, 1e-2, *table)),
    ):
        assert all(torch.equal(a, b.to(dtype)) for a, b in zip(short, long, strict=True))


def writes_in_place(device: str, dtypes: tuple[torch.dtype, ...], shapes: list[Shape]) -> None:
    for dtype, shape in product(dtypes, shapes):
        q, k, *_ = draw(shape, dtype, device)
        table = angles(shape, device)
        wanted = rope(q, k, *table)
        rope_(q, k, *table)
        torch.testing.assert_close((q, k), wanted)
        whole = q._base if q._base is not None else q
        assert whole[:, :, 0].isnan().all() and whole[:, :, -1].isnan().all()


def hears_of_writes(device: str) -> None:
    """What a graph has saved may not change behind its back."""
    shape = (1, 3, 2, 1, 4)
    q, k, *_ = draw(shape, torch.float32, device)
    weight = torch.ones(4, device=device, requires_grad=True)
    loss = (q * weight).sum()
    rope_(q, k, *angles(shape, device))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_in_place_is_the_same_rotation() -> None:
    writes_in_place("cpu", (torch.float64, *EPSILON), [(2, 3, 5, 1, 6), (1, 1, 1, 1, 2)])
    hears_of_writes("cpu")


def test_in_place_is_refused_where_it_would_be_wrong() -> None:
    shape = (2, 3, 4, 2, 6)
    q, k, *_ = draw(shape, torch.float32)
    table = angles(shape)
    with pytest.raises(RuntimeError, match=r"rope_: q or k requires grad, .*; use rope"):
        rope_(q.clone().requires_grad_(), k, *table)
    with torch.no_grad():
        rope_(q.clone().requires_grad_(), k.clone(), *table)
    with pytest.raises(ValueError, match=r"rope_: k has strides .* rows must be dense and each its own; use rope"):
        rope_(q, k[:, :, :1].expand(-1, -1, 2, -1), *table)
    with pytest.raises(ValueError, match="rope_: q has strides"):
        rope_(q.mT.contiguous().mT, k, *table)


def test_what_does_not_fit_is_refused() -> None:
    shape = (2, 3, 4, 2, 6)
    q, k, *_ = draw(shape, torch.float32)
    cos, sin = angles(shape)
    with pytest.raises(ValueError, match="with an even K"):
        rope(q[..., :5], k[..., :5], cos, sin)
    with pytest.raises(ValueError, match=r"k \(2, 2, 2, 6\) B T Hkv K"):
        rope(q, k[:, :2], cos, sin)
    with pytest.raises(ValueError, match=r"must be \(2, 3, 1, 3\) each, or \(1, 3, 1, 3\) for all rows"):
        rope(q, k, cos[:, :2], sin[:, :2])
    with pytest.raises(ValueError, match=r"weights \(5,\) and \(6,\) must be K=6 each"):
        qk_norm_rope(q, k, torch.ones(5), torch.ones(6), 1e-5, cos, sin)
    with pytest.raises(ValueError, match=r"eps=0.0 positive; 1e-5 is usual"):
        qk_norm_rope(q, k, torch.ones(6), torch.ones(6), 0.0, cos, sin)


def is_close(found: tuple[Tensor, ...], usual: tuple[Tensor, ...], wanted: tuple[Tensor, ...], what: object) -> None:
    """Each number within twice torch's own error in that type, and what one rounding and fp32 sums leave."""
    for i, (ours, torchs, exact) in enumerate(zip(found, usual, wanted, strict=True)):
        assert ours.dtype == torchs.dtype and ours.is_contiguous() and ours.shape == exact.shape
        allowed = 2 * (torchs.double() - exact).abs() + EPSILON[ours.dtype] * exact.abs() + 2e-6 * exact.abs().amax()
        assert ((ours.double() - exact).abs() <= allowed).all(), (i, what)


def kernels_equal_their_twins(device: str, dtypes: tuple[torch.dtype, ...], shapes: list[Shape]) -> None:
    cases = product(dtypes, shapes, (("views", False), ("views", True), ("columns", True)))
    for number, (dtype, shape, (how, shared)) in enumerate(cases):
        table = angles(shape, device, shared=shared)
        if shared and how == "columns":  # expanded tables: one row of memory for all
            table = tuple(x.expand(shape[0], -1, -1, -1) for x in table)  # type: ignore[assignment]
        q, k, *upstream = draw(shape, dtype, device, how=how)
        leaves, grads = [x.double() for x in (q, k)], [x.double() for x in upstream]
        exact = tuple(x.double() for x in table)
        wanted = gradients(turning(rope_ref, exact), leaves, grads)  # type: ignore[arg-type]
        usual = gradients(turning(rope_ref, table), [q, k], upstream)
        is_close(gradients(turning(rope, table), [q, k], upstream), usual, wanted, (dtype, shape, how, shared))
        weights = gains(shape, dtype if number % 2 else torch.float32, device)
        leaves += [w.double() for w in weights]
        wanted = gradients(norming(qk_norm_rope_ref, exact), leaves, grads)  # type: ignore[arg-type]
        usual = gradients(norming(apart, table), [q, k, *weights], upstream)
        found = gradients(norming(qk_norm_rope, table), [q, k, *weights], upstream)
        is_close(found, usual, wanted, ("norm", dtype, shape, how, shared))


def kernels_write_nothing_else(device: str, dtype: torch.dtype, shapes: list[Shape]) -> None:
    """Between guard bands the results are whole, the bands NaN as before, and the inputs as they were."""
    for shape in shapes:
        table, weights = angles(shape, device), gains(shape, dtype, device)
        q, k, dq, dk = given = draw(shape, dtype, device)
        before = [x.clone() for x in given]
        rooms = [torch.full((x.numel() + 8192,), torch.nan, dtype=dtype, device=device) for x in (q, k, *weights)]
        results = [room[4096:-4096].view(x.shape) for room, x in zip(rooms, (q, k, *weights), strict=True)]
        for norm in (False, True):
            if norm:
                tiles.norm_backward(tuple(results), (dq, dk), (q, k), tuple(weights), table, 1e-2)  # type: ignore[arg-type]
            else:
                tiles.turn((results[0], results[1]), (q, k), table, "plain")
            for room, result in zip(rooms, results[: 4 if norm else 2], strict=False):
                assert result.isfinite().all() and room[:4096].isnan().all() and room[-4096:].isnan().all()
                result.fill_(torch.nan)
        assert all(map(torch.equal, given, before))


def kernels_are_one_node_among_others(device: str, dtype: torch.dtype) -> None:
    """A second user of inputs and upstream gradients, checkpointing, expanded gradients, unused results, no tokens."""
    shape = (2, 5, 4, 2, 16)
    table, weights = angles(shape, device), gains(shape, dtype, device)
    q, k, *_ = (x.contiguous() for x in draw(shape, dtype, device))
    one = torch.ones((), dtype=dtype, device=device)
    for op, ref, leaves in (
        (turning(rope, table), turning(rope_ref, table), [q, k]),
        (norming(qk_norm_rope, table), norming(qk_norm_rope_ref, table), [q, k, *weights]),
    ):

        def shared(op: Op, q: Tensor, k: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
            turned_q, turned_k = op(q, k, *weights)
            return turned_q + turned_q.sin() + q, turned_k + k + k

        upstream = [one.expand_as(q), one.expand_as(k)]
        found, twin = (gradients(partial(shared, which), leaves, upstream) for which in (op, ref))
        torch.testing.assert_close(found, twin, rtol=8 * EPSILON[dtype], atol=64 * EPSILON[dtype])
        again = gradients(partial(checkpoint, partial(shared, op), use_reentrant=False), leaves, upstream)
        assert all(map(torch.equal, found, again)), "not the same bits when run again"
        alone = [x.detach().requires_grad_() for x in leaves]
        dq, dk = torch.autograd.grad(op(*alone)[0].sum(), alone[:2])
        assert dq.any() and not dk.any()
    none = [x[:, :0] for x in (q, k)]
    empty = (table[0][:, :0], table[1][:, :0])
    found = gradients(norming(qk_norm_rope, empty), [*none, *weights], none)
    assert all(x.numel() == 0 for x in found[:4]) and not found[4].any() and not found[5].any()
    assert all(x.shape == y.shape for x, y in zip(rope(*none, *empty), none, strict=True))


def kernels_stay_whole_under_a_compiler(device: str) -> None:
    shape = (2, 3, 4, 2, 6)
    table, weights = angles(shape, device), gains(shape, torch.float32, device)
    q, k, *upstream = draw(shape, torch.float32, device)
    for op, leaves in ((turning(rope, table), [q, k]), (norming(qk_norm_rope, table), [q, k, *weights])):
        torch._dynamo.reset()
        whole = torch.compile(op, fullgraph=True, backend="aot_eager")
        assert all(map(torch.equal, gradients(op, leaves, upstream), gradients(whole, leaves, upstream)))

    def in_place(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        q, k = q + 0, k + 0
        rope_(q, k, *table)
        return q + 1, k + 1

    torch._dynamo.reset()
    found, wanted = torch.compile(in_place, fullgraph=True, backend="aot_eager")(q, k), rope(q, k, *table)
    torch.testing.assert_close(found, (wanted[0] + 1, wanted[1] + 1))
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(ops._ROPE, (q, k, *table, True), test_utils=tests)
    torch.library.opcheck(ops._ROPE_IN_PLACE, (q, k, *table), test_utils=tests)
    torch.library.opcheck(ops._QK_NORM_ROPE, (q, k, *weights, 1e-2, *table), test_utils=tests)
    torch.library.opcheck(ops._QK_NORM_ROPE_BACKWARD, (*upstream, q, k, *weights, *table, 1e-2), test_utils=tests)


SHAPES: list[Shape] = [(2, 1025, 32, 8, 128), (1, 2051, 40, 8, 96), (3, 333, 7, 7, 80), (1, 513, 16, 1, 256)]
SHAPES += [(2, 777, 24, 24, 64), (2, 65, 5, 5, 6), (1, 1, 1, 1, 2), (4, 1, 64, 8, 128)]
"""Heads of each block, alone and several wide; widths from one pair to 256 channels; powers of two and not."""


@gpu
@needs_gpu
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gpu_kernels_equal_their_twins(shape: Shape) -> None:
    kernels_equal_their_twins("cuda", (torch.bfloat16,), [shape])
    writes_in_place("cuda", (torch.bfloat16,), [shape])
    kernels_write_nothing_else("cuda", torch.bfloat16, [shape])


@gpu
@needs_gpu
@pytest.mark.parametrize("dtype", EPSILON, ids=str)
def test_gpu_kernels_in_every_type(dtype: torch.dtype) -> None:
    kernels_equal_their_twins("cuda", (dtype,), [(2, 65, 32, 8, 128), (2, 67, 5, 1, 80)])
    kernels_are_one_node_among_others("cuda", dtype)


@gpu
@needs_gpu
def test_gpu_kernels_among_others() -> None:
    hears_of_writes("cuda")
    kernels_stay_whole_under_a_compiler("cuda")


@gpu
@needs_gpu
def test_gpu_kernels_reach_beyond_32_bits() -> None:
    """Tokens that begin 2^30 elements apart, then rows that do, so that the third begins beyond 2^31."""
    room = torch.randn((1 << 31) + 4096, dtype=torch.bfloat16, device="cuda")
    for near, steps in (((1, 3), (1 << 31, 1 << 30)), ((3, 1), (1 << 30, 0))):
        shape = (*near, 2, 1, 64)
        q, k = (room[i * 512 :].as_strided((*near, n, 64), (*steps, 64, 1)) for i, n in enumerate(shape[2:4]))
        table, weights = angles(shape, "cuda"), gains(shape, torch.bfloat16, "cuda")
        for op, leaves in ((turning(rope, table), [q, k]), (norming(qk_norm_rope, table), [q, k, *weights])):
            dense = [x.contiguous() for x in leaves]
            torch.testing.assert_close(gradients(op, leaves, [q, k]), gradients(op, dense, dense[:2]))
        wanted = rope(q, k, *table)
        rope_(q, k, *table)
        torch.testing.assert_close((q, k), wanted)


def run_interpreted() -> None:
    assert triton_runs(torch.zeros(1))
    tiles.SHARES = 5  # so that one program has several tiles
    kernels_equal_their_twins("cpu", tuple(EPSILON), [(2, 3, 5, 1, 6), (1, 1, 1, 1, 2)])
    kernels_equal_their_twins("cpu", (torch.float32,), [(2, 13, 9, 3, 80), (1, 3, 40, 2, 256)])
    writes_in_place("cpu", (torch.float32, torch.float16), [(2, 9, 5, 1, 96)])
    hears_of_writes("cpu")
    kernels_write_nothing_else("cpu", torch.float32, [(2, 9, 5, 3, 20), (1, 13, 12, 1, 128)])
    kernels_are_one_node_among_others("cpu", torch.float32)
    kernels_stay_whole_under_a_compiler("cpu")


def run_compiled() -> None:
    """Every kind of tile compiles for Hopper and keeps its values in registers, so few that four programs fit."""
    pointers = {"p_cos": "*fp32", "p_sin": "*fp32", "p_dweight": "*fp32"}
    models = [(32, 8, 64), (40, 8, 40), (16, 16, 128), (5, 1, 48), (7, 7, 3), (1, 1, 1)]  # H Hkv K/2
    cases: list[tuple[Any, dict[str, Any]]] = [(tiles._total, {"b_r": 64, "b_k": 32})]
    for heads, kv_heads, half in models:
        sizes = {"heads": heads, "kv_heads": kv_heads, "half": half, "eps": 1e-5}
        kinds = ("plain", "back", "norm", "in place") if heads == 32 else ("norm",)
        blocks = tiles._blocks(heads, kv_heads, half, 2048)
        cases += [(tiles._rope, {**sizes, **blocks, "kind": kind}) for kind in kinds]
        cases.append((tiles._norm_backward, {**sizes, **tiles._blocks(heads, kv_heads, half, 1024)}))
    for kernel, fixed in cases:
        names = [n for n in kernel.arg_names if n not in fixed]
        types = {n: pointers.get(n, "*bf16") if n.startswith("p_") else "i32" for n in names}
        built = compiled(kernel, types, fixed, num_warps=4)
        assert built.stack == 0 and built.registers <= 128, (kernel, fixed, built.registers)


test_kernels_without_a_gpu = both(run_interpreted, run_compiled)


def test_in_place_refuses_rows_that_share_memory() -> None:
    k, (cos, sin) = torch.randn(1, 4, 1, 8), (torch.randn(1, 4, 1, 4) for _ in range(2))
    shared = torch.randn(40).as_strided((1, 4, 1, 8), (40, 4, 4, 1))
    for q, other in ((shared, k), (k, k), (k, shared)):
        with pytest.raises(ValueError, match="rows must be dense and each its own"):
            rope_(q, other, cos, sin)
