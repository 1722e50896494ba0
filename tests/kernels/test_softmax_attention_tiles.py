"""Lists of tiles equal their reference with gradients, however their shapes let them be launched."""

import sys
from importlib import import_module
from importlib.util import find_spec
from itertools import pairwise, product
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from farspan.kernels import softmax_attention_tiles as module
from farspan.kernels.lse import merge_
from farspan.kernels.softmax_attention import attend_ref
from farspan.kernels.softmax_attention_cuda import Ragged, Varlen
from farspan.kernels.softmax_attention_mask import Mask
from farspan.kernels.softmax_attention_tiles import Tile, Tiles, tiles_backward, tiles_forward, tiles_ref

gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs one NVIDIA GPU")

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
MASKS: list[dict[str, Any]] = [
    {"causal": True},
    {"causal": False},
    {"causal": True, "window": 1},
    {"causal": True, "window": 9},
    {"causal": True, "window": 1000},
]
LISTS = {
    "none": (),
    "one token": (Tile(3, 1, 5, 1, 0),),
    "diagonal": (Tile(0, 37, 0, 37, 0),),
    "prefix": (Tile(9, 20, 3, 50, 30),),
    "rows that see nothing": (Tile(2, 21, 6, 11, -8),),
    "all blind": (Tile(2, 4, 6, 11, -8), Tile(8, 5, 20, 11, -5)),
    "far": (Tile(0, 16, 0, 40, 44), Tile(20, 11, 40, 23, 17)),
    "even": (Tile(1, 12, 0, 15, 3), Tile(21, 12, 16, 15, 3), Tile(41, 12, 32, 15, 3)),
    "alike, not even": (Tile(0, 7, 0, 7, 0), Tile(7, 7, 7, 7, 0), Tile(20, 7, 30, 7, 0)),
    "documents": (Tile(0, 3, 0, 3, 0), Tile(3, 20, 3, 20, 0), Tile(23, 1, 23, 1, 0), Tile(24, 35, 24, 35, 0)),
    "anything": (Tile(0, 5, 2, 9, 4), Tile(6, 5, 11, 9, 4), Tile(13, 19, 21, 30, -6), Tile(40, 8, 60, 3, 90)),
}


