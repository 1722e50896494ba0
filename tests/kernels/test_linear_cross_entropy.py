"""The chunked loss is the whole loss, value and gradients, whatever computes it."""

import math
from itertools import product
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from without_gpu import both, compiled

from farspan.kernels import cross_entropy as rows
from farspan.kernels import linear_cross_entropy as room
from farspan.kernels.cross_entropy import Loss, rows_fused, rows_ref, target_logits
from farspan.kernels.define import triton_runs
from farspan.kernels.linear_cross_entropy import chunks, linear_cross_entropy, linear_cross_entropy_ref

gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs one NVIDIA GPU")


def inputs(
    tokens: int, vocabulary: int, dtype: torch.dtype, device: str = "cpu", width: int = 24
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    hidden = torch.randn(tokens, width, generator=generator).to(device, dtype).requires_grad_()
    weight = (torch.randn(vocabulary, width, generator=generator) / width**0.5).to(device, dtype).requires_grad_()
    labels = torch.randint(vocabulary, (tokens,), generator=generator)
    labels[::3] = -100
    return hidden, weight, labels.to(device)


def drawn_weights(tokens: int, device: str = "cpu") -> Tensor:
    """Weights of tokens, some of them zero."""
    return torch.rand(tokens, generator=torch.Generator().manual_seed(1)).mul(3).floor().div(2).to(device)


def chunked(tokens: int) -> Any:
    return mock.patch.object(room, "_most", lambda hidden, weight: tokens)


def apart(left: Tensor, right: Tensor) -> float:
    """Error of `left`, relative to the norm of `right`."""
    return float((left.double() - right.double()).norm() / right.double().norm().clamp(min=1e-9))


@pytest.mark.parametrize("tokens", [1, 63, 1000])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4), (torch.bfloat16, 2e-2)], ids=str
)
@pytest.mark.parametrize("chunk", [7, 63, 4096])
def test_equals_reference(tokens: int, dtype: torch.dtype, tolerance: float, chunk: int) -> None:
    hidden, weight, labels = inputs(tokens, 131, dtype)
    for options in ({}, {"weights": drawn_weights(tokens), "z_loss": 0.1}):
        with chunked(chunk):
            ours = linear_cross_entropy(hidden, weight, labels, **options)  # type: ignore[arg-type]
        theirs = linear_cross_entropy_ref(hidden, weight, labels, **options)  # type: ignore[arg-type]
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
        mine = torch.autograd.grad(ours * 0.37, (hidden, weight))
        others = torch.autograd.grad(theirs * 0.37, (hidden, weight))
        for left, right in zip(mine, others, strict=True):
            assert left.dtype == dtype and apart(left, right) < tolerance


def test_the_specification_is_torchs_own_loss() -> None:
    hidden, weight, labels = inputs(33, 57, torch.float64)
    ours, theirs = linear_cross_entropy_ref(hidden, weight, labels), cross_entropy(hidden @ weight.T, labels)
    counted = (labels >= 0).sum()
    torch.testing.assert_close(ours, theirs * counted)
    grads = (torch.autograd.grad(x, (hidden, weight)) for x in (ours, theirs * counted))
    torch.testing.assert_close(*grads)


def test_gradients_are_those_of_the_value() -> None:
    hidden, weight, labels = inputs(5, 7, torch.float64)
    weights = drawn_weights(5).double()
    for function in (linear_cross_entropy, linear_cross_entropy_ref):
        with chunked(2):
            assert torch.autograd.gradcheck(
                lambda h, w, f=function: f(h, w, labels, weights=weights, z_loss=0.3), (hidden, weight)
            )


@pytest.mark.parametrize("options", [{}, {"z_loss": 0.05, "weights": True}], ids=["plain", "weighed"])
def test_parts_of_the_vocabulary_join(options: dict[str, Any]) -> None:
    """Ranks that hold 50, 1 and 80 columns: each one's loss is the whole's, and hidden's gradients sum to its."""
    parts_join("cpu", torch.float64, options, {"rtol": 1e-7, "atol": 1e-7})


