"""Configurations of HuggingFace's transformers and our own, each made of the other: the same function, or a refusal."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from farspan.models.block import Block
from farspan.models.decoder import Decoder
from farspan.models.ffns import Moe, Swiglu
from farspan.models.mixers.softmax import Softmax
from farspan.models.norm import Rms
from farspan.models.rope import Linear, Llama3, Rope, Yarn

Plain = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Family:
    """An architecture of transformers, by what tells it from the others."""

    model_type: str
    qk_norm: bool = False
    theta: float | None = None
    """The base of its rotations where config.json names none; None: it must."""
    counts: tuple[str, ...] = ()
    """Whole numbers that its config.json holds besides `COUNTS`."""
    block: str = "mlp"
    """What holds router and experts where each expert's weights are apart."""
    expert: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    """An expert's three products there: gate, up, out."""


FAMILIES = {
    "LlamaForCausalLM": Family(model_type="llama", theta=10000.0),
    "MixtralForCausalLM": Family(
        model_type="mixtral",
        theta=1e6,
        counts=("num_key_value_heads", "num_local_experts", "num_experts_per_tok"),
        block="block_sparse_moe",
        expert=("w1", "w3", "w2"),
    ),
    "Qwen3ForCausalLM": Family(model_type="qwen3", qk_norm=True, counts=("num_key_value_heads", "head_dim")),
    "Qwen3MoeForCausalLM": Family(
        model_type="qwen3_moe",
        qk_norm=True,
        counts=("num_key_value_heads", "num_experts_per_tok", "moe_intermediate_size"),
    ),
}

KNOWN = ", ".join(FAMILIES)

COUNTS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)

PLAIN = {
    "hidden_act": ("silu", "its experts and feed-forward layers are SwiGLU here"),
    "attention_bias": (False, "products have no bias here"),
    "mlp_bias": (False, "products have no bias here"),
    "partial_rotary_factor": (1.0, "all channels of a head are turned here"),
    "quantization_config": (None, "only plain weights are read; save them dequantised, with no quantization_config"),
}
"""What config.json may say of these and nothing else, and why."""


def model_of(config: Mapping[str, Any]) -> Plain:
    """The `model` section that computes what a model of this config.json does. ValueError: there is none."""
    architecture = architecture_in(config)
    family = FAMILIES[architecture]
    if found := _misfits(config, family):
        raise ValueError("\n".join(f"config.json: {problem}" for problem in found))
    windows, rope = _windows(config, family), _rope(config, family)
    layers = [
        {"mixer": _mixer(config, family, rope, window), "ffn": _ffn(config, family, i)}
        for i, window in enumerate(windows)
    ]
    return {
        "kind": "decoder",
        "width": config["hidden_size"],
        "vocabulary": config["vocab_size"],
        "tied": bool(config.get("tie_word_embeddings", False)),
        "norm": {"kind": "rms", "eps": config["rms_norm_eps"]},
        "blocks": [{"repeat": len(list(run)), **layer} for layer, run in groupby(layers)],
    }


def architecture_in(config: Mapping[str, Any]) -> str:
    """Which of `FAMILIES` a config.json is of. ValueError: none."""
    named = config.get("architectures") or []
    if len(named) != 1 or named[0] not in FAMILIES:
        raise ValueError(f"config.json: architectures={named}: is not known here; import a model of {KNOWN}")
    return str(named[0])


def _misfits(config: Mapping[str, Any], family: Family) -> list[str]:
    """What it says that our models cannot be, and what it does not say."""
    counts = [*COUNTS, *family.counts]
    if family.model_type == "qwen3_moe" and "num_local_experts" not in config:  # transformers 5 calls it so
        counts.append("num_experts")
    found = [
        f"{key}={config.get(key)}: must be a number of at least 1; take the file as the model was published with it"
        for key in counts
        if not isinstance(config.get(key), int) or config[key] < 1
    ]
    if not isinstance(config.get("rms_norm_eps"), float):
        found.append(f"rms_norm_eps={config.get('rms_norm_eps')}: must be a number such as 1e-6")
    return found + [
        f"{key}={config[key]}: {why}"
        for key, (wanted, why) in PLAIN.items()
        if config.get(key) is not None and config[key] != wanted
    ]


