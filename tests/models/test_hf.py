"""A published model computes here what its definition says, and its weights come back bit for bit under their names."""

from collections.abc import Mapping
from math import log, pi, sqrt
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from farspan.models.decoder import Decoder, DecoderModel
from farspan.models.hf import FAMILIES, architecture_of, config_of, model_of
from farspan.models.hf_weights import Layout, joined, layout_in, misfits, parted, pieces_of
from farspan.parallel.context.local import Local
from farspan.parallel.context.shard import Batch
from farspan.platform import config

SHARED = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 30,
    "rms_norm_eps": 1e-4,
    "hidden_act": "silu",
    "max_position_embeddings": 64,
    "intermediate_size": 12,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
EXPERTS = {"num_experts": 5, "num_experts_per_tok": 3, "moe_intermediate_size": 6, "head_dim": 8}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"architectures": ["LlamaForCausalLM"], "rope_theta": 100.0, "rope_scaling": LLAMA3},
    "llama of old": {"architectures": ["LlamaForCausalLM"], "num_key_value_heads": None, "tie_word_embeddings": True},
    "qwen3": {
        "architectures": ["Qwen3ForCausalLM"],
        "head_dim": 8,
        "rope_parameters": {"rope_theta": 500.0, "rope_type": "linear", "factor": 2.0},
        "tie_word_embeddings": True,
        "use_sliding_window": True,
        "sliding_window": 4,
        "max_window_layers": 1,
    },
    "mixtral": {
        "architectures": ["MixtralForCausalLM"],
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 5,
    },
    "qwen3_moe": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "rope_theta": 1e6,
        **EXPERTS,
        "norm_topk_prob": True,
        "mlp_only_layers": [1],
        "sliding_window": 4,
        "use_sliding_window": False,
    },
    "qwen3_moe unnormalised": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "rope_theta": 1e6,
        **EXPERTS,
        "decoder_sparse_step": 2,
    },
}
LAYOUTS: list[Layout] = ["experts", "fused"]


def published(name: str) -> dict[str, Any]:
    return {**SHARED, **CONFIGS[name]}


def decoded(tree: Mapping[str, Any]) -> Decoder:
    rest = {key: value for key, value in tree.items() if key != "kind"}
    return config.decode(config.Source(tree=rest, raw=rest), Decoder)


def shapes_of(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(weight.shape) for name, weight in model.named_parameters()}


def moe_in(told: Mapping[str, Any], layer: int) -> bool:
    if "num_local_experts" in told:
        return True
    step = told.get("decoder_sparse_step", 1)
    return "num_experts" in told and layer not in told.get("mlp_only_layers", []) and (layer + 1) % step == 0


def weights_for(told: Mapping[str, Any]) -> dict[str, Tensor]:
    """Random, of every name that transformers 4 saves, in fp32."""
    width, heads = told["hidden_size"], told["num_attention_heads"]
    each = told.get("head_dim") or width // heads
    keys = (told.get("num_key_value_heads") or heads) * each
    wanted = {"model.embed_tokens.weight": (told["vocab_size"], width), "model.norm.weight": (width,)}
    if not told.get("tie_word_embeddings"):
        wanted["lm_head.weight"] = (told["vocab_size"], width)
    for layer in range(told["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        wanted |= {f"{at}.{norm}_layernorm.weight": (width,) for norm in ("input", "post_attention")}
        rows = {"q": heads * each, "k": keys, "v": keys}
        wanted |= {f"{at}.self_attn.{name}_proj.weight": (out, width) for name, out in rows.items()}
        wanted[f"{at}.self_attn.o_proj.weight"] = (width, heads * each)
        if "Qwen3" in told["architectures"][0]:
            wanted |= {f"{at}.self_attn.{name}_norm.weight": (each,) for name in "qk"}
        if not moe_in(told, layer):
            parts, inner = {f"{at}.mlp": ("gate_proj", "up_proj", "down_proj")}, told["intermediate_size"]
        elif "num_local_experts" in told:
            block, inner = f"{at}.block_sparse_moe", told["intermediate_size"]
            wanted[f"{block}.gate.weight"] = (told["num_local_experts"], width)
            parts = {f"{block}.experts.{e}": ("w1", "w3", "w2") for e in range(told["num_local_experts"])}
        else:
            block, inner = f"{at}.mlp", told["moe_intermediate_size"]
            wanted[f"{block}.gate.weight"] = (told["num_experts"], width)
            names = ("gate_proj", "up_proj", "down_proj")
            parts = {f"{block}.experts.{e}": names for e in range(told["num_experts"])}
        for place, (gate, up, down) in parts.items():
            wanted |= {f"{place}.{gate}.weight": (inner, width), f"{place}.{up}.weight": (inner, width)}
            wanted[f"{place}.{down}.weight"] = (width, inner)
    made = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=made) * 0.7 for name, shape in wanted.items()}


