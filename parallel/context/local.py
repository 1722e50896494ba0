"""Attention within one rank: cp is 1, and every key is at hand."""

from collections.abc import Mapping

import torch
from torch import Tensor

from farspan.kernels.softmax_attention import attend
from farspan.parallel.context.shard import Batch, Documents


class Local:
    """The runtime of cp = 1: `attend` spans the whole sequence, and `cut` takes nothing away."""

    rank, ranks = 0, 1

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        causal: bool,
        window: int | None = None,
        documents: Documents,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """q: B T H K, k and v: B T Hkv K -> B T H K; see `farspan.kernels.softmax_attention.attend`."""
        bounds = documents.cu_seqlens
        out, _ = attend(q, k, v, causal=causal, window=window, cu_seqlens=bounds, softcap=softcap, sinks=sinks)
        if documents.prefix is None or not causal:
            return out
        inside = documents.prefix
        parts = (x.flatten(0, 1)[inside].unsqueeze(0) for x in (q, k, v))  # 1 P H K: the prefixes end to end
        bounds = documents.prefix_cu_seqlens
        both_ways, _ = attend(*parts, causal=False, cu_seqlens=bounds, softcap=softcap, sinks=sinks)
        return out.flatten(0, 1).index_copy(0, inside, both_ways[0]).view_as(out)

    def cut(self, batch: Batch) -> Batch:
        """This rank's part of a batch: all of it."""
        return batch

    def find(self, batch: Batch, at: Tensor) -> tuple[Tensor, Tensor]:
        """Places of row 0 of a batch among this rank's tokens, and whether they are here."""
        return at, torch.ones_like(at, dtype=torch.bool)

    def example(self, rows: int, length: int) -> Documents:
        """Rows of one document each, of which each rank holds rows·length tokens: to measure a layer with."""
        return Documents()

    def explain(self) -> str:
        """What was picked and why: there is nothing to pick."""
        return ""

    def chosen(self) -> dict[str, str]:
        """What was picked."""
        return {}

    def replay(self, chosen: Mapping[str, str]) -> None:
        """Picks what was picked before."""
