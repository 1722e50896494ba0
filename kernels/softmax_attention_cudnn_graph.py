"""cudnn-frontend (nvidia-cudnn-frontend, 1.14 or newer) runs ragged attention at cuDNN's speed; torch's own door to it
rebuilds its graph at every call. Graphs are built once for each shape, executed on torch's current stream."""

from functools import cache, lru_cache
from threading import get_ident
from typing import Any, NamedTuple

import cudnn
import torch
from torch import Tensor

from farspan.kernels.softmax_attention_backends import flat, flat_lse, rows_lse
from farspan.kernels.softmax_attention_cuda import Ragged, power_of_2, rounded
from farspan.kernels.softmax_attention_mask import Mask, bottom_right

_NAMES = ("q", "k", "v", "out", "stats", "dout", "dq", "dk", "dv")
_UID = {name: uid for uid, name in enumerate((*_NAMES, *(f"{name} starts" for name in _NAMES), "rows", "keys"), 1)}
"""Numbers by which graphs know their tensors: each operand's, then its ragged offsets', then the lengths'."""


class _Operand(NamedTuple):
    """One ragged tensor: rows of heads of width, with elements a row and a head.

    Sequences lie end to end in all of them.
    """

    name: str
    heads: int
    width: int
    row: int
    head: int

    @property
    def along(self) -> str:
        return "k" if self.name in ("k", "v", "dk", "dv") else "q"


class _Shape(NamedTuple):
    """All that a graph depends on."""

    device: torch.device
    dtype: torch.dtype
    sequences: int
    longest: tuple[int, int]
    totals: tuple[int, int]
    band: tuple[int | None, int | None]
    square: bool
    scale: float
    inputs: tuple[_Operand, ...]
    outputs: tuple[_Operand, ...]


def ragged_forward(q: Tensor, k: Tensor, v: Tensor, ragged: Ragged) -> tuple[Tensor, Tensor]:
    """q R H K, k and v C Hkv K, of any strides with the last axis dense -> out R H V, lse H R (fp32, natural log).

    Errors: what cudnn raises where it has no kernel for the shape.
    """
    out = q.new_empty(*q.shape[:2], v.shape[2])
    stats = q.new_empty(q.shape[:2], dtype=torch.float32)
    _run(("q", "k", "v"), (q, k, v), ("out", "stats"), (out, stats), ragged)
    return out, stats.T


def ragged_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, ragged: Ragged
) -> tuple[Tensor, Tensor, Tensor]:
    """dq R H K, dk and dv C Hkv K from the whole softmax's out R H V and lse H R."""
    grads = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    # Its workspaces are dense, and it finds places in them by the offsets of operands: these have to be dense as well.
    inputs = *(x.contiguous() for x in (dout, q, k, v, out)), lse.T
    _run(("dout", "q", "k", "v", "out", "stats"), inputs, ("dq", "dk", "dv"), grads, ragged)
    return grads


