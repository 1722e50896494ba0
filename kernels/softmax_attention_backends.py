"""Every attention backend is a pair: forward gives (out, lse), backward takes them back, and so a softmax can be cut.

A backend sees only what `trim` leaves: non-empty tensors in which every query sees at least one key. Layout is B T H K
throughout; lse is B H T, natural logarithm. None of these functions knows autograd.
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby, pairwise
from typing import Protocol

import torch
from torch import Tensor

from farspan.kernels.softmax_attention_mask import Mask, Part, document_bounds, tiles, trim, visible

aten = torch.ops.aten


def lse_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def last_dense(x: Tensor) -> Tensor:
    # aten's kernels read the last axis with stride 1; the CPU one silently returns wrong numbers otherwise.
    return x if x.stride(-1) == 1 else x.contiguous()


def heads_first(x: Tensor) -> Tensor:
    return last_dense(x).transpose(1, 2)


def tokens_first(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous()


def flat(x: Tensor) -> Tensor:
    """B T H K -> B*T H K."""
    return last_dense(x).flatten(0, 1)


def flat_lse(lse: Tensor) -> Tensor:
    """B H T -> H B*T."""
    return lse.transpose(0, 1).flatten(1).contiguous()


def rows_lse(lse: Tensor, batch: int) -> Tensor:
    """H B*T -> B H T."""
    return lse.unflatten(1, (batch, -1)).transpose(0, 1).contiguous()


class Backend(Protocol):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> tuple[Tensor, Tensor]: ...

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: Mask
    ) -> tuple[Tensor, Tensor, Tensor]: ...


class Math:
    """Plain torch over strips of queries: bounded memory, every option, every dtype, at least fp32 inside."""

    elements = 1 << 24  # scores alive at once

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> tuple[Tensor, Tensor]:
        if mask.cu_seqlens is not None:
            documents, mask = self._documents(q, mask)
            out, lse = self._forward(flat(q)[None], flat(k)[None], flat(v)[None], mask, documents)
            return out.view(*q.shape[:-1], v.shape[-1]), rows_lse(lse[0], q.shape[0])
        return self._forward(q, k, v, mask, None)

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        mask: Mask,
        dlse: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        # d lse / d score is the probability itself, so a gradient that arrives through lse only shifts delta.
        delta = (dout.to(lse.dtype) * out).sum(-1).transpose(1, 2)  # B H T
        delta = delta if dlse is None else delta - dlse
        if mask.cu_seqlens is not None:
            documents, mask = self._documents(q, mask)
            dout, query, key, value = (flat(x)[None] for x in (dout, q, k, v))
            grads = self._backward(dout, query, key, value, flat_lse(lse)[None], flat_lse(delta)[None], mask, documents)
            return grads[0].view_as(q), grads[1].view(k.shape), grads[2].view(v.shape)
        return self._backward(dout, q, k, v, lse, delta, mask, None)

    @staticmethod
    def _documents(q: Tensor, mask: Mask) -> tuple[Tensor, Mask]:
        """Document number of each token; no document outgrows a row, and so a row's length bounds the window."""
        assert mask.cu_seqlens is not None
        rows, length = q.shape[:2]
        if q.device.type == "cpu":
            document_bounds(mask.cu_seqlens, rows * length, length)
        documents = torch.searchsorted(mask.cu_seqlens, torch.arange(rows * length, device=q.device), right=True)
        window = min(mask.window or length, length) if mask.causal else None
        return documents, replace(mask, window=window, cu_seqlens=None)

    def _strips(self, q: Tensor, k: Tensor, mask: Mask) -> Iterator[Part]:
        reach = k.shape[1] if mask.window is None else min(k.shape[1], 2 * mask.window)
        rows = max(16, self.elements // (q.shape[0] * q.shape[2] * reach))
        return tiles(mask, q.shape[1], k.shape[1], min(rows, reach))

    @staticmethod
    def _grouped(x: Tensor, groups: int, dtype: torch.dtype) -> Tensor:
        """B T H K -> B Hkv G*T K: the query heads of one key head become more rows of it, and no key is repeated."""
        return x.to(dtype).unflatten(2, (groups, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3)

    @staticmethod
    def _ungrouped(x: Tensor, t: int) -> Tensor:
        """B Hkv G*T K -> B T H K."""
        return x.unflatten(2, (-1, t)).flatten(1, 2).transpose(1, 2)

    @staticmethod
    def _scores(
        q: Tensor, k: Tensor, part: Part, scale: float, documents: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Masked scores B Hkv G*T S, and the slope of the soft cap."""
        score, slope = (q @ k.mT) * scale, None
        if part.mask.softcap is not None:
            squashed = torch.tanh(score / part.mask.softcap)
            score, slope = squashed * part.mask.softcap, 1 - squashed * squashed
        t, s = part.rows.stop - part.rows.start, part.keys.stop - part.keys.start
        seen = visible(part.mask, t, s, q.device)
        if documents is not None:
            same = documents[part.rows, None] == documents[part.keys]
            seen = same if seen is None else seen & same
        if seen is not None:
            score.unflatten(2, (-1, t)).masked_fill_(~seen, -torch.inf)
        return score, slope

    def _forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, documents: Tensor | None) -> tuple[Tensor, Tensor]:
        dtype, scale, groups = lse_dtype(q.dtype), mask.scale_of(q), k.shape[2]
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
        lse = q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=dtype)
        key, value = self._grouped(k, groups, dtype), self._grouped(v, groups, dtype)
        for part in self._strips(q, k, mask):
            query = self._grouped(q[:, part.rows], groups, dtype)
            score, _ = self._scores(query, key[:, :, part.keys], part, scale, documents)
            total = score.logsumexp(-1, keepdim=True)
            weighted = (score - total).exp_() @ value[:, :, part.keys]
            t = part.rows.stop - part.rows.start
            out[:, part.rows] = self._ungrouped(weighted, t)
            lse[:, :, part.rows] = self._ungrouped(total, t).squeeze(-1).transpose(1, 2)
        return out, lse

    def _backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lse: Tensor,
        delta: Tensor,
        mask: Mask,
        documents: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        dtype, scale, groups = lse.dtype, mask.scale_of(q), k.shape[2]
        key, value = self._grouped(k, groups, dtype), self._grouped(v, groups, dtype)
        dq, dkey, dvalue = q.new_empty(q.shape), torch.zeros_like(key), torch.zeros_like(value)
        for part in self._strips(q, k, mask):
            rows, keys = part.rows, part.keys
            query, grad = self._grouped(q[:, rows], groups, dtype), self._grouped(dout[:, rows], groups, dtype)
            total, shift = (
                self._grouped(x[:, :, rows].transpose(1, 2)[..., None], groups, dtype) for x in (lse, delta)
            )
            score, slope = self._scores(query, key[:, :, keys], part, scale, documents)
            weight = (score - total).exp_()
            dvalue[:, :, keys] += weight.mT @ grad
            dscore = weight.mul_(grad @ value[:, :, keys].mT - shift).mul_(scale)
            dscore = dscore if slope is None else dscore * slope
            dq[:, rows] = self._ungrouped(dscore @ key[:, :, keys], rows.stop - rows.start)
            dkey[:, :, keys] += dscore.mT @ query
        return dq, dkey.transpose(1, 2).to(k.dtype).contiguous(), dvalue.transpose(1, 2).to(v.dtype).contiguous()


class Cpu:
    """aten's CPU flash attention: groups heads itself, is causal from the top left, takes other masks as a bias."""

    strip = 256  # queries per call where a bias is needed: bounds the bias and lets a window skip keys

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> tuple[Tensor, Tensor]:
        if mask.cu_seqlens is None:
            return self._forward(q, k, v, mask)
        out, lse = q.new_empty(q.shape), q.new_empty(q.shape[2], q.shape[0] * q.shape[1], dtype=lse_dtype(q.dtype))
        flat_out, (query, key, value) = out.flatten(0, 1), (flat(x) for x in (q, k, v))
        for tokens, shape, part in self._documents(q, mask):
            pieces = tuple(x[tokens].unflatten(0, shape) for x in (query, key, value))
            piece, total = self._forward(pieces[0], pieces[1], pieces[2], part)
            flat_out[tokens], lse[:, tokens] = piece.flatten(0, 1), flat_lse(total)
        return out, rows_lse(lse, q.shape[0])

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: Mask
    ) -> tuple[Tensor, Tensor, Tensor]:
        if mask.cu_seqlens is None:
            return self._backward(dout, q, k, v, out, lse, mask)
        grads = tuple(x.new_empty(x.shape) for x in (q, k, v))
        inputs, totals = [flat(x) for x in (dout, q, k, v, out)], flat_lse(lse)
        for tokens, shape, part in self._documents(q, mask):
            total = totals[:, tokens].unflatten(1, shape).transpose(0, 1)
            grad, query, key, value, result = (x[tokens].unflatten(0, shape) for x in inputs)
            pieces = self._backward(grad, query, key, value, result, total, part)
            for whole, piece in zip(grads, pieces, strict=True):
                whole.flatten(0, 1)[tokens] = piece.flatten(0, 1)
        return grads[0], grads[1], grads[2]

    @staticmethod
    def _documents(q: Tensor, mask: Mask) -> Iterator[tuple[slice, tuple[int, int], Mask]]:
        """Runs of neighbouring documents of one length, as (tokens, (documents, length), mask): a run is one batch."""
        assert mask.cu_seqlens is not None
        bounds, start = document_bounds(mask.cu_seqlens, q.shape[0] * q.shape[1], q.shape[1]), 0
        lengths = (b - a for a, b in pairwise(bounds) if b > a)
        for length, run in groupby(lengths):
            count = sum(1 for _ in run)
            part = trim(replace(mask, cu_seqlens=None), length, length)
            assert part is not None
            yield slice(start, start + count * length), (count, length), part.mask
            start += count * length

    @staticmethod
    def _bias(q: Tensor, part: Part) -> Tensor | None:
        t, s = part.rows.stop - part.rows.start, part.keys.stop - part.keys.start
        seen = visible(part.mask, t, s, q.device)
        return None if seen is None else q.new_zeros(t, s).masked_fill_(~seen, -torch.inf)

    def _forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> tuple[Tensor, Tensor]:
        scale = mask.scale_of(q)
        query, key, value = heads_first(q), heads_first(k), heads_first(v)
        if mask.plain:
            forward = aten._scaled_dot_product_flash_attention_for_cpu
            out, lse = forward(query, key, value, 0.0, mask.causal, scale=scale)
            return tokens_first(out), lse.contiguous()
        out, lse = q.new_empty(q.shape), q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=lse_dtype(q.dtype))
        for part in tiles(mask, q.shape[1], k.shape[1], self.strip):
            piece, lse[:, :, part.rows] = aten._scaled_dot_product_flash_attention_for_cpu(
                query[:, :, part.rows],
                key[:, :, part.keys],
                value[:, :, part.keys],
                attn_mask=self._bias(q, part),
                scale=scale,
            )
            out[:, part.rows] = piece.transpose(1, 2)
        return out, lse

    def _backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: Mask
    ) -> tuple[Tensor, Tensor, Tensor]:
        scale, backward = mask.scale_of(q), aten._scaled_dot_product_flash_attention_for_cpu_backward
        grad, query, key, value, result = (heads_first(x) for x in (dout, q, k, v, out))
        if mask.plain:
            dq, dk, dv = backward(grad, query, key, value, result, lse, 0.0, mask.causal, scale=scale)
            return tokens_first(dq), tokens_first(dk), tokens_first(dv)
        dq, dk, dv = q.new_empty(q.shape), *(x.new_zeros(x.shape, dtype=lse.dtype) for x in (k, v))
        for part in tiles(mask, q.shape[1], k.shape[1], self.strip):
            rows, keys = part.rows, part.keys
            pieces = backward(
                grad[:, :, rows],
                query[:, :, rows],
                key[:, :, keys],
                value[:, :, keys],
                result[:, :, rows],
                lse[:, :, rows],
                0.0,
                False,
                attn_mask=self._bias(q, part),
                scale=scale,
            )
            dq[:, rows] = pieces[0].transpose(1, 2)
            dk[:, keys] += pieces[1].transpose(1, 2)
            dv[:, keys] += pieces[2].transpose(1, 2)
        return dq, dk.to(k.dtype), dv.to(v.dtype)
