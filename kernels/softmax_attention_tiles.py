"""Attention between lists of tiles, the currency of context-parallel schedules: as few kernels as their shapes allow.

Tensors are token-major, without a batch: q T H K, k S Hkv K, v S Hkv V; lse H T. What a list of tiles needs at its
launch is worked out once from numbers on the host, so no call ever waits for the device.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from farspan.kernels.lse import add_
from farspan.kernels.softmax_attention import block_backward, block_forward, choose, has_cudnn_graphs
from farspan.kernels.softmax_attention_backends import lse_dtype
from farspan.kernels.softmax_attention_cuda import Pack, Piece, Span, Uploads, joined, varlen_backward, varlen_forward
from farspan.kernels.softmax_attention_mask import Mask, trim

__all__ = ["Tile", "Tiles", "tiles_backward", "tiles_forward", "tiles_ref"]


class Tile(NamedTuple):
    """Queries [row, row + rows) against keys [key, key + keys). Of a causal tile, query i sees key j iff
    j <= i + offset, and j > i + offset - window if there is a window; both count from the tile's corner."""

    row: int
    rows: int
    key: int
    keys: int
    offset: int


@dataclass(frozen=True)
class Tiles:
    """Tiles whose rows ascend and never overlap, and whose keys do neither; hashable, and caches how it is launched.

    scale None means K ** -0.5; softcap c turns a score s into c * tanh(s / c).
    Errors: ValueError for tiles that are empty, overlap or do not ascend, and for what `Mask` refuses.
    """

    tiles: tuple[Tile, ...]
    causal: bool
    window: int | None = None
    scale: float | None = None
    softcap: float | None = None

    def __post_init__(self) -> None:
        self.mask(0)
        for tile in self.tiles:
            if tile.rows < 1 or tile.keys < 1 or tile.row < 0 or tile.key < 0:
                raise ValueError(f"tiles: {tile} is empty or begins below 0; leave it out, or shift it")
        for a, b in pairwise(self.tiles):
            if a.row + a.rows > b.row or a.key + a.keys > b.key:
                raise ValueError(
                    f"tiles: {a}, {b} share rows or keys, or descend; sort them, or put what overlaps in another list"
                )

    def mask(self, offset: int) -> Mask:
        return Mask(causal=self.causal, window=self.window, offset=offset, scale=self.scale, softcap=self.softcap)

    @cached_property
    def rows(self) -> int:
        return sum(tile.rows for tile in self.tiles)

    @cached_property
    def keys(self) -> int:
        return sum(tile.keys for tile in self.tiles)

    @cached_property
    def pairs(self) -> int:
        """Visible (query, key) pairs."""
        return sum(_pairs(tile, self.causal, self.window) for tile in self.tiles)

    @cached_property
    def row_spans(self) -> tuple[Span, ...]:
        """Where the compact rows lie, tile by tile, neighbours joined."""
        return joined(Span(tile.row, tile.row + tile.rows) for tile in self.tiles)

    @cached_property
    def key_spans(self) -> tuple[Span, ...]:
        return joined(Span(tile.key, tile.key + tile.keys) for tile in self.tiles)

    def row_index(self, device: torch.device) -> slice | Tensor:
        """Places of the compact rows: a slice where they are one range, else int32 on `device`."""
        return self._uploads.index("rows", self.row_spans, device)

    def key_index(self, device: torch.device) -> slice | Tensor:
        """Places of the compact keys: a slice where they are one range, else int32 on `device`."""
        return self._uploads.index("keys", self.key_spans, device)

    @cached_property
    def _uploads(self) -> Uploads:
        return Uploads()

    @cached_property
    def even(self) -> tuple[int, int] | None:
        """(row step, key step) if the tiles are alike and evenly spaced, so that views make them one dense batch."""
        steps = {(b.row - a.row, b.key - a.key) for a, b in pairwise(self.tiles)}
        shapes = {(tile.rows, tile.keys, tile.offset) for tile in self.tiles}
        if len(shapes) != 1 or len(steps) > 1:
            return None
        return steps.pop() if steps else (self.rows, self.keys)

    @cached_property
    def packs(self) -> tuple[Pack, ...]:
        """The tiles as few calls of varlen kernels."""
        return _packs(self)

    @cached_property
    def squared(self) -> tuple[Pack, ...]:
        """`packs`, then what `Pack.squared` takes away from them; together they see what the tiles see."""
        halves = [pack.squared for pack in self.packs]
        return (*(square for square, _ in halves), *(band for _, bands in halves for band in bands))

    @cached_property
    def launches(self) -> dict[Hashable, str]:
        """How this list is launched, for each kind of tensors."""
        return {}

    @cached_property
    def alike(self) -> tuple[tuple[int, ...], ...]:
        """Numbers of the tiles that share a shape and an offset, group by group."""
        groups: dict[tuple[int, int, int], list[int]] = {}
        for i, tile in enumerate(self.tiles):
            groups.setdefault((tile.rows, tile.keys, tile.offset), []).append(i)
        return tuple(tuple(group) for group in groups.values())