def packed(
    t: int = 64, s: int = 70, *, heads: int = 4, kv_heads: int = 2, width: int = 8, dtype: torch.dtype, device: str
) -> tuple[Tensor, Tensor, Tensor]:
    """q a slice of heads, k and v halves of one tensor: the strides that schedules pass."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(t, heads + 3, width, generator=generator).bfloat16().to(device, dtype)
    kv = torch.randn(s, 2, kv_heads, width, generator=generator).bfloat16().to(device, dtype)
    return q[:, 2 : 2 + heads], kv[:, 0], kv[:, 1]


def check(ours: tuple[Tensor, ...], truth: tuple[Tensor, ...], dtype: torch.dtype) -> None:
    for name, a, b in zip(("out", "lse", "dq", "dk", "dv"), ours, truth, strict=True):
        assert a.shape == b.shape, name
        assert torch.equal(a.isinf(), b.isinf()), name
        a, b = a.double().masked_fill(a.isinf(), 0.0), b.double().masked_fill(b.isinf(), 0.0)
        bound = TOLERANCE[dtype] * max(1.0, float(b.abs().max()) if b.numel() else 0.0)
        torch.testing.assert_close(a, b, rtol=0, atol=bound, msg=lambda text, name=name: f"{name}: {text}")


def agree(q: Tensor, k: Tensor, v: Tensor, tiles: Tiles) -> None:
    """Forward and backward against fp64 autograd; what lies outside the tiles is poisoned first."""
    leaves = [x.detach().double().requires_grad_() for x in (q, k, v)]
    out, lse = tiles_ref(*leaves, tiles)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(q.device, q.dtype)
    grads = torch.autograd.grad((out * dout.double()).sum(), leaves) if tiles.tiles else leaves
    rows, keys = tiles.row_index(q.device), tiles.key_index(q.device)
    truth = (out.detach(), lse.detach(), grads[0].detach()[rows], *(grad.detach()[keys] for grad in grads[1:]))
    q, k, v = (poisoned(x, index) for x, index in ((q, rows), (k, keys), (v, keys)))
    ours = tiles_forward(q, k, v, tiles)
    assert (ours[0].dtype, ours[1].dtype) == (q.dtype, torch.promote_types(q.dtype, torch.float32))
    whole = (truth[0].to(q.dtype), truth[1].to(ours[1].dtype))
    check((*ours, *tiles_backward(dout, q, k, v, *whole, tiles)), truth, q.dtype)


def poisoned(x: Tensor, index: slice | Tensor) -> Tensor:
    """The same rows in a tensor that is NaN elsewhere, and as strided as x."""
    room = torch.full((x.shape[0], 2, *x.shape[1:]), torch.nan, dtype=x.dtype, device=x.device)
    room[index, 1] = x[index]
    return room[:, 1]


@pytest.mark.parametrize("name", LISTS)
def test_tiles_equal_their_reference(name: str) -> None:
    for mask, dtype in product(MASKS, (torch.float64, torch.float32)):
        agree(*packed(dtype=dtype, device="cpu"), Tiles(LISTS[name], **mask))


@pytest.mark.parametrize("groups", [1, 4, 8])
def test_query_heads_share_key_heads(groups: int) -> None:
    tensors = packed(heads=8, kv_heads=8 // groups, dtype=torch.float64, device="cpu")
    for name, mask in product(("even", "anything"), MASKS):
        agree(*tensors, Tiles(LISTS[name], scale=0.3, softcap=2.0, **mask))


def test_values_may_have_a_width_of_their_own() -> None:
    q, k, _ = packed(dtype=torch.float64, device="cpu")
    v = torch.randn(70, 2, 5, dtype=torch.float64)
    for name, mask in product(("prefix", "anything"), MASKS):
        agree(q, k, v, Tiles(LISTS[name], **mask))


@pytest.mark.parametrize("window", [None, 11])
def test_tiles_of_a_cut_sequence_merge_into_the_whole(window: int | None) -> None:
    """Two ranks' chunks of one sequence: the diagonal of each, then what one sees of the other, in either order."""
    q, k, v = packed(60, 60, dtype=torch.float64, device="cpu")
    whole, total = tiles_ref(q, k, v, Tiles((Tile(0, 60, 0, 60, 0),), causal=True, window=window))
    near = Tiles((Tile(0, 25, 0, 25, 0), Tile(25, 35, 25, 35, 0)), causal=True, window=window)
    far = Tiles((Tile(25, 35, 0, 25, 25),), causal=True, window=window)
    for first, second in ((near, far), (far, near)):
        out, lse = q.new_zeros(60, 4, 8), q.new_full((4, 60), -torch.inf)
        for tiles in (first, second):
            merge_(out, lse, *tiles_forward(q, k, v, tiles), tiles.row_index(q.device))
        torch.testing.assert_close((out, lse), (whole, total), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", LISTS)
def test_pairs_counts_what_the_mask_shows(name: str) -> None:
    for mask in MASKS:
        tiles = Tiles(LISTS[name], **mask)
        seen = 0
        for tile, i, j in ((t, i, j) for t in tiles.tiles for i in range(t.rows) for j in range(t.keys)):
            edge = i + tile.offset
            seen += not tiles.causal or (j <= edge and (tiles.window is None or j > edge - tiles.window))
        assert tiles.pairs == seen


def test_an_index_is_a_slice_where_rows_are_one_range() -> None:
    cpu = torch.device("cpu")
    documents, even = Tiles(LISTS["documents"], causal=True), Tiles(LISTS["even"], causal=True)
    assert (documents.row_index(cpu), documents.rows) == (slice(0, 59), 59)
    index = even.row_index(cpu)
    assert isinstance(index, Tensor) and index.dtype == torch.int32 and even.row_index(cpu) is index
    assert index.tolist() == [*range(1, 13), *range(21, 33), *range(41, 53)]
    assert len({documents, Tiles(LISTS["documents"], causal=True)}) == 1


@pytest.mark.parametrize(
    ("tiles", "words"),
    [
        ((Tile(0, 0, 0, 1, 0),), "empty"),
        ((Tile(0, 3, 0, 1, 0), Tile(2, 1, 1, 1, 0)), "share rows or keys"),
        ((Tile(5, 3, 0, 1, 0), Tile(0, 1, 1, 1, 0)), "share rows or keys"),
        ((Tile(0, 3, 0, 4, 0), Tile(3, 1, 3, 1, 0)), "share rows or keys"),
    ],
    ids=["empty", "overlapping rows", "descending", "overlapping keys"],
)
def test_lists_that_make_no_sense_are_refused(tiles: tuple[Tile, ...], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Tiles(tiles, causal=True)
    with pytest.raises(ValueError, match="beyond"):
        tiles_forward(*packed(dtype=torch.float32, device="cpu"), Tiles((Tile(0, 65, 0, 4, 0),), causal=False))


def banded(q: Tensor, k: Tensor, v: Tensor, scale: float, left: int | None, right: int | None) -> tuple[Tensor, Tensor]:
    """One sequence as a varlen kernel counts its band, T H K -> out T H V, lse H T; every query must see a key."""
    query, key, value = (x.transpose(0, 1).repeat_interleave(q.shape[1] // x.shape[1], 0) for x in (q, k, v))
    shift = torch.arange(k.shape[0]) - torch.arange(q.shape[0])[:, None] - (k.shape[0] - q.shape[0])
    seen = (shift >= -left if left is not None else shift == shift) & (shift <= right if right is not None else True)
    assert seen.any(-1).all()
    score = (query @ key.mT * scale).masked_fill(~seen, -torch.inf)
    return (score.softmax(-1) @ value).transpose(0, 1), score.logsumexp(-1)


@torch.enable_grad()
def banded_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, *band: int | None
) -> tuple[Tensor, ...]:
    """Gradients with the probabilities of a given lse and out, as kernels form them: autograd of a linear form."""
    query, key, value = (x.detach().requires_grad_() for x in (q, k, v))
    part, total = banded(query, key, value, scale, *band)
    weight = (total.detach() - lse).exp().T[..., None]  # the part's share of the whole softmax
    delta = (out * dout).sum(-1) - (part * dout).sum(-1).detach()
    loss = (part * dout * weight).sum() - (total.T * delta * weight[..., 0]).sum()
    return torch.autograd.grad(loss, (query, key, value))


def fake_varlen_forward(q: Tensor, k: Tensor, v: Tensor, varlen: Varlen) -> tuple[Tensor, Tensor]:
    band = [None if edge < 0 else edge for edge in (varlen.left, varlen.right)]
    pairs = zip(pairwise(varlen.cu_q.tolist()), pairwise(varlen.cu_k.tolist()), strict=True)
    parts = [banded(q[a:b], k[c:d], v[c:d], varlen.scale, *band) for (a, b), (c, d) in pairs if b > a]
    assert all(b - a <= varlen.longest_q for a, b in pairwise(varlen.cu_q.tolist()))
    return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts], 1)


def fake_varlen_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, varlen: Varlen
) -> tuple[Tensor, ...]:
    band = [None if edge < 0 else edge for edge in (varlen.left, varlen.right)]
    parts = []
    for (a, b), (c, d) in zip(pairwise(varlen.cu_q.tolist()), pairwise(varlen.cu_k.tolist()), strict=True):
        tensors = (dout[a:b], q[a:b], k[c:d], v[c:d], out[a:b], lse[:, a:b])
        parts += [banded_backward(*tensors, varlen.scale, *band)] if b > a else []
    return tuple(torch.cat(grads) for grads in zip(*parts, strict=True))


