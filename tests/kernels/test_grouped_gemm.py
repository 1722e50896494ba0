"""Products by expert equal one product after the other, leave no memory unwritten, and save nothing but inputs."""

from collections.abc import Callable
from functools import partial
from itertools import pairwise, product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from without_gpu import both, compiled

from farspan.kernels import gated_rows as gates
from farspan.kernels import grouped_gemm as ops
from farspan.kernels.define import triton_runs
from farspan.kernels.gated_rows import gated, gated_ref
from farspan.kernels.grouped_gemm import experts, experts_ref, grouped_mm, grouped_mm_ref

gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs one NVIDIA GPU")

Op = Callable[..., Tensor]
TYPES = (torch.float32, torch.float16, torch.bfloat16)
EPSILON = {torch.float64: 1e-14, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
ENDS = {
    "uneven": [3, 3, 40, 57],
    "tail": [0, 11, 11, 31],
    "first only": [57, 57, 57, 57],
    "none": [0, 0, 0, 0],
}
"""Of 57 rows."""


def draw(*shape: int, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def gradients(op: Op, inputs: list[Tensor], dout: Tensor) -> tuple[Tensor, ...]:
    """The result, then the gradients."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = op(*leaves)
    return out.detach(), *torch.autograd.grad(out, leaves, dout)


def spans(ends: Tensor) -> list[slice]:
    return [slice(*span) for span in pairwise([0, *ends.tolist()])]


def products(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    """One expert after the other, written into zeros."""
    out = a.new_zeros(a.shape[0], b.shape[2])
    for span, factor in zip(spans(ends), b, strict=True):
        out[span] = a[span] @ factor
    return out


def networks(x: Tensor, w13: Tensor, w2: Tensor, p: Tensor, ends: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for span, (w1, w3), w in zip(spans(ends), w13, w2, strict=True):
        inner = F.silu(x[span] @ w1.T) * (x[span] @ w3.T) * p[span, None].to(x.dtype)
        out[span] = inner @ w.T
    return out


def laid(b: Tensor, how: str) -> Tensor:
    """The same factors by rows, by columns, as a part of something larger, or with no axis dense."""
    if how == "rows":
        return b
    if how == "columns":
        return b.transpose(1, 2).contiguous().transpose(1, 2)
    if how == "part":
        return torch.cat([b, b], 2).transpose(0, 1).contiguous().transpose(0, 1)[..., b.shape[2] :]
    return torch.stack([b, b], 3)[..., 0]


LAYOUTS = ("rows", "columns", "part", "sparse")


def near(
    found: tuple[Tensor, ...], usual: tuple[Tensor, ...], exact: tuple[Tensor, ...], note: object, slack: float = 1e-5
) -> None:
    """No further from the truth than twice torch's own operations in that type, for each number.

    slack: of the largest, for fp32 sums in another order.
    """
    for ours, torchs, wanted in zip(found, usual, exact, strict=True):
        assert ours.shape == wanted.shape
        allowed = 2 * (torchs.double() - wanted).abs() + EPSILON[ours.dtype] * wanted.abs()
        if wanted.numel():
            allowed += slack * wanted.abs().amax()
        assert ((ours.double() - wanted).abs() <= allowed).all(), note


def stain(device: str) -> None:
    """What memory held before is NaN, in small pieces and in large ones."""
    if device == "cuda":
        pieces = [1 << 18] * 64 + [1 << 27]
        _ = [torch.full((piece,), torch.nan, dtype=torch.bfloat16, device=device) for piece in pieces]


def products_are_those_of_each_expert(
    device: str, dtype: torch.dtype, sizes: list[tuple[int, int]], ends: dict[str, list[int]], layouts: tuple[str, ...]
) -> None:
    rows = max(max(stops) for stops in ends.values())
    for (inner, width), (name, stops), how in product(sizes, ends.items(), layouts):
        a, dout = (draw(rows, n, dtype=dtype, device=device, seed=n) for n in (inner, width))
        b = laid(draw(len(stops), inner, width, dtype=dtype, device=device), how)
        at = torch.tensor(stops, dtype=torch.int32, device=device)
        exact = gradients(partial(products, ends=at), [x.double() for x in (a, b)], dout.double())
        usual = gradients(partial(products, ends=at), [a, b], dout)
        for x in (a, dout):
            x[stops[-1] :] = torch.nan
        stain(device)
        found = gradients(partial(grouped_mm, ends=at), [a, b], dout)
        slack = 2e-3 if dtype == torch.float16 else 1e-5  # cuBLAS adds parts of long sums in fp16
        near(found, usual, exact, (inner, width, name, how), slack)
        out, da, db = found
        assert out.is_contiguous() and da.is_contiguous() and db.dtype == dtype
        assert not out[stops[-1] :].any() and not da[stops[-1] :].any()
        assert not any(db[e].any() for e, span in enumerate(spans(at)) if span.start == span.stop)
        assert db.stride() == b.stride() or how in ("part", "sparse") or min(inner, width) == 1


def networks_are_those_of_each_expert(
    device: str, dtype: torch.dtype, shape: tuple[int, int], ends: dict[str, list[int]]
) -> None:
    width, inner = shape
    for name, stops in ends.items():
        count, rows = len(stops), max(max(stops) for stops in ends.values())
        x, dout = (draw(rows, width, dtype=dtype, device=device, seed=n) for n in range(2))
        w13 = draw(count, 2, inner, width, dtype=dtype, device=device) / width**0.5
        w2 = draw(count, width, inner, dtype=dtype, device=device) / inner**0.5
        p = draw(rows, dtype=torch.promote_types(dtype, torch.float32), device=device).sigmoid()
        at = torch.tensor(stops, dtype=torch.int32, device=device)
        exact = gradients(partial(networks, ends=at), [t.double() for t in (x, w13, w2, p)], dout.double())
        usual = gradients(partial(networks, ends=at), [x, w13, w2, p], dout)
        for t in (x, dout, p):
            t[stops[-1] :] = torch.nan
        stain(device)
        found = gradients(partial(experts, ends=at), [x, w13, w2, p], dout)
        for ours, torchs, wanted in zip(found, usual, exact, strict=True):
            assert ours.shape == wanted.shape and ours.is_contiguous()
            error, own = ((t.double() - wanted).norm() for t in (ours, torchs))
            slack = max(1e-6, EPSILON[dtype] / 10) * wanted.norm()
            assert error <= 1.5 * own + slack, (name, shape, dtype, error, own)
        out, dx, dw13, dw2, dp = found
        assert not any(t[stops[-1] :].any() for t in (out, dx, dp))
        assert not any(t[e].any() for t in (dw13, dw2) for e, span in enumerate(spans(at)) if span.start == span.stop)
        again = gradients(partial(experts, ends=at), [x, w13, w2, p], dout)
        assert all(map(torch.equal, found, again))
        network = partial(checkpoint, partial(experts, ends=at), use_reentrant=False)
        assert all(map(torch.equal, found, gradients(network, [x, w13, w2, p], dout)))


def poisoned(x: Tensor, how: str) -> Tensor:
    """The same numbers amid NaN: `dense`; `rows`: one half of wider rows; `columns`: not even dense along a row."""
    if how == "dense":
        inner = x.new_full((x.numel() + 64,), torch.nan)[32:-32].view(x.shape)
    elif how == "rows":
        inner = x.new_full((*x.shape[:-1], 2 * x.shape[-1]), torch.nan)[..., x.shape[-1] :]
    else:
        inner = x.new_full((*x.shape, 2), torch.nan)[..., 1]
    return inner.copy_(x)


def plain(h: Tensor, p: Tensor) -> Tensor:
    """What torch itself would do, a rounding after each operation."""
    return F.silu(h[:, 0]) * h[:, 1] * p.to(h.dtype).unsqueeze(1)


def inputs_of(rows: int, width: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
    h, dout = (
        4 * draw(rows, 2, width, dtype=dtype, device=device),
        draw(rows, width, dtype=dtype, device=device, seed=1),
    )
    return h, draw(rows, dtype=torch.float32, device=device, seed=2).sigmoid(), dout


def activations_equal_their_twin(device: str, dtypes: tuple[torch.dtype, ...], shapes: list[tuple[int, int]]) -> None:
    for dtype, (rows, width), how in product(dtypes, shapes, ("dense", "rows", "columns")):
        h, p, dout = inputs_of(rows, width, dtype, device)
        exact, usual = gradients(gated_ref, [h.double(), p.double()], dout.double()), gradients(plain, [h, p], dout)
        found = gradients(gated, [poisoned(h, how), poisoned(p, how)], poisoned(dout, how))
        near(found, usual, exact, (dtype, rows, width, how))
        assert all(t.is_contiguous() for t in found) and found[2].dtype == torch.float32
        dh, dp, again = gates.GATED_BACKWARD(poisoned(dout, how), poisoned(h, how), p, True)
        assert torch.equal(again, found[0])
        torch.testing.assert_close(dh, found[1], rtol=EPSILON[dtype], atol=1e-6)
        torch.testing.assert_close(dp, found[2], rtol=1e-5, atol=1e-5 * float(dp.abs().amax()))


def kernels_write_nothing_else(device: str, dtype: torch.dtype) -> None:
    """Between guard bands the results are whole, the bands NaN as before, and the inputs as they were."""

    def room(*shape: int, of: torch.dtype) -> tuple[Tensor, Tensor]:
        bands = torch.full((torch.Size(shape).numel() + 8192,), torch.nan, dtype=of, device=device)
        return bands, bands[4096:-4096].view(shape)

    for rows, width in [(1, 1), (7, 63), (5, 192), (3, 1100)]:
        inputs = tuple(poisoned(x, "dense") for x in inputs_of(rows, width, dtype, device))
        h, p, dout = inputs
        before = [x.clone() for x in inputs]
        out, dh, again = (room(*shape, of=dtype) for shape in ((rows, width), h.shape, (rows, width)))
        dp = room(rows, of=torch.float32)
        gates._launch_gated(out[1], h, p)
        gates._launch_gated_backward((dh[1], dp[1], again[1]), dout, h, p, True)
        for bands, inner in (out, dh, again, dp):
            assert inner.isfinite().all() and bands[:4096].isnan().all() and bands[-4096:].isnan().all()
        assert all(map(torch.equal, inputs, before)) and torch.equal(out[1], again[1])


def only_what_nobody_wrote_is_cleared(device: str, dtype: torch.dtype, width: int) -> None:
    for stops in ([0, 3, 3, 9], [5, 5, 5, 5], [0, 0, 0, 0], [2, 4, 6, 11]):
        ends = torch.tensor([7, *stops, 7], dtype=torch.int32, device=device)[1:-1]
        bands = torch.full((11 * width + 64,), torch.nan, dtype=dtype, device=device)
        ops.clear_tail(bands[32:-32].view(11, width), ends)
        wanted = torch.full_like(bands, torch.nan)
        wanted[32:-32].view(11, width)[stops[-1] :] = 0
        torch.testing.assert_close(bands, wanted, rtol=0, atol=0, equal_nan=True)
        bands = torch.full((4 * 3 * width + 64,), torch.nan, dtype=dtype, device=device)
        ops._clear_empty(bands[32:-32].view(4, 3, width), ends)
        wanted = torch.full_like(bands, torch.nan)
        for e, span in enumerate(spans(ends)):
            if span.start == span.stop:
                wanted[32:-32].view(4, 3, width)[e] = 0
        torch.testing.assert_close(bands, wanted, rtol=0, atol=0, equal_nan=True)


def nothing_is_no_error(device: str, dtype: torch.dtype) -> None:
    """No rows, or rows of which none is an expert's: zeros, and gradients of zeros."""
    w13, w2 = (draw(*shape, dtype=dtype, device=device) for shape in ((3, 2, 8, 16), (3, 16, 8)))
    x, p = draw(70, 16, dtype=dtype, device=device), torch.rand(70, device=device)
    ends = torch.zeros(3, dtype=torch.int32, device=device)
    for rows in (0, 70):
        stain(device)
        found = gradients(partial(experts, ends=ends), [x[:rows], w13, w2, p[:rows]], x[:rows])
        assert [t.shape for t in found] == [(rows, 16), (rows, 16), w13.shape, w2.shape, (rows,)]
        assert not any(t.any() for t in found)


def activations_are_one_node_among_others(device: str, dtype: torch.dtype) -> None:
    """A second user of the inputs and of the upstream gradient, checkpointing, expanded gradients, empty inputs."""
    h, p, _ = inputs_of(5, 24, dtype, device)

    def shared(op: Op, h: Tensor, p: Tensor) -> Tensor:
        out = op(h, p)
        return out + torch.sin(out) + h.sum(1) + p.to(h.dtype).unsqueeze(1)

    ones = torch.ones((), dtype=dtype, device=device).expand(5, 24)
    found, twin = (gradients(partial(shared, which), [h, p], ones) for which in (gated, gated_ref))
    for ours, wanted in zip(found, twin, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=4 * EPSILON[dtype], atol=64 * EPSILON[dtype])
    again = gradients(partial(checkpoint, partial(shared, gated), use_reentrant=False), [h, p], ones)
    assert all(map(torch.equal, found, again))
    assert [x.shape for x in gradients(gated, [h[:0], p[:0]], ones[:0])] == [(0, 24), (0, 2, 24), (0,)]
    out, dh, dp = gradients(gated, [h[..., :0], p], ones[:, :0])
    assert out.shape == (5, 0) and dh.shape == (5, 2, 0) and not dp.any()


def activations_survive_extremes(device: str, dtype: torch.dtype) -> None:
    """Large numbers overflow nothing inside, and NaN is never hidden."""
    largest = torch.finfo(dtype).max
    gate = torch.tensor([0.0, -0.0, 17, -17, 90, -90, largest, -largest, torch.nan], device=device).to(dtype)
    h = torch.stack([gate, torch.ones_like(gate)], 1).unsqueeze(2)
    p, dout = torch.full((9,), 0.25, device=device), torch.ones(9, 1, dtype=dtype, device=device)
    for ours, wanted in zip(gradients(gated, [h, p], dout), gradients(gated_ref, [h, p], dout), strict=True):
        assert ours[-1].isnan().any() and (ours.isfinite() | wanted.isinf())[:-1].all()
        torch.testing.assert_close(ours[:6], wanted[:6], rtol=2 * EPSILON[dtype], atol=1e-6)


def all_stays_whole_under_a_compiler(device: str, dtype: torch.dtype) -> None:
    x, w13, w2 = (draw(*shape, dtype=dtype, device=device) for shape in ((9, 16), (3, 2, 8, 16), (3, 16, 8)))
    h, p, dout = inputs_of(9, 8, dtype, device)
    ends = torch.tensor([2, 2, 8], dtype=torch.int32, device=device)
    for op, inputs, upstream in (
        (partial(experts, ends=ends), [x, w13, w2, p], x),
        (partial(grouped_mm, ends=ends), [x, w13[:, 0].transpose(1, 2)], dout),
        (gated, [h, p], dout),
    ):
        torch._dynamo.reset()
        whole = torch.compile(op, fullgraph=True, backend="aot_eager")
        assert all(map(torch.equal, gradients(op, inputs, upstream), gradients(whole, inputs, upstream)))
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(ops.GROUPED_MM, (x, w13[:, 0].transpose(1, 2), ends), test_utils=tests)
    torch.library.opcheck(ops.GROUPED_OUTER, (x, dout.T.contiguous().T, ends), test_utils=tests)
    torch.library.opcheck(gates.GATED, (h, p), test_utils=tests)
    for again in (True, False):
        torch.library.opcheck(gates.GATED_BACKWARD, (dout, h, p, again), test_utils=tests)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_products_are_those_of_each_expert(dtype: torch.dtype) -> None:
    products_are_those_of_each_expert("cpu", dtype, [(1, 5), (8, 1), (63, 64)], ENDS, LAYOUTS)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_networks_are_those_of_each_expert(dtype: torch.dtype) -> None:
    networks_are_those_of_each_expert("cpu", dtype, (33, 21), ENDS)


def test_gradients_are_those_of_differences() -> None:
    of = partial(draw, dtype=torch.float64)
    inputs = [x.requires_grad_() for x in (of(7, 3), of(3, 2, 4, 3), of(3, 3, 4), of(7).sigmoid())]
    ends = torch.tensor([2, 2, 6], dtype=torch.int32)
    for op in (experts, experts_ref):
        assert torch.autograd.gradcheck(op, (*inputs, ends))
    for how in LAYOUTS:
        b = laid(of(3, 3, 4), how).requires_grad_()
        for op in (grouped_mm, grouped_mm_ref):
            assert torch.autograd.gradcheck(op, (inputs[0], b, ends))
    for op in (gated, gated_ref):
        assert torch.autograd.gradcheck(op, (of(5, 2, 3).requires_grad_(), of(5).requires_grad_()))


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_activation_rounds_once(dtype: torch.dtype) -> None:
    h, p, _ = inputs_of(40, 25, dtype, "cpu")
    assert torch.equal(gated(h, p), plain(h.float(), p).to(dtype))
    activations_equal_their_twin("cpu", (dtype,), [(1, 1), (63, 100)])


def test_only_arguments_and_the_first_product_are_saved() -> None:
    x, w13, w2 = (draw(*shape, dtype=torch.bfloat16) for shape in ((9, 16), (3, 2, 8, 16), (3, 16, 8)))
    p, ends = torch.rand(9), torch.tensor([2, 2, 8], dtype=torch.int32)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        experts(x.requires_grad_(), w13.requires_grad_(), w2.requires_grad_(), p.requires_grad_(), ends)
    given = {t.data_ptr() for t in (x, w13, w2, p, ends)}
    assert len(saved) == 6 and given < {t.data_ptr() for t in saved}
    assert [(t.shape, t.dtype) for t in saved if t.data_ptr() not in given] == [((9, 2, 8), torch.bfloat16)]


def test_operations_are_counted() -> None:
    x, w13, w2 = (draw(*shape, dtype=torch.float32) for shape in ((9, 16), (3, 2, 8, 16), (3, 16, 8)))
    ends = torch.tensor([2, 2, 9], dtype=torch.int32)
    with FlopCounterMode(display=False) as counter:
        experts(x.requires_grad_(), w13.requires_grad_(), w2.requires_grad_(), torch.rand(9), ends).sum().backward()
    assert counter.get_total_flops() == 18 * 9 * 16 * 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_shapes_are_known_without_a_device(dtype: torch.dtype) -> None:
    shapes = (9, 16), (3, 2, 8, 16), (3, 16, 8)
    x, w13, w2 = (torch.empty(shape, dtype=dtype, device="meta", requires_grad=True) for shape in shapes)
    p, ends = torch.empty(9, device="meta", requires_grad=True), torch.empty(3, dtype=torch.int32, device="meta")
    out = experts(x, w13, w2, p, ends)
    assert out.shape == x.shape and out.dtype == dtype
    for grad, of in zip(torch.autograd.grad(out.sum(), (x, w13, w2, p)), (x, w13, w2, p), strict=True):
        assert grad.shape == of.shape and grad.dtype == of.dtype


def test_all_stays_whole_under_a_compiler() -> None:
    all_stays_whole_under_a_compiler("cpu", torch.float32)


def test_what_does_not_fit_is_refused() -> None:
    x, w13, w2 = (draw(*shape, dtype=torch.float32) for shape in ((9, 16), (3, 2, 8, 16), (3, 16, 8)))
    p, ends = torch.rand(9), torch.tensor([2, 2, 9], dtype=torch.int32)
    b = w2.transpose(1, 2)
    with pytest.raises(
        ValueError, match=r"grouped_mm: rows \(9, 16\), factors \(3, 8, 16\) and ends \(3,\) do not fit"
    ):
        grouped_mm(x, b, ends)
    with pytest.raises(ValueError, match=r"grouped_mm: .* ends \(2,\) do not fit; they are M N1, E N1 N2 and E"):
        grouped_mm(x, w2, ends[:2])
    with pytest.raises(ValueError, match=r"grouped_mm: .* with an expert at least"):
        grouped_mm(x, w2[:0], ends[:0])
    with pytest.raises(ValueError, match=r"grouped_mm: rows are torch.float32, factors torch.float16; cast one"):
        grouped_mm(x, w2.half(), ends)
    with pytest.raises(ValueError, match=r"grouped_mm: ends are torch.int64; they must be int32"):
        grouped_mm(x, w2, ends.long())
    with pytest.raises(ValueError, match=r"gated: h \(9, 16\) and p \(9,\) must be M 2 I and M"):
        gated(x, p)
    with pytest.raises(ValueError, match=r"experts: w13 \(3, 16, 16\) .* must be E 2 I D and E D I of one type"):
        experts(x, w13.flatten(1, 2), w2, p, ends)
    with pytest.raises(ValueError, match=r"experts: p \(8,\) must be \(9,\): one probability a row"):
        experts(x, w13, w2, p[1:], ends)
    with pytest.raises(ValueError, match=r"experts: rows \(9, 15\)"):
        experts(x[:, 1:], w13, w2, p, ends)


def test_nothing_is_no_error() -> None:
    nothing_is_no_error("cpu", torch.float32)


SOME = {name: stops for name, stops in ENDS.items() if name != "none"}
MANY = {"many": sorted([0, 0, *range(0, 4096, 37), *[2048] * 14, 4099])}


@gpu
@needs_gpu
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_gpu_products_are_those_of_each_expert(dtype: torch.dtype) -> None:
    products_are_those_of_each_expert("cuda", dtype, [(8, 8), (1, 3), (63, 65), (256, 352)], SOME, LAYOUTS)


@gpu
@needs_gpu
@pytest.mark.parametrize("size", [(64, 64), (1024, 704), (1000, 1001)], ids=str)
def test_gpu_products_of_many_rows(size: tuple[int, int]) -> None:
    """Both of torch's tiles: for fewer than 128 rows an expert, and for more."""
    few = {"few": [1000, 1000, 1129, 4000]}
    products_are_those_of_each_expert("cuda", torch.bfloat16, [size], few, ("rows", "columns"))
    products_are_those_of_each_expert("cuda", torch.bfloat16, [size], MANY, ("columns",))


@gpu
@needs_gpu
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_gpu_networks_are_those_of_each_expert(dtype: torch.dtype) -> None:
    networks_are_those_of_each_expert("cuda", dtype, (33, 21), SOME)
    networks_are_those_of_each_expert("cuda", dtype, (512, 352), SOME)


@gpu
@needs_gpu
def test_gpu_networks_of_a_model() -> None:
    networks_are_those_of_each_expert("cuda", torch.bfloat16, (2048, 768), {"model": [500, 1500, 1500, 3000, 4099]})
    networks_are_those_of_each_expert("cuda", torch.bfloat16, (256, 128), MANY)


@gpu
@needs_gpu
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_gpu_activations_in_every_type(dtype: torch.dtype) -> None:
    """Tiles 1, 64, 128, 256 and 1024 columns wide, and rows cut at their end."""
    shapes = [(1, 1), (1001, 63), (515, 1000), (1003, 1408), (517, 768), (343, 14336), (67, 16384), (70, 192)]
    activations_equal_their_twin("cuda", (dtype,), shapes)
    kernels_write_nothing_else("cuda", dtype)
    activations_are_one_node_among_others("cuda", dtype)
    activations_survive_extremes("cuda", dtype)


@gpu
@needs_gpu
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_gpu_only_what_nobody_wrote_is_cleared(dtype: torch.dtype) -> None:
    for width in (1, 5, 64, 4100, 1 << 20):
        only_what_nobody_wrote_is_cleared("cuda", dtype, width)


@gpu
@needs_gpu
def test_gpu_all_stays_whole_under_a_compiler() -> None:
    all_stays_whole_under_a_compiler("cuda", torch.bfloat16)


@gpu
@needs_gpu
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_gpu_no_count_comes_to_the_host(dtype: torch.dtype) -> None:
    x, w13, w2 = (draw(*shape, dtype=dtype, device="cuda") for shape in ((57, 16), (4, 2, 8, 16), (4, 16, 8)))
    p, ends = torch.rand(57, device="cuda"), torch.tensor(ENDS["tail"], dtype=torch.int32, device="cuda")
    usual = gradients(partial(experts, ends=ends), [x, w13, w2, p], x)  # kernels are loaded
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = gradients(partial(experts, ends=ends), [x, w13, w2, p], x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(map(torch.equal, found, usual))


@gpu
@needs_gpu
def test_gpu_activations_reach_beyond_32_bits() -> None:
    """Rows that begin 2^31 elements apart, and more than 2^31 elements in all."""
    room = torch.randn((1 << 31) + 4096 * 8, dtype=torch.bfloat16, device="cuda")
    for h in (room.as_strided((2, 2, 4096), (1 << 31, 4096, 1)), room.view(-1, 2, 4096)):
        p, dout = torch.rand(len(h), device="cuda"), h[:, 0]
        found = gradients(gated, [h, p], dout)
        wanted = gradients(gated_ref, [h[-1:].clone(), p[-1:]], dout[-1:].clone())
        for ours, last in zip(found, wanted, strict=True):
            torch.testing.assert_close(ours[-1:], last, rtol=8e-3, atol=1e-3)
        del found, ours


@gpu
@needs_gpu
def test_gpu_products_reach_beyond_32_bits() -> None:
    rows = (1 << 25) + 133
    a = torch.randn(rows, 64, dtype=torch.bfloat16, device="cuda")
    b = draw(2, 64, 64, dtype=torch.bfloat16, device="cuda")
    ends = torch.tensor([5, rows - 3], dtype=torch.int32, device="cuda")
    out = grouped_mm(a, b, ends)
    torch.testing.assert_close(out[-140:-3], a[-140:-3] @ b[1], rtol=8e-3, atol=1e-2)
    torch.testing.assert_close(out[:5], a[:5] @ b[0], rtol=8e-3, atol=1e-2)
    assert not out[-3:].any()
    out.fill_(torch.nan)
    ops.clear_tail(out, torch.tensor([0, 1], dtype=torch.int32, device="cuda"))
    assert out[0].isnan().all() and not out[1:].any()


@gpu
@needs_gpu
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_gpu_nothing_is_no_error(dtype: torch.dtype) -> None:
    nothing_is_no_error("cuda", dtype)


def run_interpreted() -> None:
    assert triton_runs(torch.zeros(1))
    activations_equal_their_twin("cpu", TYPES, [(1, 1), (5, 21), (70, 64), (2, 1100)])
    for dtype in TYPES:
        kernels_write_nothing_else("cpu", dtype)
        activations_survive_extremes("cpu", dtype)
    activations_are_one_node_among_others("cpu", torch.float32)
    networks_are_those_of_each_expert("cpu", torch.float32, (16, 8), {"tail": ENDS["tail"]})
    all_stays_whole_under_a_compiler("cpu", torch.float32)
    only_what_nobody_wrote_is_cleared("cpu", torch.bfloat16, 5)


def run_compiled() -> None:
    """Every tile compiles for Hopper, keeps its values in registers, and moves 16 bytes at a time where it can."""
    for width in (1, 63, 64, 128, 256, 768, 1024, 2048):
        known = {"width": width} if width % 16 else {}
        for kernel, size, flags, most in (
            (gates._gated_forward, 4096, {}, 48),
            (gates._gated_backward, 2048, {"again": True}, 80),
            (gates._gated_backward, 2048, {"again": False}, 80),
        ):
            b_r, b_i = gates._tile(width, size)
            fixed = {**known, **flags, "b_r": b_r, "b_i": b_i}
            special = {"p_prob": "*fp32", "p_dprob": "*fp32"}
            names = [name for name in kernel.arg_names if name not in fixed]
            types = {n: special.get(n, "*bf16" if n.startswith("p_") else "i32") for n in names}
            built = compiled(kernel, types, fixed, num_warps=8)
            assert built.stack <= 8, (kernel, fixed, built.stack)  # Triton 3.9 parks one pair
            if width % 64 == 0:
                assert built.registers <= most, (kernel, width, built.registers)
                assert "ld.global.v4" in built.ptx and "ld.global.b16" not in built.ptx, (kernel, width)
    for tail in (True, False):
        fixed = {"tail": tail, "block": 4096}
        types = {"p_out": "*bf16", "p_ends": "*i32", "experts": "i32", "rows": "i32", "width": "i32"}
        built = compiled(ops._clear, types, fixed, num_warps=8)
        assert built.stack == 0 and built.registers <= 40 and "st.global.v4" in built.ptx, (tail, built.registers)


test_kernels_without_a_gpu = both(run_interpreted, run_compiled)
