"""`launch convert`: a run goes on under another optimizer, or with moments from elsewhere, as a new run."""

import argparse
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from farspan.launch.exit import Exit
from farspan.launch.making import (
    HF,
    farewell,
    finish,
    kept_of,
    making,
    newest,
    reading,
    source_of,
    target_of,
    weights_of,
)

if TYPE_CHECKING:  # torch takes a second to import: help does without
    from torch import Tensor

    from farspan.platform.config import Plain, Source
    from farspan.platform.job import Job
    from farspan.platform.optim.convert import Convertible
    from farspan.platform.optim.imported import Imported

KEPT = ("metrics.jsonl", "loads.jsonl", "choices.json")
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
    old = source_of(parsed.old)
    new = target_of(parsed.new, old.parent)
    if parsed.names is not None and parsed.state is None:
        raise ValueError(f"--names {parsed.names}: goes with --state, whose parameters it names")
    with reading(old):
        change = _change(old, new, parsed.overrides)
        _ = change.optims
        imported = _imported(parsed.state, parsed.names)
        with making(new) as aside:
            said = _make(old, aside, change, imported)
    print(f"{said}\n{farewell(new)}")
    return int(Exit.DONE)


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
    from farspan.platform import config
    from farspan.platform.checkpoint import folder_of, manifest_of
    from farspan.platform.stored import store

    step = newest(old / "checkpoints", "convert")
    manifest = manifest_of(source := folder_of(old / "checkpoints", step))
    world = manifest["mesh"]["world"]
    if problems := [p for p in change.job.problems(world) if p not in change.was.problems(world)]:
        raise ValueError("\n".join(problems))
    told = {**manifest, "config": change.tree, "time": time.time(), "converted_from": change.was.name}
    store(folder / "checkpoints", step, _tensors(source, manifest, change, imported), told)
    for name in KEPT:
        if (old / name).exists():
            shutil.copyfile(old / name, folder / name)
    if (old / HF).is_dir():
        shutil.copytree(old / HF, folder / HF)
    attempt = pulse.read(old / "status.json").get("attempt", 0)
    finish(folder, change.tree, step=step, reason=f"converted from {change.was.name}", attempt=attempt)
    sizes = [
        sum(file["size"] for file in manifest_of(folder_of(run / "checkpoints", step))["files"])
        for run in (old, folder)
    ]
    kinds = [config.kind(type(optim)) for optim in change.optims]
    moments = "" if imported is None else f", with moments of {imported.step} updates from elsewhere"
    return f"step {step}: {kinds[0]}, {sizes[0] / 1e6:,.1f} MB -> {kinds[1]}, {sizes[1] / 1e6:,.1f} MB{moments}"


def _tensors(
    source: Path, manifest: Mapping[str, Any], change: Change, imported: "Imported | None"
) -> "Iterator[tuple[str, Tensor]]":
    """Those of the new checkpoint. ValueError: the old one's are not those of its configuration, or of the file."""
    from farspan.platform.optim.convert import convert, layout
    from farspan.platform.stored import Stored

    old, new = change.optims
    shapes, known = weights_of(change.was)
    wanted = {n: {"shape": list(t.shape), "dtype": str(t.dtype)} for n, t in layout(old, shapes, known).items()}
    kept = {n: {"shape": list(t.shape), "dtype": str(t.dtype)} for n, t in kept_of(change.was).items()}
    wanted, saved = wanted | kept, manifest["tensors"]
    if wrong := [name for name in {**wanted, **saved} if wanted.get(name) != saved.get(name)]:
        raise ValueError(
            f"{source}: does not fit {source.parents[1] / 'config.yaml'}: {wrong[0]} is {saved.get(wrong[0])} there, "
            f"not {wanted.get(wrong[0])}; mend the configuration"
        )
    if imported is not None and (problems := imported.problems(shapes)):
        more = f"\nand {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError("\n".join(f"--state: {problem}; mend --names" for problem in problems[:5]) + more)
    state = Stored(source)
    return chain(((name, state[name]) for name in kept), convert(state, old, new, shapes, known, imported))
