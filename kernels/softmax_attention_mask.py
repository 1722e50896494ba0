"""Who sees whom in attention: one causal rule with an explicit offset, and how a block is cut down to what meets."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Mask:
    """Which keys a query sees, and how scores are formed.

    Query i of a block sees key j iff j <= i + offset (causal) and j > i + offset - window (window), where
    offset = global start of q - global start of k. cu_seqlens [N + 1] int32 cuts the flattened B*T tokens into
    documents of at most T tokens that never see each other; it needs T = S and offset = 0.
    scale None means K ** -0.5; softcap c turns a score s into c * tanh(s / c).
    Errors: ValueError for a window without causal or below 1, a softcap not above 0, an offset beside cu_seqlens.
    """

    causal: bool
    window: int | None = None
    offset: int = 0
    scale: float | None = None
    softcap: float | None = None
    cu_seqlens: Tensor | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if self.window is not None and not self.causal:
            raise ValueError(f"attention: window={self.window} needs causal=True; pass causal=True or window=None")
        if self.window is not None and self.window < 1:
            raise ValueError(f"attention: window={self.window} must be at least 1, the token itself; None is no window")
        if self.softcap is not None and self.softcap <= 0:
            raise ValueError(f"attention: softcap={self.softcap} must be positive; None means no cap")
        if self.cu_seqlens is not None and self.offset != 0:
            raise ValueError(f"attention: offset={self.offset} beside cu_seqlens; cut blocks by document, or leave 0")

    @property
    def plain(self) -> bool:
        """Full, or causal from the first query and key on: what an is_causal flag counted from the top left says."""
        return self.window is None and self.offset == 0

    def scale_of(self, q: Tensor) -> float:
        return self.scale if self.scale is not None else 1.0 / math.sqrt(q.shape[-1])


class Part(NamedTuple):
    """The rows and keys of a block that matter, and the mask between them."""

    rows: slice
    keys: slice
    mask: Mask


def trim(mask: Mask, t: int, s: int) -> Part | None:
    """Cuts t queries and s keys down to those that meet; None if none do. The mask left is in its simplest form.

    Afterwards offset >= 0, s <= t + offset, and every query sees a key: FlashAttention's windows can say no more.
    """
    if t <= 0 or s <= 0:
        return None
    if not mask.causal:
        return Part(slice(0, t), slice(0, s), mask if mask.offset == 0 else replace(mask, offset=0))
    first, last = max(0, -mask.offset), t
    low = 0
    if mask.window is not None:
        last = min(t, s - 1 - mask.offset + mask.window)
        low = max(0, first + mask.offset - mask.window + 1)
    high = min(s, last + mask.offset)
    if last <= first or high <= low:
        return None
    offset = mask.offset + first - low
    window = None if mask.window is None or mask.window >= last - first + offset else mask.window
    causal = window is not None or offset < high - low - 1
    if (causal, window, offset) != (mask.causal, mask.window, mask.offset):
        mask = replace(mask, causal=causal, window=window, offset=offset if causal else 0)
    return Part(slice(first, last), slice(low, high), mask)


def tiles(mask: Mask, t: int, s: int, rows: int) -> Iterator[Part]:
    """The block as strips of at most `rows` queries, each with only the keys that it sees."""
    for start in range(0, t, rows):
        part = trim(replace(mask, offset=mask.offset + start), min(rows, t - start), s)
        if part is not None:
            yield Part(slice(part.rows.start + start, part.rows.stop + start), part.keys, part.mask)


def visible(mask: Mask, t: int, s: int, device: torch.device) -> Tensor | None:
    """T S bool, or None where everything is seen."""
    if not mask.causal:
        return None
    i = torch.arange(t, device=device)[:, None] + mask.offset
    j = torch.arange(s, device=device)
    return j <= i if mask.window is None else (j <= i) & (j > i - mask.window)


def bottom_right(mask: Mask, t: int, s: int) -> tuple[bool, int, int]:
    """(is_causal, left, right) as FlashAttention counts: query i is aligned with key i + s - t, and -1 is no limit."""
    right = mask.offset - (s - t)
    if not mask.causal:
        return False, -1, -1
    if mask.window is None:
        return right == 0, -1, right
    return False, mask.window - 1 - right, -1 if mask.offset >= s - 1 else right


def document_bounds(cu_seqlens: Tensor, tokens: int, longest: int) -> list[int]:
    """Bounds on the host. Only for CPU tensors: on a GPU this would wait for the device."""
    bounds = cu_seqlens.tolist()
    lengths = [b - a for a, b in pairwise(bounds)]
    if not lengths or bounds[0] != 0 or bounds[-1] != tokens or min(lengths) < 0:
        raise ValueError(f"attention: cu_seqlens={bounds} must rise from 0 to B*T={tokens}; pad it with the last bound")
    if max(lengths) > longest:
        raise ValueError(
            f"attention: cu_seqlens has a document of {max(lengths)} > T={longest} tokens; use longer rows"
        )
    return bounds
