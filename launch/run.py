"""A run is a job, the machines it is launched on, and a folder that is never overwritten silently."""

import difflib
import fcntl
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from farspan.launch import runner
from farspan.launch.on_local import Local
from farspan.launch.pulse import read as read_json
from farspan.launch.runner import Launch
from farspan.platform import choices, config, metrics
from farspan.platform.checkpoint import latest
from farspan.platform.checkpoint import replace as write_whole
from farspan.platform.config import ConfigError, Plain, Source
from farspan.platform.job import Job
from farspan.platform.plan import plan
from farspan.platform.schedule import Constant

MAY_CHANGE = ("train.steps", "parallel", "launch", "checkpoint", "metrics", "optim.offload")
"""What a resumed run may do differently from its own configuration."""


CONFIGS = Path(__file__).parents[1] / "configs"


@dataclass(frozen=True, kw_only=True)
class Run:
    """Everything of one configuration file."""

    job: Job
    launch: Launch
    raw: Plain
    """The tree as it was written, `${...}` unresolved."""

    @property
    def launch_is_here(self) -> bool:
        """Whether the ranks will see this machine's files: not so on a cluster that is only joined."""
        return isinstance(self.launch, Local) or self.launch.address is None

    def tree(self) -> Plain:
        """The configuration with every default written out, and nothing of the environment in it."""
        tree = {**config.encode(self.job), "launch": config.encode(self.launch, Launch)}
        found: Plain = config.unresolved(tree, self.raw)
        return found


def shipped(path: Path) -> Path:
    """`configs/quickstart.yaml` means the one that is installed, where the working folder has none."""
    installed = CONFIGS / path.name
    return installed if not path.exists() and path.parent.name == "configs" and installed.exists() else path


def decode(source: Source, notes: Callable[[str], None] = lambda _: None, world: int | None = None) -> Run:
    """Decodes both halves and checks them against each other; one ConfigError names all that is wrong.

    `world`: the number of ranks where they run already; None: what the launch section will start.
    """
    run = _decode(source, notes)
    if problems := run.job.problems(world or runner.world(run.launch)):
        raise ConfigError(problems)
    return replace(run, job=_with_horizon(run.job))


def _decode(source: Source, notes: Callable[[str], None] = lambda _: None) -> Run:
    """Both halves, each right in itself."""
    problems: list[str] = []
    halves: dict[str, Any] = {}
    tree = dict(source.tree)
    launch = {"launch": tree.pop("launch", {"kind": "ray"})}
    for name, part, cls in (("job", tree, Job), ("launch", launch, _Launched)):
        try:
            halves[name] = config.decode(replace(source, tree=part), cls, notes)
        except ConfigError as error:
            problems += _with_launch(error.problems) if name == "job" else error.problems
    if problems:
        raise ConfigError(problems)
    return Run(job=halves["job"], launch=halves["launch"].launch, raw=source.raw)


@dataclass(frozen=True, kw_only=True)
class _Launched:
    launch: Launch


def _with_launch(problems: Sequence[str]) -> list[str]:
    """Makes unknown top-level keys aware of `launch`, which the job's own keys do not include."""
    return [_hint(problem) if ": unknown key" in problem else problem for problem in problems]


def _hint(problem: str) -> str:
    place, _, _ = problem.partition(": unknown key")
    if difflib.get_close_matches(place.split("=")[0], ["launch"], n=1, cutoff=0.7):
        return f"{place}: unknown key; did you mean launch?"
    return problem if "." in place.split("=")[0] else problem.replace("known here: ", "known here: launch, ")


def _with_horizon(job: Job) -> Job:
    """Fixes the schedule's horizon at the first start: it does not move when train.steps does."""
    if isinstance(job.schedule, Constant) or job.schedule.steps is not None:
        return job
    return replace(job, schedule=replace(job.schedule, steps=job.train.steps))


def plan_of(run: Run, world: int | None = None) -> list[str]:
    """What the run will be, in lines; ValueError where the model does not fit the data."""
    return plan(run.job, world or runner.world(run.launch), runner.device(run.launch)).lines()


