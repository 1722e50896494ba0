"""Checkpoints: written aside, hashed by their writers, committed by a rename, and trusted only when they verify."""

import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint._state_dict_stager import StateDictStager
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType, AsyncSaveResponse
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from farspan.parallel.fsdp import local

MANIFEST = "manifest.json"
LATEST = "LATEST"
FORMAT = 1
FILE = 1 << 30
"""Bytes of a rank's file, about: larger only for a single tensor."""
Say = Callable[[str], None]
State = Mapping[str, Tensor]


def folder_of(root: Path, step: int) -> Path:
    """Where the checkpoint of `step` lives under `root`."""
    return root / f"step-{step:08d}"


def steps_in(root: Path) -> list[int]:
    """Steps of the committed checkpoints under `root`, newest first, verified or not."""
    names = (path.name for path in root.glob("step-*") if path.is_dir())
    return sorted((int(name[5:]) for name in names if name[5:].isdigit()), reverse=True)


def latest(root: Path) -> int | None:
    """The step of the last commit, or None: cheap, and read by those who only watch progress."""
    try:
        return int((root / LATEST).read_text().strip().removeprefix("step-"))
    except (OSError, ValueError):
        return None


@dataclass(frozen=True)
class Hashed:
    """A file as its writer left it."""

    name: str
    size: int
    sha256: str

    @staticmethod
    def of(path: Path) -> "Hashed":
        with path.open("rb") as stream:
            return Hashed(path.name, path.stat().st_size, hashlib.file_digest(stream, "sha256").hexdigest())


