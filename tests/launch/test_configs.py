"""Every configuration that ships decodes, plans on the meta device, and survives being written and read again."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from farspan.launch import run as runs
from farspan.launch import runner
from farspan.models.ffns import Moe
from farspan.parallel.expert.auto import KINDS
from farspan.platform import config
from farspan.platform.dispatching import _layers, _needs, _room
from farspan.platform.plan import Memory, Plan, plan

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_decodes_and_plans(path: Path, tmp_path: Path) -> None:
    run = runs.decode(config.read(path))
    lines = runs.plan_of(run)
    assert [line.split("  ")[0] for line in lines] == ["parameters", "FLOPs per token", "mesh", "step", "memory"]
    again = tmp_path / "again.yaml"
    again.write_text(config.dump(run.tree()))
    other = runs.decode(config.read(again))
    assert other.job == run.job and other.launch == run.launch


def test_dry_run_prints_the_plan_and_starts_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "farspan.launch.cli", "train", "--config", "configs/quickstart.yaml", "--dry-run"]
    said = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    for word in ("parameters", "FLOPs per token", "mesh", "memory", "kind: decoder"):
        assert word in said
    assert not list(tmp_path.iterdir())


def test_the_llama_1b_configuration_has_its_size() -> None:
    run = runs.decode(config.read(next(p for p in CONFIGS if p.stem == "llama_1b"), ["launch.ranks=1"]))
    assert "1,235,814,400" in runs.plan_of(run)[0]  # the published Llama-3.2-1B


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [
        ("qwen3_30b_a3b", 30_532_122_624, 3_353_032_704),  # published as 30.5B and 3.3B
        ("mixtral_8x7b", 46_702_792_704, 12_879_925_248),  # as 46.7B and 12.9B
        ("deepseek_fine_grained", 15_674_619_904, 2_629_285_888),
    ],
)
def test_models_of_experts_have_their_sizes(name: str, total: int, active: int) -> None:
    """What a token meets is all but the experts that it is not given to."""
    run = runs.decode(config.read(next(p for p in CONFIGS if p.stem == name)))
    assert plan(run.job, runner.world(run.launch), "cuda").parameters == total
    model = run.job.model
    ffns = [(block.repeat, block.ffn) for block in model.blocks if isinstance(block.ffn, Moe)]
    unmet = sum(repeat * (ffn.experts - ffn.active) * 3 * ffn.hidden * model.width for repeat, ffn in ffns)
    assert total - unmet == active


def test_memory_is_that_of_the_dispatch() -> None:
    """Gathered tokens are held as often as there are ranks, experts that are gathered whole, and a rank's own experts
    once: products read them where they lie. Beside these nothing differs."""
    path = next(p for p in CONFIGS if p.stem == "expert_parallel")

    def memory(ranks: int, *overrides: str) -> Memory:
        run = runs.decode(config.read(path, [f"launch.ranks={ranks}", "model.blocks.0.ffn.shared=0", *overrides]))
        return plan(run.job, ranks, "cpu").memory

    tokens, gathered, whole = (
        memory(4, "parallel.ep=4", f"parallel.dispatch={{kind: {kind}}}")
        for kind in ("all_to_all", "all_gather", "weight_gather")
    )
    rows, kept = 4 * 256, 4 * (2 * 2 * 128 + 128 + 2 + 2 + 2)
    """Of a token: gate and up of two experts, itself, and its two shares, rows and places."""
    assert gathered.activations - tokens.activations == pytest.approx(4 * 3 * rows * kept, rel=0.1)
    assert whole.gathered - tokens.gathered == 2 * 8 * 3 * 128 * 128 * 4
    assert whole.activations == pytest.approx(tokens.activations, rel=1e-5) and gathered.gathered == tokens.gathered
    assert memory(4, "parallel.ep=1", "parallel.etp=2").activations > memory(4, "parallel.ep=1").activations
    assert memory(3, "train.batch=3", "parallel.ep=3", "parallel.dispatch={kind: weight_gather}").total, "8 / 3 experts"


def test_experts_that_choose_are_planned_for_what_they_take() -> None:
    """A quarter of the visits are taken, on one rank and on each of two, and products count no more."""
    path = next(p for p in CONFIGS if p.stem == "expert_choice")

    def planned(active: float, ranks: int) -> Plan:
        run = runs.decode(
            config.read(path, [f"launch.ranks={ranks}", f"parallel.ep={ranks}", f"model.blocks.0.ffn.active={active}"])
        )
        return plan(run.job, ranks, "cpu")

    tokens, visit = 4 * 8 * 256, 4 * 2 * 128
    """In all layers; of a visit gate and up alone."""
    for ranks in (1, 2):
        few, many = (planned(active, ranks) for active in (2, 8))
        assert many.memory.activations - few.memory.activations > 0.9 * 6 * tokens * visit
        assert few.flops_per_token < many.flops_per_token
    job = runs.decode(config.read(path, ["parallel.ep=2", "model.blocks.0.ffn.active=1.5"])).job
    mesh = SimpleNamespace(sizes=job.parallel.sizes(2))
    assert [layer.active for layer in _layers(job, mesh, torch.float32)] == [2]  # type: ignore[arg-type]


def test_what_is_recomputed_is_what_was_not_kept() -> None:
    """Of one layer; logits find it gone, and what of them is larger than it counts as well."""
    path = next(p for p in CONFIGS if p.stem == "llama_1b")
    kept, again = (
        plan(runs.decode(config.read(path, ["launch.ranks=1", f"train.recompute={how}"])).job, 1, "cuda").memory
        for how in ("none", "block")
    )
    assert kept.recomputed == 0 < again.recomputed
    assert kept.activations - again.activations == 16 * again.recomputed
    assert again.logits == kept.logits - again.recomputed > 2 * 128256 * 2048, "the head's gradient stays"


def test_auto_knows_what_a_gpu_would_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    job = runs.decode(config.read(next(p for p in CONFIGS if p.stem == "expert_parallel"))).job
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=80 * 10**9))
    monkeypatch.setattr(dist, "all_reduce", lambda *_, **__: None)
    mesh = SimpleNamespace(device=torch.device("cuda"), sizes=job.parallel.sizes(2), control=None)
    needs = _needs(job, mesh)  # type: ignore[arg-type]
    assert _room(mesh) == 80 * 10**9 and set(needs) == set(KINDS)  # type: ignore[arg-type]
    assert needs["all_to_all"] == plan(job, 2, "cuda").memory.total < min(needs["all_gather"], needs["weight_gather"])
    mesh.device = torch.device("cpu")
    assert _room(mesh) == 0  # type: ignore[arg-type]


def test_two_ranks_of_cp_hold_half_of_each_sequence() -> None:
    path = next(p for p in CONFIGS if p.stem == "long_context_1b")
    cut, whole = (runs.decode(config.read(path, [f"launch.ranks={n}", f"parallel.cp={n}"])) for n in (2, 1))
    halves, all_of_it = (plan(run.job, n, "cuda") for run, n in ((cut, 2), (whole, 1)))
    assert 2 * halves.memory.activations == pytest.approx(all_of_it.memory.activations, rel=0.01)
    assert halves.flops_per_token == all_of_it.flops_per_token and halves.tokens_per_step == 131072
    mesh, step = runs.plan_of(cut)[2:4]
    assert "cp=2 · tp=1, context auto; weights: 1 x shard 2" in mesh and step.endswith("cut into 2 parts of 65,536")
    assert "context" not in runs.plan_of(whole)[2] and "cut into" not in runs.plan_of(whole)[3]
