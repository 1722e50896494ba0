"""Two attention backends come with torch on NVIDIA: cuDNN, dense only and fastest on Hopper, and FlashAttention 2."""

import torch
from torch import Tensor

from farspan.kernels.softmax_attention_backends import flat, flat_lse, heads_first, last_dense, rows_lse, tokens_first
from farspan.kernels.softmax_attention_mask import Mask, bottom_right

aten = torch.ops.aten


class Cudnn:
    """Full, or causal with T = S. It groups heads itself; its lse is B H T 1; its backward is not deterministic."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> tuple[Tensor, Tensor]:
        out, lse, *_ = aten._scaled_dot_product_cudnn_attention(
            heads_first(q), heads_first(k), heads_first(v), None, True, 0.0, mask.causal, False, scale=mask.scale_of(q)
        )
        return tokens_first(out), lse.view(q.shape[0], q.shape[2], q.shape[1]).contiguous()

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: Mask
    ) -> tuple[Tensor, Tensor, Tensor]:
        # Seed and offset are read only under dropout; undefined cu_seqlens mean dense.
        seed, offset = (torch.empty((), dtype=torch.int64, device=q.device) for _ in range(2))
        dq, dk, dv = aten._scaled_dot_product_cudnn_attention_backward(
            *(heads_first(x) for x in (dout, q, k, v, out)),
            lse.contiguous().unsqueeze(-1),
            seed,
            offset,
            None,
            None,
            None,
            q.shape[1],
            k.shape[1],
            0.0,
            mask.causal,
            scale=mask.scale_of(q),
        )
        return tokens_first(dq), tokens_first(dk), tokens_first(dv)


class Flash:
    """torch's FlashAttention 2: groups heads itself; documents and windows, no soft cap. Its packed lse is H B*T."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> tuple[Tensor, Tensor]:
        t, s, bounds = q.shape[1], k.shape[1], mask.cu_seqlens
        causal, left, right = bottom_right(mask, t, s)
        query, key, value = (last_dense(x) if bounds is None else flat(x) for x in (q, k, v))
        out, lse, *_ = aten._flash_attention_forward(
            query,
            key,
            value,
            bounds,
            bounds,
            t,  # no document is longer than a row, and an upper bound is all the kernel needs
            s,
            0.0,
            causal,
            False,
            scale=mask.scale_of(q),
            window_size_left=left,
            window_size_right=right,
        )
        if bounds is None:
            return out.contiguous(), lse.contiguous()
        return out.reshape(q.shape), rows_lse(lse, q.shape[0])

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: Mask
    ) -> tuple[Tensor, Tensor, Tensor]:
        t, s, bounds = q.shape[1], k.shape[1], mask.cu_seqlens
        causal, left, right = bottom_right(mask, t, s)
        dq, dk, dv = aten._flash_attention_backward(
            *(last_dense(x) if bounds is None else flat(x) for x in (dout, q, k, v, out)),
            lse.contiguous() if bounds is None else flat_lse(lse),
            bounds,
            bounds,
            t,
            s,
            0.0,
            causal,
            torch.empty(2, dtype=torch.uint64, device=q.device),  # random state and its spare: read only under dropout
            torch.empty(0, dtype=torch.uint64, device=q.device),
            scale=mask.scale_of(q),
            window_size_left=left,
            window_size_right=right,
        )
        return dq.reshape(q.shape).contiguous(), dk.reshape(k.shape).contiguous(), dv.reshape(v.shape).contiguous()
