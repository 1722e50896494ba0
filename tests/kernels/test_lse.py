"""Partial attentions merge into the whole, sums round once, and a stand-in for `out` gives back its delta."""

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from without_gpu import both, compiled

from farspan.kernels import lse as ops
from farspan.kernels.define import triton_runs
from farspan.kernels.lse import Rows, add_, add_ref, delta, delta_ref, merge_, merge_ref, stand_in, stand_in_ref

gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs one NVIDIA GPU")

EPSILON = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    """Normal numbers that bf16 holds exactly, in a tensor whose rows and heads lie apart, with NaN between them."""
    drawn = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()
    room = torch.full((shape[0], 2, *shape[1:]), torch.nan, dtype=dtype, device=device)
    room[:, 1] = drawn.to(device, dtype)
    return room[:, 1]


def partials(
    count: int, width: int, dtype: torch.dtype, device: str = "cpu", *, rows: int = 11, heads: int = 3
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out, lse, part, part_lse, where every pair of a seen and an unseen side occurs and the unseen ones are NaN."""
    total = torch.promote_types(dtype, torch.float32)
    out, part = draw(rows, heads, width, seed=0, dtype=dtype, device=device), draw(count, heads, width, seed=1)
    part = draw(count, heads, width, seed=1, dtype=dtype, device=device)
    lse, part_lse = (draw(heads, n, seed=n, dtype=total, device=device) * 5 for n in (rows, count))
    lse[:, 1::3], part_lse[:, ::2] = -torch.inf, -torch.inf
    out.masked_fill_(lse.T.isinf()[..., None], 0.0)
    part.masked_fill_(part_lse.T.isinf()[..., None], torch.nan)
    return out, lse, part, part_lse


def named(device: str = "cpu") -> list[tuple[Rows, int]]:
    """Ways to name rows of 11, and how many are named."""
    return [(None, 11), (slice(3, 8), 5), (slice(4, 4), 0), (torch.tensor([9, 0, 4, 10], device=device).int(), 4)]


def union(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Two columns of keys, each with a weight: softmax written out, in fp64."""
    logs = torch.stack([lse.double(), part_lse.double()])
    values = torch.stack([out.double(), part.double()]).nan_to_num(0.0)
    weights = logs.softmax(0).nan_to_num(0.0)  # both sides unseen
    return (values * weights.mT[..., None]).sum(0), logs.logsumexp(0)


@pytest.mark.parametrize("dtype", EPSILON, ids=str)
def test_a_merge_is_the_softmax_over_both_sets_of_keys(dtype: torch.dtype) -> None:
    for rows, count in named():
        out, lse, part, part_lse = partials(count, 5, dtype)
        where = slice(None) if rows is None else rows
        truth_out, truth_lse = out.double(), lse.double()
        truth_out[where], truth_lse[:, where] = union(out[where], lse[:, where], part, part_lse)
        merge_(out, lse, part, part_lse, rows)
        torch.testing.assert_close(out.double(), truth_out, rtol=0, atol=4 * EPSILON[dtype])
        torch.testing.assert_close(lse.double(), truth_lse, rtol=0, atol=1e-13 if dtype == torch.float64 else 2e-6)


def test_merges_in_any_order_agree() -> None:
    out, lse, _, _ = partials(11, 6, torch.float64)
    parts = [(draw(11, 3, 6, seed=s).double(), draw(3, 11, seed=s + 50).double()) for s in range(4)]
    results = []
    for order in ((0, 1, 2, 3), (3, 1, 0, 2)):
        mine = out.clone(), lse.clone()
        for i in order:
            merge_(*mine, *parts[i], None)
        results.append(mine)
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-13)


def test_a_merge_in_a_wide_accumulator_keeps_what_bf16_would_lose() -> None:
    """64 equal parts: the mean of their values to bf16's last bit, which bf16 sums drift away from."""
    values = [draw(7, 2, 16, seed=s, dtype=torch.bfloat16) for s in range(64)]
    out, lse = torch.zeros(7, 2, 16), torch.full((2, 7), -torch.inf)
    for value in values:
        merge_(out, lse, value, torch.zeros(2, 7), None)
    torch.testing.assert_close(out, torch.stack(values).double().mean(0).float(), rtol=0, atol=1e-6)


def test_a_part_may_be_merged_into_a_slice_of_a_wider_lse() -> None:
    out, lse, part, part_lse = partials(5, 4, torch.float64)
    wide, copy = torch.cat([lse, lse], 1), (out.clone(), lse.clone())
    merge_(out, wide[:, 11:], part, part_lse, slice(3, 8))
    merge_(*copy, part, part_lse, slice(3, 8))
    assert torch.equal(wide[:, :11], lse) and torch.equal(wide[:, 11:], copy[1]) and torch.equal(out, copy[0])


@pytest.mark.parametrize("pair", list(product((torch.float64, torch.float32, torch.bfloat16), repeat=2)), ids=str)
def test_a_sum_is_rounded_once(pair: tuple[torch.dtype, torch.dtype]) -> None:
    for rows, count in named():
        total, part = draw(11, 3, 5, seed=0, dtype=pair[0]), draw(count, 3, 5, seed=1, dtype=pair[1])
        truth = total.double()
        truth[slice(None) if rows is None else rows] += part.double()
        add_(total, part, rows)
        assert torch.equal(total, truth.float().to(pair[0]))  # the numbers are short: their fp32 sums are exact