def _pairs(tile: Tile, causal: bool, window: int | None) -> int:
    """Keys j < limit(i) summed over the queries, less those before the window: two sums of clamped integers."""
    if not causal:
        return tile.rows * tile.keys

    def below(n: int) -> int:  # of x < n, the sum of x clamped to [0, keys]
        inside = min(max(n, 0), tile.keys + 1)
        return inside * (inside - 1) // 2 + max(0, n - tile.keys - 1) * tile.keys

    end = tile.offset + 1
    count = below(end + tile.rows) - below(end)
    return count if window is None else count - below(end - window + tile.rows) + below(end - window)


def _packs(tiles: Tiles) -> tuple[Pack, ...]:
    """The tiles by band. A piece that an edge does not touch joins any band whose edge does not touch it either."""
    needs: list[tuple[int | None, int | None, Piece]] = []
    row_place = key_place = 0
    for tile in tiles.tiles:
        part = trim(tiles.mask(tile.offset), tile.rows, tile.keys)
        if part is not None:
            row, key = part.rows.start, part.keys.start
            t, s = part.rows.stop - row, part.keys.stop - key
            right = tile.offset + row - key - (s - t)
            left = -1 if tiles.window is None else tiles.window - 1 - right
            piece = Piece(tile.row + row, t, tile.key + key, s, row_place + row, key_place + key)
            cut_left = tiles.window is not None and left < s - 1
            needs.append((left if cut_left else None, right if tiles.causal and right < t - 1 else None, piece))
        row_place, key_place = row_place + tile.rows, key_place + tile.keys
    bands: dict[tuple[int | None, int | None], list[Piece]] = {}
    for left, right, piece in sorted(needs, key=lambda need: (need[0] is None) + (need[1] is None)):
        band = next((band for band in bands if _joins(left, right, piece, band)), (left, right))
        bands.setdefault(band, []).append(piece)
    return tuple(Pack(left, right, tuple(sorted(pieces))) for (left, right), pieces in bands.items())


def _joins(left: int | None, right: int | None, piece: Piece, band: tuple[int | None, int | None]) -> bool:
    fits_left = band[0] == left or (left is None and band[0] is not None and band[0] >= piece.keys - 1)
    fits_right = band[1] == right or (right is None and band[1] is not None and band[1] >= piece.rows - 1)
    return fits_left and fits_right


@torch.no_grad()
def tiles_forward(q: Tensor, k: Tensor, v: Tensor, tiles: Tiles) -> tuple[Tensor, Tensor]:
    """q T H K, k S Hkv K, v S Hkv V, of any strides with the last axis dense -> out R H V, lse H R of the tiles' rows.

    Rows stand as in the list; lse is fp32 (fp64 for fp64), natural log. Queries that see nothing have out 0, lse -inf.
    """
    _check(q, k, v, tiles)
    if not tiles.tiles:
        return q.new_zeros(0, q.shape[1], v.shape[2]), q.new_zeros(q.shape[1], 0, dtype=lse_dtype(q.dtype))
    forward = {"even": _forward_even, "groups": _forward_groups, "flash": _forward_flash, "cudnn": _forward_cudnn}
    return forward[_launch(q, k, v, tiles)](q, k, v, tiles)


@torch.no_grad()
def tiles_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, tiles: Tiles
) -> tuple[Tensor, Tensor, Tensor]:
    """dq R H K, dk C Hkv K, dv C Hkv V: the share of these tiles in the gradients of q, k, v.

    dout and out R H V and lse H R are those of the whole softmax, at the tiles' rows; q, k, v are what forward took.
    Summed over lists of tiles that cover a softmax the shares are the gradient.
    """
    _check(q, k, v, tiles)
    if not tiles.tiles:
        return q.new_zeros(0, *q.shape[1:]), k.new_zeros(0, *k.shape[1:]), v.new_zeros(0, *v.shape[1:])
    backward = {"even": _backward_even, "groups": _backward_groups, "flash": _backward_flash, "cudnn": _backward_cudnn}
    return backward[_launch(q, k, v, tiles)](dout, q, k, v, out, lse, tiles)