@contextmanager
def held(folder: Path, *, resume: bool) -> Iterator[None]:
    """Keeps the run folder for this process alone; ConfigError when another one has it, or there is none to resume."""
    if resume and not (folder / "config.yaml").exists():
        raise ConfigError([f"--resume: {folder} is no run (it has no config.yaml); leave --resume out to start it"])
    try:
        folder.mkdir(parents=True, exist_ok=True)
        stream = (folder / ".lock").open("a+")
    except OSError as error:
        raise ConfigError(
            [f"--runs: cannot write {folder} ({error.strerror}); give another folder or another name"]
        ) from error
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            stream.seek(0)
            owner = stream.read().strip()
            raise ConfigError([f"{folder} is in use by process {owner}; wait for it or stop it"]) from error
        except OSError:  # a file system without locks: then only care keeps two runs apart
            pass
        stream.truncate(0)
        stream.write(f"{os.getpid()} on {socket.gethostname()}\n")
        stream.flush()
        yield


def start(run: Run, folder: Path) -> None:
    """Makes the folder of a new run; refuses one that holds anything but a start that never made a step."""
    if _holds_anything(folder):
        status = read_json(folder / "status.json")
        state = f" ({status['state']}, step {status.get('step')})" if "state" in status else ""
        way = "add --resume to go on with it, or name=another"
        if not (folder / "config.yaml").exists():
            way = "it has no config.yaml; move it away, or take name=another"
        raise ConfigError([f"name={run.job.name}: the run {folder} exists{state}; {way}"])
    write_whole(folder / "config.yaml", config.dump(run.tree()))
    (folder / "logs").mkdir(exist_ok=True)


def _holds_anything(folder: Path) -> bool:
    """Whether a run has left something to lose: a line of metrics, a checkpoint, or what is not ours."""
    ours = {".lock", "config.yaml", "status.json", "logs", "agents", "checkpoints", metrics.FILE, choices.FILE}
    if any(path.name not in ours for path in folder.iterdir()):
        return True
    checkpoints = folder / "checkpoints"
    written = folder / metrics.FILE
    return (checkpoints.is_dir() and any(checkpoints.iterdir())) or (written.exists() and written.stat().st_size > 0)


def resume(run: Run, folder: Path) -> Run:
    """Goes on with the run in `folder` from its own configuration; `run` may change only what `MAY_CHANGE` names."""
    path = folder / "config.yaml"
    old = _decode(config.read(path))  # only to be compared: it need not fit today's ranks
    wanted = replace(run, job=_with_horizon_of(old.job, run))
    differences = _differences(config.encode(old.job), config.encode(wanted.job))
    refused = [d for d in differences if not any(d[0] == key or d[0].startswith(f"{key}.") for key in MAY_CHANGE)]
    if refused:
        allowed = ", ".join(MAY_CHANGE)
        raise ConfigError(
            [
                f"{key}={new!r}: the run {folder} was started with {was!r}, and --resume may change only {allowed}; "
                f"give the same overrides as then (or --config {path}), or start a run under a new name"
                for key, was, new in refused
            ]
        )
    if old.job.optim.weight_type != wanted.job.optim.weight_type:
        raise ConfigError(
            [
                f"optim.offload: the run {folder} holds its weights in {old.job.optim.weight_type}, and with this in "
                f"{wanted.job.optim.weight_type}; launch convert makes a run of it that goes on so"
            ]
        )
    reached = latest(folder / "checkpoints") or 0
    if wanted.job.train.steps < reached:
        raise ConfigError([f"train.steps={wanted.job.train.steps}: the run is at step {reached}; give more steps"])
    write_whole(path, config.dump(wanted.tree()))
    return wanted


def _with_horizon_of(old: Job, run: Run) -> Job:
    """The run's job; where it leaves the schedule's horizon open, that is the old one."""
    schedule, before = run.job.schedule, old.schedule
    if isinstance(schedule, Constant) or isinstance(before, Constant) or run.raw["schedule"].get("steps") is not None:
        return run.job
    return replace(run.job, schedule=replace(schedule, steps=before.steps))


def _differences(old: Any, new: Any, path: str = "") -> list[tuple[str, Any, Any]]:
    """(dotted path, old, new) wherever two plain trees differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = dict.fromkeys([*old, *new])
        join = f"{path}." if path else ""
        return [d for key in keys for d in _differences(old.get(key), new.get(key), f"{join}{key}")]
    return [] if old == new else [(path, old, new)]
