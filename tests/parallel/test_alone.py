"""A unit of one rank gives bit for bit what FSDP gives, without the copies: where types allow it, products read weights
themselves."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from farspan.models.block import Block
from farspan.models.decoder import Decoder, initial
from farspan.models.ffns import Moe
from farspan.models.mixers import Softmax
from farspan.parallel import alone, fsdp
from farspan.parallel.context import Ring
from farspan.parallel.context.shard import Batch
from farspan.parallel.engine import Engine, Held
from farspan.parallel.fsdp import local
from farspan.parallel.mesh import Mesh, Parallel

HELD = {"fp32": Held(torch.float32, torch.float32), "bf16": Held(torch.bfloat16, torch.bfloat16)}
HELD |= {"bf16, fp32 gradients": Held(torch.bfloat16, torch.float32)}


def batches(count: int) -> list[Batch]:
    made = torch.Generator().manual_seed(5)
    tokens = torch.randint(32, (count, 2, 12), generator=made)
    positions = torch.arange(12).expand(2, -1)
    return [
        Batch(tokens=t, labels=t.roll(-1, 1), positions=positions, cu_seqlens=None, lengths=(12, 12), valid=24)
        for t in tokens
    ]


def engine_of(held: str, gather: str, kept: float | None) -> Engine:
    parallel = Parallel(context=Ring())
    mesh = Mesh(parallel.sizes(1), torch.device("cpu"), dist.group.WORLD)
    mixer, ffn = Softmax(heads=2, head_dim=8), Moe(experts=4, active=2, hidden=16, shared=8)
    with torch.device("meta"):
        model = Decoder(width=16, vocabulary=32, blocks=(Block(repeat=2, mixer=mixer, ffn=ffn),)).build(
            32, parallel.context.build()
        )
    how: dict[str, Any] = {"kept": kept, "gather": gather, "held": HELD[held], "compute": torch.bfloat16}
    return Engine(model, list(model.layers), initial(model), mesh, context=parallel.context.build(), seed=1, **how)


def steps(engine: Engine, count: int) -> Iterator[Tensor]:
    """What two steps of so many micro-batches lead to."""
    for _ in range(2):
        yield engine.forward_backward(batches(count), 24.0 * count)
        yield engine.evaluate(batches(1)[0])
        yield engine.gradient_norm()
        yield from (local(w.grad).clone() for w in engine.weights.values() if w.grad is not None)
        with torch.no_grad():
            for weight in engine.weights.values():
                local(weight).sub_(0.1 * local(weight.grad))  # type: ignore[arg-type]
        engine.clear()
        yield from (local(w).clone() for w in engine.weights.values())


def probe(cases: list[list[Any]]) -> list[Any]:
    results = []
    ease = alone.ease
    for held, gather, kept, count in cases:
        eased = engine_of(held, gather, kept)
        eased_units = sum(type(u._get_fsdp_state()._fsdp_param_group) is alone._Alone for u in fsdp.units(eased.model))
        alone.ease = lambda unit: None
        plain = engine_of(held, gather, kept)
        alone.ease = ease
        found = [list(steps(engine, count)) for engine in (eased, plain)]
        weight = eased.model.layers[0].ffn.experts.w13
        eased.model(batches(1)[0])
        used = eased.model.layers[0].ffn.experts.w13 if gather == "step" else None
        copied = None if used is None else local(used).data_ptr() != local(eased.weights[NAME]).data_ptr()
        results.append((found, eased_units, copied, weight.dtype))
    return results


NAME = "layers.0.ffn.experts.w13"
CASES = [[held, gather, kept, count] for held in HELD for gather, kept, count in (("layer", 0.5, 3), ("step", None, 1))]


def test_a_unit_of_one_rank_is_fsdp_bit_for_bit(ranks: Any) -> None:
    for case, (found, units, copied, _) in zip(CASES, ranks(1, probe, cases=CASES)[0], strict=True):
        assert units == 3
        for ours, theirs in zip(*found, strict=True):
            assert ours.dtype == theirs.dtype and torch.equal(ours, theirs), case
        if copied is not None:
            assert copied == (case[0] == "fp32"), "weights of the type of products are read where they lie"


@pytest.mark.parametrize("cut", [{}, {"shard": 1}])
def test_more_ranks_are_fsdps(ranks: Any, cut: dict[str, int]) -> None:
    assert ranks(2, eased_of_two, cut=cut) == [0, 0]


def eased_of_two(cut: dict[str, int]) -> int:
    parallel = Parallel(context=Ring(), **cut)
    mesh = Mesh(parallel.sizes(2), torch.device("cpu"), dist.group.WORLD)
    with torch.device("meta"):
        block = Block(mixer=Softmax(heads=2, head_dim=8), ffn=Moe(experts=4, active=2, hidden=16))
        model = Decoder(width=16, vocabulary=32, blocks=(block,)).build(32, parallel.context.build())
    engine = Engine(model, list(model.layers), initial(model), mesh, context=parallel.context.build(), seed=1)
    return sum(type(u._get_fsdp_state()._fsdp_param_group) is alone._Alone for u in fsdp.units(engine.model))
