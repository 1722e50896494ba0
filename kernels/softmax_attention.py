"""Softmax attention that also returns its log-sum-exp, so that attention over parts merges into the whole.

`attend` is for layers; `block_forward` and `block_backward` are for context-parallel schedules, which run the backward
of every block with the out and lse of the whole softmax. `attend_ref` is the specification. Layout B T H K; lse B H T.
"""

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from farspan.kernels.define import define
from farspan.kernels.softmax_attention_backends import Backend, Cpu, Math, lse_dtype
from farspan.kernels.softmax_attention_cuda import Cudnn, Flash
from farspan.kernels.softmax_attention_mask import Mask, bottom_right, trim, visible

__all__ = ["Mask", "attend", "attend_ref", "block_backward", "block_forward", "choose", "join_sinks", "sinks_gradient"]


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    window: int | None = None,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """q B T H K, k B S Hkv K, v B S Hkv V -> out B T H V in q's dtype, lse B H T in fp32 (fp64 for fp64), natural log.

    H is a multiple of Hkv (grouped-query attention). Query i sees keys j <= i (causal) with j > i - window.
    cu_seqlens [N + 1] int32 cuts the flattened B*T tokens into documents of at most T tokens that never see each other
    (T = S; bounds rise from 0 to B*T; repeated bounds are empty documents; on a GPU they are trusted, since reading
    them would wait for the device). scale is K ** -0.5 unless given; softcap c turns a score s into c * tanh(s / c).
    sinks [H] are logits that join each softmax with value zero, and lse counts them. A query that sees nothing has
    out = 0 and lse = -inf (its sink, if there are sinks).
    Differentiable once in q, k, v and sinks, through out and lse; a gradient through lse takes the `math` backend.
    Errors: ValueError for shapes, dtypes or a mask that do not fit.
    """
    _check(q, k, v, cu_seqlens, sinks)
    Mask(causal=causal, window=window, softcap=softcap)  # its errors, before the op hides where they came from
    return torch.ops.farspan.attend(q, k, v, cu_seqlens, sinks, causal, window, scale, softcap)


