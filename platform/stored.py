"""A checkpoint's tensors one at a time, read and written by one process: what is whole never has to be in memory."""

import dataclasses
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

from farspan.platform.checkpoint import FILE, LATEST, MANIFEST, Hashed, folder_of, replace


class Stored(Mapping[str, Tensor]):
    """The tensors of a checkpoint by name, whole, read when asked for. They are not to be written to: they may be the
    file's own memory."""

    def __init__(self, folder: Path) -> None:
        reader = HuggingFaceStorageReader(str(folder))
        found = reader.read_metadata()
        self._tensors = {
            name: entry for name, entry in found.state_dict_metadata.items() if isinstance(entry, TensorStorageMetadata)
        }
        self._places: Mapping[MetadataIndex, Any] = found.storage_data or {}
        self._open: dict[str, Any] = {}

    def __len__(self) -> int:
        return len(self._tensors)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __getitem__(self, name: str) -> Tensor:
        entry = self._tensors[name]
        if len(entry.chunks) == 1 and entry.chunks[0].sizes == entry.size:
            return self._piece(name, entry.chunks[0].offsets)
        whole = torch.empty(entry.size, dtype=entry.properties.dtype)
        for chunk in entry.chunks:
            at = tuple(slice(o, o + s) for o, s in zip(chunk.offsets, chunk.sizes, strict=True))
            whole[at] = self._piece(name, chunk.offsets)
        return whole

    def _piece(self, name: str, offsets: torch.Size) -> Tensor:
        path = self._places[MetadataIndex(name, offsets)].relative_path
        if path not in self._open:
            self._open[path] = safe_open(path, framework="pt")
        found: Tensor = self._open[path].get_tensor(name)
        return found


def store(root: Path, step: int, tensors: Iterable[tuple[str, Tensor]], manifest: Mapping[str, Any]) -> None:
    """Writes a checkpoint under `root`, which has none, by the format of `checkpoint`; `LATEST` is written last.

    Of `tensors` no more are held than go into a file.
    """
    folder = folder_of(root, step)
    folder.mkdir(parents=True)
    files: list[Hashed] = []
    known: dict[str, dict[str, Any]] = {}
    for batch in _batches(tensors):
        path = folder / f"{len(files) + 1:05d}.safetensors"
        try:
            save_file(batch, path)
        except SafetensorError as error:  # its own word for a full disk
            raise OSError(f"{path}: {error}") from error
        path.chmod(0o644)
        with path.open("rb+") as stream:
            os.fsync(stream.fileno())
        files.append(Hashed.of(path))
        known |= {name: {"shape": list(t.shape), "dtype": str(t.dtype)} for name, t in batch.items()}
    told = {**manifest, "files": [dataclasses.asdict(file) for file in files], "tensors": known}
    replace(folder / MANIFEST, json.dumps(told, indent=1))
    replace(root / LATEST, f"{folder.name}\n")


def _batches(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """What goes into one file."""
    batch: dict[str, Tensor] = {}
    for name, tensor in tensors:
        if batch and sum(each.nbytes for each in batch.values()) + tensor.nbytes > FILE:
            yield batch
            batch = {}
        batch[name] = tensor.contiguous()
    if batch:
        yield batch
