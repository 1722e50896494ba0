"""The flash-attn package (2.7 or newer) as an attention backend: what torch's own copy lacks is the soft cap."""

import torch
from flash_attn.flash_attn_interface import (
    _wrapped_flash_attn_backward,
    _wrapped_flash_attn_forward,
    _wrapped_flash_attn_varlen_backward,
    _wrapped_flash_attn_varlen_forward,
)
from torch import Tensor

from farspan.kernels.softmax_attention_backends import flat, flat_lse, last_dense, rows_lse
from farspan.kernels.softmax_attention_mask import Mask, bottom_right


class FlashAttn:
    """Dense and packed, causal, window, soft cap; B T H K as it is."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> tuple[Tensor, Tensor]:
        causal, left, right = bottom_right(mask, q.shape[1], k.shape[1])
        options = (0.0, mask.scale_of(q), causal, left, right, mask.softcap or 0.0, None, False)
        bounds = mask.cu_seqlens
        if bounds is None:
            out, lse, *_ = _wrapped_flash_attn_forward(last_dense(q), last_dense(k), last_dense(v), *options)
            return out.contiguous(), lse.contiguous()
        lengths = (bounds, bounds, q.shape[1], k.shape[1])
        out, lse, *_ = _wrapped_flash_attn_varlen_forward(flat(q), flat(k), flat(v), *lengths, *options)
        return out.reshape(q.shape), rows_lse(lse, q.shape[0])

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: Mask
    ) -> tuple[Tensor, Tensor, Tensor]:
        causal, left, right = bottom_right(mask, q.shape[1], k.shape[1])
        deterministic = torch.are_deterministic_algorithms_enabled()
        options = (0.0, mask.scale_of(q), causal, left, right, mask.softcap or 0.0, None, deterministic, None)
        dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
        bounds = mask.cu_seqlens
        if bounds is None:
            inputs = tuple(last_dense(x) for x in (dout, q, k, v, out))
            _wrapped_flash_attn_backward(*inputs, lse.contiguous(), dq, dk, dv, *options)
            return dq, dk, dv
        grads, lengths = tuple(x.flatten(0, 1) for x in (dq, dk, dv)), (bounds, bounds, q.shape[1], k.shape[1])
        inputs = tuple(flat(x) for x in (dout, q, k, v, out))
        _wrapped_flash_attn_varlen_backward(*inputs, flat_lse(lse), *grads, *lengths, *options)
        return dq, dk, dv