def fused(weights: Mapping[str, Tensor], told: Mapping[str, Any]) -> dict[str, Tensor]:
    """The same as transformers 5 holds it: gate above up, one expert after the other."""
    found = {
        name.replace("block_sparse_moe", "mlp"): weight for name, weight in weights.items() if ".experts." not in name
    }
    count = told.get("num_local_experts") or told["num_experts"]
    block, gate, up, down = "mlp", "gate_proj", "up_proj", "down_proj"
    if "num_local_experts" in told:
        block, gate, up, down = "block_sparse_moe", "w1", "w3", "w2"
    for layer in filter(lambda layer: moe_in(told, layer), range(told["num_hidden_layers"])):
        at = f"model.layers.{layer}"

        def part(expert: int, name: str, at: str = at) -> Tensor:
            return weights[f"{at}.{block}.experts.{expert}.{name}.weight"]

        both = [torch.cat((part(e, gate), part(e, up))) for e in range(count)]
        found[f"{at}.mlp.experts.gate_up_proj"] = torch.stack(both)
        found[f"{at}.mlp.experts.down_proj"] = torch.stack([part(e, down) for e in range(count)])
    return found


def normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * (x * (x.square().mean(-1, keepdim=True) + eps).rsqrt())


def frequencies(told: Mapping[str, Any], each: int) -> Tensor:
    rope = told.get("rope_parameters") or told.get("rope_scaling") or {}
    base = 1e6 if told["architectures"] == ["MixtralForCausalLM"] else 1e4
    theta = rope.get("rope_theta", told.get("rope_theta", base))
    plain = theta ** -(torch.arange(0, each, 2, dtype=torch.float64) / each)
    if rope.get("rope_type") == "linear":
        return plain / rope["factor"]
    if rope.get("rope_type") != "llama3":
        return plain
    found = []
    for frequency in plain.tolist():
        wave, old = 2 * pi / frequency, rope["original_max_position_embeddings"]
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        smooth = (old / wave - low) / (high - low)
        mixed = (1 - smooth) * frequency / rope["factor"] + smooth * frequency
        found.append(frequency if wave < old / high else frequency / rope["factor"] if wave > old / low else mixed)
    return torch.tensor(found, dtype=torch.float64)