def attend_ref(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    window: int | None = None,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`attend` in plain torch and fp64, T S scores per document: what every backend equals, gradients included."""
    _check(q, k, v, cu_seqlens, sinks)
    mask = Mask(causal=causal, window=window, scale=scale, softcap=softcap)
    if cu_seqlens is None:
        out, lse = _softmax_ref(q, k, v, mask, sinks)
    else:
        bounds = cu_seqlens.tolist()
        query, key, value = (x.flatten(0, 1)[None] for x in (q, k, v))
        parts = [_softmax_ref(query[:, a:b], key[:, a:b], value[:, a:b], mask, sinks) for a, b in pairwise(bounds)]
        out = torch.cat([part[0] for part in parts], 1).view(*q.shape[:-1], v.shape[-1])
        lse = torch.cat([part[1] for part in parts], 2)[0].unflatten(1, q.shape[:2]).transpose(0, 1)
    return out.to(q.dtype), lse.to(lse_dtype(q.dtype))


def _softmax_ref(q: Tensor, k: Tensor, v: Tensor, mask: Mask, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    groups = q.shape[2] // k.shape[2]
    query = q.double().transpose(1, 2)
    key, value = (x.double().transpose(1, 2).repeat_interleave(groups, 1) for x in (k, v))
    score = query @ key.mT * mask.scale_of(q)
    if mask.softcap is not None:
        score = mask.softcap * torch.tanh(score / mask.softcap)
    seen = visible(mask, q.shape[1], k.shape[1], q.device)
    seen = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool, device=q.device) if seen is None else seen
    blind = ~seen.any(-1)  # such rows are computed as if they saw everything, then replaced: no NaN reaches a gradient
    score = score.masked_fill(~(seen | blind[:, None]), -torch.inf)
    lse = score.logsumexp(-1).masked_fill(blind, -torch.inf)
    out = (score.softmax(-1) @ value).masked_fill(blind[:, None], 0.0)
    if sinks is not None:
        sink = sinks.double()[:, None]
        out, lse = out * torch.sigmoid(lse - sink)[..., None], torch.logaddexp(lse, sink)
    return out.transpose(1, 2), lse


def _check(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, sinks: Tensor | None) -> None:
    if not (q.dim() == k.dim() == v.dim() == 4):
        raise ValueError(f"attention: q, k, v have {q.dim()}, {k.dim()}, {v.dim()} axes; each needs 4: B T H K")
    if q.shape[0] != k.shape[0] or k.shape[:3] != v.shape[:3] or q.shape[3] != k.shape[3]:
        shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        raise ValueError(f"attention: {shapes} do not fit; q is B T H K, k is B S Hkv K, v is B S Hkv V")
    if k.shape[2] == 0 or q.shape[2] % k.shape[2] != 0:
        raise ValueError(f"attention: heads={q.shape[2]} must be a multiple of kv_heads={k.shape[2]}; change one")
    if not (q.dtype == k.dtype == v.dtype) or not q.dtype.is_floating_point:
        raise ValueError(f"attention: dtypes {q.dtype}, {k.dtype}, {v.dtype} must be one float type; cast them alike")
    if cu_seqlens is not None and (cu_seqlens.dtype != torch.int32 or cu_seqlens.dim() != 1):
        found = f"{cu_seqlens.dtype} {tuple(cu_seqlens.shape)}"
        raise ValueError(f"attention: cu_seqlens is {found}; it must be int32 [documents + 1], so cast or flatten it")
    if cu_seqlens is not None and q.shape[1] != k.shape[1]:
        raise ValueError(
            f"attention: cu_seqlens needs T = S, not {q.shape[1]}, {k.shape[1]}; leave it out, or pass whole rows"
        )
    if sinks is not None and sinks.shape != (q.shape[2],):
        raise ValueError(f"attention: sinks {tuple(sinks.shape)} must be one logit for each of heads={q.shape[2]}")


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@cache
def _has_flash_attn() -> bool:
    return find_spec("flash_attn") is not None


@cache
def has_cudnn_graphs() -> bool:
    return find_spec("cudnn") is not None


def choose(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> str:
    """Name of the backend for these tensors: `cpu`, `cudnn`, `cudnn_graph`, `flash`, `flash_attn` or `math`.

    Reads device, dtype, shapes, mask, capability and torch's deterministic flag (cuDNN's backward has no such form),
    never values. Blocks are judged by what is left of them after trimming: one that sees all its keys counts as full.
    """
    t, s, width = q.shape[1], k.shape[1], q.shape[3]
    part = trim(mask, t, s)
    if part is None or v.shape[3] != width:
        return "math"
    if q.device.type == "cpu":
        return "math" if mask.softcap is not None else "cpu"
    half = q.dtype in (torch.float16, torch.bfloat16)
    if q.device.type != "cuda" or not half or width % 8 != 0 or width > 256 or _capability(q.device) < (8, 0):
        return "math"
    t, s = part.rows.stop - part.rows.start, part.keys.stop - part.keys.start
    right = bottom_right(part.mask, t, s)[2]
    if right >= s:  # FlashAttention takes it for no edge at all
        flash = "math"
    elif mask.softcap is not None:
        flash = "flash_attn" if _has_flash_attn() else "math"
    else:
        flash = "flash"
    fits = width <= 128 and min(t, s) > 1 and _capability(q.device) >= (9, 0) and mask.softcap is None
    if not fits or torch.are_deterministic_algorithms_enabled():
        return flash
    if part.mask.plain and mask.cu_seqlens is None and (t == s or not part.mask.causal):
        return "cudnn"
    return "cudnn_graph" if has_cudnn_graphs() and right in (-1, 0) else flash


@cache
def _backend(name: str) -> Backend:
    if name == "flash_attn":  # an optional library, so its adapter is imported when first chosen
        from farspan.kernels.softmax_attention_fa import FlashAttn

        return FlashAttn()
    if name == "cudnn_graph":
        from farspan.kernels.softmax_attention_cudnn_graph import CudnnGraph

        return CudnnGraph()
    backends: dict[str, Callable[[], Backend]] = {"cpu": Cpu, "cudnn": Cudnn, "flash": Flash, "math": Math}
    if name not in backends:
        known = ", ".join([*backends, "cudnn_graph", "flash_attn"])
        raise ValueError(f"attention: backend={name!r} is unknown; use one of {known}, or choose()")
    return backends[name]()


@torch.no_grad()
def block_forward(q: Tensor, k: Tensor, v: Tensor, mask: Mask, backend: str) -> tuple[Tensor, Tensor]:
    """One block: q B T H K, k B S Hkv K, v B S Hkv V -> out B T H V, lse B H T. Sizes may be 0; no autograd.

    Queries that see nothing get out = 0 and lse = -inf, the neutral element of a merge. backend comes from `choose`.
    """
    part = trim(mask, q.shape[1], k.shape[1]) if min(q.numel(), k.numel(), v.numel()) else None
    forward = _backend(backend).forward
    if part is not None and part.rows == slice(0, q.shape[1]):
        return forward(q, k[:, part.keys], v[:, part.keys], part.mask)
    out = q.new_zeros(*q.shape[:-1], v.shape[-1])
    lse = q.new_full((q.shape[0], q.shape[2], q.shape[1]), -torch.inf, dtype=lse_dtype(q.dtype))
    if part is not None:
        out[:, part.rows], lse[:, :, part.rows] = forward(q[:, part.rows], k[:, part.keys], v[:, part.keys], part.mask)
    return out, lse


@torch.no_grad()
def block_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: Mask, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of one block: dq B T H K, dk B S Hkv K, dv B S Hkv V in the dtypes of q, k, v.

    dout, out (B T H V) and lse (B H T) belong to the whole softmax over all blocks. The sums of dq, dk, dv over the
    blocks are then exact without any gradient through lse: the merge is already part of out.
    """
    return _block_backward(_backend(backend).backward, (q, k, v), (dout, out, lse, None), mask)