def _mixer(config: Mapping[str, Any], family: Family, rope: Plain, window: int | None) -> Plain:
    heads = config["num_attention_heads"]
    return {
        "kind": "softmax",
        "heads": heads,
        "kv_heads": config.get("num_key_value_heads") or heads,
        "head_dim": config.get("head_dim") or config["hidden_size"] // heads,
        "rope": rope,
        "qk_norm": family.qk_norm,
        "window": window,
    }


def _ffn(config: Mapping[str, Any], family: Family, layer: int) -> Plain:
    """Of one layer: in Qwen3-MoE, those of `mlp_only_layers` and between the steps have no experts."""
    moe: Plain = {"kind": "moe", "active": config.get("num_experts_per_tok")}
    if family.model_type == "mixtral":
        return moe | {
            "experts": config["num_local_experts"],
            "hidden": config["intermediate_size"],
            "score": "softmax_after",
        }
    dense = layer in (config.get("mlp_only_layers") or []) or (layer + 1) % (config.get("decoder_sparse_step") or 1)
    if family.model_type != "qwen3_moe" or dense:
        return {"kind": "swiglu", "hidden": config["intermediate_size"]}
    return moe | {
        "experts": config.get("num_local_experts") or config["num_experts"],
        "hidden": config["moe_intermediate_size"],
        "score": "softmax",
        "normalised": bool(config.get("norm_topk_prob", False)),
    }


def _windows(config: Mapping[str, Any], family: Family) -> list[int | None]:
    """Of each layer; there as here a token sees itself and the window-1 before it."""
    count, window = config["num_hidden_layers"], config.get("sliding_window")
    if family.model_type == "llama" or (family.qk_norm and not config.get("use_sliding_window", False)):
        window = None
    if family.model_type != "qwen3" or window is None:
        return [window] * count
    kinds = config.get("layer_types")
    if kinds is None:
        first = config.get("max_window_layers", count)
        return [window if layer >= first else None for layer in range(count)]
    if len(kinds) != count or not {"full_attention", "sliding_attention"}.issuperset(kinds):
        raise ValueError(
            f"config.json: layer_types={kinds}: must be full_attention or sliding_attention, one for each of the "
            f"{count} layers"
        )
    return [window if kind == "sliding_attention" else None for kind in kinds]


SCALINGS: dict[str, dict[str, str]] = {
    "default": {},
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "low_freq_factor": "low_frequency_factor",
        "high_freq_factor": "high_frequency_factor",
        "original_max_position_embeddings": "original_length",
    },
    "yarn": {
        "factor": "factor",
        "original_max_position_embeddings": "original_length",
        "beta_fast": "beta_fast",
        "beta_slow": "beta_slow",
        "attention_factor": "attention_factor",
    },
}
"""Scalings of rotations by their name there, with their keys there and here."""

OPTIONAL = ("beta_fast", "beta_slow", "attention_factor")


def _rope(config: Mapping[str, Any], family: Family) -> Plain:
    """transformers 4 keeps `rope_theta` beside `rope_scaling`, 5 both in `rope_parameters`."""
    told = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    theta = told.pop("rope_theta", config.get("rope_theta", family.theta))
    if not isinstance(theta, int | float):
        raise ValueError(f"config.json: rope_theta={theta}: must be a number; write the one that the model has")
    told.setdefault("rope_type", told.pop("type", "default"))
    kind = told.pop("rope_type")
    told.pop("type", None)
    if told.get("partial_rotary_factor") == 1.0:
        del told["partial_rotary_factor"]
    known = SCALINGS.get(kind, {})
    if kind == "yarn":
        told.setdefault("original_max_position_embeddings", config.get("max_position_embeddings"))
        if told.get("truncate", True):
            told.pop("truncate", None)
    said = {key: value for key, value in told.items() if value is not None}
    missing = [key for key in known if key not in said and key not in OPTIONAL]
    if kind not in SCALINGS or missing or set(said) - set(known):
        raise ValueError(
            f"config.json: rope_scaling={{rope_type: {kind}, …}} with {sorted(said)}: only {', '.join(SCALINGS)} are "
            f"known here, with {', '.join(known) or 'no keys'}; write the scaling as one of them"
        )
    scaling = {"kind": kind, **{known[key]: value for key, value in said.items()}} if kind != "default" else None
    return {"theta": float(theta), "scaling": scaling}


