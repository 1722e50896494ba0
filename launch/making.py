"""What is made of a run, or becomes one: nobody trains the run that is read, and the new folder is there whole or not
at all."""

import fcntl
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from farspan.launch import pulse
from farspan.launch.exit import Exit

if TYPE_CHECKING:  # torch takes a second to import: help does without
    from torch import Tensor

    from farspan.models.roles import Role
    from farspan.platform.job import Job

RUNS = Path("runs")

HF = "hf"
"""Folder within an imported run: the small files that its model was published with."""


def source_of(given: str) -> Path:
    """A run's folder, absolute. ValueError: there is none."""
    source = Path(given) if Path(given).is_dir() or len(Path(given).parts) > 1 else RUNS / given
    if not (source / "config.yaml").is_file():
        raise ValueError(f"{source}: is no run (it has no config.yaml); give runs/NAME")
    return source.absolute()


def target_of(given: str, beside: Path) -> Path:
    """The folder to make, absolute: a name alone goes into `beside`. ValueError: there is something."""
    target = beside.absolute() / given if len(Path(given).parts) == 1 else Path(given).absolute()
    if target.exists():
        raise ValueError(f"{target}: exists, and nothing is ever overwritten; name another")
    return target


@contextmanager
def reading(folder: Path) -> Iterator[None]:
    """While it lasts nobody trains the run. ValueError: somebody does."""
    lock = folder / ".lock"
    if not lock.exists():
        yield
        return
    with lock.open() as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owner = stream.read().strip()
            raise ValueError(f"{folder} is in use by process {owner}; wait for it or stop it") from error
        except OSError:  # a file system without locks: then only care helps
            pass
        yield


@contextmanager
def making(target: Path) -> Iterator[Path]:
    """A folder aside, which becomes `target` in the end, or goes away. ValueError: it cannot be made."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what is unfinished goes away, as with Ctrl-C
    aside = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        aside.mkdir(parents=True)
        yield aside
        if target.exists():
            raise ValueError(f"{target}: exists by now; name another")
        aside.rename(target)
    except OSError as error:
        raise ValueError(f"{target}: could not be made ({error}); make room, or name another place") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def newest(root: Path, purpose: str) -> int:
    """The newest step whose checkpoint verifies; those passed over stay where they are."""
    from farspan.platform.checkpoint import folder_of, steps_in, verify

    steps = steps_in(root)
    for step in steps:
        if not (problems := verify(folder_of(root, step))):
            return step
        print(f"warning: checkpoint {folder_of(root, step)} does not verify and is passed over: {problems[0]}")
    found = f"none of its {len(steps)} checkpoints verifies" if steps else "holds no checkpoint"
    raise ValueError(f"{root}: {found}; there is nothing to {purpose}")


def weights_of(job: "Job") -> "tuple[dict[str, tuple[int, ...]], dict[str, Role]]":
    """Shapes and roles of a job's weights by name. ValueError: the model does not fit its tokenizer."""
    import torch

    from farspan.models.roles import roles

    with torch.device("meta"):
        model = job.model.build(job.data.vocabulary, job.parallel.context.build())
    return {name: tuple(weight.shape) for name, weight in model.named_parameters()}, roles(model)


def kept_of(job: "Job") -> "dict[str, Tensor]":
    """What a job's model keeps besides weights, as a run begins with it, by its name in a checkpoint."""
    import torch

    from farspan.models.decoder import initial
    from farspan.parallel import fsdp

    with torch.device("meta"):
        model = job.model.build(job.data.vocabulary, job.parallel.context.build())
    kept = {name: torch.empty_like(buffer, device="cpu") for name, buffer in model.named_buffers()}
    fsdp.fill(kept, initial(model), job.seed)
    return {f"model.{name}": buffer for name, buffer in kept.items()}


def finish(folder: Path, tree: dict[str, Any], *, step: int, reason: str, attempt: int = 0) -> None:
    """Makes a run of a folder with a checkpoint: one that was stopped at `step`."""
    from farspan.platform import checkpoint, config

    (folder / "logs").mkdir()
    checkpoint.replace(folder / "config.yaml", config.dump(tree))
    status = {"state": "preempted", "exit_code": int(Exit.PREEMPTED), "step": step, "reason": reason}
    pulse.publish(folder / "status.json", {**status, "attempt": attempt})


def farewell(new: Path) -> str:
    """How to go on with a run that was made."""
    runs = "" if new.parent == RUNS.absolute() else f" --runs {os.path.relpath(new.parent)}"
    return (
        f"run folder: {os.path.relpath(new)}; go on with it:\n"
        f"  launch train --config {os.path.relpath(new)}/config.yaml{runs} --resume"
    )
