"""Optimizers whose state is cut by blocks or by matrices do on ranks of ep and etp what they do on one."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from farspan.models.decoder import initial
from farspan.models.roles import roles
from farspan.parallel.engine import Engine
from farspan.parallel.mesh import Mesh, Parallel
from farspan.platform.optim import Adamw, Adamw8, Galore, Muon, NaturalGalore

CONFIGS = {
    "adamw8": Adamw8(rate=1e-2, exact=(), master="fp32"),
    "muon": Muon(rate=1e-2, rest=Adamw(rate=1e-2)),
    "muon int8": Muon(rate=1e-2, rest=Adamw(rate=1e-2), momentum="int8"),
    "galore": Galore(rate=1e-2, rest=Adamw(rate=1e-2), rank=1, every=1),
    "natural_galore": NaturalGalore(rate=1e-2, rest=Adamw(rate=1e-2), rank=1, every=1, history=2, damping=1.0),
}
"""GaLore's rank is that of an expert's least gradient, of a single token: any further directions are of rounding."""
CUTS = [{"ep": 2, "etp": 2, "dispatch": "all_to_all"}, {"tp": 2, "ep": 4, "dispatch": "all_gather"}]


def probe(cuts: list[dict[str, Any]], kind: str) -> list[dict[str, torch.Tensor]]:
    """The weights after three steps."""
    spec = importlib.util.spec_from_file_location("experts", Path(__file__).parent / "test_experts.py")
    assert spec is not None and spec.loader is not None
    experts = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(experts)
    control, found = dist.new_group(backend="gloo"), []
    for cut in cuts:
        parallel = Parallel(**{**cut, "dispatch": experts.DISPATCH[cut.get("dispatch", "auto")]})
        mesh = Mesh(parallel.sizes(dist.get_world_size()), torch.device("cpu"), control)
        context = experts.runtime(parallel, mesh)
        with torch.device("meta"):
            built, whole = (experts.model(0.5).build(experts.VOCABULARY, context) for _ in range(2))
        engine = Engine(
            built,
            list(built.layers),
            initial(built),
            mesh,
            context=context,
            seed=3,
            dispatcher=parallel.dispatch.build(mesh.expert_axes),
        )
        optimizer = CONFIGS[kind].build(engine.weights, roles(whole), 0)
        for _ in range(3):
            work = experts.batches(mesh.index("dp"), mesh.sizes.dp, 2)
            labels = torch.tensor(float(sum(batch.valid for batch in work)))
            dist.all_reduce(labels, group=mesh.dense.get_group("dp"))
            engine.forward_backward(work, labels.item())
            optimizer.update(1e-2, torch.tensor(0.5))
            engine.clear()
        found.append({name: experts.whole(weight) for name, weight in engine.weights.items()})
    return found


@pytest.mark.laws
@pytest.mark.parametrize("kind", CONFIGS)
def test_ranks_of_experts_step_as_one(ranks: Any, kind: str) -> None:
    """fp32 sums differ in their last bits; a code that they tip over is worth a hundredth of a step."""
    one = ranks(1, probe, cuts=[{}], kind=kind)[0][0]
    for of_rank in ranks(4, probe, cuts=CUTS, kind=kind):
        for found in of_rank:
            for name, weight in one.items():
                torch.testing.assert_close(found[name], weight, rtol=1e-3, atol=5e-4 if "8" in kind else 2e-5)