def architecture_of(model: Decoder) -> str:
    """Which of `FAMILIES` computes what our model does. ValueError: none."""
    if found := list(_unlike(model)):
        raise ValueError("\n".join(f"model.{problem}; export knows {KNOWN}" for problem in found))
    mixers, ffns = _mixers(model), [block.ffn for block in model.blocks]
    if any(isinstance(ffn, Moe) for ffn in ffns):
        return "Qwen3MoeForCausalLM" if mixers[0].qk_norm else "MixtralForCausalLM"
    return "Qwen3ForCausalLM" if mixers[0].qk_norm else "LlamaForCausalLM"


def _mixers(model: Decoder) -> list[Softmax]:
    return [block.mixer for block in model.blocks if isinstance(block.mixer, Softmax)]


def _unlike(model: Decoder) -> Iterator[str]:
    """What keeps a model from being one of theirs, each as place, value and reason."""
    if not isinstance(model.norm, Rms):
        yield "norm.kind=layer: their norms are RMSNorm"
    if model.placement != "pre":
        yield f"placement={model.placement}: their norms stand before mixer and ffn"
    if model.stable_embedding:
        yield "stable_embedding=True: no norm follows their embedding"
    before = ""
    for i, block in enumerate(model.blocks):
        for problem in _unlike_block(block):
            before = problem
            yield f"blocks.{i}.{problem}"
    if not before:
        yield from _uneven(model)


def _unlike_block(block: Block) -> Iterator[str]:
    mixer, ffn = block.mixer, block.ffn
    if block.shared_ffn:
        yield "shared_ffn=True: every layer of theirs has a feed-forward of its own"
    if not isinstance(mixer, Softmax):
        yield "mixer: every layer of theirs has softmax attention"
    else:
        if mixer.rope is None:
            yield "mixer.rope=null: their queries and keys are turned"
        if mixer.softcap is not None:
            yield f"mixer.softcap={mixer.softcap}: their scores are not capped"
        if mixer.sinks:
            yield "mixer.sinks=True: their softmax has none"
        if not mixer.causal:
            yield "mixer.causal=False: theirs are"
    if isinstance(ffn, Moe):
        own: Mapping[str, tuple[Any, Any]] = {
            "shared": (ffn.shared, 0),
            "scale": (ffn.scale, 1.0),
            "groups": (ffn.groups, 1),
            "bias": (ffn.bias, "none"),
            "capacity": (ffn.capacity, None),
            "forced": (ffn.forced, False),
        }
        for name, (value, wanted) in own.items():
            if value != wanted:
                yield f"ffn.{name}={value}: theirs have {wanted}"
        if ffn.score == "sigmoid":
            yield "ffn.score=sigmoid: theirs are softmax"
    elif not isinstance(ffn, Swiglu):
        yield "ffn: every layer of theirs has swiglu or moe"


def _uneven(model: Decoder) -> Iterator[str]:
    """Where layers differ that are all alike in theirs."""
    first = _mixers(model)[0]
    shared = ("heads", "kv_heads", "head_dim", "rope", "qk_norm")
    for i, mixer in enumerate(_mixers(model)):
        for name in shared:
            if getattr(mixer, name) != getattr(first, name):
                yield f"blocks.{i}.mixer.{name}={getattr(mixer, name)}: all layers of theirs have the same"
    dense = {block.ffn for block in model.blocks if isinstance(block.ffn, Swiglu)}
    routed = {_routing(block.ffn) for block in model.blocks if isinstance(block.ffn, Moe)}
    if len(dense) > 1 or len(routed) > 1:
        yield "blocks: ffn: all layers of theirs with swiglu, and all with moe, have the same"
    if routed and not first.qk_norm:
        if dense:
            yield "blocks: ffn.kind=swiglu beside moe: only Qwen3-MoE has both, and its mixers have qk_norm"
        if not all(normalised for *_, normalised in routed):
            yield "blocks: ffn.normalised=False: only Qwen3-MoE has it, and its mixers have qk_norm"
    windows = {mixer.window for mixer in _mixers(model)}
    if not routed and not first.qk_norm and windows != {None}:
        yield "blocks: mixer.window: Llama has none"
    if len(windows - {None}) > 1 or (routed and len(windows) > 1):
        yield "blocks: mixer.window: theirs have one size, in some layers of Qwen3 or all of Mixtral and Qwen3-MoE"


