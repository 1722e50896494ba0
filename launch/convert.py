"""`launch convert`: a run goes on under another optimizer, or with moments from elsewhere, as a new run."""

import argparse
import fcntl
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from farspan.launch.exit import Exit

if TYPE_CHECKING:  # torch takes a second to import: help does without
    from torch import Tensor

    from farspan.platform.config import Plain, Source
    from farspan.platform.job import Job
    from farspan.platform.optim.convert import Convertible
    from farspan.platform.optim.imported import Imported

KEPT = ("metrics.jsonl", "choices.json")
"""Files of a run that its continuation begins with."""


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds `convert`."""
    convert = commands.add_parser(
        "convert",
        help="make a new run of a run's last checkpoint, with another optimizer",
        description="Write the run NEW: the configuration of RUN under the overrides, its metrics, and its newest "
        "sound checkpoint with the optimizer's state converted (adamw and adamw8, of any master, block and offload). "
        "RUN is only read. One process on a CPU, a weight at a time.",
    )
    convert.add_argument("old", metavar="RUN", help="a run folder, or its name in runs")
    convert.add_argument("new", metavar="NEW", help="the run folder to make, or its name beside RUN")
    convert.add_argument(
        "overrides", nargs="*", metavar="a.b=c", help="values of optim, for instance optim.kind=adamw8"
    )
    convert.add_argument(
        "--state", type=Path, metavar="FILE", help="moments to install: an optimizer's state_dict by torch.save"
    )
    convert.add_argument(
        "--names", type=Path, metavar="FILE", help="JSON: the weights' names in the order of that optimizer"
    )
    convert.set_defaults(run=_convert)


@dataclass(frozen=True, kw_only=True)
class Change:
    """From which configuration to which."""

    was: "Job"
    job: "Job"
    tree: "Plain"
    """What config.yaml will hold."""

    @property
    def optims(self) -> "tuple[Convertible, Convertible]":
        """ValueError: one of them has another kind of state."""
        from farspan.platform import config
        from farspan.platform.optim import Adamw, Adamw8

        old, new = self.was.optim, self.job.optim
        if isinstance(old, Adamw | Adamw8) and isinstance(new, Adamw | Adamw8):
            return old, new
        names = " to ".join(config.kind(type(optim)) for optim in (old, new))
        raise ValueError(
            f"optim.kind: {names}: only the states of adamw and adamw8 become each other's; muon and galore keep what "
            "no other optimizer does: go on with the run as it is, or start one under a new name"
        )


def _convert(parsed: argparse.Namespace) -> int:
    old, new = _places(parsed.old, parsed.new)
    if parsed.names is not None and parsed.state is None:
        raise ValueError(f"--names {parsed.names}: goes with --state, whose parameters it names")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what is unfinished goes away, as with Ctrl-C
    with _reading(old):
        change = _change(old, new, parsed.overrides)
        _ = change.optims
        imported = _imported(parsed.state, parsed.names)
        aside = new.with_name(f".{new.name}.{os.getpid()}.tmp")
        try:
            aside.mkdir(parents=True)
            said = _make(old, aside, change, imported)
            if new.exists():
                raise ValueError(f"{new}: exists by now; name another")
            aside.rename(new)
        except OSError as error:
            raise ValueError(f"{new}: could not be made ({error}); make room, or name another place") from error
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    print(f"{said}\nrun folder: {os.path.relpath(new)}; go on with it:")
    runs = "" if new.parent == Path("runs").absolute() else f" --runs {os.path.relpath(new.parent)}"
    print(f"  launch train --config {os.path.relpath(new)}/config.yaml{runs} --resume")
    return int(Exit.DONE)


def _places(old: str, new: str) -> tuple[Path, Path]:
    """Folders, absolute. ValueError: there is no run to read, or something where the new one goes."""
    source = Path(old) if Path(old).is_dir() or len(Path(old).parts) > 1 else Path("runs") / old
    if not (source / "config.yaml").is_file():
        raise ValueError(f"{source}: is no run (it has no config.yaml); give runs/NAME")
    target = source.absolute().parent / new if len(Path(new).parts) == 1 else Path(new).absolute()
    if target.exists():
        raise ValueError(f"{target}: exists, and nothing is ever overwritten; name another")
    return source.absolute(), target


@contextmanager
def _reading(folder: Path) -> Iterator[None]:
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


def _change(old: Path, new: Path, overrides: list[str]) -> Change:
    """Both configurations; ValueError where anything but optim would change."""
    from farspan.platform import config

    path = old / "config.yaml"
    source, before = config.read(path, overrides), config.read(path)
    named = source.tree["name"] if "name" in source.overridden else new.name
    if named != new.name:
        raise ValueError(f"name={named}: a run is named as its folder is, {new.name}; leave the override out")
    refused = [key for key in sorted(source.overridden) if key.split(".")[0] not in ("optim", "name")]
    if refused:
        raise ValueError(
            "\n".join(f"{key}: convert changes optim and, with the folder, name only; leave it out" for key in refused)
        )
    launch = source.tree["launch"]
    told = replace(source, tree={**source.tree, "name": new.name}, raw={**source.raw, "name": new.name})
    was, job = (_job(before, lambda _: None), _job(told, lambda note: print(note, flush=True)))
    tree: Plain = config.unresolved({**config.encode(job), "launch": launch}, told.raw)
    return Change(was=was, job=job, tree=tree)


def _job(source: "Source", notes: Callable[[str], None]) -> "Job":
    from farspan.platform import config
    from farspan.platform.job import Job

    tree = {key: value for key, value in source.tree.items() if key != "launch"}
    return config.decode(replace(source, tree=tree), Job, notes)


def _imported(state: Path | None, names: Path | None) -> "Imported | None":
    from farspan.platform.optim import imported

    if state is None:
        return None
    found = imported.read(state, names)
    if found.left_out:
        print(f"left out of {state}: {', '.join(found.left_out)}; weights are those of the run")
    return found


def _make(old: Path, folder: Path, change: Change, imported: "Imported | None") -> str:
    """Fills the new folder; what is to be said of it."""
    from farspan.launch import pulse
    from farspan.platform import checkpoint, config
    from farspan.platform.checkpoint import folder_of, manifest_of
    from farspan.platform.stored import store

    step = _newest(old / "checkpoints")
    manifest = manifest_of(source := folder_of(old / "checkpoints", step))
    world = manifest["mesh"]["world"]
    if problems := [p for p in change.job.problems(world) if p not in change.was.problems(world)]:
        raise ValueError("\n".join(problems))
    told = {**manifest, "config": change.tree, "time": time.time(), "converted_from": change.was.name}
    store(folder / "checkpoints", step, _tensors(source, manifest, change, imported), told)
    for name in KEPT:
        if (old / name).exists():
            shutil.copyfile(old / name, folder / name)
    (folder / "logs").mkdir()
    checkpoint.replace(folder / "config.yaml", config.dump(change.tree))
    status = {"state": "preempted", "exit_code": int(Exit.PREEMPTED), "step": step}
    attempt = pulse.read(old / "status.json").get("attempt", 0)
    pulse.publish(folder / "status.json", {**status, "reason": f"converted from {change.was.name}", "attempt": attempt})
    sizes = [
        sum(file["size"] for file in manifest_of(folder_of(run / "checkpoints", step))["files"])
        for run in (old, folder)
    ]
    kinds = [config.kind(type(optim)) for optim in change.optims]
    moments = "" if imported is None else f", with moments of {imported.step} updates from elsewhere"
    return f"step {step}: {kinds[0]}, {sizes[0] / 1e6:,.1f} MB -> {kinds[1]}, {sizes[1] / 1e6:,.1f} MB{moments}"


def _newest(root: Path) -> int:
    """The newest step whose checkpoint verifies; those passed over stay where they are."""
    from farspan.platform.checkpoint import folder_of, steps_in, verify

    steps = steps_in(root)
    for step in steps:
        if not (problems := verify(folder_of(root, step))):
            return step
        print(f"warning: checkpoint {folder_of(root, step)} does not verify and is passed over: {problems[0]}")
    found = f"none of its {len(steps)} checkpoints verifies" if steps else "holds no checkpoint"
    raise ValueError(f"{root}: {found}; there is nothing to convert")


def _tensors(
    source: Path, manifest: Mapping[str, Any], change: Change, imported: "Imported | None"
) -> "Iterator[tuple[str, Tensor]]":
    """Those of the new checkpoint. ValueError: the old one's are not those of its configuration, or of the file."""
    import torch

    from farspan.models.roles import roles
    from farspan.platform.optim.convert import convert, layout
    from farspan.platform.stored import Stored

    job, (old, new) = change.was, change.optims
    with torch.device("meta"):
        model = job.model.build(job.data.vocabulary, job.parallel.context.build())
    shapes, known = {name: tuple(weight.shape) for name, weight in model.named_parameters()}, roles(model)
    wanted = {n: {"shape": list(t.shape), "dtype": str(t.dtype)} for n, t in layout(old, shapes, known).items()}
    saved = manifest["tensors"]
    if wrong := [name for name in {**wanted, **saved} if wanted.get(name) != saved.get(name)]:
        raise ValueError(
            f"{source}: does not fit {source.parents[1] / 'config.yaml'}: {wrong[0]} is {saved.get(wrong[0])} there, "
            f"not {wanted.get(wrong[0])}; mend the configuration"
        )
    if imported is not None and (problems := imported.problems(shapes)):
        more = f"\nand {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError("\n".join(f"--state: {problem}; mend --names" for problem in problems[:5]) + more)
    return convert(Stored(source), old, new, shapes, known, imported)