class _Writer(HuggingFaceStorageWriter):
    """Writes safetensors, hashes what it wrote, and (on rank 0, once all ranks are done) commits."""

    def __init__(self, root: Path, step: int, manifest: dict[str, Any], keep: int, state: State) -> None:
        self.root, self.step, self.manifest, self.keep = root, step, manifest, keep
        self.aside = Path(f"{folder_of(root, step)}.tmp")
        super().__init__(path=str(self.aside), save_distributed=True, fqn_to_index_mapping=_files(state))

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        results = super().write_data(plan, planner).wait()
        names = {result.storage_data.relative_path for result in results}
        hashed = [Hashed.of(self.aside / name) for name in sorted(names)]
        for name in names:
            _sync(self.aside / name)
        done: Future[list[WriteResult]] = Future()
        done.set_result([dataclasses.replace(r, storage_data=hashed) for r in results[:1]] + results[1:])
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        files = [file for of_rank in results if of_rank for file in of_rank[0].storage_data]
        tensors = {
            name: {"shape": list(entry.size), "dtype": str(entry.properties.dtype)}
            for name, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        manifest = {**self.manifest, "files": [dataclasses.asdict(f) for f in files], "tensors": tensors}
        (self.aside / MANIFEST).write_text(json.dumps(manifest, indent=1))
        _sync(self.aside / MANIFEST)
        _sync(self.aside)
        final = folder_of(self.root, self.step)
        if final.exists():  # of a save of this step that failed after its rename
            shutil.rmtree(final)
        self.aside.rename(final)
        replace(self.root / LATEST, f"{final.name}\n")
        older = [step for step in steps_in(self.root) if step < self.step]
        for old in older[self.keep - 1 :]:
            shutil.rmtree(folder_of(self.root, old), ignore_errors=True)


def _files(state: State) -> dict[str, int]:
    """Which file, from 1 on, each tensor goes to: a file is made in memory, twice, before it is written."""
    found, size, index = {}, 0, 1
    for name, tensor in state.items():
        mine = local(tensor)
        if size and size + mine.nbytes > FILE:
            size, index = 0, index + 1
        size += mine.nbytes
        found[name] = index
    return found


def replace(path: Path, text: str) -> None:
    """Writes a small file in one move: readers see the old text or the new, never a part."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}.", delete=False) as aside:
        aside.write(text)
        aside.flush()
        os.fsync(aside.fileno())
    Path(aside.name).chmod(0o644)
    Path(aside.name).replace(path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class _Copies(StateDictStager):
    """Keeps its pinned, shared memory from save to save: torch 2.11 closes it after each, and then cannot be used."""

    def close(self) -> None:
        pass


class Saver:
    """Saves a run's state in another process while training goes on.

    A save that fails is said and asks to be made again (`failed`); it never ends the training.
    """

    TRIES = 3

    def __init__(self, root: Path, keep: int, control: dist.ProcessGroup, say: Say) -> None:
        self.root, self.keep, self.control, self.say = root, keep, control, say
        self._stager: DefaultStager | None = None
        self._prepared: Any = None
        self._pending: tuple[int, AsyncSaveResponse] | None = None
        self.failures = 0
        """How many saves this rank saw fail in a row."""
        self.saved: int | None = None
        """The step whose checkpoint is known to stand: the last that was saved, or the one that was loaded."""
        if dist.get_rank() == 0:
            root.mkdir(parents=True, exist_ok=True)

    @property
    def failed(self) -> bool:
        """Whether the last save failed and should be made again soon: a few times, then at the next regular turn."""
        return 0 < self.failures < self.TRIES

    def prepare(self, state: State) -> None:
        """Makes the memory that saves copy a GPU's state into, in a thread: pinning it takes longer than many steps."""
        if any(local(tensor).is_cuda for tensor in state.values()):
            self._prepared = self._copies().stage(dict(state))

    def _copies(self) -> DefaultStager:
        """What copies the state aside; its memory is kept from save to save."""
        if self._stager is None:
            cuda = torch.cuda.is_available()
            self._stager = DefaultStager(StagingOptions(use_pinned_memory=cuda, use_non_blocking_copy=cuda))
            self._stager._state_dict_stager = _Copies(pin_memory=cuda, share_memory=True)
        return self._stager

    def start(self, step: int, state: State, manifest: dict[str, Any]) -> None:
        """Begins a save. The state may change again once `staged` has returned."""
        self.finish()
        if self._prepared is not None:
            wait([self._prepared])  # its failure would be the save's as well
            self._prepared = None
        self._clear(step)
        response = state_dict_saver.async_save(
            dict(state),
            storage_writer=_Writer(self.root, step, manifest, self.keep, state),
            process_group=self.control,
            async_checkpointer_type=AsyncCheckpointerType.PROCESS,
            async_stager=self._copies(),
        )
        assert isinstance(response, AsyncSaveResponse)
        self._pending = (step, response)

    def staged(self) -> None:
        """Waits until the pending save has copied the state aside: before the weights change."""
        if self._pending is not None:
            wait([self._pending[1].staging_completion])  # its failure is the save's, which `finish` will tell

    def poll(self) -> None:
        """Notices a pending save that has ended, without waiting."""
        if self._pending is not None and self._pending[1].upload_completion.done():
            self.finish()

    def finish(self) -> None:
        """Waits for the pending save; a failure is said, and remembered in `failed`."""
        if self._pending is None:
            return
        (step, response), self._pending = self._pending, None
        try:
            response.upload_completion.result()
            self.failures, self.saved = 0, step
            self.say(f"saved checkpoint {folder_of(self.root, step)}")
        except BaseException as error:  # DCP's own exception is no Exception
            if isinstance(error, KeyboardInterrupt):
                raise
            self._warn(step, error)

    def save(self, step: int, state: State, manifest: dict[str, Any]) -> bool:
        """Saves at once, in this process; returns whether it stands. All ranks call it and agree."""
        self.finish()
        for _ in range(self.TRIES):
            self._clear(step)
            try:
                writer = _Writer(self.root, step, manifest, self.keep, state)
                state_dict_saver.save(dict(state), storage_writer=writer, process_group=self.control)
                self.failures, self.saved = 0, step
                self.say(f"saved checkpoint {folder_of(self.root, step)}")
                return True
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    raise
                self._warn(step, error)
        return False

    def close(self) -> None:
        self.finish()
        if self._stager is not None:
            self._stager.close()

    def _clear(self, step: int) -> None:
        """Removes what an earlier, killed save of this step left aside."""
        if dist.get_rank() == 0:
            shutil.rmtree(f"{folder_of(self.root, step)}.tmp", ignore_errors=True)
        dist.barrier(group=self.control)

    def _warn(self, step: int, error: BaseException) -> None:
        self.failures += 1
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = f"{type(error).__name__}: {lines[-1] if lines else 'no message'}"
        self.say(f"warning: checkpoint {folder_of(self.root, step)} failed ({reason}); it will be tried again")


def manifest_of(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint; ValueError that says what is wrong with it."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except OSError as error:
        raise ValueError(f"{folder / MANIFEST}: not readable ({error.strerror}); the save was not completed") from error
    except ValueError as error:
        raise ValueError(f"{folder / MANIFEST}: damaged ({error})") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        found = manifest.get("format") if isinstance(manifest, dict) else None
        raise ValueError(f"{folder / MANIFEST}: format {found}; this version reads {FORMAT}")
    return manifest


def verify(folder: Path, part: int = 0, parts: int = 1) -> list[str]:
    """What is wrong with a checkpoint, empty when it stands. Of its files, every `parts`-th from `part` is read."""
    try:
        manifest = manifest_of(folder)
        expected = [Hashed(**entry) for entry in manifest["files"]]
    except (ValueError, KeyError, TypeError) as error:
        return [str(error)]
    found = {path.name for path in folder.iterdir() if not path.name.startswith(".")}  # file systems leave dot-files
    strangers = found - {e.name for e in expected} - {MANIFEST}
    problems = [f"{folder / name}: not in the manifest" for name in sorted(strangers)]
    with ThreadPoolExecutor(4) as pool:
        return problems + [p for p in pool.map(lambda e: _compare(folder, e), expected[part::parts]) if p]


def _compare(folder: Path, expected: Hashed) -> str | None:
    path = folder / expected.name
    try:
        size = path.stat().st_size
        if size != expected.size:
            return f"{path}: {size} bytes, the manifest says {expected.size}"
        return None if Hashed.of(path) == expected else f"{path}: its SHA-256 differs from the manifest's"
    except OSError as error:
        return f"{path}: not readable ({error.strerror})"


def newest(root: Path, control: dist.ProcessGroup, say: Say) -> int | None:
    """The newest step whose checkpoint verifies, None without any. All ranks read a part and agree.

    Those passed over are said, and set aside as step-N.damaged. ValueError: there are some, and none verifies.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    steps: list[list[int]] = [steps_in(root)]
    dist.broadcast_object_list(steps, src=0, group=control)
    for step in steps[0]:
        gathered: list[list[str]] = [[] for _ in range(world)]
        dist.all_gather_object(gathered, verify(folder_of(root, step), rank, world), group=control)
        problems = [problem for of_rank in gathered for problem in of_rank]
        if not problems:
            if rank == 0:
                _set_aside(root, [other for other in steps[0] if other > step])
            return step
        say(f"warning: checkpoint {folder_of(root, step)} does not verify and is passed over: {problems[0]}")
    if steps[0]:
        raise ValueError(
            f"{root}: none of its {len(steps[0])} checkpoints verifies; restore one from a copy, "
            "or remove this folder to begin again from step 0"
        )
    return None


def _set_aside(root: Path, steps: list[int]) -> None:
    """Renames damaged checkpoints, so that nothing counts them as checkpoints and nothing of them is lost."""
    for step in steps:
        folder = folder_of(root, step)
        aside = next(p for i in count() if not (p := Path(f"{folder}.damaged{i or ''}")).exists())
        folder.rename(aside)


def load(root: Path, step: int, state: State, control: dist.ProcessGroup) -> dict[str, Any]:
    """Reads the checkpoint of `step` into `state` in place, whatever mesh wrote it; returns its manifest."""
    folder = folder_of(root, step)
    manifest = manifest_of(folder)
    if problems := _mismatches(manifest["tensors"], state):
        raise ValueError(
            f"{folder}: does not fit this model: {'; '.join(problems[:3])}; go on with the model and optimizer of "
            f"{root.parent / 'config.yaml'}, or start a run under a new name"
        )
    state_dict_loader.load(dict(state), storage_reader=HuggingFaceStorageReader(str(folder)), process_group=control)
    return manifest


def _mismatches(saved: Mapping[str, Any], state: State) -> list[str]:
    """Where the saved tensors and ours differ in name, shape or type."""
    found = [f"{name} is missing there" for name in state if name not in saved]
    found += [f"{name} is unknown here" for name in saved if name not in state]
    for name, tensor in state.items():
        if name in saved and saved[name] != (ours := {"shape": list(tensor.shape), "dtype": str(tensor.dtype)}):
            found.append(f"{name} is {saved[name]} there and {ours} here")
    return found
