"""A model as HuggingFace's hub has it: config.json, safetensors files, and an index where there are several."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from farspan.platform.checkpoint import FILE

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

FILES = (
    CONFIG,
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
)
"""What lies beside the weights and goes where they go."""

TYPES = ("F64", "F32", "F16", "BF16")


class Published:
    """A folder of such a model, read when asked. ValueError: it is none, or not readable."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = _object(folder / CONFIG)
        self._files = self._find()
        self._open: dict[Path, Any] = {}

    def _find(self) -> dict[str, Path]:
        """Which file holds each tensor."""
        index, single = self.folder / INDEX, self.folder / SINGLE
        if index.is_file():
            placed = _object(index).get("weight_map")
            if not isinstance(placed, dict):
                raise ValueError(f"{index}: has no weight_map; take it from where the model was published")
            return {name: self.folder / str(file) for name, file in placed.items()}
        if single.is_file():
            with _opened(single) as file:
                return dict.fromkeys(file.keys(), single)
        raise ValueError(
            f"{self.folder}: holds neither {INDEX} nor {SINGLE}; only safetensors are read, and of other files no code "
            "is ever run: save the model with safe_serialization=True"
        )

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of every tensor by name. ValueError: one is missing, or no plain float."""
        found = {}
        for name in self._files:
            try:
                part = self._file(name).get_slice(name)
            except SafetensorError as error:
                raise ValueError(f"{self._files[name]}: {name}: {error}; get the file anew") from error
            if part.get_dtype() not in TYPES:
                raise ValueError(
                    f"{name}: is of {part.get_dtype()}, and {', '.join(TYPES)} are read; save the model dequantised"
                )
            found[name] = tuple(part.get_shape())
        return found

    def read(self, name: str) -> Tensor:
        """One tensor, as it is stored; it may be the file's own memory."""
        found: Tensor = self._file(name).get_tensor(name)
        return found

    def _file(self, name: str) -> Any:
        path = self._files[name]
        if path not in self._open:
            self._open[path] = _opened(path)
        return self._open[path]


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: not readable ({error}); get the file anew") from error


def _object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"{path}: not readable ({error.strerror}); give the folder of a published model") from error
    except ValueError as error:
        raise ValueError(f"{path}: damaged ({error}); get the file anew") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: holds no keys; get the file anew")
    return found


def publish(
    folder: Path,
    config: Mapping[str, Any],
    tensors: Iterable[tuple[str, Tensor]],
    shapes: Mapping[str, tuple[int, ...]],
) -> int:
    """Writes such a folder, which exists and is empty; answers with the bytes of all tensors.

    tensors: in the order of `shapes`, all of the type that config names, of which no more are held than go into a file.
    """
    each = getattr(torch, config["torch_dtype"]).itemsize
    sizes = {name: each * torch.Size(shape).numel() for name, shape in shapes.items()}
    numbers = _numbers(sizes)
    count = max(numbers.values())
    names = {i: SINGLE if count == 1 else f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)}
    for number, part in groupby(tensors, key=lambda item: numbers[item[0]]):
        _write(folder / names[number], {name: tensor.contiguous() for name, tensor in part})
    if count > 1:
        placed = {name: names[number] for name, number in numbers.items()}
        _put(folder / INDEX, {"metadata": {"total_size": sum(sizes.values())}, "weight_map": placed})
    _put(folder / CONFIG, config)
    return sum(sizes.values())


def _numbers(sizes: Mapping[str, int]) -> dict[str, int]:
    """The file of each tensor, from 1 on."""
    found, held, number = {}, 0, 1
    for name, size in sizes.items():
        if held and held + size > FILE:
            held, number = 0, number + 1
        held += size
        found[name] = number
    return found


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:  # its own word for a full disk
        raise OSError(f"{path}: {error}") from error
    path.chmod(0o644)
    with path.open("rb+") as stream:
        os.fsync(stream.fileno())


def _put(path: Path, tree: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(tree, indent=2) + "\n")


def beside(folder: Path) -> Iterator[Path]:
    """The small files of a folder that go where the weights go."""
    return (folder / name for name in FILES if (folder / name).is_file())
