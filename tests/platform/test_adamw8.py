"""8-bit moments train as fp32 ones do, on any mesh, through any reshard, and gradients add up in fp32."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from farspan.kernels.master import Master
from farspan.kernels.random import key, normal
from farspan.models.block import Block
from farspan.models.decoder import Decoder, initial
from farspan.models.ffns import Swiglu
from farspan.models.mixers import Softmax
from farspan.models.roles import Role, roles
from farspan.parallel.context import Local
from farspan.parallel.context.shard import Batch
from farspan.parallel.engine import Engine, Held
from farspan.parallel.fsdp import full, local, offset
from farspan.parallel.mesh import Mesh, Parallel
from farspan.platform.checkpoint import Saver, load
from farspan.platform.optim import Adamw, Adamw8
from farspan.platform.optim.adamw8 import Adamw8State

VOCABULARY = 64
MODEL = Decoder(
    width=96,
    vocabulary=VOCABULARY,
    blocks=(Block(repeat=2, mixer=Softmax(heads=4, kv_heads=2, head_dim=16), ffn=Swiglu(hidden=136)),),
)
"""Rows of 96 and 136 (68 on two ranks of tp): blocks of 32, uneven shards on 4 ranks, and one that stays fp32."""
OPTIM = Adamw8(rate=1e-2, betas=(0.9, 0.99), max_tp=2, exact=("embedding", "norm"), master="residual8")


def engine_on(cut: dict[str, Any], held: Held, compute: torch.dtype | None = None) -> tuple[Engine, dict[str, Role]]:
    control = dist.new_group(backend="gloo")
    mesh = Mesh(Parallel(**cut).sizes(dist.get_world_size()), torch.device("cpu"), control)
    with torch.device("meta"):
        model, whole = (MODEL.build(VOCABULARY, Local()) for _ in range(2))
    layers = list(model.layers)
    return Engine(model, layers, initial(model), mesh, context=Local(), seed=3, held=held, compute=compute), roles(
        whole
    )


def gradient(name: str, weight: DTensor, step: int) -> DTensor:
    """This rank's part of a gradient that every mesh makes alike."""
    index = torch.zeros((), dtype=torch.int64)
    for axis, (start, size) in enumerate(zip(offset(weight), local(weight).shape, strict=True)):
        index = index.unsqueeze(-1) + torch.arange(start, start + size) * weight.shape[axis + 1 :].numel()
    mine = normal(index, key(step, name)) * 1e-3
    return DTensor.from_local(
        mine, weight.device_mesh, weight.placements, run_check=False, shape=weight.shape, stride=weight.stride()
    )


def everywhere(tensor: Tensor) -> Tensor:
    """The whole of a tensor; gloo carries no int16."""
    return (full(tensor.int()).short() if tensor.dtype == torch.int16 else full(tensor)).clone()


def updates(cut: dict[str, Any], folder: str, first: int, last: int, save: int, optim: dict[str, Any]) -> Any:
    """Updates first..last, from the checkpoint of the one before if there is one; saves after `save`."""
    engine, known = engine_on(cut, Held(torch.bfloat16, torch.float32))
    optimizer = Adamw8(**{**vars(OPTIM), **optim}).build(engine.weights, known, seed=5)
    tensors: dict[str, Tensor] = {f"model.{n}": w.detach() for n, w in engine.weights.items()} | optimizer.state()
    saver = Saver(Path(folder), 2, engine.mesh.control, lambda _: None)
    if first > 1:
        load(Path(folder), first - 1, tensors, engine.mesh.control)
    for step in range(first, last + 1):
        for name, weight in engine.weights.items():
            weight.grad = gradient(name, weight, step)
        optimizer.update(1e-2, torch.tensor(0.5 if step % 3 else 1.0))
        engine.clear()
        if step == save:
            assert saver.save(step, tensors, {"format": 1})
    return {name: everywhere(tensor) for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    ("world", "cut"),
    [
        (2, {"tp": 2}),
        pytest.param(2, {}, marks=pytest.mark.laws),
        pytest.param(8, {"tp": 2, "shard": 2}, marks=pytest.mark.laws),
        pytest.param(8, {}, marks=pytest.mark.laws),
        pytest.param(1, {}, marks=pytest.mark.laws),
    ],
)
def test_resharded_is_never_stopped(ranks: Any, tmp_path: Path, world: int, cut: dict[str, Any]) -> None:
    """Saved on 4 ranks, loaded on others, ten further updates by the same gradients: the same bits."""
    told = {"folder": str(tmp_path), "save": 2, "optim": {}}
    expected = ranks(4, updates, cut={}, first=1, last=12, **told)[0]
    found = ranks(world, updates, cut=cut, first=3, last=12, **told)[0]
    assert found.keys() == expected.keys()
    kinds = {tensor.dtype for tensor in expected.values()}
    assert {torch.uint8, torch.int8, torch.int16, torch.bfloat16, torch.float32} <= kinds
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def batch_of(rows: Tensor) -> Batch:
    """B T+1 tokens, each row one document."""
    count, length = rows.shape[0], rows.shape[1] - 1
    return Batch(
        tokens=rows[:, :-1].contiguous(),
        labels=rows[:, 1:].contiguous(),
        positions=torch.arange(length).expand(count, length).contiguous(),
        cu_seqlens=None,
        lengths=(length,) * count,
        valid=count * length,
    )