def _check(q: Tensor, k: Tensor, v: Tensor, tiles: Tiles) -> None:
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if not (q.dim() == k.dim() == v.dim() == 3) or k.shape[:2] != v.shape[:2] or q.shape[2] != k.shape[2]:
        raise ValueError(f"tiles: {shapes} do not fit; q is T H K, k is S Hkv K, v is S Hkv V")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1] != 0:
        raise ValueError(f"tiles: heads={q.shape[1]} must be a multiple of kv_heads={k.shape[1]}; change one")
    if tiles.tiles:
        last = tiles.tiles[-1]
        if last.row + last.rows > q.shape[0] or last.key + last.keys > k.shape[0]:
            raise ValueError(f"tiles: {last} ends beyond {shapes}; shift it, or pass the whole tensors")


def _launch(q: Tensor, k: Tensor, v: Tensor, tiles: Tiles) -> str:
    deterministic = torch.are_deterministic_algorithms_enabled()
    kind = (q.device, q.dtype, q.shape[1:], v.shape[1:], deterministic)
    if kind not in tiles.launches:
        tiles.launches[kind] = _choose_launch(q, k, v, tiles)
    return tiles.launches[kind]


def _choose_launch(q: Tensor, k: Tensor, v: Tensor, tiles: Tiles) -> str:
    """`even`: one dense batch. `groups`: a dense batch for each shape. `flash`, `cudnn`: a varlen call for each band.

    cuDNN's kernels run about 1.8 times as fast as FlashAttention 2's, so they take what they can: dense through torch,
    ragged through cudnn-frontend where that is installed. A ragged list is never cut into dense calls of cuDNN: every
    new length would build a graph, which takes longer than the attention. Reads shapes and settings, never values.
    """
    dense = "groups" if tiles.even is None else "even"
    full = Mask(causal=False, softcap=tiles.softcap)
    able = choose(q[None, :2], k[None, :2], v[None, :2], full)  # which kernels take such tensors at all
    if not q.is_cuda or able not in ("cudnn", "flash") or not tiles.packs:
        return dense
    if tiles.even is not None:
        query, key, value = _inputs_even(q, k, v, tiles)
        if choose(query, key, value, tiles.mask(tiles.tiles[0].offset)) == "cudnn":
            return dense
    if able == "cudnn" and has_cudnn_graphs() and all(pack.right in (None, 0) for pack in tiles.packs):
        return "cudnn"
    # FlashAttention takes an edge at or beyond the longest sequence for no edge.
    if any(pack.right is not None and pack.right >= pack.longest[1] for pack in tiles.packs):
        return dense
    return dense if tiles.even is not None else "flash"


def _batched(x: Tensor, start: int, size: int, step: int, count: int) -> Tensor:
    """Ranges of the first axis as a batch, T H K -> N t H K, without a copy."""
    return x[start : start + step * (count - 1) + size].unfold(0, size, step).movedim(-1, 1)


def _inputs_even(q: Tensor, k: Tensor, v: Tensor, tiles: Tiles) -> tuple[Tensor, Tensor, Tensor]:
    assert tiles.even is not None
    first, count, (row_step, key_step) = tiles.tiles[0], len(tiles.tiles), tiles.even
    query = _batched(q, first.row, first.rows, row_step, count)
    key, value = (_batched(x, first.key, first.keys, key_step, count) for x in (k, v))
    return query, key, value


def _forward_even(q: Tensor, k: Tensor, v: Tensor, tiles: Tiles) -> tuple[Tensor, Tensor]:
    query, key, value = _inputs_even(q, k, v, tiles)
    mask = tiles.mask(tiles.tiles[0].offset)
    out, lse = block_forward(query, key, value, mask, choose(query, key, value, mask))
    return out.flatten(0, 1), lse.transpose(0, 1).flatten(1)


def _backward_even(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, tiles: Tiles
) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = _inputs_even(q, k, v, tiles)
    mask, count = tiles.mask(tiles.tiles[0].offset), len(tiles.tiles)
    grad, result = (x.unflatten(0, (count, -1)) for x in (dout, out))
    total = lse.unflatten(1, (count, -1)).transpose(0, 1).contiguous()
    dq, dk, dv = block_backward(grad, query, key, value, result, total, mask, choose(query, key, value, mask))
    return dq.flatten(0, 1), dk.flatten(0, 1), dv.flatten(0, 1)


