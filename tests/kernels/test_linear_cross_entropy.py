"""The chunked loss is the whole loss, value and gradients."""

import pytest
import torch
from torch import Tensor

from farspan.kernels import linear_cross_entropy as room
from farspan.kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_ref


def inputs(tokens: int, vocabulary: int, dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(tokens)
    hidden = torch.randn(tokens, 24, device=device, dtype=dtype).requires_grad_()
    weight = (torch.randn(vocabulary, 24, device=device, dtype=dtype) / 5).requires_grad_()
    labels = torch.randint(vocabulary, (tokens,), device=device)
    labels[::3] = -100
    return hidden, weight, labels


@pytest.mark.parametrize("tokens", [1, 63, 1000])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4), (torch.bfloat16, 2e-2)]
)
@pytest.mark.parametrize("chunk", [7, 4096])
def test_equals_reference(
    tokens: int, dtype: torch.dtype, tolerance: float, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "_chunk", lambda weight: chunk)
    hidden, weight, labels = inputs(tokens, 131, dtype)
    ours = linear_cross_entropy(hidden, weight, labels)
    theirs = linear_cross_entropy_ref(hidden, weight, labels)
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    mine = torch.autograd.grad(ours * 0.37, (hidden, weight))
    others = torch.autograd.grad(theirs * 0.37, (hidden, weight))
    for left, right in zip(mine, others, strict=True):
        assert left.dtype == dtype
        error = (left.double() - right.double()).norm() / right.double().norm().clamp(min=1e-9)
        assert error < tolerance


def test_parts_of_the_vocabulary_join() -> None:
    """Ranks that hold 50, 1 and 80 rows: each one's loss is the whole's, and their hidden gradients sum to its."""
    hidden, weight, labels = inputs(63, 131, torch.float64)
    whole = linear_cross_entropy_ref(hidden, weight, labels)
    wanted = torch.autograd.grad(whole, (hidden, weight))
    logits = (hidden @ weight.T).detach()
    merged = logits.logsumexp(1), torch.where(labels < 0, 0, logits.gather(1, labels.clamp(min=0)[:, None])[:, 0])
    found, rows, first = torch.zeros_like(hidden), [], 0
    for part in weight.detach().split([50, 1, 80]):
        part = part.clone().requires_grad_()
        heard: list[tuple[Tensor, Tensor]] = []

        def merge(lse: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
            heard.append((lse, target))  # noqa: B023 (called before the loop goes on)
            return merged

        loss = linear_cross_entropy(hidden, part, labels, first=first, merge=merge)
        torch.testing.assert_close(loss, whole)
        mine = logits[:, first : first + len(part)]
        inside = (labels >= first) & (labels < first + len(part))
        target = torch.where(inside, mine.gather(1, torch.where(inside, labels - first, 0)[:, None])[:, 0], 0)
        torch.testing.assert_close(heard, [(mine.logsumexp(1), target)])
        d_hidden, d_part = torch.autograd.grad(loss, (hidden, part))
        found, first = found + d_hidden, first + len(part)
        rows.append(d_part)
    torch.testing.assert_close((found, torch.cat(rows)), wanted)


def test_nothing_to_predict_is_zero() -> None:
    hidden, weight, labels = inputs(9, 11, torch.float32)
    loss = linear_cross_entropy(hidden, weight, torch.full_like(labels, -100))
    loss.backward()
    assert loss == 0 and torch.equal(hidden.grad, torch.zeros_like(hidden))
    assert linear_cross_entropy(hidden[:0], weight, labels[:0]) == 0


def test_a_sure_model_has_no_loss_and_no_gradient() -> None:
    """softmax(y) → 1: the difference to one-hot must vanish rather than round to something."""
    weight = torch.eye(5).requires_grad_()
    hidden = (60 * torch.eye(5)).requires_grad_()
    loss = linear_cross_entropy(hidden, weight, torch.arange(5))
    loss.backward()
    assert loss < 1e-6 and hidden.grad.abs().max() < 1e-6


def test_ignored_rows_may_hold_anything() -> None:
    hidden, weight, labels = inputs(9, 11, torch.float32)
    poisoned = hidden.detach().clone()
    poisoned[::3] = 1e30
    poisoned.requires_grad_()
    ours, theirs = linear_cross_entropy(hidden, weight, labels), linear_cross_entropy(poisoned, weight, labels)
    assert torch.equal(ours, theirs)
    left, right = torch.autograd.grad(ours, hidden)[0], torch.autograd.grad(theirs, poisoned)[0]
    assert torch.equal(left, right)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("tokens", [63, 4097])
def test_equals_reference_on_a_gpu(tokens: int) -> None:
    hidden, weight, labels = inputs(tokens, 50257, torch.bfloat16, "cuda")
    ours = linear_cross_entropy(hidden, weight, labels)
    theirs = linear_cross_entropy_ref(hidden.double(), weight.double(), labels)
    assert abs(ours - theirs) / theirs < 1e-4
    mine = torch.autograd.grad(ours, (hidden, weight))
    for left, right in zip(mine, torch.autograd.grad(theirs, (hidden, weight)), strict=True):
        assert (left.double() - right.double()).norm() / right.double().norm() < 1e-2
