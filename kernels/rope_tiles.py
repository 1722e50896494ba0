"""The Triton kernels of rotary embedding: tiles of heads and tokens that read their angles once, and their launches."""
# ruff: noqa: ANN001 - a kernel's arguments are pointers p_ and numbers

from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["norm_backward", "turn"]

Pair = tuple[Tensor, Tensor]
"""For q and k, or cosine and sine."""

SHARES = 512
"""Programs that a backward with weights is dealt out to: about four on each multiprocessor of today's GPUs."""


def turn(
    results: Pair,
    inputs: Pair,
    angles: Pair,
    kind: Literal["plain", "back", "norm", "in place"],
    weights: Pair | None = None,
    eps: float = 0.0,
) -> None:
    """Turns q B T H K and k B T Hkv K into dense results, in one launch.

    back: by the negative angles. norm: RMSNorm by `weights` and `eps` before. in place: results are the inputs.
    """
    q, k = inputs if kind == "in place" else map(_last_dense, inputs)
    if q.numel() + k.numel() == 0:
        return
    cos, sin, steps = _tables(angles)
    tokens, heads, kv_heads, half = q.shape[1], q.shape[2], k.shape[2], q.shape[3] // 2
    blocks = _blocks(heads, kv_heads, half, 2048)
    groups = triton.cdiv(tokens, blocks["b_r"] // min(blocks["b_hq"], blocks["b_hk"]))
    _rope[(q.shape[0] * groups * _tiles_of_group(heads, kv_heads, blocks),)](
        *results,
        *(q, k),
        *(map(_last_dense, weights) if weights else (q, k)),
        *(cos, sin, tokens, groups),
        *(*q.stride()[:3], *k.stride()[:3], *steps),
        heads=heads,
        kv_heads=kv_heads,
        half=half,
        eps=eps,
        kind=kind,
        **blocks,
    )


def norm_backward(
    results: tuple[Tensor, Tensor, Tensor, Tensor], grads: Pair, inputs: Pair, weights: Pair, angles: Pair, eps: float
) -> None:
    """Fills dq, dk, dweight_q, dweight_k for `turn` with norm, in two launches; the sums' order is fixed by shapes."""
    dq, dk, dweight_q, dweight_k = results
    (q, k), (up_q, up_k) = map(_last_dense, inputs), map(_last_dense, grads)
    if q.numel() + k.numel() == 0:
        for dweight in (dweight_q, dweight_k):
            dweight.zero_()
        return
    cos, sin, steps = _tables(angles)
    batches, tokens, heads, key_dim = q.shape
    blocks = _blocks(heads, k.shape[2], key_dim // 2, 1024)
    shares = _shares(batches, tokens, heads, k.shape[2], blocks)
    dweight = torch.empty(sum(shares), key_dim, dtype=torch.float32, device=q.device)
    _norm_backward[(sum(shares),)](
        *(dq, dk, dweight, up_q, up_k, q, k, *map(_last_dense, weights)),
        *(cos, sin, *shares, batches, tokens),
        *(*up_q.stride()[:3], *up_k.stride()[:3], *q.stride()[:3], *k.stride()[:3], *steps),
        heads=heads,
        kv_heads=k.shape[2],
        half=key_dim // 2,
        eps=eps,
        **blocks,
    )
    _total[(triton.cdiv(key_dim, 32), 2)](dweight_q, dweight_k, dweight, *shares, key_dim, b_r=64, b_k=32)


def _blocks(heads: int, kv_heads: int, half: int, pairs: int) -> dict[str, int]:
    """Sizes of a tile of so many pairs: how many heads of q and of k it has side by side, its rows, pairs a row."""
    b_p = triton.next_power_of_2(half)
    b_r = min(128, max(1, pairs // b_p))  # a row's place costs registers: more of them spill for narrow heads
    return {"b_hq": _block(heads, b_r), "b_hk": _block(kv_heads, b_r), "b_r": b_r, "b_p": b_p}


def _block(heads: int, rows: int) -> int:
    """A power of two: one of at least 8 that divides the heads, or else one that holds them all and idles a little."""
    dividing = heads & -heads
    return min(rows, dividing if dividing >= 8 else triton.next_power_of_2(heads))


def _tiles_of_group(heads: int, kv_heads: int, blocks: dict[str, int]) -> int:
    """How many tiles q and k have of the tokens that a tile of either has at most."""
    least = min(blocks["b_hq"], blocks["b_hk"])
    pairs = ((heads, blocks["b_hq"]), (kv_heads, blocks["b_hk"]))
    return sum(block // least * triton.cdiv(count, block) for count, block in pairs)


def _shares(batches: int, tokens: int, heads: int, kv_heads: int, blocks: dict[str, int]) -> tuple[int, int]:
    """How many programs work on q, and how many on k: by their heads, and no more than there are tiles."""
    found = []
    for count, block in ((heads, blocks["b_hq"]), (kv_heads, blocks["b_hk"])):
        tiles = batches * triton.cdiv(tokens, blocks["b_r"] // block) * triton.cdiv(count, block)
        found.append(min(tiles, max(1, SHARES * count // (heads + kv_heads))))
    return found[0], found[1]


def _tables(angles: Pair) -> tuple[Tensor, Tensor, tuple[int, int]]:
    """cos, sin and their common strides from row to row, 0 where one serves all, and from token to token."""
    cos, sin = map(_last_dense, angles)
    if cos.stride() != sin.stride():
        cos, sin = cos.contiguous(), sin.contiguous()
    return cos, sin, (cos.stride(0) if cos.shape[0] > 1 else 0, cos.stride(1))


def _last_dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


# A tile is b_r rows, each a head of one token, by the b_p pairs of a head: b_h neighbouring heads, so that
# angles read once serve many heads, for as many tokens as then fit. Heads are counted in powers of two within a tile,
# which splits row numbers without dividing. Offsets of tokens are 64-bit.


@triton.jit
def _rows(batch, token, head, tokens, heads, b_h: tl.constexpr, b_r: tl.constexpr):  # type: ignore[no-untyped-def]
    """batch; tokens and heads of the tile's rows, b_r 1 and 64-bit; which rows are."""
    row = tl.arange(0, b_r)[:, None]
    t, h = token + row // b_h, head + row % b_h
    return batch.to(tl.int64), t.to(tl.int64), h.to(tl.int64), (t < tokens) & (h < heads)


@triton.jit
def _angles(p_cos, p_sin, batch, token, mask, angle_batch, angle_token, column):  # type: ignore[no-untyped-def]
    place = batch * angle_batch + token * angle_token + column
    cos = tl.load(p_cos + place, mask=mask, other=0.0).to(tl.float32)
    return cos, tl.load(p_sin + place, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _pairs(p_x, place, mask, half: tl.constexpr):  # type: ignore[no-untyped-def]
    """Both channels of each pair, in fp32."""
    first = tl.load(p_x + place, mask=mask, other=0.0).to(tl.float32)
    return first, tl.load(p_x + place + half, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _turn(  # type: ignore[no-untyped-def]
    p_to,
    p_x,
    p_weight,
    p_cos,
    p_sin,
    batch,
    token,
    head,
    tokens,
    x_batch,
    x_token,
    x_head,
    angle_batch,
    angle_token,
    heads: tl.constexpr,
    half: tl.constexpr,
    eps: tl.constexpr,
    kind: tl.constexpr,
    b_h: tl.constexpr,
    b_r: tl.constexpr,
    b_p: tl.constexpr,
):
    """One tile, from p_x to p_to."""
    batch, token, head, m_row = _rows(batch, token, head, tokens, heads, b_h, b_r)
    column = tl.arange(0, b_p)[None, :]
    mask = m_row & (column < half)
    cos, sin = _angles(p_cos, p_sin, batch, token, mask, angle_batch, angle_token, column)
    if kind == "back":
        sin = -sin
    place = batch * x_batch + token * x_token + head * x_head + column
    a, b = _pairs(p_x, place, mask, half)
    if kind == "norm":
        weight_a, weight_b = _pairs(p_weight, column, column < half, half)
        scale = tl.rsqrt(tl.sum(a * a + b * b, 1) / (2 * half) + eps)[:, None]
        a, b = a * scale * weight_a, b * scale * weight_b
    if kind != "in place":
        place = ((batch * tokens + token) * heads + head) * (2 * half) + column
    tl.store(p_to + place, (a * cos - b * sin).to(p_to.dtype.element_ty), mask=mask)
    tl.store(p_to + place + half, (b * cos + a * sin).to(p_to.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["tokens", "groups"])
def _rope(  # type: ignore[no-untyped-def]
    p_q_to,
    p_k_to,
    p_q,
    p_k,
    p_weight_q,
    p_weight_k,
    p_cos,
    p_sin,
    tokens,
    groups,
    q_batch,
    q_token,
    q_head,
    k_batch,
    k_token,
    k_head,
    angle_batch,
    angle_token,
    heads: tl.constexpr,
    kv_heads: tl.constexpr,
    half: tl.constexpr,
    eps: tl.constexpr,
    kind: tl.constexpr,
    b_hq: tl.constexpr,
    b_hk: tl.constexpr,
    b_r: tl.constexpr,
    b_p: tl.constexpr,
):
    """q's tiles of a group of tokens, then k's of the same: the angles that both read are in the cache by then."""
    q_wide: tl.constexpr = (heads + b_hq - 1) // b_hq
    k_wide: tl.constexpr = (kv_heads + b_hk - 1) // b_hk
    span: tl.constexpr = b_r // (b_hq if b_hq < b_hk else b_hk)
    q_tiles: tl.constexpr = span // (b_r // b_hq) * q_wide
    k_tiles: tl.constexpr = span // (b_r // b_hk) * k_wide
    group, tile = tl.program_id(0) // (q_tiles + k_tiles), tl.program_id(0) % (q_tiles + k_tiles)
    batch, first = group // groups, group % groups * span
    if tile < q_tiles:
        token, head = first + tile // q_wide * (b_r // b_hq), tile % q_wide * b_hq
        _turn(p_q_to, p_q, p_weight_q, p_cos, p_sin, batch, token, head, tokens, q_batch, q_token, q_head,
              angle_batch, angle_token, heads, half, eps, kind, b_hq, b_r, b_p)  # fmt: skip
    else:
        token, head = first + (tile - q_tiles) // k_wide * (b_r // b_hk), (tile - q_tiles) % k_wide * b_hk
        _turn(p_k_to, p_k, p_weight_k, p_cos, p_sin, batch, token, head, tokens, k_batch, k_token, k_head,
              angle_batch, angle_token, kv_heads, half, eps, kind, b_hk, b_r, b_p)  # fmt: skip


@triton.jit
def _share(  # type: ignore[no-untyped-def]
    p_dx,
    p_dweight,
    p_dy,
    p_x,
    p_weight,
    p_cos,
    p_sin,
    share,
    shares,
    batches,
    tokens,
    dy_batch,
    dy_token,
    dy_head,
    x_batch,
    x_token,
    x_head,
    angle_batch,
    angle_token,
    heads: tl.constexpr,
    half: tl.constexpr,
    eps: tl.constexpr,
    b_h: tl.constexpr,
    b_r: tl.constexpr,
    b_p: tl.constexpr,
):
    """Every shares-th tile of q or of k: the gradient of its rows, and what they add to the weight's."""
    wide: tl.constexpr = (heads + b_h - 1) // b_h
    high = tl.cdiv(tokens, b_r // b_h)
    column = tl.arange(0, b_p)[None, :]
    weight_a, weight_b = _pairs(p_weight, column, column < half, half)
    dweight_a = tl.zeros((b_r, b_p), tl.float32)
    dweight_b = tl.zeros((b_r, b_p), tl.float32)
    for tile in range(share, batches * high * wide, shares):
        where = tile // wide
        batch, token, head, m_row = _rows(
            where // high, where % high * (b_r // b_h), tile % wide * b_h, tokens, heads, b_h, b_r
        )
        mask = m_row & (column < half)
        cos, sin = _angles(p_cos, p_sin, batch, token, mask, angle_batch, angle_token, column)
        a, b = _pairs(p_x, batch * x_batch + token * x_token + head * x_head + column, mask, half)
        up_a, up_b = _pairs(p_dy, batch * dy_batch + token * dy_token + head * dy_head + column, mask, half)
        back_a, back_b = up_a * cos + up_b * sin, up_b * cos - up_a * sin
        scale = tl.rsqrt(tl.sum(a * a + b * b, 1) / (2 * half) + eps)[:, None]
        a, b = a * scale, b * scale
        dweight_a += back_a * a
        dweight_b += back_b * b
        back_a, back_b = back_a * weight_a, back_b * weight_b
        along = (tl.sum(back_a * a + back_b * b, 1) / (2 * half))[:, None]
        place = ((batch * tokens + token) * heads + head) * (2 * half) + column
        tl.store(p_dx + place, (scale * (back_a - a * along)).to(p_dx.dtype.element_ty), mask=mask)
        tl.store(p_dx + place + half, (scale * (back_b - b * along)).to(p_dx.dtype.element_ty), mask=mask)
    pair = tl.arange(0, b_p)
    tl.store(p_dweight + pair, tl.sum(dweight_a, 0), mask=pair < half)
    tl.store(p_dweight + half + pair, tl.sum(dweight_b, 0), mask=pair < half)


@triton.jit(do_not_specialize=["q_shares", "k_shares", "batches", "tokens"])
def _norm_backward(  # type: ignore[no-untyped-def]
    p_dq,
    p_dk,
    p_dweight,
    p_dq_to,
    p_dk_to,
    p_q,
    p_k,
    p_weight_q,
    p_weight_k,
    p_cos,
    p_sin,
    q_shares,
    k_shares,
    batches,
    tokens,
    dq_batch,
    dq_token,
    dq_head,
    dk_batch,
    dk_token,
    dk_head,
    q_batch,
    q_token,
    q_head,
    k_batch,
    k_token,
    k_head,
    angle_batch,
    angle_token,
    heads: tl.constexpr,
    kv_heads: tl.constexpr,
    half: tl.constexpr,
    eps: tl.constexpr,
    b_hq: tl.constexpr,
    b_hk: tl.constexpr,
    b_r: tl.constexpr,
    b_p: tl.constexpr,
):
    program = tl.program_id(0)
    p_dweight += program * 2 * half
    if program < q_shares:
        _share(p_dq, p_dweight, p_dq_to, p_q, p_weight_q, p_cos, p_sin, program, q_shares, batches, tokens,
               dq_batch, dq_token, dq_head, q_batch, q_token, q_head, angle_batch, angle_token,
               heads, half, eps, b_hq, b_r, b_p)  # fmt: skip
    else:
        _share(p_dk, p_dweight, p_dk_to, p_k, p_weight_k, p_cos, p_sin, program - q_shares, k_shares, batches,
               tokens, dk_batch, dk_token, dk_head, k_batch, k_token, k_head, angle_batch, angle_token,
               kv_heads, half, eps, b_hk, b_r, b_p)  # fmt: skip


@triton.jit(do_not_specialize=["q_shares", "k_shares"])
def _total(p_dweight_q, p_dweight_k, p_dweight, q_shares, k_shares, width, b_r: tl.constexpr, b_k: tl.constexpr):  # type: ignore[no-untyped-def]
    """Sums the shares' rows of p_dweight, q's and then k's, in their order."""
    column = tl.program_id(0) * b_k + tl.arange(0, b_k)
    ours = tl.program_id(1) == 0
    first = tl.where(ours, 0, q_shares)
    last = tl.where(ours, q_shares, q_shares + k_shares)
    total = tl.zeros((b_r, b_k), tl.float32)
    for start in range(first, last, b_r):
        row = start + tl.arange(0, b_r)[:, None]
        mask = (row < last) & (column < width)[None, :]
        total += tl.load(p_dweight + row * width + column[None, :], mask=mask, other=0.0)
    result = tl.sum(total, 0)
    if ours:
        tl.store(p_dweight_q + column, result.to(p_dweight_q.dtype.element_ty), mask=column < width)
    else:
        tl.store(p_dweight_k + column, result.to(p_dweight_k.dtype.element_ty), mask=column < width)
