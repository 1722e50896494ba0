"""Rows fetched by the product are those that a copy would have, and nothing else is read or written."""

from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from without_gpu import both, compiled

from farspan.kernels import gathered_gemm as ops
from farspan.kernels.define import triton_runs
from farspan.kernels.gathered_gemm import GATHERED, gathered_ref
from farspan.kernels.permute import Order, sort

gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs one NVIDIA GPU")

EPSILON = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def draw(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def padded(x: Tensor) -> Tensor:
    """The same numbers amid NaN."""
    return x.new_full((x.numel() + 64,), torch.nan)[32:-32].view(x.shape).copy_(x)


def inputs(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """x, w13 and probabilities for tokens, width, hidden, experts and visits of a token."""
    tokens, width, hidden, experts, k = shape
    x = draw(tokens, width, dtype=dtype, device=device)
    w13 = draw(experts, 2, hidden, width, dtype=dtype, device=device, seed=1) / width**0.5
    p = draw(tokens, k, dtype=torch.promote_types(dtype, torch.float32), device=device, seed=2).sigmoid()
    return padded(x), padded(w13), padded(p)


def choice(shape: tuple[int, ...], device: str, whom: str) -> Tensor:
    """Experts at random, the lower ones more often and the last never; of some tokens, or of all, none."""
    tokens, _, _, experts, k = shape
    made = torch.Generator().manual_seed(tokens)
    chosen = (torch.rand(tokens, k, generator=made) ** 2 * (experts - 1)).int()
    if whom == "nobody":
        return chosen.fill_(-1).to(device)
    if whom == "some":
        chosen[torch.rand(tokens, k, generator=made) < 0.3] = experts
        chosen[tokens // 2] = -1
    return chosen.to(device)


def orders(shape: tuple[int, ...], device: str) -> list[tuple[str, Tensor, Order]]:
    """With a place for every visit, and with as many as are needed and two more."""
    found = []
    for whom in ("all", "some", "nobody"):
        chosen, experts = choice(shape, device, whom), shape[3]
        live = int(((chosen >= 0) & (chosen < experts)).sum())
        for room in (chosen.numel(), min(chosen.numel(), live + 2)):
            found.append((f"{whom} {room}", chosen, sort(chosen, experts, room)))
    return found


def one_by_one(x: Tensor, w13: Tensor, p: Tensor, order: Order) -> tuple[Tensor, Tensor]:
    """In fp64, an expert after the other; all else is zero."""
    hidden = w13.shape[2]
    h = torch.zeros(len(order.rows), 2, hidden, dtype=torch.float64, device=x.device)
    act, begin = h[:, 0].clone(), 0
    for expert, end in enumerate(order.ends.tolist()):
        visit = order.rows[begin:end].long()
        given = x[visit // p.shape[1]].double()
        h[begin:end] = (given @ w13[expert].double().flatten(0, 1).T).unflatten(1, (2, hidden))
        gate, up = h[begin:end].unbind(1)
        act[begin:end] = gate * gate.sigmoid() * up * p.flatten()[visit, None].double()
        begin = end
    return h, act


def results_are_those_of_each_expert(
    device: str, dtypes: tuple[torch.dtype, ...], shapes: list[tuple[int, ...]], launched: bool
) -> None:
    """launched: the kernel itself, whether it is ahead or not, into memory of NaN between guard bands."""
    for shape, dtype in product(shapes, dtypes):
        for name, chosen, order in orders(shape, device):
            x, w13, p = inputs(shape, dtype, device)
            exact = one_by_one(x, w13, p, order)
            live = (chosen >= 0) & (chosen < shape[3])
            p[~live] = torch.nan
            x[~live.any(1)] = torch.nan
            given = x, w13, p, order.rows, order.places, order.ends
            before = [t.clone() for t in given]
            if launched:
                bands = [torch.full((t.numel() + 8192,), torch.nan, dtype=dtype, device=device) for t in exact]
                h, act = (b[4096:-4096].view(t.shape) for b, t in zip(bands, exact, strict=True))
                if len(order.rows):
                    ops._launch((h, act), x, w13, p, order.rows, order.ends)
                assert all(b[:4096].isnan().all() and b[-4096:].isnan().all() for b in bands)
            else:
                h, act = GATHERED(*given)
            for ours, wanted in zip((h, act), exact, strict=True):
                slack = EPSILON[dtype] * (wanted.abs() + 1)
                assert ours.is_contiguous() and ours.shape == wanted.shape
                assert ((ours.double() - wanted).abs() <= slack).all(), (name, shape, dtype)
                assert not ours[int(order.ends[-1]) :].any()
            for now, then in zip(given, before, strict=True):
                torch.testing.assert_close(now, then, rtol=0, atol=0, equal_nan=True)


def too_little_room_touches_nothing_else(device: str, dtype: torch.dtype) -> None:
    shape = 40, 24, 12, 4, 3
    x, w13, p = inputs(shape, dtype, device)
    whole = sort(choice(shape, device, "all"), 4)
    few = sort(choice(shape, device, "all"), 4, 50)
    wanted, found = one_by_one(x, w13, p, whole)[0], torch.full((100, 2, 12), torch.nan, dtype=dtype, device=device)
    act = torch.full((100, 12), torch.nan, dtype=dtype, device=device)
    ops._launch((found[:50], act[:50]), x, w13, p, few.rows, few.ends)
    assert found[50:].isnan().all() and act[50:].isnan().all() and act[:50].isfinite().all()
    torch.testing.assert_close(found[:50].double(), wanted[:50], rtol=EPSILON[dtype], atol=EPSILON[dtype])


def it_is_one_operator(device: str, dtype: torch.dtype) -> None:
    shape = 9, 16, 8, 4, 2
    x, w13, p = inputs(shape, dtype, device)
    for room in (18, 5, 0):
        order = sort(choice(shape, device, "some"), 4, room)
        ends = order.ends.clamp(max=room)
        given = x.T.contiguous().T, w13, p, order.rows, order.places, ends
        torch.library.opcheck(GATHERED, given, test_utils=("test_schema", "test_faketensor"))
        for ours, wanted in zip(GATHERED(*given), gathered_ref(*given), strict=True):
            torch.testing.assert_close(ours, wanted, rtol=EPSILON[dtype], atol=EPSILON[dtype])
        with FlopCounterMode(display=False) as counter:
            GATHERED(*given)
        assert counter.get_total_flops() == 2 * room * 16 * 16
    for empty in ((0, 16, 8, 4, 2), (9, 16, 0, 4, 2), (9, 0, 8, 4, 2)):
        order = sort(choice((*empty[:3], 4, 2), device, "all"), 4) if empty[0] else sort(p[:0].int(), 4)
        h, act = GATHERED(*inputs(empty, dtype, device), order.rows, order.places, order.ends)
        assert h.shape == (2 * empty[0], 2, empty[2]) and not h.any() and not act.any()


@pytest.mark.parametrize("dtype", EPSILON, ids=str)
def test_results_are_those_of_each_expert(dtype: torch.dtype) -> None:
    results_are_those_of_each_expert("cpu", (dtype,), [(1, 1, 1, 2, 1), (37, 21, 5, 4, 3), (70, 16, 8, 9, 2)], False)


def test_it_is_one_operator() -> None:
    it_is_one_operator("cpu", torch.float32)


def run_interpreted() -> None:
    assert triton_runs(torch.zeros(1))
    results_are_those_of_each_expert("cpu", (torch.float32,), [(1, 1, 1, 2, 1), (150, 67, 133, 5, 2)], True)
    results_are_those_of_each_expert("cpu", (torch.float16,), [(70, 64, 70, 4, 3)], True)
    results_are_those_of_each_expert("cpu", (torch.bfloat16,), [(70, 64, 70, 4, 3)], False)
    wide = 300, 8, 1100, 3, 1  # more than eight tiles across, and more lines than one
    results_are_those_of_each_expert("cpu", (torch.float32,), [wide], False)
    too_little_room_touches_nothing_else("cpu", torch.float32)
    it_is_one_operator("cpu", torch.float32)


def run_compiled() -> None:
    """All that a model may ask for stays in registers, and rows come 16 bytes at a time, ahead of their use."""
    for hidden, width, experts, k in (
        *((512, 4096, 128, 8), (256, 1536, 128, 8), (768, 2048, 128, 8), (1408, 2048, 64, 6)),
        *((1000, 1000, 8, 2), (64, 512, 8, 2), (1536, 1000, ops.EXPERTS, 10)),
    ):
        tile = ops._tile(hidden, width)
        fixed: dict[str, Any] = {"x_row": width, "active": k, "experts": experts, "hidden": hidden, "width": width}
        fixed |= {"b_e": ops._padded(experts), **tile}
        types = {n: "*bf16" if n.startswith("p_") else "i32" for n in ops._gathered.arg_names if n not in fixed}
        types |= {"p_prob": "*fp32", "p_rows": "*i32", "p_ends": "*i32"}
        built = compiled(ops._gathered, types, fixed, num_warps=8)
        assert built.stack == 0, (hidden, width, built.registers, built.stack)
        assert "wgmma" in built.ptx and "cp.async.cg" in built.ptx and "cp.async.ca" not in built.ptx


test_kernels_without_a_gpu = both(run_interpreted, run_compiled)


@gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gpu_results_are_those_of_each_expert(dtype: torch.dtype) -> None:
    """Where it is ahead, and where it is not: an odd width, many channels, fp32."""
    shapes = [(1, 8, 8, 2, 1), (517, 72, 40, 5, 2), (513, 63, 21, 4, 3), (300, 64, 1600, 4, 2)]
    results_are_those_of_each_expert("cuda", (dtype,), shapes, False)
    it_is_one_operator("cuda", dtype)


@gpu
@needs_gpu
@pytest.mark.parametrize(
    "shape",
    [(3001, 2048, 768, 128, 8), (4096, 4096, 512, 64, 8), (1500, 1536, 256, 96, 8), (2000, 1000, 1000, 8, 2)],
    ids=str,
)
def test_gpu_the_kernel_at_sizes_of_models(shape: tuple[int, ...]) -> None:
    results_are_those_of_each_expert("cuda", (torch.bfloat16,), [shape], True)


@gpu
@needs_gpu
def test_gpu_the_kernel_at_odd_sizes() -> None:
    shapes = [(70, 63, 21, 4, 3), (300, 64, 2500, 4, 2), (1000, 72, 64, 2000, 8), (257, 8, 130, 3, 1)]
    results_are_those_of_each_expert("cuda", (torch.bfloat16,), shapes, True)
    too_little_room_touches_nothing_else("cuda", torch.bfloat16)


@gpu
@needs_gpu
def test_gpu_runs_are_alike() -> None:
    shape = 5000, 1024, 512, 64, 8
    order = sort(choice(shape, "cuda", "some"), 64)
    run = partial(GATHERED, *inputs(shape, torch.bfloat16, "cuda"), order.rows, order.places, order.ends)
    first = run()
    for _ in range(5):
        assert all(map(torch.equal, first, run()))


@gpu
@needs_gpu
def test_gpu_results_reach_beyond_32_bits() -> None:
    """More than 2^31 elements in h, and rows of x that begin as far apart."""
    tokens, hidden = (1 << 19) + 77, 512
    x = draw(tokens, 64, dtype=torch.bfloat16, device="cuda")
    w13 = draw(8, 2, hidden, 64, dtype=torch.bfloat16, device="cuda") / 8
    chosen = (torch.arange(tokens * 4, device="cuda", dtype=torch.int32) % 8).view(tokens, 4)
    order, p = sort(chosen, 8), torch.rand(tokens, 4, device="cuda")
    h, act = GATHERED(x, w13, p, order.rows, order.places, order.ends)
    last = order.rows[-1000:].long()
    wanted = x[last // 4].float() @ w13[7].float().flatten(0, 1).T
    torch.testing.assert_close(h[-1000:].flatten(1).float(), wanted, rtol=1e-2, atol=1e-2)
    gate, up = wanted.chunk(2, 1)
    exact = torch.nn.functional.silu(gate) * up * p.flatten()[last, None]
    torch.testing.assert_close(act[-1000:].float(), exact, rtol=2e-2, atol=2e-2)
    del h, act
    room = torch.randn((1 << 31) + 64, dtype=torch.bfloat16, device="cuda")
    far = room.as_strided((2, 64), (1 << 31, 1))
    two = sort(torch.tensor([[7], [7]], dtype=torch.int32, device="cuda"), 8)
    h, _ = GATHERED(far, w13, p[:2, :1], two.rows, two.places, two.ends)
    torch.testing.assert_close(h.flatten(1).float(), far.float() @ w13[7].float().flatten(0, 1).T, rtol=1e-2, atol=1e-2)
