"""`launch export`: the weights of a run in HuggingFace's format, for every program that reads it."""

import argparse
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from farspan.launch.exit import Exit
from farspan.launch.making import HF, making, newest, reading, source_of, target_of, weights_of

if TYPE_CHECKING:  # torch takes a second to import: help does without
    from torch import Tensor

    from farspan.models.hf_weights import Pieces
    from farspan.platform.job import Job

TYPES = {"bf16": "bfloat16", "fp32": "float32"}

CARRIED = ("bos_token_id", "eos_token_id", "pad_token_id")
"""Keys of the config.json that a run was imported with and our configuration has no place for."""

TOKENIZER = "tokenizer.json"


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds `export`."""
    parser = commands.add_parser(
        "export",
        help="write a run's weights in HuggingFace's format",
        description="Write FOLDER: the newest sound checkpoint of RUN as safetensors with an index, config.json, and "
        "the tokenizer that the run was imported with. RUN is only read. One process on a CPU, a weight at a time.",
    )
    parser.add_argument("old", metavar="RUN", help="a run folder, or its name in runs")
    parser.add_argument("new", metavar="FOLDER", help="the folder to make")
    parser.add_argument(
        "--layout",
        choices=("experts", "fused"),
        default="experts",
        help="experts: each expert's weights apart, which every version of transformers reads; fused: those of a "
        "layer's experts in one, as transformers 5 holds them",
    )
    parser.add_argument("--dtype", choices=tuple(TYPES), default="bf16", help="what weights are written in")
    parser.set_defaults(run=_export)


def _export(parsed: argparse.Namespace) -> int:
    old, new = source_of(parsed.old), target_of(parsed.new, Path())
    with reading(old):
        job = _job(old)
        step = newest(old / "checkpoints", "export")
        with making(new) as aside:
            size, architecture = _make(job, old, step, aside, parsed)
    print(f"step {step}: {architecture}, {size / 1e6:,.1f} MB in {parsed.dtype}, in {parsed.new}")
    return int(Exit.DONE)


def _job(folder: Path) -> "Job":
    from farspan.platform import config
    from farspan.platform.job import Job

    source = config.read(folder / "config.yaml")
    tree = {key: value for key, value in source.tree.items() if key != "launch"}
    return config.decode(config.Source(tree=tree, raw=source.raw), Job)


def _make(job: "Job", old: Path, step: int, folder: Path, parsed: argparse.Namespace) -> tuple[int, str]:
    """Fills the folder; bytes of its weights, and their architecture."""
    from farspan.launch.published import beside, publish
    from farspan.models.hf import FAMILIES, architecture_of, config_of
    from farspan.models.hf_weights import pieces_of
    from farspan.platform.checkpoint import folder_of

    architecture, was = architecture_of(job.model), _published(old)
    shapes, _ = weights_of(job)
    rows = _rows(job, was)
    pieces = pieces_of(shapes, FAMILIES[architecture], parsed.layout, rows)
    length, dtype = job.data.sequence_length, TYPES[parsed.dtype]
    told = config_of(job.model, vocabulary=rows, length=length, dtype=dtype)
    told |= {key: was.get(key) for key in CARRIED}
    told["max_position_embeddings"] = max(told["max_position_embeddings"], was.get("max_position_embeddings", 0))
    wanted = {name: piece.shape for piece in pieces.values() for name in piece.names}
    size = publish(folder, told, _tensors(folder_of(old / "checkpoints", step), shapes, pieces, dtype), wanted)
    own = _tokenizer(job)
    if own is not None:
        shutil.copyfile(own, folder / TOKENIZER)
    if own is None or own.read_bytes() == _bytes(old / HF / TOKENIZER):  # what is said of another would be wrong
        for path in beside(old / HF):
            if not (folder / path.name).exists():
                shutil.copyfile(path, folder / path.name)
    if not (folder / TOKENIZER).exists():
        print(f"the run has no {TOKENIZER}: who reads {parsed.new} must know its tokens")
    return size, architecture


def _tokenizer(job: "Job") -> Path | None:
    """The tokenizer.json that the run's documents are read with."""
    from farspan.platform.data import Mixture

    data = job.data.sources[0].data if isinstance(job.data, Mixture) else job.data
    given = Path(getattr(data, "tokenizer", "bytes")).expanduser()
    found = given / TOKENIZER if given.is_dir() else given
    return found if found.is_file() else None


def _bytes(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def _published(run: Path) -> dict[str, Any]:
    """The config.json that a run was imported with; empty where it was not."""
    import json

    path = run / HF / "config.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    return found


def _rows(job: "Job", was: Mapping[str, Any]) -> int:
    """Of embedding and head: as many as were imported, else the configured or the tokenizer's, without padding."""
    tokens = job.data.vocabulary
    imported = was.get("vocab_size", 0)
    return imported if imported >= tokens else job.model.vocabulary or tokens


def _tensors(
    checkpoint: Path, shapes: Mapping[str, tuple[int, ...]], pieces: "Mapping[str, Pieces]", dtype: str
) -> "Iterator[tuple[str, Tensor]]":
    """Their weights by name. ValueError: the checkpoint's are not those of the run's configuration."""
    import torch

    from farspan.kernels.master import whole
    from farspan.models.hf_weights import parted
    from farspan.platform.stored import Stored

    state, kind = Stored(checkpoint), getattr(torch, dtype)
    for name, shape in shapes.items():
        stored = f"model.{name}"
        if stored not in state or tuple(state[stored].shape) != shape:
            raise ValueError(f"{checkpoint}: {stored} is not there of {list(shape)}; mend the run's config.yaml")
        weight, residual = state[stored], f"optim.residual.{name}"
        if kind == torch.float32:
            weight = whole(weight, state.get(residual))
        yield from parted(pieces[name], weight.to(kind))
