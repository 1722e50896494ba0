"""Rotary embedding of queries and keys in one launch, alone or with the RMSNorm of each head before it."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from farspan.kernels.define import define, triton_runs
from farspan.kernels.rope_tiles import norm_backward, turn

__all__ = ["qk_norm_rope", "qk_norm_rope_ref", "rope", "rope_", "rope_ref"]


def rope_ref(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """The specification of `rope`, differentiable by autograd."""
    return _turned(_wide(q), cos, sin).to(q.dtype), _turned(_wide(k), cos, sin).to(k.dtype)


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Turns channel pairs (i, i + K/2) of q and k by their tokens' angles (Su et al., 2021), rounded once.

    q: B T H K, k: B T Hkv K, views with a dense last axis as a projection leaves them (others are copied); cos and sin:
    B T 1 K/2 or 1 T 1 K/2 in fp32, of any amplitude, without gradients. Returns both turned and dense, in their types.
    Nothing but cos and sin is saved: the backward turns the gradients by the negative angles. Kernels run on the
    current device. Errors: ValueError for an odd K and for shapes that do not fit.
    """
    _check(q, k, cos, sin)
    if not triton_runs(q, k, cos, sin):
        return rope_ref(q, k, cos, sin)
    turned: tuple[Tensor, Tensor] = _Rope.apply(q, k, cos, sin)
    return turned


def rope_(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    """`rope` in place, where no gradient is asked for: evaluation and sampling. q and k as there, rows not shared.

    Errors: RuntimeError for tensors that require grad in grad mode; ValueError as in `rope`, and for memory that cannot
    be written so.
    """
    # There is no version for training on purpose. Selective recomputation keeps the products' outputs, which this would
    # overwrite, and the backward of a projection or a norm may have saved them. It would spare memory for a moment but
    # no bytes on the way: both versions read and write each number once.
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad):
        raise RuntimeError("rope_: q or k requires grad, and the write would be missing in its gradient; use rope")
    _check(q, k, cos, sin)
    _ROPE_IN_PLACE(q, k, cos, sin)


