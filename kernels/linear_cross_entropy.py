"""Head and loss in chunks of tokens: the logits never live whole."""

import torch
import torch.nn.functional as F
from torch import Tensor


def linear_cross_entropy_ref(hidden: Tensor, weight: Tensor, labels: Tensor, ignore: int = -100) -> Tensor:
    """The specification: `linear_cross_entropy` with the logits whole, differentiable by autograd."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    return F.cross_entropy(hidden.to(dtype) @ weight.to(dtype).T, labels, ignore_index=ignore, reduction="sum")


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, ignore: int = -100) -> Tensor:
    """Summed negative log-likelihood, in nats, of `labels` under softmax(hidden · weightᵀ).

    hidden: N D, weight: V D of the same dtype, labels: N int64, `ignore` where nothing is predicted.
    Returns a scalar of at least fp32. Gradients are formed in the forward, chunk by chunk, while the logits are
    there: three products in all, as without chunks, and the backward only scales them by the upstream gradient.
    The weight's gradient is accumulated in at least fp32.
    """
    loss: Tensor = _LinearCrossEntropy.apply(hidden, weight, labels, ignore, torch.is_grad_enabled())
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, labels: Tensor, ignore: int, grad: bool) -> Tensor:  # type: ignore[no-untyped-def] # noqa: ANN001
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        train = grad and any(ctx.needs_input_grad[:2])  # inside a Function gradients always look disabled
        loss = torch.zeros((), dtype=dtype, device=hidden.device)
        d_hidden = torch.empty_like(hidden) if train else None
        d_weight = torch.zeros_like(weight, dtype=dtype) if train else None
        chunk = _chunk(weight)
        for start in range(0, hidden.shape[0], chunk):
            rows, target = hidden[start : start + chunk], labels[start : start + chunk]
            counted = target != ignore
            target = torch.where(counted, target, 0).unsqueeze(1)
            log_p = torch.log_softmax(_product(rows, weight.T, dtype), dim=1)
            loss -= torch.where(counted, log_p.gather(1, target).squeeze(1), 0).sum()
            if d_hidden is None or d_weight is None:
                continue
            p = log_p.exp_()
            p.scatter_add_(1, target, torch.full_like(target, -1, dtype=dtype))  # softmax minus one-hot, in fp32
            d_logits = p.mul_(counted.unsqueeze(1)).to(hidden.dtype)
            d_hidden[start : start + chunk] = d_logits @ weight
            d_weight += _product(d_logits.T, rows, dtype)
        if train:
            ctx.save_for_backward(d_hidden, d_weight)
        ctx.dtype = weight.dtype
        return loss

    @staticmethod
    def backward(ctx, upstream: Tensor) -> tuple[Tensor, Tensor, None, None, None]:  # type: ignore[no-untyped-def] # noqa: ANN001
        d_hidden, d_weight = ctx.saved_tensors
        return (d_hidden * upstream).to(d_hidden.dtype), (d_weight * upstream).to(ctx.dtype), None, None, None


def _chunk(weight: Tensor) -> int:
    """Tokens at a time: logits of about 512 MB on a GPU, which keeps its products fast; 4 MB in a CPU's cache."""
    return max(64, (1 << 27 if weight.is_cuda else 1 << 20) // weight.shape[0])


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a · b in `dtype`, accumulated there: bf16 inputs never round their result."""
    if a.is_cuda and a.dtype != dtype:
        return torch.mm(a, b, out_dtype=dtype)
    return a.to(dtype) @ b.to(dtype)
