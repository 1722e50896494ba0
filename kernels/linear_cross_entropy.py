"""Head and loss in chunks of tokens: the logits never live whole."""
# ruff: noqa: ANN001 - a kernel's arguments are pointers p_ and numbers

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

from farspan.kernels.cross_entropy import Loss, Merge, rows_fused, rows_ref, target_logits
from farspan.kernels.define import define, triton_runs

__all__ = [
    *("Formed", "Gradients", "Logits", "Merge"),
    *("chunks", "linear_cross_entropy", "linear_cross_entropy_ref", "shapes"),
]


def linear_cross_entropy_ref(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    ignore: int = -100,
    *,
    weights: Tensor | None = None,
    z_loss: float = 0.0,
) -> Tensor:
    """The specification: `linear_cross_entropy` with the logits whole, differentiable by autograd."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    counted = labels != ignore
    logits = (hidden.to(dtype) @ weight.to(dtype).T).masked_fill(~counted.unsqueeze(1), 0)
    lse = logits.logsumexp(1)
    losses = lse - logits.gather(1, torch.where(counted, labels, 0).unsqueeze(1)).squeeze(1) + z_loss * lse.square()
    return (losses * counted * (1 if weights is None else weights.to(dtype))).sum()


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    ignore: int = -100,
    *,
    weights: Tensor | None = None,
    z_loss: float = 0.0,
    first: int = 0,
    merge: Merge | None = None,
    accumulate: torch.dtype | None = None,
) -> Tensor:
    """Summed negative log-likelihood, in nats, of `labels` under softmax(hidden · weightᵀ).

    hidden: N D, weight: V D of the same dtype, labels: N int64, `ignore` where nothing is predicted; there hidden may
    hold anything whose logits are finite. A label that is neither makes the loss NaN, or infinite with `merge`. Returns
    a scalar of at least fp32.
    weights: N numbers, constants, that the tokens' losses are multiplied by; z_loss adds z_loss · lse² to each, which
    keeps the log-sum-exp near zero (Chowdhery et al., 2022, PaLM, section 5).

    Gradients are formed in the forward, chunk by chunk, while the logits are there: three products in all, as without
    chunks, and the backward only scales them. On a GPU the logits are rounded to hidden's dtype, as a linear layer's
    are, but not those of the labels; all sums are in fp32. The weight's gradient is added up in `accumulate`: None for
    at least fp32, or weight's own dtype, which halves its memory and that of the logits and rounds once a chunk.

    With `merge`, `weight` is a part of the vocabulary whose row 0 is token `first`, and `merge` joins the parts of all
    ranks once a chunk: the loss is that of the whole vocabulary, the hidden gradient this part's summand.
    Errors: ValueError for shapes or dtypes that do not fit.
    """
    sums = torch.promote_types(weight.dtype, torch.float32) if accumulate is None else accumulate
    _check(hidden, weight, labels, weights, sums)
    asked = torch.is_grad_enabled() and hidden.requires_grad, torch.is_grad_enabled() and weight.requires_grad
    inputs = hidden.detach(), weight.detach(), labels, None if weights is None else weights.detach()
    if merge is None:
        formed = _forward(*inputs, ignore, z_loss, sums, *asked)
    else:
        run = shapes if hidden.is_meta else _run
        formed = run(*inputs, Loss(ignore=ignore, z_loss=z_loss, first=first, merge=merge), sums, *asked)
    loss: Tensor = Formed.apply(hidden, weight, *formed)
    return loss


def _check(hidden: Tensor, weight: Tensor, labels: Tensor, weights: Tensor | None, sums: torch.dtype) -> None:
    count = hidden.shape[:1]
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1] or labels.shape != count:
        shapes = f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)}, labels {tuple(labels.shape)}"
        raise ValueError(f"linear_cross_entropy: {shapes} do not fit; they are N D, V D and N, so flatten B and T")
    if labels.dtype != torch.int64:
        raise ValueError(f"linear_cross_entropy: labels are {labels.dtype}; they must be int64, so cast them")
    if weights is not None and weights.shape != count:
        raise ValueError(f"linear_cross_entropy: weights {tuple(weights.shape)} must be {tuple(count)}: one a token")
    if hidden.dtype != weight.dtype:
        raise ValueError(f"linear_cross_entropy: hidden {hidden.dtype}, weight {weight.dtype}; cast one to the other's")
    wide = torch.promote_types(weight.dtype, torch.float32)
    if sums not in (weight.dtype, wide):
        raise ValueError(f"linear_cross_entropy: accumulate={sums} must be None, {wide} or weight's {weight.dtype}")


def _run(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    weights: Tensor | None,
    loss: Loss,
    sums: torch.dtype,
    d_hidden: bool,
    d_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses N, and the gradients of their sum, empty where not asked for."""
    wide, fused = torch.promote_types(hidden.dtype, torch.float32), triton_runs(hidden, weight)
    wanted = d_hidden or d_weight
    labels, weights = labels.contiguous(), None if weights is None else weights.to(wide).contiguous()
    gradients = Gradients(hidden, weight, sums, d_hidden, d_weight)
    losses = torch.empty(hidden.shape[0], dtype=wide, device=hidden.device)
    parts = chunks(hidden, weight, halved=d_weight and sums != wide)
    logits = Logits(parts, hidden, weight, fused=fused)
    with torch.cuda.device_of(hidden):
        target = target_logits(hidden, weight, labels, loss) if fused and parts else losses
        for part in parts:
            here, some = logits.of(part), (labels[part], None if weights is None else weights[part])
            if fused:
                losses[part] = rows_fused(here, target[part], *some, loss, gradient=wanted)
            else:
                losses[part], here = rows_ref(here, *some, loss, gradient=wanted)
            if wanted:
                gradients.add(part, here)
    return losses, gradients.hidden, gradients.weight