def _block_backward(
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]],
    inputs: tuple[Tensor, Tensor, Tensor],
    results: tuple[Tensor, Tensor, Tensor, Tensor | None],
    mask: Mask,
) -> tuple[Tensor, Tensor, Tensor]:
    (q, k, v), (dout, out, lse, dlse) = inputs, results
    part = trim(mask, q.shape[1], k.shape[1]) if min(x.numel() for x in inputs) else None
    if part is None:
        return q.new_zeros(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
    rows, keys = part.rows, part.keys
    arguments = (dout[:, rows], q[:, rows], k[:, keys], v[:, keys], out[:, rows], lse[:, :, rows], part.mask)
    grads = backward(*arguments) if dlse is None else backward(*arguments, dlse[:, :, rows])
    if (rows, keys) == (slice(0, q.shape[1]), slice(0, k.shape[1])):
        return grads
    padded = q.new_zeros(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
    for whole, piece, span in zip(padded, grads, (rows, keys, keys), strict=True):
        whole[:, span] = piece
    return padded


def join_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """Attention, out [B] T H V and lse [B] H T with or without a batch, once sinks [H] have joined each softmax."""
    sink = sinks.to(lse.dtype)[:, None]
    weight = torch.sigmoid(lse - sink).transpose(-1, -2)[..., None]  # what the sink leaves of each softmax
    return (out * weight).to(out.dtype), torch.logaddexp(lse, sink)


def sinks_gradient(dout: Tensor, out: Tensor, lse: Tensor, sinks: Tensor, dlse: Tensor | None = None) -> Tensor:
    """Of sinks [H], from what `join_sinks` gave: [B] T H V and [B] H T.

    A sink is one more key of value zero: its probability times (0 - delta + dlse), summed over batch and tokens.
    """
    shift = -(dout.to(lse.dtype) * out).sum(-1).transpose(-1, -2)
    shift = shift if dlse is None else shift + dlse
    share = torch.exp(sinks.to(lse.dtype)[:, None] - lse)
    rest = [axis for axis in range(lse.dim()) if axis != lse.dim() - 2]
    return (share * shift).sum(rest).to(sinks.dtype)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None,
    sinks: Tensor | None,
    causal: bool,
    window: int | None,
    scale: float | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    mask = Mask(causal=causal, window=window, scale=scale, softcap=softcap, cu_seqlens=cu_seqlens)
    out, lse = block_forward(q, k, v, mask, choose(q, k, v, mask))
    return (out, lse) if sinks is None else join_sinks(out, lse, sinks)


def _attend_backward(
    dout: Tensor | None,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor | None,
    sinks: Tensor | None,
    causal: bool,
    window: int | None,
    scale: float | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    mask = Mask(causal=causal, window=window, scale=scale, softcap=softcap, cu_seqlens=cu_seqlens)
    dout = torch.zeros_like(out) if dout is None else dout
    backward = _backend(choose(q, k, v, mask)).backward if dlse is None else Math().backward
    dq, dk, dv = _block_backward(backward, (q, k, v), (dout, out, lse, dlse), mask)
    if sinks is None:
        return dq, dk, dv, q.new_empty(0)
    return dq, dk, dv, sinks_gradient(dout, out, lse, sinks, dlse)


def _attend_fake(q: Tensor, k: Tensor, v: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    out = q.new_empty(*q.shape[:-1], v.shape[-1])
    return out, q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=lse_dtype(q.dtype))


def _attend_backward_fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, k, v, sinks = *arguments[2:5], arguments[8]
    return (
        *(x.new_empty(x.shape) for x in (q, k, v)),
        q.new_empty(0) if sinks is None else sinks.new_empty(sinks.shape),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)  # a missing dlse stays None, and so keeps the fast backward
    ctx.save_for_backward(*inputs[:3], *output, *inputs[3:5])
    ctx.options = inputs[5:]


@once_differentiable
def _derive(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    if dout is None and dlse is None:
        return (None,) * 9
    saved = ctx.saved_tensors  # read once: activation checkpointing hands them out a single time
    *grads, dsinks = torch.ops.farspan.attend_backward(dout, dlse, *saved, *ctx.options)
    return (*grads, None, None if saved[-1] is None else dsinks, None, None, None, None)


_OPTIONS = "Tensor? cu_seqlens, Tensor? sinks, bool causal, int? window, float? scale, float? softcap"
define(f"attend(Tensor q, Tensor k, Tensor v, {_OPTIONS}) -> (Tensor, Tensor)", _attend, _attend_fake)
define(
    "attend_backward(Tensor? dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"{_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)",
    _attend_backward,
    _attend_backward_fake,
)
torch.library.register_autograd("farspan::attend", _derive, setup_context=_save)