def _routing(ffn: Moe) -> tuple[int, int, int, bool]:
    """What a family has once for all layers: experts, active, hidden, normalised."""
    return ffn.experts, ffn.active, ffn.hidden, ffn.normalised or ffn.score == "softmax_after"


def config_of(model: Decoder, *, vocabulary: int, length: int, dtype: str) -> Plain:
    """A config.json for our model. ValueError: no family computes what it does.

    vocabulary: rows of the embedding that are exported. length: tokens that the model is meant for, where its rotations
    do not say. dtype: of the weights, by torch's name.
    """
    architecture = architecture_of(model)
    family, mixer = FAMILIES[architecture], _mixers(model)[0]
    assert mixer.rope is not None, "_unlike lets none pass"
    ffns = [block.ffn for block in model.blocks for _ in range(block.repeat)]
    windows = [block.mixer.window for block in model.blocks for _ in range(block.repeat) if block.mixer]
    return {
        "architectures": [architecture],
        "model_type": family.model_type,
        "vocab_size": vocabulary,
        "hidden_size": model.width,
        "num_hidden_layers": model.depth,
        "num_attention_heads": mixer.heads,
        "num_key_value_heads": mixer.kv_heads or mixer.heads,
        "head_dim": mixer.key_dim(model.width),
        "hidden_act": "silu",
        "attention_bias": False,
        "rms_norm_eps": model.norm.eps,
        "tie_word_embeddings": model.tied,
        "max_position_embeddings": _reach(mixer.rope, length),
        **_turning(mixer.rope),
        **_seeing(windows, family),
        **_thinking(ffns, family),
        "torch_dtype": dtype,
    }


def _reach(rope: Rope, length: int) -> int:
    scaling = rope.scaling
    return length if scaling is None or isinstance(scaling, Linear) else int(scaling.original_length * scaling.factor)


def _turning(rope: Rope) -> Plain:
    scaling, kinds = rope.scaling, {Linear: "linear", Llama3: "llama3", Yarn: "yarn"}
    if scaling is None:
        return {"rope_theta": rope.theta, "rope_scaling": None}
    kind = kinds[type(scaling)]
    said = {theirs: getattr(scaling, ours) for theirs, ours in SCALINGS[kind].items()}
    told = {key: value for key, value in said.items() if value is not None}
    return {"rope_theta": rope.theta, "rope_scaling": {"rope_type": kind, **told}}


def _seeing(windows: Sequence[int | None], family: Family) -> Plain:
    """transformers before 4.53 knows Qwen3's windowed layers by the first of them, later ones by `layer_types`."""
    if family.model_type == "llama":
        return {}
    width = next((window for window in windows if window is not None), None)
    told: Plain = {"sliding_window": width}
    if family.qk_norm:
        told["use_sliding_window"] = width is not None
    if family.model_type == "qwen3":
        told["layer_types"] = ["full_attention" if window is None else "sliding_attention" for window in windows]
        told["max_window_layers"] = next((i for i, window in enumerate(windows) if window), len(windows))
    return told


def _thinking(ffns: Sequence[Any], family: Family) -> Plain:
    dense = [i for i, ffn in enumerate(ffns) if isinstance(ffn, Swiglu)]
    moe = next((ffn for ffn in ffns if isinstance(ffn, Moe)), None)
    if moe is None:
        return {"intermediate_size": ffns[0].hidden}
    experts, active, hidden, normalised = _routing(moe)
    if family.model_type == "mixtral":
        return {"intermediate_size": hidden, "num_local_experts": experts, "num_experts_per_tok": active}
    return {
        "intermediate_size": ffns[dense[0]].hidden if dense else hidden * active,
        "moe_intermediate_size": hidden,
        "num_experts": experts,
        "num_experts_per_tok": active,
        "norm_topk_prob": normalised,
        "mlp_only_layers": dense,
        "decoder_sparse_step": 1,
    }
