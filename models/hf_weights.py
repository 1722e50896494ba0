"""Weights of HuggingFace's transformers and our own: the same numbers in the same order, under other names."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Literal

import torch
from torch import Tensor

from farspan.models.hf import Family

Layout = Literal["experts", "fused"]
"""experts: each expert's weights apart, as transformers 4 saves them, and 5 unless told otherwise. fused: those of all
experts in one, `gate_up_proj` E 2I D and `down_proj` E D I, as transformers 5 holds them."""

FUSED = "mlp.experts.gate_up_proj"

TOP = {
    "embed.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}

LAYER = {
    "mixer_norm.weight": "input_layernorm.weight",
    "mixer.to_q.weight": "self_attn.q_proj.weight",
    "mixer.to_k.weight": "self_attn.k_proj.weight",
    "mixer.to_v.weight": "self_attn.v_proj.weight",
    "mixer.to_out.weight": "self_attn.o_proj.weight",
    "mixer.norm_q.weight": "self_attn.q_norm.weight",
    "mixer.norm_k.weight": "self_attn.k_norm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn.to_gate.weight": "mlp.gate_proj.weight",
    "ffn.to_up.weight": "mlp.up_proj.weight",
    "ffn.to_out.weight": "mlp.down_proj.weight",
}
"""Names within a layer. Rotations pair channels i and i + K/2 there as here, so that no row changes its place."""

ROUTER, W13, W2 = "ffn.router.weight", "ffn.experts.w13", "ffn.experts.w2"
"""Ours in a layer of experts: E D, E 2 I D and E D I."""

UNREAD = re.compile(r"\.rotary_emb\.inv_freq$")
"""What old files hold and nobody reads."""


@dataclass(frozen=True, kw_only=True)
class Pieces:
    """What one weight of ours is there: laid end to end, the pieces are its memory; rows beyond them are zero."""

    names: tuple[str, ...]
    shape: tuple[int, ...]
    """Of each piece."""


def pieces_of(
    shapes: Mapping[str, tuple[int, ...]], family: Family, layout: Layout, vocabulary: int
) -> dict[str, Pieces]:
    """What each weight of a model of ours is there. shapes: of ours by name. vocabulary: rows of embedding and head
    there, no more than here. ValueError: it is more, or a weight has no counterpart."""
    if shapes["embed.weight"][0] < vocabulary:
        raise ValueError(
            f"model.vocabulary: {shapes['embed.weight'][0]} rows do not hold the {vocabulary} of the published model; "
            "leave it as published, or raise it"
        )
    return {name: _pieces(name, shape, family, layout, vocabulary) for name, shape in shapes.items()}


def _pieces(name: str, shape: tuple[int, ...], family: Family, layout: Layout, vocabulary: int) -> Pieces:
    if name in TOP:
        return Pieces(names=(TOP[name],), shape=shape if len(shape) == 1 else (vocabulary, *shape[1:]))
    number, _, inner = name.removeprefix("layers.").partition(".")
    at = f"model.layers.{number}"
    if inner in LAYER:
        return Pieces(names=(f"{at}.{LAYER[inner]}",), shape=shape)
    block = f"{at}.mlp" if layout == "fused" else f"{at}.{family.block}"
    if inner == ROUTER:
        return Pieces(names=(f"{block}.gate.weight",), shape=shape)
    if inner not in (W13, W2):
        raise ValueError(
            f"{name}: {list(shape)} has no counterpart in {family.model_type}; configure the model without"
        )
    experts, (gate, up, out) = shape[0], family.expert
    if layout == "experts":
        parts = (gate, up) if inner == W13 else (out,)
        names = (f"{block}.experts.{expert}.{part}.weight" for expert in range(experts) for part in parts)
        return Pieces(names=tuple(names), shape=shape[-2:])
    if inner == W13:
        return Pieces(names=(f"{at}.{FUSED}",), shape=(experts, 2 * shape[2], shape[3]))
    return Pieces(names=(f"{at}.mlp.experts.down_proj",), shape=shape)


def layout_in(names: Iterable[str]) -> Layout:
    """The layout of files that hold these names."""
    return "fused" if any(name.endswith(FUSED) for name in names) else "experts"


def misfits(pieces: Mapping[str, Pieces], found: Mapping[str, tuple[int, ...]], tied: bool) -> list[str]:
    """What of a folder does not fit the model, by name and shape. found: shapes of its tensors."""
    wanted = {name: piece.shape for piece in pieces.values() for name in piece.names}
    missing = [
        f"{name}: is missing; the model wants it of {list(wanted[name])}" for name in wanted if name not in found
    ]
    wrong = [
        f"{name}: is {list(found[name])}, and the model wants {list(shape)}; mend config.json, or save the weights so"
        for name, shape in wanted.items()
        if name in found and found[name] != shape
    ]
    unread = {name for name in found if UNREAD.search(name)} | ({TOP["head.weight"]} if tied else set())
    strange = [
        f"{name}: {list(found[name])} has no place in the model; leave it out of the folder, if it is not needed"
        for name in found
        if name not in wanted and name not in unread
    ]
    return missing + wrong + strange


def joined(pieces: Pieces, shape: tuple[int, ...], read: Callable[[str], Tensor]) -> Tensor:
    """A weight of ours in fp32. read: gives one of theirs by name; asked for one at a time."""
    whole = torch.empty(shape)
    flat, each = whole.view(-1), prod(pieces.shape)
    for i, name in enumerate(pieces.names):
        flat[i * each : (i + 1) * each] = read(name).reshape(-1)
    flat[len(pieces.names) * each :] = 0
    return whole


def parted(pieces: Pieces, weight: Tensor) -> Iterator[tuple[str, Tensor]]:
    """What a weight of ours is there, by name; views where it is dense."""
    flat, each = weight.reshape(-1), prod(pieces.shape)
    for i, name in enumerate(pieces.names):
        yield name, flat[i * each : (i + 1) * each].view(pieces.shape)