@pytest.mark.parametrize("dtype", EPSILON, ids=str)
def test_a_stand_in_has_the_delta_of_what_it_stands_for(dtype: torch.dtype) -> None:
    out, dout = (draw(13, 3, 64, seed=seed, dtype=dtype) for seed in (0, 1))
    dout[4] = 0.0
    dout[5, :, 1:] = 0.0  # one entry alone: no more than its rounding can be had
    dout[6] *= 2.0**-10
    truth = (out.double() * dout.double()).sum(-1).T
    found = delta(out, dout)
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(found.double(), truth, rtol=0, atol=1e-5)
    other = stand_in(dout, found)
    assert other.dtype == dtype and not other[4].any()
    again = (other.double() * dout.double()).sum(-1).T
    apart = (again - found.double()).abs()
    kept = [i for i in range(13) if i != 5]
    assert (apart[:, kept] <= 1e-6 * found.abs()[:, kept] + 1e-12).all()
    assert (apart[:, 5] <= EPSILON[dtype] * found.abs()[:, 5]).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_a_stand_in_never_overflows(dtype: torch.dtype) -> None:
    tiny = torch.finfo(dtype).smallest_normal
    for size, width in ((tiny, 8), (tiny / 4, 8), (1e-3, 1), (1e-3, 2)):
        dout = torch.full((4, 2, width), size, dtype=dtype)
        assert stand_in(dout, torch.tensor([1.0, -1.0, 0.0, 1e30]).expand(2, 4)).isfinite().all()


def test_sizes_that_do_not_fit_are_refused() -> None:
    out, lse, part, part_lse = partials(5, 4, torch.float32)
    with pytest.raises(ValueError, match="the 4 named rows"):
        merge_(out, lse, part, part_lse, slice(3, 7))
    with pytest.raises(ValueError, match="lse is H T"):
        merge_(out, lse.T, part, part_lse, slice(3, 8))
    with pytest.raises(ValueError, match="steps of 1"):
        add_(out, part, slice(0, 10, 2))
    with pytest.raises(ValueError, match="the 11 named rows"):
        add_(out, part, None)


def kernels_equal_their_twins(device: str, dtypes: tuple[torch.dtype, ...], widths: tuple[int, ...], rows: int) -> None:
    for dtype, width in product(dtypes, widths):
        close = {"rtol": 0, "atol": 8 * EPSILON[dtype]}
        ways = [(None, rows), (slice(3, rows - 4), rows - 7), (torch.arange(rows - 1, 0, -2, device=device).int(), 0)]
        for where, count in ways:
            count = where.numel() if isinstance(where, Tensor) else count
            out, lse, part, part_lse = partials(count, width, dtype, device, rows=rows)
            for ours, twin in ((merge_, merge_ref),):
                results = [(out.clone(), lse.clone()) for _ in range(2)]
                ours(*results[0], part, part_lse, where)
                twin(*results[1], part, part_lse, where)
                torch.testing.assert_close(results[0][0], results[1][0], **close)
                torch.testing.assert_close(results[0][1], results[1][1], rtol=0, atol=4e-6)
            totals = [draw(rows, 3, width, seed=3, dtype=torch.float32, device=device) for _ in range(2)]
            part = part.nan_to_num(1.0)
            add_(totals[0], part, where)
            add_ref(totals[1], part, where)
            torch.testing.assert_close(totals[0], totals[1], rtol=0, atol=1e-6)
        out, dout = (draw(rows, 3, width, seed=seed, dtype=dtype, device=device) for seed in (0, 1))
        torch.testing.assert_close(delta(out, dout), delta_ref(out, dout), rtol=1e-6, atol=2e-5)
        found = delta_ref(out, dout)
        sums = [(x.double() * dout.double()).sum(-1).T for x in (stand_in(dout, found), stand_in_ref(dout, found))]
        torch.testing.assert_close(sums[0], sums[1], rtol=3e-6 if width > 2 else 2e-2, atol=1e-6)


@gpu
@needs_gpu
def test_gpu_kernels_equal_their_twins() -> None:
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    kernels_equal_their_twins("cuda", dtypes, (8, 64, 96, 128, 192, 256), rows=1003)


@gpu
@needs_gpu
def test_gpu_kernels_reach_rows_beyond_32_bits() -> None:
    """Two rows of a tensor as seen with a stride of 2^31 elements and more."""
    whole = torch.zeros((1 << 31) + 128 * 3, dtype=torch.bfloat16, device="cuda")
    far = whole.as_strided((2, 3, 128), (1 << 31, 128, 1))
    add_(far, torch.ones(2, 3, 128, dtype=torch.bfloat16, device="cuda"), None)
    assert far.float().sum().item() == whole.sum(dtype=torch.float32).item() == 2 * 3 * 128


def run_interpreted() -> None:
    assert triton_runs(torch.zeros(1))
    kernels_equal_their_twins("cpu", (torch.float32, torch.float16, torch.bfloat16), (1, 6, 64), rows=150)


def run_compiled() -> None:
    """Every kernel compiles for Hopper and keeps its values in registers."""
    pointers = {"p_lse": "*fp32", "p_part_lse": "*fp32", "p_rows": "*i32", "p_delta": "*fp32"}
    kernels: list[tuple[Any, dict[str, Any]]] = [
        (ops._merge, {"indexed": True}),
        (ops._merge, {"indexed": False}),
        (ops._add, {"indexed": False}),
        (ops._delta, {}),
        (ops._stand_in, {"terms": 3}),
    ]
    for kernel, chosen in kernels:
        fixed = {**chosen, "b_r": 16, "b_v": 128}
        names = [name for name in kernel.arg_names if name not in fixed]
        types = {
            n: pointers.get(n, "*bf16") if n.startswith("p_") else "fp32" if n == "limit" else "i32" for n in names
        }
        assert compiled(kernel, types, fixed, num_warps=4).stack == 0, kernel


test_kernels_without_a_gpu = both(run_interpreted, run_compiled)
