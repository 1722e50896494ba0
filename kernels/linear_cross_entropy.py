"""Head and loss in chunks of tokens: the logits never live whole."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Merge = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""From (log-sum-exp, target logit) of N tokens over some rows of the vocabulary to those over all rows."""


def linear_cross_entropy_ref(hidden: Tensor, weight: Tensor, labels: Tensor, ignore: int = -100) -> Tensor:
    """The specification: `linear_cross_entropy` with the logits whole, differentiable by autograd."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    return F.cross_entropy(hidden.to(dtype) @ weight.to(dtype).T, labels, ignore_index=ignore, reduction="sum")


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, ignore: int = -100, *, first: int = 0, merge: Merge | None = None
) -> Tensor:
    """Summed negative log-likelihood, in nats, of `labels` under softmax(hidden · weightᵀ).

    hidden: N D, weight: V D of the same dtype, labels: N int64, `ignore` where nothing is predicted.
    Returns a scalar of at least fp32. Gradients are formed in the forward, chunk by chunk, while the logits are
    there: three products in all, as without chunks, and the backward only scales them by the upstream gradient.
    The weight's gradient is accumulated in at least fp32.

    With `merge`, `weight` is a part of the vocabulary whose row 0 is token `first`, and `merge` joins the parts of all
    ranks once a chunk: the loss is that of the whole vocabulary, the hidden gradient this part's summand.
    """
    loss: Tensor = _LinearCrossEntropy.apply(hidden, weight, labels, ignore, torch.is_grad_enabled(), first, merge)
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        ignore: int,
        grad: bool,
        first: int,
        merge: Merge | None,
    ) -> Tensor:
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        train = grad and any(ctx.needs_input_grad[:2])  # inside a Function gradients always look disabled
        loss = torch.zeros((), dtype=dtype, device=hidden.device)
        d_hidden = torch.empty_like(hidden) if train else None
        d_weight = torch.zeros_like(weight, dtype=dtype) if train else None
        chunk = _chunk(weight)
        for start in range(0, hidden.shape[0], chunk):
            rows, target = hidden[start : start + chunk], labels[start : start + chunk]
            counted = target != ignore
            here = counted & (target >= first) & (target < first + weight.shape[0])
            target = torch.where(here, target - first, 0).unsqueeze(1)
            logits = _product(rows, weight.T, dtype)
            log_p = torch.log_softmax(logits, dim=1)
            if merge is None:
                loss -= torch.where(counted, log_p.gather(1, target).squeeze(1), 0).sum()
            else:
                part = logits[:, 0] - log_p[:, 0]  # this part's log-sum-exp
                lse, logit = merge(part, torch.where(here, logits.gather(1, target).squeeze(1), 0))
                loss += torch.where(counted, lse - logit, 0).sum()
                log_p += (part - lse).unsqueeze(1)
            del logits
            if d_hidden is None or d_weight is None:
                continue
            p = log_p.exp_()
            p.scatter_add_(1, target, -here.unsqueeze(1).to(dtype))  # softmax minus one-hot, in fp32
            d_logits, counts = p.to(hidden.dtype), counted.unsqueeze(1).to(hidden.dtype)
            d_hidden[start : start + chunk] = (d_logits @ weight) * counts  # D columns to mask, not V
            _add_product(d_weight, d_logits.T, rows * counts)
        if train:
            ctx.save_for_backward(d_hidden, d_weight)
        ctx.dtype = weight.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight = ctx.saved_tensors
        return (d_hidden * upstream).to(d_hidden.dtype), (d_weight * upstream).to(ctx.dtype), *(None,) * 5


def _chunk(weight: Tensor) -> int:
    """Tokens at a time: logits of about 512 MB on a GPU, which keeps its products fast; 4 MB in a CPU's cache."""
    return max(64, (1 << 27 if weight.is_cuda else 1 << 20) // weight.shape[0])


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a · b in `dtype`, accumulated there: bf16 inputs never round their result."""
    if a.is_cuda and a.dtype != dtype:
        return torch.mm(a, b, out_dtype=dtype)
    return a.to(dtype) @ b.to(dtype)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a · b in total's type, within the product: a vocabulary's worth of fp32 is not written twice."""
    if a.is_cuda and a.dtype != total.dtype:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))
