"""A published model becomes a run, is trained on, and is published again."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import numbers
from safetensors.torch import load_file, save_file
from torch import Tensor

from farspan.launch import cli
from farspan.launch.making import weights_of
from farspan.launch.published import Published
from farspan.platform import checkpoint, config
from farspan.platform.checkpoint import folder_of, manifest_of, verify
from farspan.platform.data.tokenizer import open_tokenizer, train_bpe
from farspan.platform.job import Job
from farspan.platform.stored import Stored

CONFIG = """
name: base
model: {kind: decoder, width: 8, blocks: []}
data: {kind: text, paths: [corpus], sequence_length: 32, held_out: 0.2, cache: cache, tokenizer: bytes}
train: {steps: 2, batch: 4}
optim: {kind: adamw, rate: 1e-3, weight_decay: 0.0}
schedule: {kind: constant}
launch: {kind: local, ranks: 1, device: cpu}
"""
TOLD = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "vocab_size": 300,
    "hidden_size": 16,
    "intermediate_size": 24,
    "moe_intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "mlp_only_layers": [0],
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 4096,
    "eos_token_id": 0,
    "tie_word_embeddings": False,
}


def weights() -> dict[str, Tensor]:
    """As they are published: in bf16."""
    width, inner = TOLD["hidden_size"], 12
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (300, width), "lm_head.weight": (300, width)}
    shapes["model.norm.weight"] = (width,)
    for layer in range(2):
        at = f"model.layers.{layer}"
        shapes |= {f"{at}.{name}_layernorm.weight": (width,) for name in ("input", "post_attention")}
        rows = {"q_proj": 16, "k_proj": 8, "v_proj": 8}
        shapes |= {f"{at}.self_attn.{name}.weight": (out, width) for name, out in rows.items()}
        shapes |= {f"{at}.self_attn.o_proj.weight": (width, 16)}
        shapes |= {f"{at}.self_attn.{name}_norm.weight": (8,) for name in "qk"}
    shapes |= {"model.layers.1.mlp.gate.weight": (4, width)}
    places = {"model.layers.0.mlp": 24} | {f"model.layers.1.mlp.experts.{e}": inner for e in range(4)}
    for place, hidden in places.items():
        shapes |= {f"{place}.{name}_proj.weight": (hidden, width) for name in ("gate", "up")}
        shapes |= {f"{place}.down_proj.weight": (width, hidden)}
    made = torch.Generator().manual_seed(0)
    found = {name: torch.randn(shape, generator=made) * 0.2 for name, shape in shapes.items()}
    return {name: (tensor + 1 if len(tensor.shape) == 1 else tensor).bfloat16() for name, tensor in found.items()}


@pytest.fixture
def here(tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the model `hub` in two files, and a configuration without one."""
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(CONFIG)
    hub = tmp_path / "hub"
    hub.mkdir()
    texts = (path.read_text() for path in sorted(corpus.iterdir()))
    train_bpe(texts, 290, [], hub / "tokenizer.json")
    (hub / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    (hub / "config.json").write_text(json.dumps(TOLD))
    items = list(weights().items())
    parts = {"model-1-of-2.safetensors": dict(items[:9]), "model-2-of-2.safetensors": dict(items[9:])}
    for file, part in parts.items():
        save_file(part, hub / file, metadata={"format": "pt"})
    placed = {name: file for file, part in parts.items() for name in part}
    (hub / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    return tmp_path


def tensors(folder: Path) -> dict[str, Tensor]:
    published = Published(folder)
    return {name: published.read(name) for name in published.shapes()}


def refusal(*arguments: str, capfd: pytest.CaptureFixture[str]) -> str:
    assert cli.main(list(arguments)) == 2
    return capfd.readouterr().err


def test_imported_trained_and_exported(
    here: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is exported bit for bit in both layouts; two steps change it a little, and that can be imported again."""
    given, run = weights(), here / "runs" / "a"
    assert cli.main(["import", "hub", "a", "--config", "tiny.yaml", "model.blocks.1.ffn.balance=0.001"]) == 0
    said = capfd.readouterr().out
    assert (
        "Qwen3MoeForCausalLM: " in said
        and "the model's own, kept in runs/a/hf" in said
        and "launch train --config runs/a/config.yaml --resume" in said
    )
    assert verify(folder_of(run / "checkpoints", 0)) == [] and checkpoint.latest(run / "checkpoints") == 0
    kept = config.read(run / "config.yaml").tree
    assert kept["data"]["tokenizer"] == "runs/a/hf" and kept["model"]["blocks"][1]["ffn"]["balance"] == 0.001
    assert cli.main(["export", "a", "same", "--dtype", "fp32"]) == 0
    with monkeypatch.context() as small:
        small.setattr("farspan.launch.published.FILE", 9000)
        assert cli.main(["export", "runs/a", "fused", "--layout", "fused"]) == 0
    index = json.loads((here / "fused" / "model.safetensors.index.json").read_text())
    files = {path.name for path in (here / "fused").glob("*.safetensors")}
    assert set(index["weight_map"].values()) == files and len(files) > 2
    assert index["metadata"]["total_size"] == sum(2 * tensor.numel() for tensor in given.values())
    same, fused = tensors(here / "same"), tensors(here / "fused")
    assert same.keys() == given.keys() and all(torch.equal(same[name], given[name].float()) for name in given)
    both = fused["model.layers.1.mlp.experts.gate_up_proj"]
    assert both.shape == (4, 24, 16) and both.dtype == torch.bfloat16
    assert torch.equal(both[2, :12], given["model.layers.1.mlp.experts.2.gate_proj.weight"])
    assert torch.equal(both[2, 12:], given["model.layers.1.mlp.experts.2.up_proj.weight"])
    told = json.loads((here / "fused" / "config.json").read_text())
    assert {key: told[key] for key in TOLD} == TOLD
    assert (here / "same" / "tokenizer.json").read_bytes() == (here / "hub" / "tokenizer.json").read_bytes()
    assert (here / "same" / "tokenizer_config.json").exists()

    lines = numbers(run / "config.yaml", here, "name=a", "--resume")
    assert [line[0] for line in lines] == [1, 2] and lines[0][1] < 7
    assert cli.main(["export", "a", "after", "--dtype", "fp32"]) == 0
    after = load_file(here / "after" / "model.safetensors")
    moved = {name: (after[name] - same[name]).abs().max().item() for name in same}
    assert all(0 < distance < 2.5e-3 for name, distance in moved.items() if "experts" not in name), moved
    assert cli.main(["import", "after", "elsewhere/b", "--config", "tiny.yaml", "data.tokenizer=hub"]) == 0
    again, trained = (Stored(folder_of(Path(p) / "checkpoints", s)) for p, s in (("elsewhere/b", 0), ("runs/a", 2)))
    assert all(torch.equal(again[name], trained[name]) for name in trained if name.startswith("model."))
    assert cli.main(["convert", "a", "c", "optim.kind=adamw8"]) == 0 and (here / "runs/c/hf/config.json").exists()
    assert not any(path.name.endswith(".tmp") for path in here.rglob("*"))


OPTIMS: list[dict[str, Any]] = [
    {"kind": "adamw", "rate": 1e-3, "offload": {"kind": "streamed"}},
    {"kind": "adamw8", "rate": 1e-3, "block": 32, "max_tp": 1, "exact": []},
    {"kind": "muon", "rate": 1e-3, "rest": {"kind": "adamw", "rate": 1e-3}},
]


@pytest.mark.parametrize("optim", OPTIMS, ids=lambda optim: optim["kind"])
def test_every_state_begins_as_its_optimizer_makes_it(here: Path, optim: dict[str, Any]) -> None:
    """So that the checkpoint of step 0 loads; weights in bf16 and what they remember are the published ones."""
    assert cli.main(["import", "hub", "a", "--config", "tiny.yaml", f"optim={json.dumps(optim)}"]) == 0
    source = config.read(here / "runs" / "a" / "config.yaml")
    job = config.decode(config.Source(tree={k: v for k, v in source.tree.items() if k != "launch"}, raw={}), Job)
    shapes, roles = weights_of(job)
    stored = Stored(folder_of(here / "runs" / "a" / "checkpoints", 0))
    zeros = {name: torch.zeros(shape, dtype=job.optim.weight_type) for name, shape in shapes.items()}
    whole = optim["kind"] == "adamw"
    made = (job.optim.in_halves if whole else job.optim).build(zeros, roles, 0).state()  # type: ignore[union-attr]
    wanted = {f"optim.{name}": tensor for name, tensor in made.items()}
    assert {name for name in stored if name.startswith("optim.")} == wanted.keys()
    for name, tensor in wanted.items():
        assert stored[name].dtype == tensor.dtype and torch.equal(stored[name], tensor), name
    assert stored["model.embed.weight"].dtype == job.optim.weight_type
    assert torch.equal(stored["model.embed.weight"].bfloat16(), weights()["model.embed_tokens.weight"])
    assert manifest_of(folder_of(here / "runs" / "a" / "checkpoints", 0))["state"] == {
        "step": 0,
        "rows": 0,
        "tokens": 0,
    }


def test_what_is_not_there_or_does_not_fit_is_named(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Before anything is left behind, and with the way out."""
    start = ["import", "hub", "a", "--config", "tiny.yaml"]
    assert "data.paths: missing" in refusal("import", "hub", "a", capfd=capfd)
    assert "name=b: a run is named as its folder is, a" in refusal(*start, "name=b", capfd=capfd)
    assert "model.blocks.0.mixer.head=3: unknown key" in refusal(*start, "model.blocks.0.mixer.head=3", capfd=capfd)
    said = refusal(*start, "model.blocks.1.ffn.hidden=13", capfd=capfd)
    assert "experts.0.gate_proj.weight: is [12, 16], and the model wants [13, 16]" in said and "and 7 more" in said
    assert "ffn.shared.to_gate.weight: [5, 16] has no counterpart in qwen3_moe" in refusal(
        *start, "model.blocks.1.ffn.shared=5", capfd=capfd
    )
    galore = "optim={kind: galore, rate: 1e-3, rank: 2, rest: {kind: adamw, rate: 1e-3}}"
    assert "a run is imported under adamw, adamw8 or muon" in refusal(*start, galore, capfd=capfd)
    assert "model.vocabulary=200: the tokenizer has" in refusal(*start, "model.vocabulary=200", capfd=capfd)
    fewer = [*start, "model.vocabulary=296"]
    assert "296 rows do not hold the 300 of the published model" in refusal(*fewer, capfd=capfd)
    assert "exists, and nothing is ever" in refusal("import", "hub", str(here / "corpus"), capfd=capfd)
    broken = here / "hub" / "model-2-of-2.safetensors"
    content = broken.read_bytes()
    broken.write_bytes(content[:40])
    assert "model-2-of-2.safetensors: not readable" in refusal(*start, capfd=capfd)
    save_file({name: tensor.to(torch.float8_e4m3fn) for name, tensor in list(weights().items())[9:]}, broken)
    assert "is of F8_E4M3, and F64, F32, F16, BF16 are read" in refusal(*start, capfd=capfd)
    (here / "hub" / "model.safetensors.index.json").unlink()
    assert "holds neither model.safetensors.index.json nor" in refusal(*start, capfd=capfd)
    (here / "hub" / "config.json").write_text("{")
    assert "config.json: damaged" in refusal(*start, capfd=capfd)
    assert "runs/a: is no run" in refusal("export", "a", "out", capfd=capfd)
    assert not any((here / "runs").iterdir()) and not (here / "out").exists()


def test_a_model_of_our_own_is_exported_without_its_padding(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A run that was never imported; one whose shape no family has is refused."""
    block = "{mixer: {kind: softmax, heads: 2}, ffn: {kind: swiglu, hidden: 24}}"
    model = f"model={{kind: decoder, width: 16, tied: true, blocks: [{block}]}}"
    plain = ["data.tokenizer=hub", model, "name=own"]
    numbers(here / "tiny.yaml", here, *plain, "train.steps=1")
    assert cli.main(["export", "own", "out", "--dtype", "fp32"]) == 0
    tokens = open_tokenizer("hub", None).vocabulary
    embedded = load_file(here / "out" / "model.safetensors")["model.embed_tokens.weight"]
    stored = Stored(folder_of(here / "runs" / "own" / "checkpoints", 1))["model.embed.weight"]
    assert len(embedded) == tokens < len(stored) and torch.equal(embedded, stored[:tokens])
    told = json.loads((here / "out" / "config.json").read_text())
    assert told["architectures"] == ["LlamaForCausalLM"] and told["vocab_size"] == tokens
    assert told["max_position_embeddings"] == 32 and told["tie_word_embeddings"] and told["eos_token_id"] is None
    assert (here / "out" / "tokenizer.json").read_bytes() == (here / "hub" / "tokenizer.json").read_bytes()
    path = here / "runs" / "own" / "config.yaml"
    path.write_text(path.read_text().replace("softcap: null", "softcap: 3.0"))
    assert "model.blocks.0.mixer.softcap=3.0" in refusal("export", "own", "other", capfd=capfd)