def _forward_groups(q: Tensor, k: Tensor, v: Tensor, tiles: Tiles) -> tuple[Tensor, Tensor]:
    outs, totals = [q] * len(tiles.tiles), [q] * len(tiles.tiles)
    for group in tiles.alike:
        members = [tiles.tiles[i] for i in group]
        query, key, value, mask = _inputs_alike(q, k, v, members, tiles)
        out, lse = block_forward(query, key, value, mask, choose(query, key, value, mask))
        for place, i in enumerate(group):
            outs[i], totals[i] = out[place], lse[place]
    return torch.cat(outs), torch.cat(totals, 1)


def _inputs_alike(
    q: Tensor, k: Tensor, v: Tensor, members: list[Tile], tiles: Tiles
) -> tuple[Tensor, Tensor, Tensor, Mask]:
    query = _stacked([q[tile.row : tile.row + tile.rows] for tile in members])
    key, value = (_stacked([x[tile.key : tile.key + tile.keys] for tile in members]) for x in (k, v))
    return query, key, value, tiles.mask(members[0].offset)


def _stacked(pieces: list[Tensor]) -> Tensor:
    return pieces[0][None] if len(pieces) == 1 else torch.stack(pieces)


def _backward_groups(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, tiles: Tiles
) -> tuple[Tensor, Tensor, Tensor]:
    sizes = [tile.rows for tile in tiles.tiles]
    grads, results, totals = dout.split(sizes), out.split(sizes), lse.split(sizes, 1)
    pieces = [(q, k, v)] * len(sizes)
    for group in tiles.alike:
        query, key, value, mask = _inputs_alike(q, k, v, [tiles.tiles[i] for i in group], tiles)
        grad, result, total = (_stacked([x[i] for i in group]) for x in (grads, results, totals))
        backend = choose(query, key, value, mask)
        dq, dk, dv = block_backward(grad, query, key, value, result, total.contiguous(), mask, backend)
        for place, i in enumerate(group):
            pieces[i] = (dq[place], dk[place], dv[place])
    dqs, dks, dvs = zip(*pieces, strict=True)
    return torch.cat(dqs), torch.cat(dks), torch.cat(dvs)


def _pick(x: Tensor, index: slice | Tensor) -> Tensor:
    return x[index] if isinstance(index, slice) else x.index_select(0, index)


def _placed(size: int, parts: list[tuple[slice | Tensor, Tensor]], fill: float = 0.0) -> Tensor:
    """The parts at their places among `size` compact rows, and `fill` elsewhere."""
    place, part = parts[0]
    if isinstance(place, slice) and place == slice(0, size):
        return part
    whole = part.new_full((size, *part.shape[1:]), fill)
    for place, part in parts:
        whole[place] = part
    return whole


VarlenForward = Callable[[Tensor, Tensor, Tensor, Pack, float], tuple[Tensor, Tensor]]
VarlenBackward = Callable[[tuple[Tensor, ...], Pack, float], tuple[Tensor, Tensor, Tensor]]


def _forward_varlen(q: Tensor, k: Tensor, v: Tensor, tiles: Tiles, run: VarlenForward) -> tuple[Tensor, Tensor]:
    """A call for each band, over sequences laid end to end."""
    outs: list[tuple[slice | Tensor, Tensor]] = []
    totals: list[tuple[slice | Tensor, Tensor]] = []
    for pack in tiles.packs:
        rows, keys = pack.index("row", "rows", q.device), pack.index("key", "keys", q.device)
        out, lse = run(_pick(q, rows), _pick(k, keys), _pick(v, keys), pack, tiles.mask(0).scale_of(q))
        places = pack.index("row_place", "rows", q.device)
        outs.append((places, out))
        totals.append((places, lse.T))
    return _placed(tiles.rows, outs), _placed(tiles.rows, totals, -torch.inf).T.contiguous()


def _backward_varlen(
    inputs: tuple[Tensor, ...], tiles: Tiles, packs: tuple[Pack, ...], run: VarlenBackward
) -> tuple[Tensor, Tensor, Tensor]:
    """The packs may share rows, whose gradients are summed, but no keys."""
    dout, q, k, v, out, lse = inputs
    grads: list[list[tuple[slice | Tensor, Tensor]]] = [[], [], []]
    for pack in packs:
        rows, keys = pack.index("row", "rows", q.device), pack.index("key", "keys", q.device)
        places, key_places = pack.index("row_place", "rows", q.device), pack.index("key_place", "keys", q.device)
        picked = _pick(dout, places), _pick(q, rows), _pick(k, keys), _pick(v, keys), _pick(out, places)
        parts = run((*picked, _pick(lse.T, places).T), pack, tiles.mask(0).scale_of(q))
        for grad, place, part in zip(grads, (places, key_places, key_places), parts, strict=True):
            grad.append((place, part))
    dq = _placed(tiles.rows, grads[0][: len(tiles.packs)])
    for place, part in grads[0][len(tiles.packs) :]:
        add_(dq, part, place)
    return dq, _placed(tiles.keys, grads[1]), _placed(tiles.keys, grads[2])