def attention(x: Tensor, weights: Mapping[str, Tensor], at: str, told: Mapping[str, Any], window: int | None) -> Tensor:
    """x: T D."""
    length, heads = len(x), told["num_attention_heads"]
    each = told.get("head_dim") or told["hidden_size"] // heads
    q, k, v = (F.linear(x, weights[f"{at}.{n}_proj.weight"]).view(length, -1, each).transpose(0, 1) for n in "qkv")
    if f"{at}.q_norm.weight" in weights:
        q, k = (normed(y, weights[f"{at}.{n}_norm.weight"], told["rms_norm_eps"]) for n, y in (("q", q), ("k", k)))
    angles = torch.arange(length, dtype=torch.float64)[:, None] * frequencies(told, each)
    cos, sin = (torch.cat((y, y), -1).float().double() for y in (angles.cos(), angles.sin()))

    def turned(y: Tensor) -> Tensor:
        first, second = y.chunk(2, -1)
        return y * cos + torch.cat((-second, first), -1) * sin

    q, k = turned(q), turned(k)
    k, v = (y.repeat_interleave(heads // len(y), 0) for y in (k, v))
    places = torch.arange(length)
    apart = places[:, None] - places
    seen = (apart >= 0) & (apart < (window or length))
    scores = (q @ k.transpose(1, 2) / sqrt(each)).masked_fill(~seen, float("-inf"))
    out = (scores.softmax(-1) @ v).transpose(0, 1).reshape(length, -1)
    return F.linear(out, weights[f"{at}.o_proj.weight"])


def gated(x: Tensor, weights: Mapping[str, Tensor], at: str, names: tuple[str, str, str]) -> Tensor:
    gate, up, down = (weights[f"{at}.{name}.weight"] for name in names)
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


def routed(x: Tensor, weights: Mapping[str, Tensor], at: str, told: Mapping[str, Any]) -> Tensor:
    """Softmax over all experts, the best of them, and their sum made one where asked for; a token at a time."""
    mixtral = "num_local_experts" in told
    names = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")
    shares, chosen = F.linear(x, weights[f"{at}.gate.weight"]).softmax(-1).topk(told["num_experts_per_tok"])
    if mixtral or told.get("norm_topk_prob", False):
        shares = shares / shares.sum(-1, keepdim=True)
    rows = [
        torch.stack([s * gated(row, weights, f"{at}.experts.{e}", names) for s, e in zip(ss, es, strict=True)]).sum(0)
        for row, ss, es in zip(x, shares, chosen.tolist(), strict=True)
    ]
    return torch.stack(rows)


def logits_by_definition(told: Mapping[str, Any], weights: Mapping[str, Tensor], tokens: Tensor) -> Tensor:
    """T V: the architecture as transformers defines it, in fp64."""
    weights = {name: weight.double() for name, weight in weights.items()}
    x, eps = weights["model.embed_tokens.weight"][tokens], told["rms_norm_eps"]
    for layer in range(told["num_hidden_layers"]):
        at, window = f"model.layers.{layer}", told.get("sliding_window")
        if "use_sliding_window" in told and not (told["use_sliding_window"] and layer >= told["max_window_layers"]):
            window = None
        inner = normed(x, weights[f"{at}.input_layernorm.weight"], eps)
        x = x + attention(inner, weights, f"{at}.self_attn", told, window)
        inner = normed(x, weights[f"{at}.post_attention_layernorm.weight"], eps)
        if moe_in(told, layer):
            block = "block_sparse_moe" if "num_local_experts" in told else "mlp"
            x = x + routed(inner, weights, f"{at}.{block}", told)
        else:
            x = x + gated(inner, weights, f"{at}.mlp", ("gate_proj", "up_proj", "down_proj"))
    head = weights.get("lm_head.weight", weights["model.embed_tokens.weight"])
    return F.linear(normed(x, weights["model.norm.weight"], eps), head)


def filled(told: Mapping[str, Any], weights: Mapping[str, Tensor], layout: Layout, rows: int | None = None) -> Any:
    """Our model with these weights; rows: of its embedding, if others than theirs."""
    tree = model_of(told)
    model = decoded({**tree, "vocabulary": rows or tree["vocabulary"]}).build(2, Local())
    family = FAMILIES[told["architectures"][0]]
    pieces = pieces_of(shapes_of(model), family, layout, told["vocab_size"])
    found = {name: tuple(weight.shape) for name, weight in weights.items()}
    assert layout_in(found) == layout or not any(moe_in(told, layer) for layer in range(told["num_hidden_layers"]))
    assert misfits(pieces, found, told.get("tie_word_embeddings", False)) == []
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(joined(pieces[name], tuple(weight.shape), weights.__getitem__))
    return model, pieces


def our_logits(model: DecoderModel, tokens: Tensor) -> Tensor:
    length = len(tokens)
    given = Batch(
        tokens=tokens[None],
        labels=tokens[None],
        positions=torch.arange(length)[None],
        cu_seqlens=None,
        lengths=(length,),
        valid=length,
    )
    with torch.no_grad():
        return model.double()(given, torch.arange(length))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_published_model_computes_what_its_definition_says(name: str) -> None:
    told = published(name)
    weights = weights_for(told)
    tokens = torch.randint(told["vocab_size"], (23,), generator=torch.Generator().manual_seed(1))
    ours = our_logits(filled(told, weights, "experts")[0], tokens)
    theirs = logits_by_definition(told, weights, tokens)
    assert theirs.std() > 0.5
    assert torch.allclose(ours, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CONFIGS)
def test_weights_come_back_bit_for_bit(name: str, layout: Layout) -> None:
    """Also from an embedding with more rows than the published one, which are zero; both layouts are one model."""
    told = published(name)
    apart = weights_for(told)
    moe = any(moe_in(told, layer) for layer in range(told["num_hidden_layers"]))
    given = fused(apart, told) if moe and layout == "fused" else apart
    model, pieces = filled(told, given, layout, rows=64)
    back = {n: t for name, weight in model.named_parameters() for n, t in parted(pieces[name], weight.detach())}
    assert back.keys() == given.keys()
    assert all(torch.equal(back[name], given[name]) for name in given)
    assert not model.embed.weight[told["vocab_size"] :].any()
    other = filled(told, apart, "experts", rows=64)[0]
    assert all(torch.equal(w, other.get_parameter(name)) for name, w in model.named_parameters())


@pytest.mark.parametrize("name", CONFIGS)
def test_configurations_come_back(name: str) -> None:
    """Ours, theirs and ours again is the same model; theirs names the family that it came from."""
    told = published(name)
    ours = decoded(model_of(told))
    again = config_of(ours, vocabulary=told["vocab_size"], length=64, dtype="bfloat16")
    assert decoded(model_of(again)) == ours
    assert again["architectures"] == told["architectures"] and architecture_of(ours) == told["architectures"][0]
    assert again["max_position_embeddings"] == 64 and again["torch_dtype"] == "bfloat16"
    for key in ("intermediate_size", "num_local_experts", "moe_intermediate_size", "num_experts", "head_dim"):
        assert again.get(key) == told.get(key) or key not in told


def test_yarn_reaches_as_far_as_its_factor_says() -> None:
    yarn = {"rope_type": "yarn", "factor": 2.5, "original_max_position_embeddings": 32, "beta_fast": 16.0}
    told = {**published("qwen3"), "rope_parameters": {"rope_theta": 1e6, **yarn}, "layer_types": ["full_attention"] * 3}
    ours = decoded(model_of(told))
    assert {block.mixer.window for block in ours.blocks if block.mixer} == {None} and len(ours.blocks) == 1
    again = config_of(ours, vocabulary=30, length=7, dtype="float32")
    assert again["max_position_embeddings"] == 80 and decoded(model_of(again)) == ours
    assert again["rope_scaling"]["beta_fast"] == 16.0 and again["rope_scaling"]["beta_slow"] == 1.0
    assert log(again["rope_theta"]) == pytest.approx(log(1e6))


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("llama", {"architectures": ["GemmaForCausalLM"]}, "architectures=['GemmaForCausalLM']: is not known here"),
        ("llama", {"attention_bias": True}, "attention_bias=True: products have no bias here"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act=gelu: its experts"),
        ("llama", {"hidden_size": None}, "hidden_size=None: must be a number"),
        ("llama", {"rms_norm_eps": None}, "rms_norm_eps=None: must be"),
        ("llama", {"quantization_config": {"bits": 4}}, "save them dequantised"),
        ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "{rope_type: dynamic, …}"),
        (
            "llama",
            {"rope_scaling": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            "['partial_rotary_factor']",
        ),
        ("llama", {"rope_scaling": {"type": "llama3", "factor": 2.0}}, "known here, with factor, low_freq_factor"),
        ("qwen3", {"rope_parameters": None}, "rope_theta=None: must be a number"),
        ("qwen3", {"layer_types": ["chunked_attention"] * 3}, "layer_types=['chunked_attention'"),
        ("mixtral", {"num_local_experts": None}, "num_local_experts=None: must be"),
        ("qwen3_moe", {"num_experts": 0}, "num_experts=0: must be"),
    ],
)
def test_what_cannot_be_imported_is_named(name: str, change: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=r"config\.json: ") as told:
        model_of({**published(name), **change})
    assert said in str(told.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"norm": {"kind": "layer"}}, "model.norm.kind=layer"),
        ({"placement": "peri"}, "model.placement=peri"),
        ({"mixer": {"sinks": True}}, "model.blocks.0.mixer.sinks=True"),
        ({"mixer": {"causal": False}}, "model.blocks.0.mixer.causal=False: theirs are"),
        ({"mixer": {"rope": None}}, "model.blocks.0.mixer.rope=null"),
        ({"mixer": {"window": 4}}, "model.blocks: mixer.window: Llama has none"),
        ({"ffn": {"kind": "geglu"}}, "model.blocks.0.ffn: every layer of theirs has swiglu or moe"),
        ({"ffn": {"kind": "moe", "experts": 4, "active": 1, "score": "sigmoid"}}, "ffn.score=sigmoid"),
        ({"ffn": {"kind": "moe", "experts": 4, "active": 1, "shared": 3}}, "ffn.shared=3: theirs have 0"),
        ({"ffn": {"kind": "moe", "experts": 4, "active": 1, "bias": "aux_free"}}, "ffn.bias=aux_free: theirs"),
        ({"ffn": {"kind": "moe", "experts": 4, "active": 1, "normalised": False}}, "only Qwen3-MoE has it"),
    ],
)
def test_what_cannot_be_exported_is_named(change: dict[str, Any], said: str) -> None:
    block = {"mixer": {"kind": "softmax", "heads": 2}, "ffn": {"kind": "swiglu", "hidden": 3}}
    parts = {part: {**block[part], **change.pop(part, {})} for part in block}
    model = decoded({"width": 8, "blocks": [parts], **change})
    with pytest.raises(ValueError, match="export knows LlamaForCausalLM") as told:
        architecture_of(model)
    assert said in str(told.value)


def test_weights_that_do_not_fit_are_named_with_their_shapes() -> None:
    """Qwen3-VL stores gate and up the other way round; files of other models hold what nobody wants."""
    told = published("qwen3_moe")
    weights = fused(weights_for(told), told)
    odd = "model.layers.0.mlp.experts.gate_up_proj"
    found = {name: tuple(weight.shape) for name, weight in weights.items()} | {odd: (5, 16, 12)}
    found["model.layers.0.self_attn.q_proj.bias"] = (32,)
    found["model.layers.0.self_attn.rotary_emb.inv_freq"] = (4,)
    del found["model.norm.weight"]
    model = decoded(model_of(told)).build(2, Local())
    pieces = pieces_of(shapes_of(model), FAMILIES["Qwen3MoeForCausalLM"], "fused", 30)
    missing, wrong, strange = misfits(pieces, found, tied=False)
    assert missing == "model.norm.weight: is missing; the model wants it of [16]"
    assert wrong.startswith(f"{odd}: is [5, 16, 12], and the model wants [5, 12, 16]")
    assert strange.startswith("model.layers.0.self_attn.q_proj.bias: [32] has no place in the model")
