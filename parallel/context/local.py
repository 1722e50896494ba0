"""Attention within one rank: cp is 1, and every key is at hand."""

from torch import Tensor

from farspan.kernels.softmax_attention import attend


class Local:
    """The runtime that mixers receive: `attend` spans the whole sequence."""

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        causal: bool,
        window: int | None = None,
        cu_seqlens: Tensor | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """q: B T H K, k and v: B T Hkv K -> B T H K; see `farspan.kernels.softmax_attention.attend`."""
        out, _ = attend(q, k, v, causal=causal, window=window, cu_seqlens=cu_seqlens, softcap=softcap, sinks=sinks)
        return out