def gradients(held: list[str], cuts: list[dict[str, Any]], micro: int) -> list[dict[str, Tensor]]:
    """The whole gradients of 8 rows in micro-batches of so many."""
    found = []
    for cut in cuts:
        types = Held(*(getattr(torch, name) for name in held))
        engine, _ = engine_on(cut, types, torch.float32)
        rows = 8 // engine.mesh.sizes.dp
        tokens = torch.randint(VOCABULARY, (8, 33), generator=torch.Generator().manual_seed(0))
        mine = tokens[engine.mesh.index("dp") * rows :][:rows]
        engine.forward_backward([batch_of(part) for part in mine.split(micro)], 8 * 32.0)
        kinds = {local(w.grad).dtype for w in engine.weights.values() if w.grad is not None}
        assert kinds == {types.gradients}
        found.append({n: full(w.grad).float() for n, w in engine.weights.items() if w.grad is not None})
    return found


def test_gradients_add_up_in_fp32(ranks: Any) -> None:
    """Over 8 micro-batches and any mesh they are those of one batch; in bf16 they would be a hundred times further."""
    whole = ranks(1, gradients, held=["bfloat16", "float32"], cuts=[{}], micro=8)[0][0]

    def error(of: dict[str, Tensor]) -> float:
        return max(((of[n] - g).norm() / g.norm()).item() for n, g in whole.items())

    for found in ranks(2, gradients, held=["bfloat16", "float32"], cuts=[{}, {"shard": 1}, {"tp": 2}], micro=1)[0]:
        assert error(found) < 2e-6
    [rough] = ranks(1, gradients, held=["bfloat16", "bfloat16"], cuts=[{}], micro=1)[0]
    assert error(rough) > 2e-4


def rows_of(corpus: bytes, steps: int) -> Tensor:
    tokens = torch.frombuffer(bytearray(corpus), dtype=torch.uint8).long()
    starts = torch.randint(len(tokens) - 65, (steps, 8), generator=torch.Generator().manual_seed(1))
    return torch.stack([torch.stack([tokens[s : s + 65] for s in of]) for of in starts.tolist()])


def learns(config: Any, rows: Tensor) -> float:
    """The mean loss of the last steps of a small model on real text."""
    model = Decoder(width=64, vocabulary=256, blocks=(Block(mixer=Softmax(heads=2), ffn=Swiglu(hidden=128)),)).build(
        256, Local()
    )
    for name, weight in model.named_parameters():
        start = initial(model)[name]
        start.fill(weight.data, key(0, name), tuple(weight.shape), (0,) * weight.dim())
    weights = dict(model.named_parameters())
    held = {n: torch.nn.Parameter(w.detach().to(config.weight_type)) for n, w in weights.items()}
    optimizer = config.build(held, roles(model), 0)
    losses = []
    for step in range(len(rows)):
        for name, weight in weights.items():
            weight.data.copy_(held[name].data)
            weight.grad = None
        loss = model(batch_of(rows[step])) / 512
        loss.backward()
        losses.append(loss.item())
        for name, weight in weights.items():
            held[name].grad_dtype = torch.float32
            held[name].grad = weight.grad
        norm = torch.stack([w.grad.norm() for w in weights.values() if w.grad is not None]).norm()
        optimizer.update(4e-3 * min(1.0, (step + 1) / 20), (1 / norm).clamp(max=1.0))
    return sum(losses[-50:]) / 50


@pytest.mark.parametrize(
    ("beta2", "master"),
    [
        (0.95, "none"),
        (0.999, "residual8"),
        pytest.param(0.95, "residual8", marks=pytest.mark.laws),
        pytest.param(0.999, "none", marks=pytest.mark.laws),
    ],
)
def test_300_steps_on_text_are_within_a_percent_of_fp32(beta2: float, master: Master) -> None:
    text = b"".join(Path(json.__path__[0]).joinpath(f).read_bytes() for f in ("decoder.py", "encoder.py", "scanner.py"))
    rows, betas = rows_of(text, 300), (0.9, beta2)
    exact = learns(Adamw(rate=4e-3, betas=betas), rows)
    assert exact < 2.6, "it learns"
    quantised = {"rate": 4e-3, "betas": betas, "exact": ()}
    found = learns(Adamw8(**quantised, master=master), rows)
    assert abs(found - exact) < 0.01 * exact, f"{found} against {exact}"


def test_what_is_quantised_does_not_depend_on_the_mesh() -> None:
    config = Adamw8(rate=1e-3)
    matrix, row = Role("matrix"), Role("matrix", cut_inputs=True)
    assert config.block_of((4096, 11008), matrix) == 256
    assert config.block_of((4096, 11008), row) == 32, "11008 / 8 = 43 · 32"
    assert config.block_of((8, 512, 1024), row) == 128, "an expert's rows of 1024 cut by 8"
    assert config.block_of((100, 1601), matrix) == config.block_of((32, 64), matrix) == 0
    assert config.block_of((128256, 4096), Role("embedding")) == config.block_of((4096,), Role("norm")) == 0
    assert config.state_bytes((4096, 4096), matrix) == 4096 * 4096 * 3 + 8 * 4096 * 16
    assert config.state_bytes((4096,), Role("norm")) == 10 * 4096


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"block": 96}, "block=96: must be a power of two from 32 to 1024"),
        ({"max_tp": 6}, "max_tp=6: must be a power of two"),
        ({"betas": (0.9,)}, "betas="),
        ({"eps": 1e-20}, "eps=1e-20: must be at least 1e-18"),
    ],
)
def test_mistakes_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        Adamw8(rate=1e-3, **fields)


def test_more_tp_than_blocks_allow_is_refused() -> None:
    config = Adamw8(rate=1e-3, max_tp=1, block=64)
    whole = {"w": torch.zeros(256, 64)}
    config.build(whole, {"w": Role("matrix", cut_inputs=True)}, 0)
    with pytest.raises(ValueError, match=r"optim\.max_tp: w: rows of 32 are cut to 32, which blocks of 64"):
        Adamw8State(config, {"w": torch.zeros(256, 32)}, {"w": 64})
