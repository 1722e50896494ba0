"""Softmax attention with grouped queries (Vaswani et al., 2017; Ainslie et al., 2023)."""

from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor, nn

from farspan.kernels.fp8 import Coded
from farspan.kernels.random import Normal
from farspan.kernels.rope import qk_norm_rope, rope, rope_
from farspan.models.linear import Linear, Plain, together
from farspan.models.norm import RMSNorm
from farspan.models.rope import Rope
from farspan.parallel.context import Context, Runtime
from farspan.parallel.context.shard import Documents
from farspan.parallel.placement import Column, Placement, Row

Angles = tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class Softmax:
    """Attention within each document."""

    heads: int
    """Query heads."""
    kv_heads: int | None = None
    """Key and value heads, each shared by heads/kv_heads query heads; null: as many as `heads`."""
    head_dim: int | None = None
    """Channels of a head; null: width / heads."""
    rope: Rope | None = Rope()
    """Rotary positions; null: none."""
    qk_norm: bool = False
    """RMSNorm of each query and key before the rotation (Henry et al., 2020)."""
    window: int | None = None
    """A token sees itself and the window-1 before it; null: all before it."""
    softcap: float | None = None
    """Scores become softcap·tanh(score/softcap), as in Gemma 2."""
    sinks: bool = False
    """A learned logit a head that joins the softmax and carries no value (gpt-oss)."""
    causal: bool = True
    """A token sees itself and those before it; false: those after it as well, for data's objective kind: masked."""

    def __post_init__(self) -> None:
        for name in ("heads", "kv_heads", "head_dim", "window"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: must be at least 1")
        if self.kv_heads is not None and self.heads % self.kv_heads:
            raise ValueError(f"kv_heads={self.kv_heads}: must divide heads={self.heads}")
        if self.head_dim is not None and self.head_dim % 2 and self.rope is not None:
            raise ValueError(f"head_dim={self.head_dim}: must be even for rope; or set rope: null")
        if self.window is not None and not self.causal:
            raise ValueError(f"window={self.window}: looks back, and causal=False both ways; set window: null")
        if self.softcap is not None and self.softcap <= 0:
            raise ValueError(f"softcap={self.softcap}: must be positive; null for none")

    def key_dim(self, width: int) -> int:
        return self.head_dim or width // self.heads

    def rotation(self, width: int) -> tuple[Rope, int] | None:
        """The rotary embedding that this mixer wants angles of, and for how many channels."""
        return None if self.rope is None else (self.rope, self.key_dim(width))

    def problems(self, width: int) -> list[str]:
        """What keeps this attention from a model of `width`."""
        if self.head_dim is None and width % self.heads:
            return [f"heads={self.heads}: must divide width={width}; or give head_dim"]
        if self.rope is not None and self.key_dim(width) % 2:
            return [f"heads={self.heads}: leaves head_dim={self.key_dim(width)}, odd; rope needs it even"]
        return []

    def tensor_problems(self, tp: int) -> list[str]:
        """What keeps the heads from being dealt out to `tp` ranks."""
        kv_heads = self.kv_heads or self.heads
        if self.heads % tp:
            return [f"heads={self.heads}: must be a multiple of parallel.tp={tp}"]
        if kv_heads % tp and tp % kv_heads:
            return [f"kv_heads={kv_heads}: must be a multiple or a divisor of parallel.tp={tp}"]
        return []

    def context_problems(self, context: Context, cp: int, tp: int) -> list[str]:
        """What keeps the heads of one rank of tp from being spread over `cp` ranks."""
        kv_heads = self.kv_heads or self.heads
        return [f"parallel.context.{p}" for p in context.problems(cp, self.heads // tp, max(1, kv_heads // tp))]

    def linear_problems(self, linear: Linear, width: int, tp: int) -> list[str]:
        """What keeps the projections, cut over `tp` ranks, from being built as `linear`."""
        inner, shared = (heads * self.key_dim(width) for heads in (self.heads, self.kv_heads or self.heads))
        shared = max(shared // tp, self.key_dim(width))  # fewer key heads than ranks are held more than once
        sizes = {"to_q": (width, inner // tp), "to_k": (width, shared), "to_out": (inner // tp, width)}
        return [found for name, size in sizes.items() for found in linear.problems(*size, name)]

    def build(
        self,
        width: int,
        depth: int,
        eps: float,
        context: Runtime,
        linear: Linear = Plain(),  # noqa: B008 - frozen
    ) -> "SoftmaxMixer":
        return SoftmaxMixer(self, width, depth, eps, context, linear)


class SoftmaxMixer(nn.Module):
    def __init__(self, config: Softmax, width: int, depth: int, eps: float, context: Runtime, linear: Linear) -> None:
        super().__init__()
        self.config, self.depth, self.context, self.linear = config, depth, context, linear
        self.key_dim = config.key_dim(width)
        inner, shared = config.heads * self.key_dim, (config.kv_heads or config.heads) * self.key_dim
        self.to_q = linear.build(width, inner)
        self.to_k = linear.build(width, shared)
        self.to_v = linear.build(width, shared)
        self.to_out = linear.build(inner, width)
        self.norm_q = RMSNorm(self.key_dim, eps) if config.qk_norm else None
        self.norm_k = RMSNorm(self.key_dim, eps) if config.qk_norm else None
        self.sinks = nn.Parameter(torch.empty(config.heads)) if config.sinks else None

    @property
    def reads_codes(self) -> bool:
        """Whether `forward` takes the codes of x as well, and reads nothing else of it."""
        return self.linear.reads_codes

    def initial(self) -> dict[str, Normal]:
        into = Normal(0.0, self.to_q.in_features**-0.5)
        out = Normal(0.0, self.to_out.in_features**-0.5 / sqrt(2 * self.depth))
        sinks = {"sinks": Normal(0.0, 0.0)} if self.sinks is not None else {}
        return {"to_q.weight": into, "to_k.weight": into, "to_v.weight": into, "to_out.weight": out, **sinks}

    def placements(self) -> dict[str, Placement]:
        """Whole heads; where kv heads are fewer than ranks, several ranks hold the same one."""
        keys: Placement = Column(units=self.config.kv_heads or self.config.heads)
        sinks: dict[str, Placement] = {"sinks": Column()} if self.sinks is not None else {}
        queries = {"to_q.weight": Column(units=self.config.heads), "to_out.weight": Row()}
        return {**queries, "to_k.weight": keys, "to_v.weight": keys, **sinks}

    def flops(self, lengths: tuple[int, ...]) -> int:
        """Forward operations for documents of these lengths: projections, and two products for each visible pair."""
        weights = 2 * (self.to_q.weight.numel() + self.to_k.weight.numel())
        config = self.config
        pairs = sum(_pairs(length, config.window) if config.causal else length**2 for length in lengths)
        return 2 * sum(lengths) * weights + 4 * pairs * config.heads * self.key_dim

    def forward(self, x: Tensor | Coded, angles: Angles | None, documents: Documents) -> Tensor:
        joined = together(x, self.to_q, self.to_k, self.to_v)
        q, k, v = (y.unflatten(-1, (-1, self.key_dim)) for y in joined)  # B T H K, and twice B T Hkv K
        q, k = self.placed(q, k, angles)
        config = self.config
        out = self.context.attend(
            q,
            k,
            v,
            causal=config.causal,
            window=config.window,
            documents=documents,
            softcap=config.softcap,
            sinks=self.sinks,
        )
        mixed: Tensor = self.to_out(out.flatten(-2))  # B T D
        return mixed

    def placed(self, q: Tensor, k: Tensor, angles: Angles | None) -> tuple[Tensor, Tensor]:
        """q B T H K and k B T Hkv K, normed and turned by their places; without gradients q and k are overwritten."""
        if self.norm_q is not None and self.norm_k is not None:
            if angles is None:
                return self.norm_q(q), self.norm_k(k)
            return qk_norm_rope(q, k, self.norm_q.weight, self.norm_k.weight, self.norm_q.eps, *angles)
        if angles is None:
            return q, k
        if torch.is_grad_enabled():
            return rope(q, k, *angles)
        rope_(q, k, *angles)
        return q, k


def _pairs(length: int, window: int | None) -> int:
    """How many (query, key) pairs a causal document of this length has, under a window."""
    seen = length if window is None else min(window, length)
    return seen * (seen + 1) // 2 + (length - seen) * seen