def sequences(ragged: Ragged, q: Tensor, k: Tensor) -> list[tuple[slice, slice]]:
    """Ranges of rows and keys of each sequence that is not empty, which cover both tensors."""
    columns = []
    for name, x in (("rows", q), ("keys", k)):
        starts, sizes = ragged.starts(name, x.stride(0)).tolist(), ragged.lengths(name).tolist()
        assert len(starts) == ragged.sequences + 1 == len(sizes) + 1 and starts[-1] == x.shape[0] * x.stride(0)
        columns.append([slice(a // x.stride(0), a // x.stride(0) + n) for a, n in zip(starts, sizes, strict=False)])
    return [(i, j) for i, j in zip(*columns, strict=True) if i.stop > i.start]


def fake_graph() -> ModuleType:
    """softmax_attention_cudnn_graph in plain torch: what the adapter promises, without cudnn."""

    def ragged_forward(q: Tensor, k: Tensor, v: Tensor, ragged: Ragged) -> tuple[Tensor, Tensor]:
        band = ragged.scale, ragged.left, ragged.right
        parts = [banded(q[i], k[j], v[j], *band) for i, j in sequences(ragged, q, k)]
        return torch.cat([out for out, _ in parts]), torch.cat([lse for _, lse in parts], 1)

    def ragged_backward(
        dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, ragged: Ragged
    ) -> tuple[Tensor, ...]:
        band = ragged.scale, ragged.left, ragged.right
        parts = [
            banded_backward(dout[i], q[i], k[j], v[j], out[i], lse[:, i], *band) for i, j in sequences(ragged, q, k)
        ]
        return tuple(torch.cat(grads) for grads in zip(*parts, strict=True))

    made = ModuleType("softmax_attention_cudnn_graph")
    made.ragged_forward, made.ragged_backward = ragged_forward, ragged_backward  # type: ignore[attr-defined]
    return made


@pytest.mark.parametrize("launch", ["even", "groups", "flash", "cudnn"])
@pytest.mark.parametrize("name", LISTS)
def test_every_launch_equals_the_reference(name: str, launch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """How tiles become calls, with the calls themselves in plain torch."""
    monkeypatch.setattr(module, "varlen_forward", fake_varlen_forward)
    monkeypatch.setattr(module, "varlen_backward", fake_varlen_backward)
    monkeypatch.setitem(sys.modules, "farspan.kernels.softmax_attention_cudnn_graph", fake_graph())
    for mask in MASKS:
        tiles = Tiles(LISTS[name], **mask)
        fits = tiles.even is not None if launch == "even" else launch == "groups" or bool(tiles.packs)
        monkeypatch.setattr(module, "_launch", lambda *_, fits=fits: launch if fits else "groups")
        agree(*packed(dtype=torch.float64, device="cpu"), tiles)


def test_documents_and_windows_are_one_call() -> None:
    """Causal documents of any length; a window that some do not fill; what each sees of the chunk before it."""
    documents = tuple(Tile(start, n, start, n, 0) for start, n in ((0, 3), (3, 20), (23, 1), (24, 35)))
    for window in (None, 5, 25):
        assert len(Tiles(documents, causal=True, window=window).packs) == 1
    before = Tiles((Tile(0, 9, 0, 9, 9), Tile(20, 15, 20, 15, 15)), causal=True, window=6)
    assert [(pack.left, pack.right) for pack in before.packs] == [(0, None)]
    prefixes = Tiles((Tile(0, 9, 0, 30, 21), Tile(20, 15, 40, 16, 1)), causal=True)
    assert [(pack.left, pack.right) for pack in prefixes.packs] == [(None, 0)]


@gpu
@needs_gpu
@pytest.mark.parametrize("launch", ["chosen", "groups", "flash", "cudnn"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gpu_launches_equal_the_reference(dtype: torch.dtype, launch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if launch == "cudnn" and (find_spec("cudnn") is None or torch.cuda.get_device_capability() < (9, 0)):
        pytest.skip("needs nvidia-cudnn-frontend and Hopper")
    grown = {name: tuple(Tile(*(8 * n + n % 3 for n in tile)) for tile in tiles) for name, tiles in LISTS.items()}
    for (name, lists), mask, (heads, kv_heads) in product(grown.items(), MASKS, ((4, 4), (8, 2), (8, 1))):
        if name in ("one token", "even", "far", "anything", "documents") and kv_heads == 1:
            lists = LISTS[name]  # awkwardly small
        lists = apart(lists)
        tiles = Tiles(lists, **{**mask, "window": mask["window"] * 8} if mask.get("window", 0) > 1 else mask)
        fits = (
            launch != "chosen"
            and tiles.packs
            and all(
                (pack.right or 0) < pack.longest[1] if launch == "flash" else pack.right in (None, 0)
                for pack in tiles.packs
            )
        )
        tensors = packed(700, 700, heads=heads, kv_heads=kv_heads, width=64, dtype=dtype, device="cuda")
        if fits:
            monkeypatch.setattr(module, "_launch", lambda *_: launch)
        elif launch != "chosen":
            continue
        agree(*tensors, tiles)


def apart(tiles: tuple[Tile, ...]) -> tuple[Tile, ...]:
    """The same tiles, shifted where they would overlap."""
    shifted: list[Tile] = []
    row = key = 0
    for tile in tiles:
        tile = tile._replace(row=max(tile.row, row), key=max(tile.key, key))
        row, key = tile.row + tile.rows, tile.key + tile.keys
        shifted.append(tile)
    return tuple(shifted)


@gpu
@needs_gpu
def test_gpu_full_precision_and_caps_take_dense_calls() -> None:
    for name, mask in product(LISTS, MASKS):
        agree(*packed(dtype=torch.float32, device="cuda"), Tiles(LISTS[name], softcap=2.0, **mask))


@gpu
@needs_gpu
def test_gpu_tiles_never_wait_for_the_device() -> None:
    q, k, v = packed(700, 700, width=64, dtype=torch.bfloat16, device="cuda")
    lists = [Tiles(LISTS[name], causal=True, window=window) for name, window in product(LISTS, (None, 9))]
    for warm in (True, False):
        torch.cuda.set_sync_debug_mode("default" if warm else "error")
        try:
            for tiles in lists if warm else [Tiles(t.tiles, t.causal, t.window) for t in lists]:
                out, lse = tiles_forward(q, k, v, tiles)
                tiles_backward(torch.ones_like(out), q, k, v, out, lse, tiles)
                tiles.row_index(q.device), tiles.key_index(q.device)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("bounds", [None, [0, 9, 22, 24, 44], [0, 1, 1, 22, 44, 44, 44, 44, 44]], ids=str)
@pytest.mark.parametrize("window", [None, 5])
def test_rows_and_packed_documents_are_ragged_sequences(
    bounds: list[int] | None, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the backend for whole rows asks of cuDNN's graphs, with the graphs in plain torch."""
    monkeypatch.setitem(sys.modules, "cudnn", ModuleType("cudnn"))
    monkeypatch.delitem(sys.modules, "farspan.kernels.softmax_attention_cudnn_graph", raising=False)
    graph = import_module("farspan.kernels.softmax_attention_cudnn_graph")
    monkeypatch.delitem(sys.modules, "farspan.kernels.softmax_attention_cudnn_graph")
    for name in ("ragged_forward", "ragged_backward"):
        monkeypatch.setattr(graph, name, getattr(fake_graph(), name))
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(2, 22, n, 8, generator=generator, dtype=torch.float64).requires_grad_() for n in (4, 2, 2)]
    cu_seqlens = None if bounds is None else torch.tensor(bounds, dtype=torch.int32)
    out, lse = attend_ref(*leaves, causal=True, window=window, cu_seqlens=cu_seqlens)
    dout = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    wanted = torch.autograd.grad(out, leaves, dout)
    mask = Mask(causal=True, window=window, cu_seqlens=cu_seqlens)
    q, k, v = (x.detach() for x in leaves)
    found = graph.CudnnGraph().forward(q, k, v, mask)
    grads = graph.CudnnGraph().backward(dout, q, k, v, *found, mask)
    torch.testing.assert_close((*found, *grads), (out.detach(), lse.detach(), *wanted), rtol=0, atol=1e-12)