class CudnnGraph:
    """Windows and packed documents as one ragged call; no soft cap. Its backward is not deterministic."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> tuple[Tensor, Tensor]:
        out, lse = ragged_forward(flat(q), flat(k), flat(v), _ragged(q, k, mask))
        return out.unflatten(0, q.shape[:2]), rows_lse(lse, q.shape[0])

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: Mask
    ) -> tuple[Tensor, Tensor, Tensor]:
        ragged = _ragged(q, k, mask)
        dq, dk, dv = ragged_backward(flat(dout), flat(q), flat(k), flat(v), flat(out), flat_lse(lse), ragged)
        return dq.view(q.shape), dk.view(k.shape), dv.view(v.shape)


def _ragged(q: Tensor, k: Tensor, mask: Mask) -> Ragged:
    """The rows of a batch, or its documents, as sequences. Their bounds are on the device already, and stay there."""
    (batch, t), s, device = q.shape[:2], k.shape[1], q.device
    _, *edges = bottom_right(mask, t, s)
    left, right = (None if edge < 0 else edge for edge in edges)
    rows = torch.arange(batch + 1, dtype=torch.int32, device=device)
    bounds = {"rows": rows * t, "keys": rows * s}
    if (documents := mask.cu_seqlens) is not None:
        last = documents[-1:].expand(power_of_2(len(documents) - 1) + 1 - len(documents))
        bounds = dict.fromkeys(bounds, torch.cat((documents, last)))

    @cache
    def lengths(size: str) -> Tensor:
        return bounds[size].diff()

    @cache
    def starts(size: str, elements: int) -> Tensor:
        return bounds[size].long() * elements

    count, longest = len(bounds["rows"]) - 1, (max(128, power_of_2(t)), max(128, power_of_2(s)))
    totals = rounded(batch * t), rounded(batch * s)
    return Ragged(count, longest, totals, left, right, t == s, mask.scale_of(q), lengths, starts, {})


def _run(
    names: tuple[str, ...],
    inputs: tuple[Tensor, ...],
    result_names: tuple[str, ...],
    results: tuple[Tensor, ...],
    ragged: Ragged,
) -> None:
    inputs = tuple(_aligned(x) for x in inputs)
    device = inputs[0].device
    stream = torch.cuda.current_stream(device).cuda_stream
    strides = tuple((x.stride()[:2], x.shape[1:]) for x in (*inputs, *results))
    if (launch := (names, strides, inputs[0].dtype, stream)) not in ragged.launches:
        ragged.launches[launch] = _prepare(names, inputs, result_names, results, ragged)
    shape, bounds = ragged.launches[launch]
    pack = dict(bounds)
    for name, x in zip((*names, *result_names), (*inputs, *results), strict=True):
        pack[_UID[name]] = x
    with torch.cuda.device(device):
        handle = _handle(device, get_ident())
        cudnn.set_stream(handle=handle, stream=stream)
        graph, size = _built(shape)
        # torch's allocator is the cache: it keeps the block, and knows which stream may reuse it.
        workspace = torch.empty(max(size, 16), dtype=torch.uint8, device=device)
        graph.execute(pack, workspace, handle=handle)


def _prepare(
    names: tuple[str, ...],
    inputs: tuple[Tensor, ...],
    result_names: tuple[str, ...],
    results: tuple[Tensor, ...],
    ragged: Ragged,
) -> tuple[_Shape, dict[int, Tensor]]:
    """What the graph depends on, and the lengths and offsets of these sequences on the device."""
    operands = tuple(_operand(name, x) for name, x in zip(names, inputs, strict=True))
    outputs = tuple(_operand(name, x) for name, x in zip(result_names, results, strict=True))
    totals = ragged.totals if "dout" in names else (0, 0)  # only backwards need workspaces of that size
    plan = (ragged.sequences, ragged.longest, totals, (ragged.left, ragged.right), ragged.square, ragged.scale)
    bounds = {_UID["rows"]: ragged.lengths("rows"), _UID["keys"]: ragged.lengths("keys")}
    for operand in (*operands, *outputs):
        starts = ragged.starts("keys" if operand.along == "k" else "rows", operand.row)
        bounds[_UID[f"{operand.name} starts"]] = starts
    return _Shape(inputs[0].device, inputs[0].dtype, *plan, operands, outputs), bounds


def _aligned(x: Tensor) -> Tensor:
    """cuDNN reads 16 bytes at a time and does not check that it may; stats are read one by one."""
    if x.dtype == torch.float32:
        return x.contiguous()
    dense = x.stride(2) == 1 and x.stride(0) % 8 == 0 and x.stride(1) % 8 == 0 and x.data_ptr() % 16 == 0
    return x if dense else x.clone(memory_format=torch.contiguous_format)


def _operand(name: str, x: Tensor) -> _Operand:
    return _Operand(name, x.shape[1], 1 if x.dim() == 2 else x.shape[2], x.stride(0), x.stride(1))


@cache
def _handle(device: torch.device, thread: int) -> Any:
    """A handle serves one thread at a time, and autograd has threads of its own. Called with `device` current."""
    return cudnn.create_handle()


@lru_cache(maxsize=512)  # some megabytes of the host each; sizes are rounded, so that a run needs a few dozen
def _built(shape: _Shape) -> tuple[Any, int]:
    """The graph and the bytes of its workspace."""
    kind = {torch.bfloat16: cudnn.data_type.BFLOAT16, torch.float16: cudnn.data_type.HALF}[shape.dtype]
    graph = cudnn.pygraph(
        handle=_handle(shape.device, get_ident()),
        io_data_type=kind,
        intermediate_data_type=cudnn.data_type.FLOAT,
        compute_data_type=cudnn.data_type.FLOAT,
    )
    inputs = {operand.name: _declared(graph, shape, operand, kind) for operand in shape.inputs}
    for name, results in zip(shape.outputs, _attention(graph, shape, inputs), strict=True):
        _describe(graph, shape, name, results, kind)
    graph.validate()
    graph.build_operation_graph()
    graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
    graph.check_support()
    graph.build_plans()
    return graph, graph.get_workspace_size()


def _attention(graph: Any, shape: _Shape, inputs: dict[str, Any]) -> tuple[Any, ...]:
    left, right = shape.band
    corner = cudnn.diagonal_alignment
    options = {
        "attn_scale": shape.scale,
        "use_padding_mask": True,
        "seq_len_q": _numbers(graph, "rows", shape.sequences, cudnn.data_type.INT32),
        "seq_len_kv": _numbers(graph, "keys", shape.sequences, cudnn.data_type.INT32),
        "diagonal_alignment": corner.TOP_LEFT if shape.square or shape.band == (None, None) else corner.BOTTOM_RIGHT,
        "diagonal_band_left_bound": None if left is None else left + 1,  # cuDNN's bound counts the token itself
        "diagonal_band_right_bound": right,
    }
    if "dout" not in inputs:
        return tuple(graph.sdpa(**inputs, generate_stats=True, **options))
    named = {"o" if name == "out" else "dO" if name == "dout" else name: tensor for name, tensor in inputs.items()}
    totals = {"max_total_seq_len_q": shape.totals[0], "max_total_seq_len_kv": shape.totals[1]}
    return tuple(graph.sdpa_backward(**named, **totals, **options))


def _numbers(graph: Any, name: str, count: int, kind: Any) -> Any:
    return graph.tensor(name=name, dim=[count, 1, 1, 1], stride=[1, 1, 1, 1], data_type=kind, uid=_UID[name])


def _layout(shape: _Shape, operand: _Operand) -> tuple[list[int], list[int]]:
    """B H T K and its strides. That of the batch is only nominal: ragged offsets say where sequences begin."""
    longest = shape.longest[operand.along == "k"]
    dim = [shape.sequences, operand.heads, longest, operand.width]
    return dim, [longest * operand.row, operand.head, operand.row, 1]


def _declared(graph: Any, shape: _Shape, operand: _Operand, kind: Any) -> Any:
    dim, stride = _layout(shape, operand)
    kind = cudnn.data_type.FLOAT if operand.name == "stats" else kind
    tensor = graph.tensor(name=operand.name, dim=dim, stride=stride, data_type=kind, uid=_UID[operand.name])
    return tensor.set_ragged_offset(_starts(graph, shape, operand))


def _describe(graph: Any, shape: _Shape, operand: _Operand, tensor: Any, kind: Any) -> None:
    dim, stride = _layout(shape, operand)
    kind = cudnn.data_type.FLOAT if operand.name == "stats" else kind
    tensor.set_uid(_UID[operand.name]).set_output(True).set_dim(dim).set_stride(stride).set_data_type(kind)
    tensor.set_ragged_offset(_starts(graph, shape, operand))


def _starts(graph: Any, shape: _Shape, operand: _Operand) -> Any:
    return _numbers(graph, f"{operand.name} starts", shape.sequences + 1, cudnn.data_type.INT64)