def _run_flash(q: Tensor, k: Tensor, v: Tensor, pack: Pack, scale: float) -> tuple[Tensor, Tensor]:
    return varlen_forward(q, k, v, pack.varlen(scale, q.device))


def _run_flash_back(inputs: tuple[Tensor, ...], pack: Pack, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    dout, q, k, v, out, lse = inputs
    return varlen_backward(dout, q, k, v, out, lse, pack.varlen(scale, q.device))


def _run_cudnn(q: Tensor, k: Tensor, v: Tensor, pack: Pack, scale: float) -> tuple[Tensor, Tensor]:
    from farspan.kernels.softmax_attention_cudnn_graph import ragged_forward  # an optional library, at its first use

    return ragged_forward(q, k, v, pack.ragged(scale, q.device))


def _run_cudnn_back(inputs: tuple[Tensor, ...], pack: Pack, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    from farspan.kernels.softmax_attention_cudnn_graph import ragged_backward

    dout, q, k, v, out, lse = inputs
    return ragged_backward(dout, q, k, v, out, lse, pack.ragged(scale, q.device))


def _forward_flash(q: Tensor, k: Tensor, v: Tensor, tiles: Tiles) -> tuple[Tensor, Tensor]:
    return _forward_varlen(q, k, v, tiles, _run_flash)


def _backward_flash(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, tiles: Tiles
) -> tuple[Tensor, Tensor, Tensor]:
    return _backward_varlen((dout, q, k, v, out, lse), tiles, tiles.packs, _run_flash_back)


def _forward_cudnn(q: Tensor, k: Tensor, v: Tensor, tiles: Tiles) -> tuple[Tensor, Tensor]:
    return _forward_varlen(q, k, v, tiles, _run_cudnn)


def _backward_cudnn(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, tiles: Tiles
) -> tuple[Tensor, Tensor, Tensor]:
    return _backward_varlen((dout, q, k, v, out, lse), tiles, tiles.squared, _run_cudnn_back)


def tiles_ref(q: Tensor, k: Tensor, v: Tensor, tiles: Tiles) -> tuple[Tensor, Tensor]:
    """`tiles_forward` in plain torch and fp64, all R C scores at once; differentiable in q, k and v."""
    _check(q, k, v, tiles)
    groups = q.shape[1] // k.shape[1]
    query = torch.cat([q[:0], *(q[slice(*span)] for span in tiles.row_spans)]).double().transpose(0, 1)  # H R K
    key, value = (
        torch.cat([x[:0], *(x[slice(*span)] for span in tiles.key_spans)])
        .double()
        .transpose(0, 1)
        .repeat_interleave(groups, 0)
        for x in (k, v)
    )
    score = query @ key.mT * tiles.mask(0).scale_of(q)
    if tiles.softcap is not None:
        score = tiles.softcap * torch.tanh(score / tiles.softcap)
    seen = _seen(tiles, q.device)
    blind = ~seen.any(-1)
    score = score.masked_fill(~(seen | blind[:, None]), -torch.inf)
    lse = score.logsumexp(-1).masked_fill(blind, -torch.inf)
    out = (score.softmax(-1) @ value).masked_fill(blind[:, None], 0.0)
    return out.transpose(0, 1).to(q.dtype), lse.to(lse_dtype(q.dtype))


def _seen(tiles: Tiles, device: torch.device) -> Tensor:
    """R C bool."""
    seen = torch.zeros(tiles.rows, tiles.keys, dtype=torch.bool, device=device)
    row = key = 0
    for tile in tiles.tiles:
        i = torch.arange(tile.rows, device=device)[:, None] + tile.offset
        j = torch.arange(tile.keys, device=device)
        inside = (j <= i) & (j > i - tiles.window if tiles.window is not None else True) if tiles.causal else j == j
        seen[row : row + tile.rows, key : key + tile.keys] = inside
        row, key = row + tile.rows, key + tile.keys
    return seen