def qk_norm_rope_ref(
    q: Tensor, k: Tensor, weight_q: Tensor, weight_k: Tensor, eps: float, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    """The specification of `qk_norm_rope`, differentiable by autograd."""
    normed = (F.rms_norm(_wide(x), w.shape, _wide(w), eps) for x, w in ((q, weight_q), (k, weight_k)))
    turned_q, turned_k = (_turned(x, cos, sin) for x in normed)
    return turned_q.to(q.dtype), turned_k.to(k.dtype)


def qk_norm_rope(
    q: Tensor, k: Tensor, weight_q: Tensor, weight_k: Tensor, eps: float, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    """RMSNorm of each head of q and k (Henry et al., 2020; Zhang and Sennrich, 2019), then `rope`, rounded once.

    x / √(mean(x²) + eps) · weight over the K channels and the rotation are one computation in at least fp32: between
    them nothing is rounded to the inputs' type, unlike in two separate operations. weight_q, weight_k: K, of any float
    type; all else as in `rope`. Saves q and k and forms their norms again, which reads nothing that the backward does
    not read anyway. The weights' gradients are sums in a fixed order. Errors: ValueError as in `rope`, and for weights
    that do not fit or an eps that is not positive.
    """
    _check(q, k, cos, sin)
    if weight_q.shape != q.shape[3:] or weight_k.shape != q.shape[3:] or eps <= 0:
        raise ValueError(
            f"qk_norm_rope: weights {tuple(weight_q.shape)} and {tuple(weight_k.shape)} must be K={q.shape[3]} each, "
            f"and eps={eps} positive; 1e-5 is usual"
        )
    if not triton_runs(q, k, weight_q, weight_k, cos, sin):
        return qk_norm_rope_ref(q, k, weight_q, weight_k, eps, cos, sin)
    turned: tuple[Tensor, Tensor] = _QkNormRope.apply(q, k, weight_q, weight_k, eps, cos, sin)
    return turned


def _overlaps(x: Tensor) -> bool:
    """Whether two places of x may be one in memory."""
    reach = 0
    for stride, size in sorted((stride, size) for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1):
        if stride <= reach:
            return True
        reach += stride * (size - 1)
    return False


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def _check(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    if q.dim() != 4 or k.dim() != 4 or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3] or q.shape[3] % 2:
        raise ValueError(f"rope: q {tuple(q.shape)} must be B T H K and k {tuple(k.shape)} B T Hkv K, with an even K")
    b, t, _, key_dim = q.shape
    if cos.shape != sin.shape or cos.shape not in ((b, t, 1, key_dim // 2), (1, t, 1, key_dim // 2)):
        raise ValueError(
            f"rope: cos {tuple(cos.shape)} and sin {tuple(sin.shape)} must be {(b, t, 1, key_dim // 2)} each, or "
            f"{(1, t, 1, key_dim // 2)} for all rows"
        )


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        return _ROPE(q, k, cos, sin, False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
        return *_ROPE(dq, dk, *ctx.saved_tensors, True), None, None


class _QkNormRope(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, weight_q: Tensor, weight_k: Tensor, eps: float, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(q, k, weight_q, weight_k, cos, sin)
        ctx.eps = eps
        return _QK_NORM_ROPE(q, k, weight_q, weight_k, eps, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
        return *_QK_NORM_ROPE_BACKWARD(dq, dk, *ctx.saved_tensors, ctx.eps), None, None, None


def _run_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, back: bool) -> tuple[Tensor, Tensor]:
    results = _like_rope(q, k, cos, sin, back)
    turn(results, (q, k), (cos, sin), "back" if back else "plain")
    return results


def _like_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, back: bool) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _run_rope_in_place(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    for name, x in (("q", q), ("k", k)):
        if (x.stride(-1) != 1 or _overlaps(x) or q.data_ptr() == k.data_ptr()) and x.numel():
            raise ValueError(
                f"rope_: {name} has strides {x.stride()} and shape {tuple(x.shape)}; rows must be dense and each its "
                "own; use rope"
            )
    if triton_runs(q, k, cos, sin):
        turn((q, k), (q, k), (cos, sin), "in place")
        if not q.is_inference():
            torch.autograd.graph.increment_version((q, k))  # a graph that saved them must hear of it
    else:
        for x, turned in zip((q, k), rope_ref(q, k, cos, sin), strict=True):
            x.copy_(turned)


def _run_qk_norm_rope(
    q: Tensor, k: Tensor, weight_q: Tensor, weight_k: Tensor, eps: float, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    results = _like_rope(q, k, cos, sin, False)
    turn(results, (q, k), (cos, sin), "norm", (weight_q, weight_k), eps)
    return results


def _like_qk_norm_rope(
    q: Tensor, k: Tensor, weight_q: Tensor, weight_k: Tensor, eps: float, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _run_qk_norm_rope_backward(
    dq: Tensor,
    dk: Tensor,
    q: Tensor,
    k: Tensor,
    weight_q: Tensor,
    weight_k: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    results = _like_qk_norm_rope_backward(dq, dk, q, k, weight_q, weight_k, cos, sin, eps)
    norm_backward(results, (dq, dk), (q, k), (weight_q, weight_k), (cos, sin), eps)
    return results


def _like_qk_norm_rope_backward(
    dq: Tensor,
    dk: Tensor,
    q: Tensor,
    k: Tensor,
    weight_q: Tensor,
    weight_k: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dweight_q, dweight_k = (w.new_empty(w.shape) for w in (weight_q, weight_k))
    return q.new_empty(q.shape), k.new_empty(k.shape), dweight_q, dweight_k


_ROPE = define("rope(Tensor q, Tensor k, Tensor cos, Tensor sin, bool back) -> (Tensor, Tensor)", _run_rope, _like_rope)
_ROPE_IN_PLACE = define(
    "rope_(Tensor(a!) q, Tensor(b!) k, Tensor cos, Tensor sin) -> ()", _run_rope_in_place, lambda q, k, cos, sin: None
)
_QK_NORM_ROPE = define(
    "qk_norm_rope(Tensor q, Tensor k, Tensor weight_q, Tensor weight_k, float eps, Tensor cos, Tensor sin)"
    " -> (Tensor, Tensor)",
    _run_qk_norm_rope,
    _like_qk_norm_rope,
)
_QK_NORM_ROPE_BACKWARD = define(
    "qk_norm_rope_backward(Tensor dq, Tensor dk, Tensor q, Tensor k, Tensor weight_q, Tensor weight_k, Tensor cos,"
    " Tensor sin, float eps) -> (Tensor, Tensor, Tensor, Tensor)",
    _run_qk_norm_rope_backward,
    _like_qk_norm_rope_backward,
)
