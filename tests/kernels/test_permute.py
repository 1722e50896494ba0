"""Visits are sorted stably, rows go where they are told, and sums of rows round once."""

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from without_gpu import both, compiled

from farspan.kernels import permute as ops
from farspan.kernels.define import triton_runs
from farspan.kernels.permute import Order, permute, permute_ref, sort, sort_ref, unpermute, unpermute_ref

gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs one NVIDIA GPU")

ULP = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
WAYS = [(permute, permute_ref), (unpermute, unpermute_ref)]


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, device: str = "cpu") -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def visits(tokens: int, k: int, experts: int, device: str = "cpu", *, nobody: int = 0) -> Tensor:
    """Experts at random, few of them often and some never; `nobody` more numbers on both sides are not experts."""
    made = torch.Generator().manual_seed(tokens + experts)
    chosen = (torch.rand(tokens, k, generator=made) ** 2 * (experts + 2 * nobody)).int() - nobody
    return chosen.clamp(-nobody, experts - 1 + nobody).to(device)


def poisoned(x: Tensor, how: str) -> Tensor:
    """The same numbers amid NaN: `dense`; `rows`: halves of wider rows; `columns`: not even dense along a row."""
    if how == "dense":
        return x.new_full((x.numel() + 64,), torch.nan)[32:-32].view(x.shape).copy_(x)
    if how == "rows":
        return x.new_full((x.shape[0], 2 * x.shape[1]), torch.nan)[:, x.shape[1] :].copy_(x)
    return x.new_full((*x.shape, 2), torch.nan)[..., 1].copy_(x)


def run(op: Any, x: Tensor, order: Order, dout: Tensor) -> tuple[Tensor, Tensor]:
    leaf = x.detach().requires_grad_()
    out = op(leaf, order)
    return out.detach(), torch.autograd.grad(out, leaf, dout)[0]


def is_sorted(order: Order, chosen: Tensor, experts: int, room: int | None = None) -> None:
    """What the order promises, without naming how it is found."""
    whom = chosen.flatten().tolist()
    whom = [e if 0 <= e < experts else experts for e in whom]
    rows = sorted(range(len(whom)), key=lambda visit: (whom[visit], visit))
    assert order.rows.tolist() == rows[:room]
    assert [rows[place] for place in order.places.flatten().tolist()] == list(range(len(whom)))
    assert order.ends.tolist() == [sum(e <= last for e in whom) for last in range(experts)]
    assert order.places.shape == chosen.shape
    assert all(x.dtype == torch.int32 and x.is_contiguous() for x in (order.rows, order.places, order.ends))