def parts_join(device: str, dtype: torch.dtype, options: dict[str, Any], close: dict[str, float]) -> None:
    hidden, weight, labels = inputs(23, 131, dtype, device)
    labels[1:6] = torch.tensor([0, 49, 50, 51, 130], device=device)  # every part's ends
    options = {**options, "weights": drawn_weights(23, device) if "weights" in options else None}
    whole = linear_cross_entropy_ref(hidden.double(), weight.double(), labels, **options)
    wanted = torch.autograd.grad(whole, (hidden, weight))
    logits = (hidden.double() @ weight.double().T).detach()
    logit = torch.where(labels < 0, 0, logits.gather(1, labels.clamp(min=0)[:, None])[:, 0])
    wide = torch.promote_types(dtype, torch.float32)
    found, columns, first = torch.zeros_like(hidden), [], 0
    for part in weight.detach().split([50, 1, 80]):
        part = part.clone().requires_grad_()
        mine, done = logits[:, first : first + len(part)], 0
        inside = (labels >= first) & (labels < first + len(part))
        own = mine.gather(1, torch.where(inside, labels - first, 0)[:, None])[:, 0]
        own = torch.where(inside, own, -torch.inf)

        def merge(lse: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
            nonlocal done
            here = slice(done, done + len(lse))
            done += len(lse)
            torch.testing.assert_close(lse, mine.logsumexp(1).to(wide)[here], **close)  # noqa: B023 (used at once)
            torch.testing.assert_close(target, own.to(wide)[here], **close)  # noqa: B023
            return logits.logsumexp(1).to(wide)[here], logit.to(wide)[here]

        with chunked(9):
            loss = linear_cross_entropy(hidden, part, labels, first=first, merge=merge, **options)
        assert done == 23
        torch.testing.assert_close(loss, whole.to(wide), **close)
        d_hidden, d_part = torch.autograd.grad(loss, (hidden, part))
        found, first = found + d_hidden, first + len(part)
        columns.append(d_part)
    torch.testing.assert_close((found, torch.cat(columns)), wanted, **close)


def test_nothing_to_predict_is_zero() -> None:
    hidden, weight, labels = inputs(9, 11, torch.float32)
    loss = linear_cross_entropy(hidden, weight, torch.full_like(labels, -100))
    loss.backward()
    assert loss == 0 and not hidden.grad.any() and not weight.grad.any()  # type: ignore[union-attr]
    none = hidden.detach()[:0].requires_grad_()
    loss = linear_cross_entropy(none, weight, labels[:0])
    d_hidden, d_weight = torch.autograd.grad(loss, (none, weight))
    assert loss == 0 and d_hidden.shape == (0, 24) and not d_weight.any()


def test_a_sure_model_has_no_loss_and_no_gradient() -> None:
    """softmax(y) → 1: the difference to one-hot must vanish rather than round to something."""
    weight = torch.eye(5).requires_grad_()
    hidden = (60 * torch.eye(5)).requires_grad_()
    loss = linear_cross_entropy(hidden, weight, torch.arange(5))
    loss.backward()
    assert loss < 1e-6 and hidden.grad.abs().max() < 1e-6  # type: ignore[union-attr]


def a_nearly_sure_model_learns(device: str, dtype: torch.dtype) -> None:
    """softmax(y) = p → 1: what is left of the gradient, 1 - p, keeps its digits. Random logits never show this."""
    for p in (0.5, 0.99, 0.999, 0.99999):
        high = torch.tensor(math.log(999 * p / (1 - p))).bfloat16()
        hidden = torch.tensor([[1.0, 2.0**-7]], device=device, dtype=dtype).requires_grad_()
        weight = torch.zeros(1000, 2, device=device, dtype=dtype)
        weight[3] = torch.tensor([float(high), 1.25], device=device)  # a logit that bf16 would round
        weight.requires_grad_()
        truth = linear_cross_entropy_ref(hidden.double(), weight.double(), torch.tensor([3], device=device))
        loss = linear_cross_entropy(hidden, weight, torch.tensor([3], device=device))
        assert abs(loss.item() / truth.item() - 1) < (2e-2 if p == 0.99999 else 1e-3), (p, loss, truth)
        wanted = torch.autograd.grad(truth, weight)[0][3]
        assert apart(torch.autograd.grad(loss, weight)[0][3], wanted) < 1.2e-2, p


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_nearly_sure_model_learns(dtype: torch.dtype) -> None:
    a_nearly_sure_model_learns("cpu", dtype)


def ignored_rows_may_hold_anything(device: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        hidden, weight, labels = inputs(9, 11, dtype, device)
        poisoned = hidden.detach().clone()
        poisoned[::3] = 1e30
        poisoned.requires_grad_()
        ours, theirs = linear_cross_entropy(hidden, weight, labels), linear_cross_entropy(poisoned, weight, labels)
        assert torch.equal(ours, theirs)
        for left, right in zip(
            torch.autograd.grad(ours, (hidden, weight)), torch.autograd.grad(theirs, (poisoned, weight)), strict=True
        ):
            assert torch.equal(left, right)
        assert not torch.autograd.grad(linear_cross_entropy(poisoned, weight, labels), poisoned)[0][::3].any()


def test_ignored_rows_may_hold_anything() -> None:
    ignored_rows_may_hold_anything("cpu")


def a_label_that_is_no_column_makes_the_loss_nan(device: str) -> None:
    hidden, weight, labels = inputs(4, 11, torch.float32, device)
    for wrong in (11, -1, 1 << 40):
        labels[2] = wrong
        assert linear_cross_entropy(hidden, weight, labels).isnan(), wrong


def test_a_label_that_is_no_column_makes_the_loss_nan() -> None:
    a_label_that_is_no_column_makes_the_loss_nan("cpu")


def test_what_is_frozen_costs_no_product() -> None:
    hidden, weight, labels = inputs(9, 11, torch.float32)
    whole = torch.autograd.grad(linear_cross_entropy(hidden, weight, labels), (hidden, weight))
    for frozen, wanted in ((0, weight), (1, hidden)):
        given = [x.detach() if i == frozen else x for i, x in enumerate((hidden, weight))]
        with torch.profiler.profile() as seen:
            loss = linear_cross_entropy(given[0], given[1], labels)
        assert torch.equal(torch.autograd.grad(loss, wanted)[0], whole[1 - frozen])
        assert sum(e.count for e in seen.key_averages() if e.key == "aten::mm") == 2
    with torch.no_grad(), torch.profiler.profile() as seen:
        assert not linear_cross_entropy(hidden, weight, labels).requires_grad
    assert sum(e.count for e in seen.key_averages() if e.key == "aten::mm") == 1


def a_backward_may_come_again(device: str) -> None:
    """A gradient is scaled in its own memory only when nobody can ask for it again, and it is never copied then."""
    hidden, weight, labels = inputs(9, 11, torch.float32, device)
    loss = linear_cross_entropy(hidden, weight, labels)
    first = torch.autograd.grad(loss, (hidden, weight), 3 * torch.ones_like(loss), retain_graph=True)
    again = torch.autograd.grad(loss, (hidden, weight), 3 * torch.ones_like(loss), retain_graph=True)
    held = [x.data_ptr() for x in loss.grad_fn.saved_tensors]  # type: ignore[union-attr]
    loss.backward(3 * torch.ones_like(loss))
    for left, middle, right in zip(first, again, (hidden.grad, weight.grad), strict=True):
        assert right is not None and torch.equal(left, middle) and torch.equal(left, right)
    assert held == [hidden.grad.data_ptr(), weight.grad.data_ptr()]  # type: ignore[union-attr]
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()
    factor = torch.ones((), device=device, requires_grad=True)
    (d_hidden,) = torch.autograd.grad(linear_cross_entropy(hidden, weight, labels) * factor, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        d_hidden.sum().backward()


def test_a_backward_may_come_again() -> None:
    a_backward_may_come_again("cpu")


def many_chunks_add_up(device: str) -> None:
    """Sums over 64 chunks: fp32 rounds once at the end; bf16 once a chunk, which shows and stays small."""
    hidden, weight, labels = inputs(320 if device == "cpu" else 64 * 256, 50, torch.bfloat16, device)
    truth = torch.autograd.grad(linear_cross_entropy_ref(hidden.double(), weight.double(), labels), weight)[0]
    errors = []
    for accumulate in (None, torch.bfloat16):
        with chunked(5 if device == "cpu" else 256):
            loss = linear_cross_entropy(hidden, weight, labels, accumulate=accumulate)
        errors.append(apart(torch.autograd.grad(loss, weight)[0], truth))
    assert errors[0] < 4e-3 and 1.5 * errors[0] < errors[1] < 3e-2, errors


def test_many_chunks_add_up() -> None:
    many_chunks_add_up("cpu")


def test_checkpoints_and_compilers_change_nothing() -> None:
    hidden, weight, labels = inputs(13, 17, torch.float32)
    weights = drawn_weights(13)

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_cross_entropy(2 * hidden, weight, labels, weights=weights, z_loss=0.1) / 7

    plain = loss(hidden, weight)
    wanted = plain, *torch.autograd.grad(plain, (hidden, weight))
    fullgraph = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for other in (fullgraph, lambda *x: checkpoint(loss, *x, use_reentrant=False)):
        found = other(hidden, weight)
        for left, right in zip((found, *torch.autograd.grad(found, (hidden, weight))), wanted, strict=True):
            assert torch.equal(left, right)
    for flags in ((True, True), (False, True), (False, False)):
        arguments = (hidden.detach(), weight.detach(), labels, weights, -100, 0.1, torch.float32, *flags)
        torch.library.opcheck(torch.ops.farspan.linear_cross_entropy.default, arguments)


@pytest.mark.parametrize("vocabulary", [1, 320, 50257, 128256, 1 << 22])
@pytest.mark.parametrize("tokens", [0, 1, 63, 4097, 16384, 70000])
def test_chunks_are_even_and_fit(tokens: int, vocabulary: int) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        hidden, weight = (torch.empty(n, 8, device="cuda", dtype=torch.bfloat16) for n in (tokens, vocabulary))
    for halved in (False, True):
        parts = chunks(hidden, weight, halved=halved)
        sizes = [part.stop - part.start for part in parts]
        assert [part.start for part in parts] == [sum(sizes[:i]) for i in range(len(parts))] and sum(sizes) == tokens
        if tokens:
            limit = max(256, (1 << 30 >> halved) // (2 * vocabulary))
            assert max(sizes) <= limit and all(part.start % 256 == 0 for part in parts)
            assert max(sizes) - min(sizes) < 256 * len(parts)
    if (tokens, vocabulary) == (16384, 128256):
        assert sizes == [2048] * 8 and len(chunks(hidden, weight)) == 4


def test_what_does_not_fit_is_refused() -> None:
    hidden, weight, labels = inputs(9, 11, torch.bfloat16)
    wrong: list[tuple[str, tuple[Tensor, ...], dict[str, Any]]] = [
        ("flatten B and T", (hidden[None], weight, labels), {}),
        ("do not fit", (hidden, weight, labels[1:]), {}),
        ("one a token", (hidden, weight, labels), {"weights": torch.ones(8)}),
        ("cast one", (hidden.float(), weight, labels), {}),
        ("accumulate=torch.float16", (hidden, weight, labels), {"accumulate": torch.float16}),
    ]
    for message, arguments, options in wrong:
        with pytest.raises(ValueError, match=message):
            linear_cross_entropy(*arguments, **options)


# The kernels.


def guarded(logits: Tensor) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """Logits as a view into NaN: rows far apart, one more before and after. And the whole, and what may be written."""
    count, width = logits.shape
    room = -(-width // 16) * 16
    whole = torch.full((count + 2, room + 48), torch.nan, dtype=logits.dtype, device=logits.device)
    whole[1:-1, 16 : 16 + width] = logits
    return whole[1:-1, 16 : 16 + width], whole, (16, 16 + room)


def rows_equal_their_twin(device: str, dtypes: tuple[torch.dtype, ...], widths: tuple[int, ...], count: int) -> None:
    for dtype, width in product(dtypes, widths):
        exact = 6 * torch.randn(count, width, generator=torch.Generator().manual_seed(width)).to(device)
        labels = torch.randint(width, (count,), generator=torch.Generator().manual_seed(0)).to(device)
        labels[0], labels[-1], labels[count // 2] = 0, width - 1, -100
        place = labels.clamp(min=0)[:, None]
        target = exact.gather(1, place)[:, 0]
        rounded = exact.to(dtype)
        truth = rounded.double().scatter_(1, place, target.double()[:, None])
        epsilon = 2.0 * torch.finfo(dtype).eps if device == "cpu" else torch.finfo(dtype).eps  # bf16 is cut off there
        for weights, z_loss in ((None, 0.0), (drawn_weights(count, device) - 0.5, 0.01)):
            loss = Loss(z_loss=z_loss)
            wanted = rows_ref(truth.clone(), labels, None if weights is None else weights.double(), loss, gradient=True)
            for gradient in (True, False):
                logits, whole, (begin, end) = guarded(rounded)
                losses = rows_fused(logits, target, labels, weights, loss, gradient=gradient)
                torch.testing.assert_close(losses, wanted[0].float(), rtol=1e-5, atol=1e-5)
                for band in (whole[0], whole[-1], whole[:, :begin], whole[:, end:]):
                    assert band.isnan().all()
                if gradient:
                    torch.testing.assert_close(logits.double(), wanted[1], rtol=epsilon + 1e-5, atol=1e-6)
            none = rows_fused(guarded(rounded)[0], target, labels * 0 - 100, weights, loss, gradient=True)
            assert not none.any()


def targets_are_exact(device: str) -> None:
    for dtype, width in product((torch.float32, torch.bfloat16), (1, 100, 2049)):
        hidden, weight, labels = (x.detach() for x in inputs(7, 30, dtype, device, width))
        for view, other in ((hidden, weight), (hidden.T.contiguous().T, weight.T.contiguous().T)):
            for loss in (Loss(), Loss(first=5, merge=lambda *x: x)):
                known = (labels >= loss.first) & (labels < 30)
                rows = weight[torch.where(known, labels - loss.first, 0)].double()
                other_rank = 0.0 if loss.merge is None else -torch.inf
                truth = torch.where(known, (hidden.double() * rows).sum(1), other_rank).float()
                found = target_logits(view, other, labels, loss)
                torch.testing.assert_close(found, truth, rtol=1e-5, atol=1e-5)


def extreme_logits_stay_numbers(device: str) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        logits = torch.randn(6, 300, device=device).to(dtype)
        logits[0], logits[1], logits[2] = -torch.inf, 3e38, -3e38
        logits[3, 5:] = -torch.inf
        logits[4, 7] = 3e38
        logits = guarded(logits)[0]
        target = torch.tensor([1.0, 3e38, -3e38, float(logits[3, 3]), 2.0, -torch.inf], device=device)
        labels = torch.full((6,), 3, device=device)
        losses = rows_fused(logits, target, labels, None, Loss(), gradient=True)
        assert not losses.isnan().any() and (losses >= 0).all() and losses[:4].isfinite().all()
        assert logits.isfinite().all() and logits.float().sum(1).abs().max() < 2e-2


def whole_equals_reference(device: str, sizes: tuple[tuple[int, int, int], ...], chunk: int | None) -> None:
    """Through the public function: errors at most twice those of torch's own operations in the same type."""
    for (tokens, vocabulary, width), dtype in product(sizes, (torch.bfloat16, torch.float32)):
        hidden, weight, labels = inputs(tokens, vocabulary, dtype, device, width)
        weights = drawn_weights(tokens, device)
        for options in ({}, {"weights": weights, "z_loss": 1e-3}):
            truth = linear_cross_entropy_ref(hidden.double(), weight.double(), labels, **options)  # type: ignore[arg-type]
            wanted = torch.autograd.grad(truth * 0.37, (hidden, weight))
            logits = hidden @ weight.T
            wide = logits.float()
            lse = wide.logsumexp(1)
            nll = lse - wide.gather(1, labels.clamp(min=0)[:, None])[:, 0] + options.get("z_loss", 0) * lse.square()
            theirs = torch.where(labels >= 0, nll, 0) * options.get("weights", 1)
            others = torch.autograd.grad(theirs.sum() * 0.37, (hidden, weight))
            with mock.patch.object(room, "_most", (lambda *_: chunk) if chunk else room._most):
                ours = linear_cross_entropy(hidden, weight, labels, **options)  # type: ignore[arg-type]
            assert abs(ours.item() / truth.item() - 1) < 1e-3 if truth else ours == 0
            for mine, other, right in zip(
                torch.autograd.grad(ours * 0.37, (hidden, weight)), others, wanted, strict=True
            ):
                floor = 4e-3 if dtype == torch.bfloat16 else 1e-5
                assert apart(mine, right) <= 2 * apart(other, right) + floor, (tokens, vocabulary, dtype)


@gpu
@needs_gpu
def test_gpu_kernels_equal_their_twins() -> None:
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    rows_equal_their_twin("cuda", dtypes, (1, 16, 997, 4096, 8191, 50264, 128256), count=301)
    targets_are_exact("cuda")
    extreme_logits_stay_numbers("cuda")


@gpu
@needs_gpu
def test_gpu_equals_reference() -> None:
    whole_equals_reference("cuda", ((1, 997, 64), (63, 50264, 128), (4097, 50257, 256)), chunk=None)
    whole_equals_reference("cuda", ((1025, 997, 64),), chunk=256)
    for options in ({}, {"z_loss": 0.05, "weights": True}):
        parts_join("cuda", torch.float32, options, {"rtol": 1e-4, "atol": 1e-4})
        parts_join("cuda", torch.float64, options, {"rtol": 1e-7, "atol": 1e-7})


@gpu
@needs_gpu
def test_gpu_laws() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        a_nearly_sure_model_learns("cuda", dtype)
    ignored_rows_may_hold_anything("cuda")
    a_label_that_is_no_column_makes_the_loss_nan("cuda")
    a_backward_may_come_again("cuda")
    many_chunks_add_up("cuda")


@gpu
@needs_gpu
@pytest.mark.parametrize("accumulate", [None, torch.bfloat16], ids=["fp32", "bf16"])
def test_gpu_memory_and_no_wait(accumulate: torch.dtype | None) -> None:
    """16384 tokens, 4096 wide, 128256 words: 2.1 billion logits, beyond 32 bits, of which few live at a time."""
    generator = torch.Generator("cuda").manual_seed(0)
    draw = {"generator": generator, "device": "cuda", "dtype": torch.bfloat16}
    hidden = torch.randn(16384, 4096, **draw).requires_grad_()  # type: ignore[call-overload]
    weight = torch.randn(128256, 4096, **draw).div_(64).requires_grad_()  # type: ignore[call-overload]
    labels = torch.randint(128256, (16384,), generator=generator, device="cuda")
    results = []
    for _ in range(2):
        hidden.grad = weight.grad = None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        torch.cuda.set_sync_debug_mode("error")
        try:
            (linear_cross_entropy(hidden, weight, labels, accumulate=accumulate) / 16384).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        peak = torch.cuda.max_memory_allocated() - before
        assert hidden.grad is not None and weight.grad is not None
        results.append((hidden.grad, weight.grad))
    assert peak <= (3.4e9 if accumulate is None else 1.8e9), peak
    assert all(torch.equal(left, right) for left, right in zip(*results, strict=True))  # bit for bit
    some = torch.arange(0, 16384, 997, device="cuda")
    wide = weight.detach().float()
    p = torch.softmax(hidden.detach()[some].float() @ wide.T, 1)
    p[torch.arange(len(some), device="cuda"), labels[some]] -= 1
    assert apart(results[-1][0][some] * 16384, p @ wide) < 1e-2
    # Logits shift freely. A label's row, an eighth of all here, is so large that what others add to it is lost in bf16.
    lost = 2e-2 if accumulate is None else 8e-2
    assert results[-1][1].float().sum(0).norm() < lost * results[-1][1].float().norm()


@gpu
@needs_gpu
def test_gpu_rows_beyond_32_bits() -> None:
    """A row that begins 2^31 elements after the first."""
    whole = torch.zeros((1 << 31) + 512, dtype=torch.bfloat16, device="cuda")
    logits = whole.as_strided((2, 500), (1 << 31, 1))
    labels = torch.tensor([3, 4], device="cuda")
    losses = rows_fused(logits, torch.zeros(2, device="cuda"), labels, None, Loss(), gradient=True)
    torch.testing.assert_close(losses, torch.full_like(losses, math.log(500)))
    assert logits[1, 4] == torch.tensor(-499 / 500).bfloat16() and logits[1].float().sum().abs() < 1e-2


def run_interpreted() -> None:
    assert triton_runs(torch.zeros(1))
    rows_equal_their_twin("cpu", (torch.float32, torch.float16, torch.bfloat16), (1, 16, 997), count=9)
    rows_equal_their_twin("cpu", (torch.bfloat16,), (50264,), count=3)
    targets_are_exact("cpu")
    extreme_logits_stay_numbers("cpu")
    whole_equals_reference("cpu", ((1, 97, 24), (63, 131, 40)), chunk=20)
    for options in ({}, {"z_loss": 0.05, "weights": True}):
        parts_join("cpu", torch.float32, options, {"rtol": 1e-4, "atol": 1e-4})
    a_nearly_sure_model_learns("cpu", torch.bfloat16)
    ignored_rows_may_hold_anything("cpu")
    a_label_that_is_no_column_makes_the_loss_nan("cpu")
    a_backward_may_come_again("cpu")
    test_nothing_to_predict_is_zero()
    test_checkpoints_and_compilers_change_nothing()


def run_compiled() -> None:
    """Every kernel compiles for Hopper in every shape that is chosen, and keeps its values in registers."""
    numbers = {"p_labels": "*i64", "p_weights": "*fp32", "p_target": "*fp32", "p_result": "*fp32", "p_lse": "*fp32"}
    numbers |= {"z_loss": "fp32"}

    def types(kernel: Any, fixed: dict[str, Any], dtype: str) -> dict[str, str]:
        names = [name for name in kernel.arg_names if name not in fixed]
        return {n: numbers.get(n, dtype if n.startswith("p_") else "i32") for n in names}

    for vocabulary, dtype in product((320, 2048, 8192, 32000, 50257, 128256), ("*bf16", "*fp32")):
        shape = rows._shape(vocabulary)
        options, warps = {k: v for k, v in shape.items() if k != "num_warps"}, shape["num_warps"]
        for gradient, part in ((True, False), (False, True)):
            modes = {"gradient": gradient, "part": part, "weighted": True, "even": vocabulary % 16 == 0}
            fixed = {**modes, **options}
            built = compiled(rows._rows, types(rows._rows, fixed, dtype), fixed, num_warps=warps)
            assert built.stack <= (0 if dtype == "*bf16" else 16), (vocabulary, dtype, built.registers, built.stack)
            if dtype == "*bf16" and gradient:
                assert "cp.async.cg" in built.ptx and "st.global.v4.b32" in built.ptx  # whole and ahead of time
        fixed = {"weighted": True, **options}
        assert compiled(rows._gradient, types(rows._gradient, fixed, dtype), fixed, num_warps=warps).stack == 0
    numbers = {"p_labels": "*i64", "p_target": "*fp32"}
    fixed = {"part": False, "b_d": 2048, "hidden_column": 1, "weight_column": 1}
    assert compiled(rows._target, types(rows._target, fixed, "*bf16"), fixed, num_warps=4).stack == 0
    for out, unit in product(("*bf16", "*fp32"), (1, 16)):
        arguments = {"p_out": out, "p_in": "*fp32", "p_factor": "*fp32", "units": "i32"}
        built = compiled(room._scale, arguments, {"unit": unit, "block": 4096}, num_warps=4)
        assert built.stack == 0 and ("st.global.v4.b32" in built.ptx) == (unit == 16)


test_kernels_without_a_gpu = both(run_interpreted, run_compiled)


@pytest.mark.parametrize("label", [-1, 10, 999])
def test_a_label_that_no_rank_has_is_not_a_finite_loss(label: int) -> None:
    hidden, weight = torch.randn(4, 6), torch.randn(10, 6)
    labels = torch.tensor([1, 2, label, 3])
    assert linear_cross_entropy(hidden, weight, labels).isnan()
    parts = [(hidden @ half.T).logsumexp(1) for half in weight.split(5)]
    logits = [torch.where((labels >= f) & (labels < f + 5), 1.0, -torch.inf) for f in (0, 5)]
    joined = torch.stack(parts).logsumexp(0), torch.stack(logits).amax(0)
    for first, half in zip((0, 5), weight.split(5), strict=True):
        assert not linear_cross_entropy(hidden, half, labels, first=first, merge=lambda *_: joined).isfinite()
    with pytest.raises(ValueError, match="they must be int64, so cast"):
        linear_cross_entropy(hidden, weight, labels.int())