def _operator(
    hidden: Tensor, weight: Tensor, labels: Tensor, weights: Tensor | None, ignore: int, z_loss: float, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return _run(hidden, weight, labels, weights, Loss(ignore=ignore, z_loss=z_loss), *rest)


def shapes(hidden: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Of losses and gradients, for a tracer; `rest` ends in sums, d_hidden, d_weight."""
    sums, d_hidden, d_weight = rest[-3:]
    losses = hidden.new_empty(hidden.shape[0], dtype=torch.promote_types(hidden.dtype, torch.float32))
    return (
        losses,
        hidden.new_empty(hidden.shape if d_hidden else 0),
        weight.new_empty(weight.shape if d_weight else 0, dtype=sums),
    )


_forward = define(
    "linear_cross_entropy(Tensor hidden, Tensor weight, Tensor labels, Tensor? weights, int ignore, float z_loss,"
    " ScalarType sums, bool d_hidden, bool d_weight) -> (Tensor, Tensor, Tensor)",
    _operator,
    shapes,
)


@register_flop_formula(torch.ops.farspan.linear_cross_entropy)
def _flops(hidden: tuple[int, ...], weight: tuple[int, ...], *rest: Any, **_: Any) -> int:
    """What torch's counter should count: a product for the logits, and one for each gradient that is formed."""
    return 2 * hidden[0] * hidden[1] * weight[0] * (1 + sum(rest[-2:]))


def chunks(hidden: Tensor, weight: Tensor, *, halved: bool = False) -> list[slice]:
    """Tokens in nearly even parts, so that the logits of one fit; `halved` for half of the memory.

    A product that adds to V D fp32 numbers also reads and writes them, which an H100 could do in a quarter of the
    product's time at 4096 tokens, in half of it at 2048. Hence 1 GiB of logits: 4096 of bf16 for a vocabulary of 128 k.
    """
    count, step = hidden.shape[0], 256 if hidden.is_cuda else 1
    most = _most(hidden, weight) // (2 if halved else 1)
    parts = -(-count // max(step, most // step * step))
    size = -(-count // (parts * step)) * step if parts else step
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def _most(hidden: Tensor, weight: Tensor) -> int:
    """Tokens at a time: logits of 1 GiB on a GPU; on a CPU of about 4 MB, for its cache, but no fewer than 64."""
    if hidden.is_cuda:
        return (1 << 30) // (hidden.element_size() * weight.shape[0])
    return max(64, (1 << 20) // weight.shape[0])


class Logits:
    """hidden · weightᵀ, part by part: in one memory for Triton, in at least fp32 for plain torch."""

    def __init__(self, parts: list[slice], hidden: Tensor, weight: Tensor, *, fused: bool) -> None:
        self._hidden = hidden if hidden.stride(1) == 1 else hidden.contiguous()  # once rather than in every product
        self._weight, self._room = weight, None
        if fused:
            rows, width = max((part.stop - part.start for part in parts), default=0), -(-weight.shape[0] // 64) * 64
            self._room = hidden.new_empty(rows, width)  # rows begin on 128 bytes, and end after a multiple of 16

    def of(self, part: slice) -> Tensor:
        """Takes the place of the part before."""
        rows = self._hidden[part]
        if self._room is not None:
            return torch.mm(rows, self._weight.T, out=self._room[: rows.shape[0], : self._weight.shape[0]])
        wide = torch.promote_types(rows.dtype, torch.float32)
        return rows.to(wide) @ self._weight.to(wide).T


class Gradients:
    """What a head's logits hand down: hidden's gradient part by part, weight's added up in the type `sums`."""

    def __init__(self, hidden: Tensor, weight: Tensor, sums: torch.dtype, d_hidden: bool, d_weight: bool) -> None:
        self._inputs, self._sums, self._wanted = (hidden, weight), sums, (d_hidden, d_weight)
        self.hidden = hidden.new_empty(hidden.shape if d_hidden else 0)
        size = weight.shape if d_weight and not len(hidden) else 0
        self.weight = weight.new_zeros(size, dtype=sums)
        """Not there before the first part: its product is written, not added to zeros."""

    def add(self, part: slice, d_logits: Tensor) -> None:
        hidden, weight = self._inputs
        d_logits, rows = d_logits.to(hidden.dtype), hidden[part]
        if self._wanted[0]:
            torch.mm(d_logits, weight, out=self.hidden[part])
        if not self._wanted[1]:
            return
        if rows.is_cuda and rows.dtype != self._sums:
            if part.start == 0:
                self.weight = torch.mm(d_logits.T, rows, out_dtype=self._sums)
            else:
                torch.addmm(self.weight, d_logits.T, rows, out_dtype=self._sums, out=self.weight)
        elif part.start == 0:
            self.weight = torch.mm(d_logits.T.to(self._sums), rows.to(self._sums))
        else:
            self.weight.addmm_(d_logits.T.to(self._sums), rows.to(self._sums))


class Formed(torch.autograd.Function):
    """(hidden, weight, losses N, their sum's two gradients) -> the sum: gradients that were formed in a forward."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, losses: Tensor, d_hidden: Tensor, d_weight: Tensor) -> Tensor:
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.dtype = weight.dtype
        return losses.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight = ctx.saved_tensors
        results = [
            _scaled(gradient, upstream, dtype) if needed else None
            for gradient, dtype, needed in zip(
                (d_hidden, d_weight), (d_hidden.dtype, ctx.dtype), ctx.needs_input_grad[:2], strict=True
            )
        ]
        return *results, None, None, None


def _scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """gradient * factor, rounded once to `dtype`; in the same memory if that fits and nobody will ask again."""
    if torch.compiler.is_compiling():
        return (gradient * factor).to(dtype)
    last = not torch._C._autograd._get_current_graph_task_keep_graph()  # a second backward is an error: torch says so
    out = gradient if last and gradient.dtype == dtype else torch.empty_like(gradient, dtype=dtype)
    if triton_runs(gradient) and gradient.numel() and not gradient.is_meta:
        unit, block = 16 if gradient.numel() % 16 == 0 else 1, 4096
        grid = (triton.cdiv(gradient.numel(), block),)
        _scale[grid](out, gradient, factor, gradient.numel() // unit, unit=unit, block=block)
        return out
    if out is gradient:
        return out.mul_(factor)
    return out.copy_(gradient * factor)


@triton.jit(do_not_specialize=["units"])
def _scale(p_out, p_in, p_factor, units, unit: tl.constexpr, block: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    mask = at < units.to(tl.int64) * unit  # a multiple of 16, so that 16 neighbours are read as one
    x = tl.load(p_in + at, mask=mask, other=0.0).to(tl.float32) * tl.load(p_factor).to(tl.float32)
    tl.store(p_out + at, x.to(p_out.dtype.element_ty), mask=mask)
