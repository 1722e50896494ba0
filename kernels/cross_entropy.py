"""Rows of logits become losses and, in the same memory, gradients: the second reading of a row is from the cache."""
# ruff: noqa: ANN001 - a kernel's arguments are pointers p_ and numbers

from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["Loss", "Merge", "rows_fused", "rows_ref", "target_logits"]

Merge = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""From (log-sum-exp, target logit) of N tokens over some columns of the vocabulary to those over all of them.

The target logit is -inf where the label is none of these columns: over all, it is the largest."""


@dataclass(frozen=True, kw_only=True)
class Loss:
    """Of a token with label y and weight w: w · (lse − logit_y + z_loss · lse²) nats; nothing where y is `ignore`.

    Column 0 of the logits is token `first`; `merge` joins them with the columns that other ranks have. A label that is
    no column makes its token's loss NaN, or after a merge infinite: to look at labels here would wait for the device.
    """

    ignore: int = -100
    z_loss: float = 0.0
    first: int = 0
    merge: Merge | None = None

    def weighed(self, labels: Tensor, weights: Tensor | None, nll: Tensor, lse: Tensor) -> Tensor:
        """Losses of N tokens from their negative log-likelihoods and log-sum-exps."""
        each = nll + self.z_loss * lse * lse
        return torch.where(labels != self.ignore, each if weights is None else each * weights, 0)


def rows_ref(
    logits: Tensor, labels: Tensor, weights: Tensor | None, loss: Loss, *, gradient: bool
) -> tuple[Tensor, Tensor]:
    """Losses of N tokens and, if asked for, the gradient of their sum in the place of the logits, in plain torch.

    logits: N V in at least fp32, labels: N, weights: N of logits' dtype -> N, N V.
    """
    place = labels - loss.first
    here = (place >= 0) & (place < logits.shape[1])
    place = torch.where(here, place, 0).unsqueeze(1)
    logit, largest = torch.where(here, logits.gather(1, place).squeeze(1), -torch.inf), logits.amax(1)
    e = logits.sub_(largest.unsqueeze(1)).exp_()
    own = torch.where(here, e.gather(1, place).squeeze(1), 0)
    others = e.scatter_(1, place, torch.where(here, 0, e[:, 0]).unsqueeze(1)).sum(1)
    total = own + others
    lse = largest + total.log()
    weight = torch.where(labels != loss.ignore, torch.ones_like(lse) if weights is None else weights, 0)
    if loss.merge is None:
        nll = torch.where(here, total.log() - (logit - largest), torch.nan)
        slope = 2 * loss.z_loss * lse
        factor, hit = (
            weight * (1 + slope) / total,
            weight * (slope * own - others) / total,
        )  # others: p - 1 with all digits
    else:
        lse, logit = loss.merge(lse, logit)
        nll, log_p, slope = lse - logit, logit - lse, 2 * loss.z_loss * lse
        factor, hit = weight * (1 + slope) * (largest - lse).exp(), weight * (log_p.expm1() + slope * log_p.exp())
    losses = loss.weighed(labels, weights, nll, lse)
    if gradient:
        e.mul_(factor.unsqueeze(1)).scatter_(1, place, torch.where(here, hit, e[:, 0]).unsqueeze(1))
    return losses, e


def rows_fused(
    logits: Tensor, target: Tensor, labels: Tensor, weights: Tensor | None, loss: Loss, *, gradient: bool
) -> Tensor:
    """`rows_ref` in one kernel (two around a merge): logits N V of any float type -> N, and the gradient over them.

    target: N fp32, the exact logits at the labels from `target_logits`: they take the place of the rounded ones, so
    that no loss is negative and value and gradient belong together.
    """
    width, losses = logits.shape[1], torch.empty_like(target)
    options = (loss.ignore, loss.first, loss.z_loss, width, logits.stride(0))
    tokens = logits, labels, target if weights is None else weights, target
    shape = {"weighted": weights is not None, **_shape(width)}
    rows, part, even = (logits.shape[0],), loss.merge is not None, width % 16 == 0
    _rows[rows](*tokens, losses, *options, gradient=gradient and not part, part=part, even=even, **shape)
    if loss.merge is None:
        return losses
    lse, logit = loss.merge(losses, target)
    if gradient:
        _gradient[rows](*tokens, lse.contiguous(), *options, **shape)
    return loss.weighed(labels, weights, lse - logit, lse)


def target_logits(hidden: Tensor, weight: Tensor, labels: Tensor, loss: Loss) -> Tensor:
    """Products of hidden N D with the rows of weight V D at the labels, in fp32 -> N: what bf16 logits round away.

    0 where the label is ignored, with `merge` -inf where it is none of these rows.
    """
    target = torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device)
    b_d = min(2048, triton.next_power_of_2(hidden.shape[1]))
    _target[(hidden.shape[0],)](
        *(hidden, weight, labels, target, loss.ignore, loss.first, weight.shape[0], hidden.shape[1]),
        *(*hidden.stride(), *weight.stride()),
        part=loss.merge is not None,
        b_d=b_d,
    )
    return target


def _shape(width: int) -> dict[str, int]:
    """One program a row. 32 warps are alone on their SM: 132 rows of 256 KB are as many as Hopper's L2 holds."""
    block = max(256, min(16384, triton.next_power_of_2(width)))
    warps = 32 if width > 65536 else max(1, block // 1024)
    b_l = min(block, 256 * warps)  # 8 neighbours a thread: 16 bytes of bf16
    return {"b_k": block // b_l, "b_l": b_l, "num_warps": warps}


# A block is b_k b_l entries: axis 0 lies within a thread, so that loops over a row never wait for other threads. Rows
# have room up to a multiple of 16: masks that end there leave loads whole, whatever the vocabulary's size.


@triton.jit(do_not_specialize=["ignore", "first", "count"])
def _target(  # type: ignore[no-untyped-def]
    p_hidden,
    p_weight,
    p_labels,
    p_target,
    ignore,
    first,
    count,
    width,
    hidden_row,
    hidden_column,
    weight_row,
    weight_column,
    part: tl.constexpr,
    b_d: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(p_labels + row).to(tl.int64)
    place = label - first
    here = (label != ignore) & (place >= 0) & (place < count)
    total, end = tl.zeros([b_d], tl.float32), tl.where(here, width, 0)
    for start in range(0, width, b_d):
        at = start + tl.arange(0, b_d).to(tl.int64)  # columns may be far apart
        mask = at < end
        hidden = tl.load(p_hidden + row * hidden_row + at * hidden_column, mask=mask, other=0.0).to(tl.float32)
        weight = tl.load(p_weight + place * weight_row + at * weight_column, mask=mask, other=0.0).to(tl.float32)
        total += hidden * weight
    known = here | ((label == ignore) & (not part))
    tl.store(p_target + row, tl.where(known, tl.sum(total, 0), float("-inf") if part else float("nan")))


@triton.jit
def _token(p_labels, p_weights, row, ignore, first, width, weighted: tl.constexpr):  # type: ignore[no-untyped-def]
    """A token's weight, 0 if it is ignored, and its label's column, -1 if that is elsewhere."""
    label = tl.load(p_labels + row)
    place = label - first
    place = tl.where((place >= 0) & (place < width), place, -1).to(tl.int32)
    weight = tl.load(p_weights + row).to(tl.float32) if weighted else 1.0
    return tl.where(label == ignore, 0.0, weight), place


@triton.jit
def _others(p_row, place, width, even: tl.constexpr, b_k: tl.constexpr, b_l: tl.constexpr):  # type: ignore[no-untyped-def]
    """The largest logit of a row but for the one at `place`, and the sum of exp(logit - largest)."""
    tl.store(p_row + place, float("-inf"), mask=place >= 0)
    tl.debug_barrier()
    most = tl.full([b_l], -3.4028234663852886e38, tl.float32)  # finite: -inf - -inf is NaN
    total = tl.zeros([b_l], tl.float32)
    inside = tl.arange(0, b_k)[:, None] * b_l + tl.arange(0, b_l)[None, :]
    end = (width + 15) // 16 * 16
    for start in tl.range(0, end, b_k * b_l, num_stages=3):
        column = start + inside
        x = tl.load(p_row + column, mask=column < end, other=float("-inf")).to(tl.float32)
        if not even:
            x = tl.where(column < width, x, float("-inf"))
        largest = tl.maximum(most, tl.max(x, 0))
        total = total * tl.exp(most - largest) + tl.sum(tl.exp(x - largest[None, :]), 0)
        most = largest
    largest = tl.max(most, 0)
    return largest, tl.sum(total * tl.exp(most - largest), 0)


@triton.jit
def _write(p_row, place, width, shift, factor, hit, b_k: tl.constexpr, b_l: tl.constexpr):  # type: ignore[no-untyped-def]
    """Logits become factor * exp(logit - shift), and `hit` at `place`; backwards, since the end was read last."""
    inside = tl.arange(0, b_k)[:, None] * b_l + tl.arange(0, b_l)[None, :]
    end, last = (width + 15) // 16 * 16, (width - 1) // (b_k * b_l)
    for block in tl.range(0, last + 1, num_stages=3):
        column = (last - block) * (b_k * b_l) + inside
        x = tl.load(p_row + column, mask=column < end, other=0.0).to(tl.float32)
        tl.store(p_row + column, (factor * tl.exp(x - shift)).to(p_row.dtype.element_ty), mask=column < end)
    tl.debug_barrier()
    tl.store(p_row + place, hit.to(p_row.dtype.element_ty), mask=place >= 0)


@triton.jit
def _clear(p_row, width, b_k: tl.constexpr, b_l: tl.constexpr):  # type: ignore[no-untyped-def]
    zero = tl.zeros([b_k * b_l], p_row.dtype.element_ty)
    end = (width + 15) // 16 * 16
    for start in range(0, end, b_k * b_l):
        column = start + tl.arange(0, b_k * b_l)
        tl.store(p_row + column, zero, mask=column < end)


@triton.jit(do_not_specialize=["ignore", "first"])
def _rows(  # type: ignore[no-untyped-def]
    p_logits,
    p_labels,
    p_weights,
    p_target,
    p_result,
    ignore,
    first,
    z_loss,
    width,
    logits_row,
    gradient: tl.constexpr,
    part: tl.constexpr,
    weighted: tl.constexpr,
    even: tl.constexpr,
    b_k: tl.constexpr,
    b_l: tl.constexpr,
):
    """result: a token's loss; of a part of the vocabulary its log-sum-exp, whatever the label."""
    row = tl.program_id(0).to(tl.int64)
    p_row = p_logits + row * logits_row
    weight, place = _token(p_labels, p_weights, row, ignore, first, width, weighted)
    if part | (weight != 0.0):
        target = tl.load(p_target + row)
        largest, others = _others(p_row, place, width, even, b_k, b_l)
        shift = tl.where(place >= 0, tl.maximum(largest, target), largest)
        own = tl.where(place >= 0, tl.exp(target - shift), 0.0)
        others *= tl.exp(largest - shift)
        total = own + others
        lse = shift + tl.log(total)
        if part:
            tl.store(p_result + row, lse)
        else:
            slope = 2.0 * z_loss * lse
            nll = shift - target + tl.log(total)
            tl.store(p_result + row, weight * (nll + z_loss * lse * lse))
            if gradient:
                hit = weight * (slope * own - others) / total  # p - 1 that keeps its digits as p goes to 1
                _write(p_row, place, width, shift, weight * (1.0 + slope) / total, hit, b_k, b_l)
    else:
        tl.store(p_result + row, 0.0)
        if gradient:
            _clear(p_row, width, b_k, b_l)


@triton.jit(do_not_specialize=["ignore", "first"])
def _gradient(  # type: ignore[no-untyped-def]
    p_logits,
    p_labels,
    p_weights,
    p_target,
    p_lse,
    ignore,
    first,
    z_loss,
    width,
    logits_row,
    weighted: tl.constexpr,
    b_k: tl.constexpr,
    b_l: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    p_row = p_logits + row * logits_row
    weight, place = _token(p_labels, p_weights, row, ignore, first, width, weighted)
    if weight != 0.0:
        lse = tl.load(p_lse + row)
        slope = 2.0 * z_loss * lse
        p = tl.exp(tl.load(p_target + row) - lse)
        hit = weight * (p - 1.0 + slope * p)
        _write(p_row, place, width, lse, weight * (1.0 + slope), hit, b_k, b_l)
    else:
        _clear(p_row, width, b_k, b_l)
