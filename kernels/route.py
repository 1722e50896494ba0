"""Which experts a token visits, and how much it makes of each: one pass over the router's logits, and one back."""
# ruff: noqa: ANN001 - a kernel's arguments are pointers p_ and numbers

from collections.abc import Sequence
from typing import Any, Literal

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from farspan.kernels.define import define, triton_runs

__all__ = ["ROUTE", "Score", "route", "route_ref"]

Score = Literal["softmax", "softmax_after", "sigmoid"]
"""What a probability is: of softmax over all experts, of softmax over the chosen ones, or of each expert's sigmoid."""

WIDEST = 1024
"""Experts, padded, whose scores a program keeps in registers; more are left to torch."""
MOST = 32
"""Chosen experts, each of which costs a search through a row; more are left to torch's sort."""
_TINY = tl.constexpr(1e-20)
_NOBODY = tl.constexpr(-(2**31))


def route_ref(
    logits: Tensor,
    k: int,
    *,
    score: Score,
    bias: Tensor | None = None,
    groups: tuple[int, int] | None = None,
    normalised: bool = False,
    scale: float = 1.0,
    chosen: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The specification of `route`, differentiable by autograd."""
    scores = logits.softmax(-1) if score == "softmax" else logits.sigmoid() if score == "sigmoid" else logits
    if chosen is None:
        chosen = _choose(logits.detach(), scores.detach(), k, bias, groups)
    picked = scores.gather(-1, chosen.long())
    if score == "softmax_after":
        picked = picked.softmax(-1)
    elif normalised:
        picked = picked / (picked.sum(-1, keepdim=True) + _TINY.value)
    return picked * scale, chosen.clone()


def _choose(logits: Tensor, scores: Tensor, k: int, bias: Tensor | None, groups: tuple[int, int] | None) -> Tensor:
    if bias is None and groups is None:
        scores = logits
    if bias is not None:
        scores = scores + bias.detach().to(scores.dtype)
    order = scores.argsort(dim=-1, descending=True, stable=True)  # NaN come first
    if groups is not None:
        count, kept = groups
        members = scores.unflatten(-1, (count, -1))
        size = members.shape[-1]
        best = members.topk(min(2, size), dim=-1).values.sum(-1).argsort(dim=-1, descending=True, stable=True)
        out = torch.ones_like(best).scatter(-1, best[:, :kept], 0).repeat_interleave(size, dim=-1)
        order = order.gather(-1, out.gather(-1, order).argsort(dim=-1, stable=True))
    return order[:, :k].int()


def route(
    logits: Tensor,
    k: int,
    *,
    score: Score,
    bias: Tensor | None = None,
    groups: tuple[int, int] | None = None,
    normalised: bool = False,
    scale: float = 1.0,
    chosen: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Probabilities T K and chosen experts T K int32, by falling score, of equal ones the lower expert first.

    logits T E in fp32 or fp64, which probabilities have too. `softmax` and `sigmoid` score all experts, choose the best
    and read their scores; `softmax_after` chooses by logits and takes the softmax of those chosen. bias E is added for
    the choice alone and has no gradient (Wang et al., 2024). groups=(count, kept): experts lie in `count` equal groups,
    and only those of the `kept` groups whose best two score most take part (DeepSeek-V3, 2024). Without either the
    logits choose, in the order of their scores but without ties that rounding makes. normalised: probabilities sum to
    one, which those of `softmax_after` always do. scale multiplies last. chosen: T K int32, different experts in every
    row, given back with their probabilities, and nothing is chosen: the replay under recomputation.

    NaN counts as the largest score: what is chosen are always different experts. Gradients go to the logits, dense;
    logits and chosen experts are saved. Kernels run on the current device. Errors: ValueError for what does not fit.
    """
    _check(logits, k, score, bias, groups, chosen)
    if groups is not None and groups[0] == groups[1]:
        groups = None  # all take part
    sizes = [] if groups is None else list(groups)
    found: tuple[Tensor, Tensor] = _Route.apply(logits, bias, chosen, k, score, sizes, normalised, float(scale))
    return found


def _check(
    logits: Tensor, k: int, score: str, bias: Tensor | None, groups: tuple[int, int] | None, chosen: Tensor | None
) -> None:
    if logits.ndim != 2 or logits.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"route: logits {tuple(logits.shape)} of {logits.dtype} must be T E in fp32 or fp64; flatten and cast them"
        )
    if score not in ("softmax", "softmax_after", "sigmoid"):
        raise ValueError(f"route: score={score!r} must be softmax, softmax_after or sigmoid")
    tokens, experts = logits.shape
    able = experts
    if groups is not None:
        count, kept = groups
        if not 1 <= kept <= count or experts % count:
            raise ValueError(
                f"route: groups={groups} must be (count, kept) with 1 <= kept <= count, and count must divide "
                f"{experts} experts"
            )
        able = experts // count * kept
    if not 1 <= k <= able:
        raise ValueError(f"route: k={k} must be in 1..{able}, the experts that take part; choose fewer or keep more")
    if bias is not None and bias.shape != (experts,):
        raise ValueError(f"route: bias {tuple(bias.shape)} must be ({experts},), one for each expert")
    if chosen is not None and (chosen.shape != (tokens, k) or chosen.dtype != torch.int32):
        raise ValueError(
            f"route: chosen {tuple(chosen.shape)} of {chosen.dtype} must be ({tokens}, {k}) of torch.int32, as route "
            "returned it"
        )


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, bias: Tensor | None, *others: Any) -> tuple[Tensor, Tensor]:
        probability, chosen = ROUTE(logits, bias, *others)
        ctx.save_for_backward(logits, chosen)
        ctx.mark_non_differentiable(chosen)
        ctx.score, _, *ctx.settings = others[2:]
        return probability, chosen

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dprobability: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        dlogits = _ROUTE_BACKWARD(dprobability, *ctx.saved_tensors, ctx.score, *ctx.settings)
        return dlogits, *(None,) * 7


