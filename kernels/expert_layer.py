"""Tokens through their experts and back, holding nothing that has a row of full width for every visit."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from farspan.kernels.gated_rows import GATED_BACKWARD
from farspan.kernels.gathered_gemm import GATHERED
from farspan.kernels.grouped_gemm import GROUPED_MM, GROUPED_OUTER, experts_ref
from farspan.kernels.permute import GATHER, SPREAD, Order, permute_ref, unpermute_ref

__all__ = ["expert_layer", "expert_layer_ref"]


def expert_layer_ref(x: Tensor, w13: Tensor, w2: Tensor, probability: Tensor, order: Order) -> Tensor:
    """The specification of `expert_layer`, differentiable by autograd."""
    live = torch.arange(order.rows.shape[0], device=order.ends.device) < order.ends[-1]
    p = torch.where(live, probability.flatten()[order.rows.long()], 0)
    return unpermute_ref(experts_ref(permute_ref(x, order), w13, w2, p, _ends(order)), order)


def expert_layer(x: Tensor, w13: Tensor, w2: Tensor, probability: Tensor, order: Order) -> Tensor:
    """Each token's sum over its visits, p · w2[e] · (silu(w13[e, 0] · x) ∘ (w13[e, 1] · x)): x T D -> T D, dense.

    w13: E 2 I D, w2: E D I of x's type; probability: T K, at least fp32; order: `sort`'s of the T K chosen experts. Who
    visits nobody, or has no place in the order, adds nothing and has gradients of zero. The same as `permute`,
    `experts` and `unpermute`, but it saves the arguments and w13 · x, M 2 I, alone: rows are fetched from x by the
    first product where that is ahead, and copied again for the backward. Runs are alike bit for bit, and no count comes
    to the host. Errors: ValueError for shapes or types that do not fit.
    """
    _check(x, w13, w2, probability, order)
    out: Tensor = _ExpertLayer.apply(x, w13, w2, probability, order.rows, order.places, _ends(order))
    return out


def _check(x: Tensor, w13: Tensor, w2: Tensor, probability: Tensor, order: Order) -> None:
    count, two, inner, width = w13.shape if w13.dim() == 4 else (0, 0, 0, 0)
    if two != 2 or w2.shape != (count, width, inner) or order.ends.shape != (count,):
        raise ValueError(
            f"expert_layer: w13 {tuple(w13.shape)} and w2 {tuple(w2.shape)} must be E 2 I D and E D I, for the "
            f"{order.ends.shape[0]} experts of the order; gate and up are w13[:, 0] and w13[:, 1]"
        )
    if not x.dtype == w13.dtype == w2.dtype:
        raise ValueError(f"expert_layer: x is {x.dtype}, w13 {w13.dtype}, w2 {w2.dtype}; cast them to one type")
    if x.shape != (order.places.shape[0], width) or probability.shape != order.places.shape:
        raise ValueError(
            f"expert_layer: x {tuple(x.shape)} and probability {tuple(probability.shape)} must be T D and T K, "
            f"({order.places.shape[0]}, {width}) and {tuple(order.places.shape)} for this order and these weights"
        )


def _ends(order: Order) -> Tensor:
    """Where experts end among the rows that are there."""
    room = order.rows.shape[0]
    return order.ends if room == order.places.numel() else order.ends.clamp(max=room)


class _ExpertLayer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w13: Tensor, w2: Tensor, probability: Tensor, rows: Tensor, places: Tensor, ends: Tensor
    ) -> Tensor:
        h, inner = GATHERED(x, w13, probability, rows, places, ends)
        ctx.save_for_backward(x, w13, w2, probability, rows, places, ends, h)
        return GATHER(GROUPED_MM(inner, w2.transpose(1, 2), ends), places, ends)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        x, w13, w2, probability, rows, places, ends, h = ctx.saved_tensors
        needs_x, needs_w13, needs_w2, needs_p, *_ = ctx.needs_input_grad
        room = rows.shape[0]
        given = SPREAD(dout, places, ends, room)  # M D, as two more below: no two of them live at once
        dinner = GROUPED_MM(given, w2, ends)
        dh, dp, inner = GATED_BACKWARD(dinner, h, probability.flatten()[rows], needs_w2)
        del dinner
        dw2 = GROUPED_OUTER(given, inner, ends) if needs_w2 else None
        del given, inner
        dh = dh.flatten(1, 2)
        dx = GATHER(GROUPED_MM(dh, w13.flatten(1, 2), ends), places, ends) if needs_x else None
        dw13 = GROUPED_OUTER(dh, SPREAD(x, places, ends, room), ends).view(w13.shape) if needs_w13 else None
        return dx, dw13, dw2, _by_visit(dp, places) if needs_p else None, None, None, None


def _by_visit(dp: Tensor, places: Tensor) -> Tensor:
    """Of each row -> of each visit, T K: zero where it has no row, as it is where the row is nobody's."""
    if dp.shape[0] < places.numel():
        dp, places = F.pad(dp, (0, 1)), places.clamp(max=dp.shape[0])
    return dp[places]
