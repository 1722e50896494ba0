"""A layer of experts, forward and backward, on one GPU: TFLOP/s of its products (18 · T · K · I · D operations, 6 of
them forward) with all that is around them: scores, choice, sort, rows to experts and back.

`ours` is a model's own, and chooses by softmax; `balanced` sends every expert the same number of tokens; `copied` has
its rows copied before the first product and its logits from one in fp32. `torch` is what one writes with
`F.grouped_mm`: topk, argsort, index_select, three products, index_add. `bmm` is the ceiling, where all experts have
the same rows and no row moves: three batched products each way, and SwiGLU between them.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from record import record
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from triton.testing import do_bench

from farspan.kernels.expert_layer import expert_layer
from farspan.kernels.grouped_gemm import experts
from farspan.kernels.permute import permute, sort, unpermute
from farspan.kernels.route import route
from farspan.kernels.router_logits import router_logits
from farspan.kernels.swiglu import swiglu

Layer = Callable[..., Tensor]


@dataclass(frozen=True)
class Shape:
    tokens: int
    width: int
    hidden: int
    experts: int
    active: int

    @property
    def operations(self) -> int:
        """Of a forward's products; a backward's are twice as many."""
        return 6 * self.tokens * self.active * self.hidden * self.width

    def __str__(self) -> str:
        return f"T {self.tokens}, D {self.width}, I {self.hidden}, E {self.experts}, K {self.active}"


SHAPES = (
    Shape(32768, 4096, 512, 128, 8),
    Shape(24576, 1536, 256, 128, 8),
    Shape(32768, 4096, 1024, 64, 4),
    Shape(32768, 2048, 768, 128, 8),
    Shape(8192, 4096, 14336, 8, 2),
)
"""Fine-grained ones of published measurements, then the layers of Qwen3-30B-A3B and of Mixtral-8x7B."""
TINY = (Shape(128, 64, 32, 8, 2),)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="a small layer on the CPU, to see whether all of this runs")
    parser.add_argument("--profile", action="store_true", help="only what the first shape's time goes to, ours alone")
    parsed = parser.parse_args()
    shapes, device = (TINY, torch.device("cpu")) if parsed.tiny else (SHAPES, torch.device("cuda"))
    if parsed.profile:
        print(profiled(shapes[0], device))
        return
    rows: list[dict[str, Any]] = []
    for shape in shapes:
        for row in measure(shape, device):
            print("  ".join(f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()), flush=True)
            rows.append(row)
        if not parsed.tiny:
            torch.cuda.empty_cache()
            record("moe", rows, shapes="bf16, scores in fp32")  # so far: a run may be cut off


def given(shape: Shape, device: torch.device) -> list[Tensor]:
    """Tokens, the router's weights, the experts' w13 and w2."""
    torch.manual_seed(0)
    draw = partial(torch.randn, device=device, dtype=torch.bfloat16)
    x = draw(shape.tokens, shape.width)
    router = torch.randn(shape.experts, shape.width, device=device) * shape.width**-0.5
    w13 = draw(shape.experts, 2, shape.hidden, shape.width) * shape.width**-0.5
    w2 = draw(shape.experts, shape.width, shape.hidden) * shape.hidden**-0.5
    return [tensor.requires_grad_() for tensor in (x, router, w13, w2)]


def measure(shape: Shape, device: torch.device) -> Iterator[dict[str, Any]]:
    leaves = given(shape, device)
    each = torch.arange(shape.tokens * shape.active, device=device, dtype=torch.int32)
    even = (each % shape.experts).view(shape.tokens, shape.active)
    rows = torch.randn(
        shape.experts, each.numel() // shape.experts, shape.width, device=device, dtype=torch.bfloat16
    ).requires_grad_()
    layers: dict[str, tuple[Layer, list[Tensor]]] = {
        "ours": (partial(ours, shape, None), leaves),
        "ours, balanced": (partial(ours, shape, even), leaves),
        "copied": (partial(copied, shape), leaves),
        "torch": (partial(plain, shape), leaves),
        "bmm": (batched, [rows, *leaves[2:]]),
    }
    for name, (layer, tensors) in layers.items():
        row: dict[str, Any] = {"shape": str(shape), "by": name, "forward ms": "", "backward ms": ""}
        row |= {"forward TFLOP/s": "", "backward TFLOP/s": "", "GB": "", "note": ""}
        try:
            row |= timed(layer, tensors, shape.operations, device)
        except (RuntimeError, torch.cuda.OutOfMemoryError) as error:
            row["note"] = str(error).splitlines()[0][:120]
        yield row


def profiled(shape: Shape, device: torch.device) -> str:
    """The 25 kernels of one forward and backward that take the longest; on the CPU, operators."""
    leaves, on_gpu = given(shape, device), device.type == "cuda"
    upstream = torch.randn_like(leaves[0])

    def both() -> None:
        torch.autograd.grad(ours(shape, None, *leaves), leaves, upstream)
        if on_gpu:
            torch.cuda.synchronize()

    for _ in range(3):
        both()
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as found:
        both()
    order = "self_cuda_time_total" if on_gpu else "self_cpu_time_total"
    table: str = found.key_averages().table(sort_by=order, row_limit=25, max_name_column_width=90)
    return f"{shape}\n{table}"


def timed(layer: Layer, leaves: list[Tensor], operations: int, device: torch.device) -> dict[str, Any]:
    out = layer(*leaves)
    upstream = torch.randn_like(out)
    if device.type != "cuda":
        grads = torch.autograd.grad(out, leaves, upstream)
        return {"note": f"runs, {sum(grad is not None for grad in grads)} gradients"}
    del out

    def both() -> None:
        torch.autograd.grad(layer(*leaves), leaves, upstream)

    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    both()
    peak = torch.cuda.max_memory_allocated() - before
    with torch.no_grad():
        forward = do_bench(lambda: layer(*leaves), warmup=50, rep=150, return_mode="median")
    backward = do_bench(both, warmup=50, rep=300, return_mode="median") - forward
    return {
        "forward ms": forward,
        "backward ms": backward,
        "forward TFLOP/s": operations / forward / 1e9,
        "backward TFLOP/s": 2 * operations / backward / 1e9,
        "GB": peak / 1e9,
    }


def ours(shape: Shape, chosen: Tensor | None, x: Tensor, router: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
    probabilities, chosen = route(router_logits(x, router), shape.active, score="softmax", chosen=chosen)
    return expert_layer(x, w13, w2, probabilities, sort(chosen, shape.experts))


def copied(shape: Shape, x: Tensor, router: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
    probabilities, chosen = route(x.float() @ router.T, shape.active, score="softmax")
    order = sort(chosen, shape.experts)
    share = probabilities.flatten()[order.rows]
    return unpermute(experts(permute(x, order), w13, w2, share, order.ends), order)


def plain(shape: Shape, x: Tensor, router: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
    probabilities, chosen = (x.float() @ router.T).softmax(-1).topk(shape.active)
    rows = chosen.flatten().argsort(stable=True)
    ends = torch.bincount(chosen.flatten(), minlength=shape.experts).cumsum(0).int()
    tokens = rows // shape.active
    given = x.index_select(0, tokens)
    w1, w3 = w13.unbind(1)
    inner = F.silu(F.grouped_mm(given, w1.transpose(1, 2), offs=ends))
    inner = inner * F.grouped_mm(given, w3.transpose(1, 2), offs=ends)
    out = F.grouped_mm(inner, w2.transpose(1, 2), offs=ends) * probabilities.flatten()[rows, None].to(x.dtype)
    return torch.zeros_like(x).index_add(0, tokens, out)


def batched(rows: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
    """rows: E M/E D."""
    gate, up = (rows @ w13.flatten(1, 2).transpose(1, 2)).chunk(2, dim=-1)
    return swiglu(gate, up) @ w2.transpose(1, 2)


if __name__ == "__main__":
    main()
