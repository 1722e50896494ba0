"""A layer of experts is the sum over its visits, one expert after the other, and holds little until its backward."""

from collections.abc import Callable
from functools import partial
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from without_gpu import elsewhere

from farspan.kernels.define import triton_runs
from farspan.kernels.expert_layer import expert_layer, expert_layer_ref
from farspan.kernels.permute import Order, sort

gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs one NVIDIA GPU")

Op = Callable[..., Tensor]
EPSILON = {torch.float64: 1e-14, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def draw(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def inputs(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> tuple[list[Tensor], Tensor]:
    """x, w13, w2 and probabilities for tokens, width, hidden, experts and visits; an upstream gradient."""
    tokens, width, hidden, experts, k = shape
    of = partial(draw, dtype=dtype, device=device)
    w13 = of(experts, 2, hidden, width, seed=1) / width**0.5
    w2 = of(experts, width, hidden, seed=2) / hidden**0.5
    p = draw(tokens, k, dtype=torch.promote_types(dtype, torch.float32), device=device, seed=3).sigmoid()
    return [of(tokens, width), w13, w2, p], of(tokens, width, seed=4)


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


def one_by_one(x: Tensor, w13: Tensor, w2: Tensor, p: Tensor, chosen: Tensor) -> Tensor:
    out = torch.zeros_like(x) + 0 * (x.sum() + p.sum() + w13.sum() + w2.sum())
    for expert, ((w1, w3), w) in enumerate(zip(w13, w2, strict=True)):
        token, j = (chosen == expert).nonzero(as_tuple=True)
        inner = F.silu(x[token] @ w1.T) * (x[token] @ w3.T) * p[token, j, None].to(x.dtype)
        out = out.index_add(0, token, inner @ w.T)
    return out


def gradients(op: Op, given: list[Tensor], dout: Tensor) -> tuple[Tensor, ...]:
    """The result, then the gradients."""
    leaves = [x.detach().requires_grad_() for x in given]
    out = op(*leaves)
    return out.detach(), *torch.autograd.grad(out, leaves, dout)


def stain(device: str) -> None:
    """What memory held before is NaN, in small pieces and in large ones."""
    if device == "cuda":
        pieces = [1 << 18] * 64 + [1 << 27]
        _ = [torch.full((piece,), torch.nan, dtype=torch.bfloat16, device=device) for piece in pieces]


def layers_are_sums_of_visits(
    device: str, dtypes: tuple[torch.dtype, ...], shapes: list[tuple[int, ...]], whose: tuple[str, ...]
) -> None:
    for shape, dtype, whom in product(shapes, dtypes, whose):
        chosen, (given, dout) = choice(shape, device, whom), inputs(shape, dtype, device)
        live = (chosen >= 0) & (chosen < shape[3])
        exact = gradients(partial(one_by_one, chosen=chosen), [t.double() for t in given], dout.double())
        usual = gradients(partial(one_by_one, chosen=chosen), given, dout)
        given[3][~live] = torch.nan
        for t in (given[0], dout):
            t[~live.any(1)] = torch.nan
        first: tuple[Tensor, ...] = ()
        for room in (None, int(live.sum()), min(live.numel(), int(live.sum()) + 3)):
            order = sort(chosen, shape[3], room)
            op = partial(expert_layer, order=order)
            stain(device)
            found = gradients(op, given, dout)
            for ours, torchs, wanted in zip(found, usual, exact, strict=True):
                assert ours.shape == wanted.shape and ours.is_contiguous()
                error, own = ((t.double() - wanted).norm() for t in (ours, torchs))
                slack = max(1e-6, EPSILON[dtype] / 10) * wanted.norm()
                assert error <= 1.5 * own + slack, (shape, dtype, whom, room, error, own)
            out, dx, dw13, dw2, dp = found
            assert not out[~live.any(1)].any() and not dx[~live.any(1)].any() and not dp[~live].any()
            assert not dw13[-1].any() and not dw2[-1].any()  # an expert that nobody chose
            first = first or found
            assert device != "cpu" or all(map(torch.equal, first, found))  # torch's tiles go by the number of rows
            again = gradients(partial(checkpoint, op, use_reentrant=False), given, dout)
            assert all(map(torch.equal, found, again))


def it_is_one_node_among_others(device: str, dtype: torch.dtype) -> None:
    """A second user of the inputs and of the result, expanded gradients, strides, a compiler; nothing at all."""
    shape = 11, 16, 8, 4, 3
    given, _ = inputs(shape, dtype, device)
    order = sort(choice(shape, device, "some"), 4)

    def shared(op: Op, x: Tensor, w13: Tensor, w2: Tensor, p: Tensor) -> Tensor:
        out = op(x, w13, w2, p, order)
        return out + torch.sin(out) + x + p.sum().to(x.dtype)

    ones = torch.ones((), dtype=dtype, device=device).expand(11, 16)
    found, twin = (gradients(partial(shared, op), given, ones) for op in (expert_layer, expert_layer_ref))
    for ours, wanted in zip(found, twin, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=8 * EPSILON[dtype], atol=32 * EPSILON[dtype])
    strided = [given[0].T.contiguous().T, *given[1:3], given[3].T.contiguous().T]
    assert all(map(torch.equal, found, gradients(partial(shared, expert_layer), strided, ones.contiguous())))
    torch._dynamo.reset()
    whole = torch.compile(shared, fullgraph=True, backend="aot_eager")
    assert all(map(torch.equal, found, gradients(partial(whole, expert_layer), given, ones)))
    empty, dout = inputs((0, 16, 8, 4, 3), dtype, device)
    none = partial(expert_layer, order=sort(torch.zeros(0, 3, dtype=torch.int32, device=device), 4))
    assert not any(t.any() for t in gradients(none, empty, dout))
    out = expert_layer(*given, sort(choice(shape, device, "some"), 4, 0))
    assert out.shape == (11, 16) and not out.any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_layers_are_sums_of_visits(dtype: torch.dtype) -> None:
    shapes = [(1, 1, 1, 2, 1), (37, 21, 5, 4, 3), (70, 16, 8, 9, 2)]
    layers_are_sums_of_visits("cpu", (dtype,), shapes, ("all", "some", "nobody"))


def test_gradients_are_those_of_differences() -> None:
    given, _ = inputs((5, 3, 4, 3, 2), torch.float64, "cpu")
    leaves = [t.requires_grad_() for t in given]
    for room, op in product((10, 6), (expert_layer, expert_layer_ref)):
        order = sort(torch.tensor([[0, 1], [1, -1], [3, -1], [0, 0], [-1, 1]], dtype=torch.int32), 3, room)
        assert torch.autograd.gradcheck(op, (*leaves, order))


def test_only_what_is_asked_for_is_made() -> None:
    given, dout = inputs((9, 16, 8, 4, 2), torch.float32, "cpu")
    op = partial(expert_layer, order=sort(choice((9, 16, 8, 4, 2), "cpu", "all"), 4))
    wanted = gradients(op, given, dout)[1:]
    for place, whole in enumerate(wanted):
        leaves = [t.detach().requires_grad_(place == i) for i, t in enumerate(given)]
        assert torch.equal(torch.autograd.grad(op(*leaves), leaves[place], dout)[0], whole)


def test_nothing_of_full_width_is_saved_for_a_visit() -> None:
    given, _ = inputs((9, 16, 8, 4, 2), torch.bfloat16, "cpu")
    order, saved = sort(choice((9, 16, 8, 4, 2), "cpu", "all"), 4), list[Tensor]()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        expert_layer(*(t.requires_grad_() for t in given), order)
    known = {t.data_ptr() for t in (*given, order.rows, order.places, order.ends)}
    assert len(saved) == 8 and known < {t.data_ptr() for t in saved}
    assert [(t.shape, t.dtype) for t in saved if t.data_ptr() not in known] == [((18, 2, 8), torch.bfloat16)]


def test_operations_are_counted() -> None:
    given, _ = inputs((9, 16, 8, 4, 2), torch.float32, "cpu")
    order = sort(choice((9, 16, 8, 4, 2), "cpu", "all"), 4)
    with FlopCounterMode(display=False) as counter:
        expert_layer(*(t.requires_grad_() for t in given), order).sum().backward()
    assert counter.get_total_flops() == 18 * 18 * 16 * 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_shapes_are_known_without_a_device(dtype: torch.dtype) -> None:
    given = [torch.empty_like(t, device="meta").requires_grad_() for t in inputs((9, 16, 8, 4, 2), dtype, "cpu")[0]]
    of = partial(torch.empty, dtype=torch.int32, device="meta")
    for room in (18, 7):
        out = expert_layer(*given, Order(of(room), of(9, 2), of(4)))
        assert out.shape == (9, 16) and out.dtype == dtype
        for grad, leaf in zip(torch.autograd.grad(out.sum(), given), given, strict=True):
            assert grad.shape == leaf.shape and grad.dtype == leaf.dtype


def test_it_is_one_node_among_others() -> None:
    it_is_one_node_among_others("cpu", torch.float32)


def test_what_does_not_fit_is_refused() -> None:
    (x, w13, w2, p), _ = inputs((9, 16, 8, 4, 2), torch.float32, "cpu")
    order = sort(choice((9, 16, 8, 4, 2), "cpu", "all"), 4)
    with pytest.raises(ValueError, match=r"expert_layer: w13 \(4, 16, 16\) and w2 .* must be E 2 I D and E D I"):
        expert_layer(x, w13.flatten(1, 2), w2, p, order)
    with pytest.raises(ValueError, match=r"expert_layer: .* for the 4 experts of the order"):
        expert_layer(x, w13[:3], w2[:3], p, order)
    with pytest.raises(
        ValueError, match=r"expert_layer: x is torch.float16, w13 torch.float32, w2 torch.float32; cast"
    ):
        expert_layer(x.half(), w13, w2, p, order)
    with pytest.raises(ValueError, match=r"x \(8, 16\) and probability \(9, 2\) must be T D and T K, \(9, 16\)"):
        expert_layer(x[1:], w13, w2, p, order)
    with pytest.raises(ValueError, match=r"probability \(18,\) must be T D and T K"):
        expert_layer(x, w13, w2, p.flatten(), order)


def run_interpreted() -> None:
    assert triton_runs(torch.zeros(1))
    layers_are_sums_of_visits("cpu", (torch.float32,), [(37, 21, 5, 4, 3)], ("some", "nobody"))
    it_is_one_node_among_others("cpu", torch.float32)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels themselves run here")
def test_interpreted() -> None:
    elsewhere(run_interpreted, interpret=True)


@gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_gpu_layers_are_sums_of_visits(dtype: torch.dtype) -> None:
    layers_are_sums_of_visits("cuda", (dtype,), [(67, 8, 8, 2, 1), (517, 63, 21, 4, 3)], ("all", "some", "nobody"))
    layers_are_sums_of_visits("cuda", (dtype,), [(517, 72, 40, 5, 2)], ("some",))
    it_is_one_node_among_others("cuda", dtype)


@gpu
@needs_gpu
@pytest.mark.parametrize(
    "shape", [(2001, 2048, 768, 64, 8), (1500, 1536, 256, 32, 8), (1024, 1024, 2816, 8, 2)], ids=str
)
def test_gpu_layers_of_models(shape: tuple[int, ...]) -> None:
    layers_are_sums_of_visits("cuda", (torch.bfloat16,), [shape], ("all", "some"))


@gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gpu_no_count_comes_to_the_host(dtype: torch.dtype) -> None:
    shape = 300, 64, 32, 8, 4
    given, dout = inputs(shape, dtype, "cuda")
    chosen = choice(shape, "cuda", "some")

    def both() -> tuple[Tensor, ...]:
        return gradients(partial(expert_layer, order=sort(chosen, 8, 1000)), given, dout)

    usual = both()  # kernels are loaded
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = both()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(map(torch.equal, found, usual))