# The kernels. A program holds b_t tokens and all experts, padded to a power of two; with groups each is padded, so that
# they are an axis. All happens in that one tile: `rank` says which place of K an expert has, K where it has none, and
# results are stored straight from there. Offsets of rows are 64-bit.


@triton.jit
def _key(x):  # type: ignore[no-untyped-def]
    """Whole numbers in the order of fp32 x, those of NaN the largest. Above _NOBODY, which no number has."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)  # of two zeros neither is larger
    return tl.where(x != x, 0x7FFFFFFF, bits ^ ((bits >> 31) & 0x7FFFFFFF))


@triton.jit
def _number(key):  # type: ignore[no-untyped-def]
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _first_best(key, place, axis: tl.constexpr, b_axis: tl.constexpr):  # type: ignore[no-untyped-def]
    """Where the largest key is, of equal ones the first."""
    best = tl.max(key, axis, keep_dims=True)
    return place == tl.min(tl.where(key == best, place, b_axis), axis, keep_dims=True)


@triton.jit
def _best_groups(  # type: ignore[no-untyped-def]
    key, groups: tl.constexpr, size: tl.constexpr, kept: tl.constexpr, b_s: tl.constexpr
):
    """Keys of experts in the kept groups, and _NOBODY."""
    b_t: tl.constexpr = key.shape[0]
    b_g: tl.constexpr = key.shape[1] // b_s
    member = tl.reshape(key, (b_t, b_g, b_s))
    total = _number(tl.max(member, 2))
    if size > 1:
        best = _first_best(member, tl.arange(0, b_s)[None, None, :], 2, b_s)
        total += _number(tl.max(tl.where(best, _NOBODY, member), 2))
    place = tl.arange(0, b_g)[None, :]
    group = tl.where(place < groups, _key(total), _NOBODY)
    stays = tl.zeros((b_t, b_g), tl.int32)
    for _ in range(kept):
        hit = _first_best(group, place, 1, b_g)
        stays = tl.where(hit, 1, stays)
        group = tl.where(hit, _NOBODY, group)
    return tl.where(tl.reshape(tl.broadcast_to(stays[:, :, None], (b_t, b_g, b_s)), (b_t, b_g * b_s)) > 0, key, _NOBODY)


@triton.jit
def _tile(  # type: ignore[no-untyped-def]
    p_logits, tokens, logits_row, experts: tl.constexpr, size: tl.constexpr, b_s: tl.constexpr, b_t, b_e
):
    """Token numbers b_t 1, int64; experts 1 b_e; which of them are; logits, -inf where there is none."""
    row = (tl.program_id(0).to(tl.int64) * b_t + tl.arange(0, b_t))[:, None]
    lane = tl.arange(0, b_e)[None, :]
    expert = lane // b_s * size + lane % b_s
    is_expert = (lane % b_s < size) & (expert < experts)
    at = p_logits + row * logits_row + expert
    return row, expert, is_expert, tl.load(at, mask=(row < tokens) & is_expert, other=float("-inf"))


@triton.jit
def _softmax(logit):  # type: ignore[no-untyped-def]
    weight = tl.exp(logit - tl.max(logit, 1, keep_dims=True))
    return weight / tl.sum(weight, 1, keep_dims=True)


@triton.jit
def _scores(logit, score: tl.constexpr):  # type: ignore[no-untyped-def]
    if score == "softmax":
        logit = _softmax(logit)
    elif score == "sigmoid":
        logit = 1.0 / (1.0 + tl.exp(-logit))
    return logit


@triton.jit
def _ranks(p_chosen, row, expert, tokens, k: tl.constexpr):  # type: ignore[no-untyped-def]
    rank = tl.zeros_like(row + expert).to(tl.int32) + k
    for j in range(k):
        rank = tl.where(expert == tl.load(p_chosen + row * k + j, mask=row < tokens, other=-1), j, rank)
    return rank


@triton.jit(do_not_specialize=["tokens"])
def _forward(  # type: ignore[no-untyped-def]
    p_probability,
    p_chosen,
    p_logits,
    p_bias,
    p_given,
    tokens,
    logits_row,
    experts: tl.constexpr,
    k: tl.constexpr,
    score: tl.constexpr,
    size: tl.constexpr,
    kept: tl.constexpr,
    normalised: tl.constexpr,
    scale: tl.constexpr,
    b_s: tl.constexpr,
    b_t: tl.constexpr,
    b_e: tl.constexpr,
):
    row, expert, is_expert, logit = _tile(p_logits, tokens, logits_row, experts, size, b_s, b_t, b_e)
    value = _scores(logit, score)
    if p_given is not None:
        rank = tl.where(is_expert, _ranks(p_given, row, expert, tokens, k), k)  # what pads a group bears the next one's
    else:
        pick = logit
        if p_bias is not None:
            pick = value + tl.load(p_bias + expert, mask=is_expert, other=0.0).to(tl.float32)
        elif kept > 0:
            pick = value
        key = tl.where(is_expert, _key(pick), _NOBODY)
        if kept > 0:
            key = _best_groups(key, experts // size, size, kept, b_s)
        lane = tl.arange(0, b_e)[None, :]
        rank = tl.full((b_t, b_e), k, tl.int32)
        for j in range(k):
            hit = _first_best(key, lane, 1, b_e)
            rank = tl.where(hit, j, rank)
            key = tl.where(hit, _NOBODY, key)
    taken = rank < k
    if score == "softmax_after":
        value = _softmax(tl.where(taken, logit, float("-inf")))
    elif normalised:
        value = value / (tl.sum(tl.where(taken, value, 0.0), 1, keep_dims=True) + _TINY)
    place, mask = row * k + rank, taken & (row < tokens)
    tl.store(p_probability + place, value * scale, mask=mask)
    tl.store(p_chosen + place, tl.broadcast_to(expert, (b_t, b_e)), mask=mask)


@triton.jit(do_not_specialize=["tokens"])
def _backward(  # type: ignore[no-untyped-def]
    p_dlogits,
    p_dprobability,
    p_logits,
    p_chosen,
    tokens,
    dprobability_row,
    dprobability_k,
    logits_row,
    experts: tl.constexpr,
    k: tl.constexpr,
    score: tl.constexpr,
    normalised: tl.constexpr,
    scale: tl.constexpr,
    b_t: tl.constexpr,
    b_e: tl.constexpr,
):
    row, expert, is_expert, logit = _tile(p_logits, tokens, logits_row, experts, experts, b_e, b_t, b_e)
    rank = _ranks(p_chosen, row, expert, tokens, k)
    taken = rank < k
    place = row * dprobability_row + rank.to(tl.int64) * dprobability_k
    grad = tl.load(p_dprobability + place, mask=taken & (row < tokens), other=0.0) * scale
    if score == "softmax_after":
        value = _softmax(tl.where(taken, logit, float("-inf")))
        grad = value * (grad - tl.sum(grad * value, 1, keep_dims=True))
    else:
        value = _scores(logit, score)
        if normalised:
            total = tl.sum(tl.where(taken, value, 0.0), 1, keep_dims=True) + _TINY
            common = tl.sum(grad * value, 1, keep_dims=True) / total
            grad = tl.where(taken, (grad - common) / total, 0.0)
        if score == "softmax":
            grad = value * (grad - tl.sum(grad * value, 1, keep_dims=True))
        else:
            grad = grad * value * (1.0 - value)
    tl.store(p_dlogits + row * experts + expert, grad, mask=(row < tokens) & is_expert)


def _widths(experts: int, groups: list[int]) -> tuple[int, int]:
    """b_s and b_e: a group and all groups, each padded to a power of two."""
    count = groups[0] if groups else 1
    b_s = triton.next_power_of_2(experts // count)
    return b_s, triton.next_power_of_2(count) * b_s


def _tokens(b_e: int) -> tuple[int, int]:
    """b_t and warps: at least 8 entries a thread, and a row never crosses warps, so its searches meet no barrier."""
    warps = 4 if b_e <= 128 else 1
    return max(1, 256 * warps // b_e), warps


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _launch(results: tuple[Tensor, Tensor], logits: Tensor, given: Sequence[Tensor | None], *settings: Any) -> None:
    """given: bias and chosen experts; settings: those of the operator, from score on."""
    score, groups, *last = settings
    (tokens, experts), k, logits = logits.shape, results[0].shape[1], _dense(logits)
    if tokens == 0:
        return
    b_s, b_e = _widths(experts, groups)
    b_t, warps = _tokens(b_e)
    size, kept = (experts // groups[0], groups[1]) if groups else (experts, 0)
    given = [None if x is None else x.contiguous() for x in given]
    numbers = (tokens, logits.stride(0), experts, k, score, size, kept, *last, b_s, b_t, b_e)
    _forward[(triton.cdiv(tokens, b_t),)](*results, logits, *given, *numbers, num_warps=warps)


def _launch_backward(dlogits: Tensor, dprobability: Tensor, logits: Tensor, chosen: Tensor, *settings: Any) -> None:
    (tokens, experts), k, logits = logits.shape, chosen.shape[1], _dense(logits)
    if tokens == 0:
        return
    b_e = triton.next_power_of_2(experts)
    b_t, warps = _tokens(b_e)
    numbers = (tokens, *dprobability.stride(), logits.stride(0), experts, k, *settings, b_t, b_e)
    inputs = dprobability, logits, chosen.contiguous()
    _backward[(triton.cdiv(tokens, b_t),)](dlogits, *inputs, *numbers, num_warps=warps)


def _run(
    logits: Tensor,
    bias: Tensor | None,
    chosen: Tensor | None,
    k: int,
    score: Score,
    sizes: list[int],
    normalised: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    if not _fits(logits, k, sizes):
        groups = (sizes[0], sizes[1]) if sizes else None
        settings: dict[str, Any] = {"score": score, "bias": bias, "groups": groups, "normalised": normalised}
        return route_ref(logits, k, **settings, scale=scale, chosen=chosen)
    results = _like(logits, bias, chosen, k)
    _launch(results, logits, (bias, chosen), score, sizes, normalised, scale)
    return results


def _fits(logits: Tensor, k: int, sizes: list[int]) -> bool:
    return triton_runs(logits) and k <= MOST and _widths(logits.shape[1], sizes)[1] <= WIDEST


def _like(logits: Tensor, bias: Tensor | None, chosen: Tensor | None, k: int, *_: Any) -> tuple[Tensor, Tensor]:
    shape = logits.shape[0], k
    return logits.new_empty(shape), logits.new_empty(shape, dtype=torch.int32)


def _run_backward(
    dprobability: Tensor, logits: Tensor, chosen: Tensor, score: Score, normalised: bool, scale: float
) -> Tensor:
    if not _fits(logits, chosen.shape[1], []):
        return _gradient(dprobability * scale, logits, chosen.long(), score, normalised)
    dlogits = logits.new_empty(logits.shape)
    _launch_backward(dlogits, dprobability, logits, chosen, score, normalised, scale)
    return dlogits


def _gradient(dp: Tensor, logits: Tensor, chosen: Tensor, score: Score, normalised: bool) -> Tensor:
    """`_backward` in plain torch, of probabilities before their scale."""
    if score == "softmax_after":
        p = logits.gather(1, chosen).softmax(1)
        return torch.zeros_like(logits).scatter(1, chosen, p * (dp - (dp * p).sum(1, keepdim=True)))
    scores = logits.softmax(1) if score == "softmax" else logits.sigmoid()
    if normalised:
        p = scores.gather(1, chosen)
        total = p.sum(1, keepdim=True) + 1e-20
        dp = dp / total - (dp * p).sum(1, keepdim=True) / total.square()
    dscores = torch.zeros_like(logits).scatter(1, chosen, dp)
    if score == "softmax":
        return scores * (dscores - (dscores * scores).sum(1, keepdim=True))
    return dscores * scores * (1 - scores)


ROUTE = define(
    "route(Tensor logits, Tensor? bias, Tensor? chosen, int k, str score, int[] groups, bool normalised, float scale)"
    " -> (Tensor, Tensor)",
    _run,
    _like,
)
_ROUTE_BACKWARD = define(
    "route_backward(Tensor dprobability, Tensor logits, Tensor chosen, str score, bool normalised, float scale)"
    " -> Tensor",
    _run_backward,
    lambda dprobability, logits, *_: logits.new_empty(logits.shape),
)