@pytest.mark.parametrize("tokens", [0, 1, 63, 1000])
def test_an_order_is_stable(tokens: int) -> None:
    for k, experts, nobody in ((1, 1, 0), (3, 7, 0), (8, 128, 2)):
        chosen = visits(tokens, k, experts, nobody=nobody)
        is_sorted(sort(chosen, experts), chosen, experts)
        is_sorted(sort(chosen.long().T.contiguous().T, experts), chosen, experts)
        for room in (0, tokens * k // 2):
            is_sorted(sort(chosen, experts, room), chosen, experts, room)


def test_what_does_not_fit_is_refused() -> None:
    order = sort(visits(5, 2, 3), 3)
    with pytest.raises(ValueError, match=r"sort: chosen \(5, 2\) of torch.float32 for experts=3 must be T K"):
        sort(torch.zeros(5, 2), 3)
    with pytest.raises(ValueError, match=r"sort: chosen \(5,\)"):
        sort(torch.zeros(5).int(), 3)
    with pytest.raises(ValueError, match=r"experts=0 .* at least one expert"):
        sort(torch.zeros(5, 2).int(), 0)
    for room in (-1, 11):
        with pytest.raises(ValueError, match=rf"sort: room={room} must be from 0 to the 10 visits"):
            sort(visits(5, 2, 3), 3, room)
    with pytest.raises(ValueError, match=r"permute: x \(4, 3\) must be T D with the 5 tokens"):
        permute(torch.zeros(4, 3), order)
    with pytest.raises(ValueError, match=r"unpermute: y \(5, 3\) must be M D with the 10 rows"):
        unpermute(torch.zeros(5, 3), order)
    with pytest.raises(ValueError, match=r"unpermute: y \(10, 3\) must be M D with the 7 rows"):
        unpermute(torch.zeros(10, 3), sort(visits(5, 2, 3), 3, 7))


@pytest.mark.parametrize("tokens", [0, 1, 63])
def test_rows_go_where_they_are_told(tokens: int) -> None:
    chosen = visits(tokens, 3, 5)
    order, x = sort(chosen, 5), draw(tokens, 7, dtype=torch.float64)
    out = permute(x, order)
    assert torch.equal(out, x[(order.rows // 3).long()])
    torch.testing.assert_close(unpermute(out, order), 3 * x)
    for op, rows in ((permute_ref, tokens), (unpermute_ref, 3 * tokens)):
        if 0 < tokens < 10:
            leaf = draw(rows, 3, dtype=torch.float64).requires_grad_()
            assert torch.autograd.gradcheck(lambda x: op(x, order), leaf)  # noqa: B023


ROOMS = {"all": None, "live": 0, "some": 3, "few": -4, "none": -(10**9)}
"""Places besides those of the rows that an expert has: fewer is too few, but touches nothing that is not there."""


def orders(device: str) -> list[tuple[str, Tensor, Order]]:
    """Of 13 tokens and 5 visits each: of them some visit nobody, or all, in more places than these need, or fewer."""
    found = []
    for whom, chosen in (("some", visits(13, 5, 6, device, nobody=2)), ("all", visits(13, 5, 6, device) - 9)):
        live = int(((chosen >= 0) & (chosen < 6)).sum())
        for name, more in ROOMS.items():
            room = None if more is None else max(0, live + more)
            found.append((f"{whom} {name}", chosen, sort(chosen, 6, room)))
    return found


def nobody_is_visited(device: str, dtype: torch.dtype) -> None:
    """Both ways, and both gradients: a row of nobody holds NaN where it is read, and zero where it is written."""
    for name, chosen, order in orders(device):
        is_sorted(order, chosen, 6, len(order.rows))
        room, live = len(order.rows), min(len(order.rows), int(order.ends[-1]))
        kept = order.places.long() < live  # T K
        x, rows = draw(13, 24, dtype=dtype, device=device), draw(room, 24, dtype=dtype, device=device, seed=1)
        spread, summed = torch.zeros_like(rows), torch.zeros_like(x, dtype=torch.float64)
        for token in range(13):
            for place in order.places[token][kept[token]].tolist():
                spread[place] = x[token]
                summed[token] += rows[place].double()
        rows[live:] = torch.nan
        for op, ref in WAYS:
            for which in (op, ref):
                given = (x, rows) if op is permute else (rows, x)
                out, grad = run(which, given[0], order, given[1])
                copies, sums = (out, grad) if op is permute else (grad, out)
                assert torch.equal(copies, spread), (name, which)
                torch.testing.assert_close(sums.double(), summed, rtol=ULP[dtype], atol=1e-5, msg=name)


@pytest.mark.parametrize("dtype", ULP, ids=str)
def test_nobody_is_visited(dtype: torch.dtype) -> None:
    nobody_is_visited("cpu", dtype)


@pytest.mark.parametrize("dtype", ULP, ids=str)
def test_sums_round_once(dtype: torch.dtype) -> None:
    """In both directions: 1 and many halves of its last digit, which a sum in half precision would lose."""
    order = sort(visits(40, 8, 5), 5)
    small = torch.finfo(dtype).eps / 2 if dtype != torch.float32 else 0.25
    y = torch.full((320, 3), small, dtype=dtype)
    y[order.places[:, 0].long()] = 1.0
    wanted = torch.full((40, 3), 1 + 7 * small, dtype=torch.float64).to(dtype)
    assert torch.equal(unpermute(y, order), wanted)
    assert torch.equal(run(permute, wanted, order, y)[1], wanted)


def orders_equal_their_twins(device: str, shapes: list[tuple[int, int, int]]) -> None:
    for (tokens, k, experts), nobody in product(shapes, (0, 2)):
        chosen = visits(tokens, k, experts, device, nobody=nobody)
        wanted = sort_ref(chosen, experts)
        for given in (chosen, chosen.long(), chosen.T.contiguous().T):
            found = sort(given, experts)
            for name in ("rows", "places", "ends"):
                ours, truth = getattr(found, name), getattr(wanted, name)
                assert ours.dtype == torch.int32 and ours.is_contiguous()
                assert torch.equal(ours, truth), (name, tokens, k, experts)
        few = sort(chosen, experts, tokens * k // 3)
        assert torch.equal(few.rows, wanted.rows[: tokens * k // 3])
        assert torch.equal(few.places, wanted.places) and torch.equal(few.ends, wanted.ends)
        if tokens * k < 10000:
            is_sorted(wanted, chosen, experts)


def rows_equal_their_twins(device: str, dtypes: tuple[torch.dtype, ...], shapes: list[tuple[int, int, int]]) -> None:
    """Copies in every bit; sums within a rounding of the same sums in fp64."""
    for (tokens, k, width), dtype, (op, ref) in product(shapes, dtypes, WAYS):
        order = sort(visits(tokens, k, 6, device), 6)
        sizes = (tokens, tokens * k) if op is permute else (tokens * k, tokens)
        x, dout = (draw(n, width, dtype=dtype, seed=i, device=device) for i, n in enumerate(sizes))
        exact = run(ref, x.double(), order, dout.double())
        first = run(op, x, order, dout)
        for how in ("dense", "rows", "columns"):
            found = run(op, poisoned(x, how), order, poisoned(dout, how))
            assert all(map(torch.equal, first, found))
        for ours, truth in zip(first, exact, strict=True):
            assert ours.dtype == dtype and ours.is_contiguous()
            torch.testing.assert_close(ours.double(), truth, rtol=ULP[dtype], atol=1e-6 * k)
        copied = 0 if op is permute else 1
        assert torch.equal(first[copied].double(), exact[copied])


def kernels_write_nothing_else(device: str, widths: tuple[int, ...]) -> None:
    for tokens, width, experts in product((1, 67), widths, (3, 40)):
        chosen = visits(tokens, 5, experts, device)
        sizes, wanted = (tokens * 5, tokens * 5, experts), sort(chosen, experts)
        rooms = [torch.full((n + 1024,), -9, dtype=torch.int32, device=device) for n in sizes]
        rows, places, ends = (room[512:-512] for room in rooms)
        ops._launch_sort((rows, places.view(tokens, 5), ends), chosen, experts)
        assert torch.equal(rows, wanted.rows) and torch.equal(ends, wanted.ends)
        assert all((room[:512] == -9).all() and (room[-512:] == -9).all() for room in rooms)
        chosen[0] = -1
        for places in (tokens * 5, tokens * 5 - 2, tokens * 3):
            order = sort(chosen, experts, places)
            rows = torch.full((places + 1024,), -9, dtype=torch.int32, device=device)
            ops._launch_sort((rows[512:-512], order.places, order.ends), chosen, experts)
            assert torch.equal(rows[512:-512], order.rows) and (rows == -9).sum() == 1024
            for kernel, given, count in ((ops._spread, tokens, places), (ops._gather, places, tokens)):
                x = poisoned(draw(given, width, device=device), "rows")
                room = torch.full((count * width + 4096,), torch.nan, device=device)
                ops._launch(kernel, room[2048:-2048].view(count, width), x, order.places, order.ends, places)
                assert room[2048:-2048].isfinite().all() and room.isnan().sum() == 4096


def kernels_are_one_node_among_others(device: str, dtype: torch.dtype) -> None:
    """Other users of what goes in and comes out, expanded gradients, checkpointing, and nothing to move."""
    order, empty = sort(visits(11, 3, 4, device), 4), sort(visits(0, 3, 4, device), 4)
    assert empty.ends.tolist() == [0] * 4 and empty.places.shape == (0, 3)
    none = sort(visits(4, 0, 4, device), 4)
    assert none.ends.tolist() == [0] * 4 and unpermute(draw(0, 5, device=device), none).tolist() == [[0.0] * 5] * 4
    for (op, ref), count in zip(WAYS, (11, 33), strict=True):

        def shared(which: Any, x: Tensor) -> Tensor:
            out = which(x, order)
            return (out + torch.sin(out)).sum(0) + x.sum(0)

        leaf = draw(count, 24, dtype=dtype, device=device).requires_grad_()
        ones = torch.ones((), dtype=dtype, device=device).expand(24)
        plain = torch.autograd.grad(shared(op, leaf), leaf, ones)[0]
        twin = torch.autograd.grad(shared(ref, leaf), leaf, ones)[0]
        torch.testing.assert_close(plain, twin, rtol=4 * ULP[dtype], atol=8 * ULP[dtype])
        kept = checkpoint(shared, op, leaf, use_reentrant=False)
        assert torch.equal(plain, torch.autograd.grad(kept, leaf, ones)[0])
        out = op(leaf, order)
        for dout in (ones.expand_as(out), draw(1, 24, dtype=dtype, device=device).expand_as(out)):
            given = [torch.autograd.grad(out, leaf, g, retain_graph=True)[0] for g in (dout, dout.contiguous())]
            assert torch.equal(*given)
        assert all(x.shape == (0, 24) for x in run(op, leaf[:0], empty, out[:0].detach()))
        assert op(leaf[:, :0], order).shape == (out.shape[0], 0)


def kernels_stay_whole_under_a_compiler(device: str) -> None:
    def there_and_back(chosen: Tensor, x: Tensor) -> Tensor:
        order = sort(chosen, 4)
        return unpermute(torch.sin(permute(x, order)), order) + order.ends.sum()

    chosen, x = visits(11, 3, 4, device), draw(11, 24, device=device)
    torch._dynamo.reset()
    whole = torch.compile(there_and_back, fullgraph=True, backend="aot_eager")
    grads = []
    for op in (there_and_back, whole):
        leaf = x.clone().requires_grad_()
        grads.append(torch.autograd.grad(op(chosen, leaf), leaf, torch.cos(x))[0])
    assert torch.equal(*grads) and torch.equal(whole(chosen, x), there_and_back(chosen, x))
    tests, order = ("test_schema", "test_faketensor"), sort(chosen, 4)
    for room in (33, 7):
        torch.library.opcheck(ops._SORT, (chosen.T.contiguous().T, 4, room), test_utils=tests)
        torch.library.opcheck(ops.SPREAD, (x.T.contiguous().T, order.places, order.ends, room), test_utils=tests)
        torch.library.opcheck(ops.GATHER, (draw(room, 24, device=device), order.places, order.ends), test_utils=tests)


def run_interpreted() -> None:
    assert triton_runs(torch.zeros(1, dtype=torch.int32))
    orders_equal_their_twins("cpu", [(1, 1, 1), (63, 3, 5), (130, 4, 33), (257, 1, 7)])
    rows_equal_their_twins("cpu", tuple(ULP), [(1, 1, 1), (13, 3, 63), (7, 10, 520)])
    kernels_write_nothing_else("cpu", (1, 24))
    for dtype in ULP:
        nobody_is_visited("cpu", dtype)
        kernels_are_one_node_among_others("cpu", dtype)
    kernels_stay_whole_under_a_compiler("cpu")


def run_compiled() -> None:
    """All compiles for Hopper without spills; rows move 16 bytes at a time where the width is a multiple of 8."""
    for experts in (1, 8, 128, 1024, ops.MOST):
        b_e = ops._experts_padded(experts)
        fixed: dict[str, Any] = {"b_m": ops.VISITS, "b_e": b_e} | ({"experts": 1} if experts == 1 else {})
        for kernel, more in ((ops._count, fixed), (ops._place, fixed | {"b_c": 32})):
            types = {n: "*i32" if n.startswith("p_") else "i32" for n in kernel.arg_names if n not in more}
            types["p_chosen"] = "*i64" if experts == 8 else "*i32"
            built = compiled(kernel, types, more, num_warps=4)
            assert built.stack == 0 and built.registers <= 128, (kernel, experts, built.registers, built.stack)
    cases = [*product((1000, 2048), ("bf16", "fp32"), (1, 8)), (2880, "bf16", 32), (63, "bf16", 32), (1, "fp32", 10)]
    for (width, dtype, k), (kernel, row) in product(cases, ((ops._spread, "x_row"), (ops._gather, "y_row"))):
        b_k, b_t, b_d = ops._block(k, width, width)
        fixed = {"k": k, "width": width, row: width, "b_k": b_k, "b_t": b_t, "b_d": b_d}
        given = {n: "*" + dtype if n.startswith("p_") else "i32" for n in kernel.arg_names if n not in fixed}
        built = compiled(kernel, given | {"p_places": "*i32", "p_ends": "*i32"}, fixed, num_warps=4)
        assert built.stack == 0 and built.registers <= 80, (kernel, width, k, built.registers)
        if width % 8 == 0:
            assert "ld.global.v4" in built.ptx and "st.global.v4" in built.ptx and "ld.global.b16" not in built.ptx


test_kernels_without_a_gpu = both(run_interpreted, run_compiled)


@gpu
@needs_gpu
def test_gpu_orders_equal_their_twins() -> None:
    orders_equal_their_twins(
        "cuda",
        [(1, 1, 1), (63, 3, 5), (1000, 8, 64), (4097, 6, 1000), (16384, 8, 128), (99999, 10, 512), (100, 2, 4095)],
    )
    chosen = visits(16384, 8, 128, "cuda")
    first = sort(chosen, 128)
    for _ in range(3):
        again = sort(chosen, 128)
        assert torch.equal(first.rows, again.rows) and torch.equal(first.places, again.places)


@gpu
@needs_gpu
@pytest.mark.parametrize("dtype", ULP, ids=str)
def test_gpu_rows_equal_their_twins(dtype: torch.dtype) -> None:
    shapes = [
        (1, 1, 1),
        (4097, 8, 2048),
        (1000, 6, 1000),
        (1003, 10, 2880),
        (513, 3, 63),
        (65, 32, 1536),
        (999, 2, 7168),
    ]
    rows_equal_their_twins("cuda", (dtype,), shapes)
    nobody_is_visited("cuda", dtype)
    kernels_are_one_node_among_others("cuda", dtype)


@gpu
@needs_gpu
def test_gpu_kernels_are_tidy_and_whole() -> None:
    kernels_write_nothing_else("cuda", (1, 24, 63, 1000, 2048))
    kernels_stay_whole_under_a_compiler("cuda")


@gpu
@needs_gpu
def test_gpu_rows_reach_beyond_32_bits() -> None:
    """More than 2^31 elements in all, in what is read and in what is written."""
    tokens, k, width = 70_001, 8, 4096
    order = sort(visits(tokens, k, 64, "cuda"), 64)
    x = torch.randn(tokens, width, dtype=torch.bfloat16, device="cuda")
    out = permute(x, order)
    for part in (slice(0, 1000), slice(-1000, None)):
        assert torch.equal(out[part], x[(order.rows[part] // k).long()])
    back = unpermute(out, order)
    assert torch.equal(back, 8 * x)  # a power of two: no rounding
    far = out.view(-1).as_strided((2, width), (1 << 31, 1))
    two = sort(torch.zeros(2, 1, dtype=torch.int32, device="cuda"), 1)
    assert torch.equal(permute(far, two), far) and torch.equal(unpermute(far, two), far)
