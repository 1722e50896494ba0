"""A run is a job, the machines it is launched on, and a folder that is never overwritten silently."""

import difflib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from farspan.launch import runner
from farspan.launch.pulse import read as read_json
from farspan.launch.runner import Launch
from farspan.platform import config
from farspan.platform.checkpoint import replace as write_whole
from farspan.platform.config import ConfigError, Plain, Source
from farspan.platform.job import Job
from farspan.platform.plan import plan
from farspan.platform.schedule import Constant

MAY_CHANGE = ("train.steps", "parallel", "launch", "checkpoint", "metrics")
"""What a resumed run may do differently from its own configuration."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """Everything of one configuration file."""

    job: Job
    launch: Launch
    raw: Plain
    """The tree as it was written, `${...}` unresolved."""

    def tree(self) -> Plain:
        """The configuration with every default written out, and nothing of the environment in it."""
        tree = {**config.encode(self.job), "launch": config.encode(self.launch, Launch)}
        found: Plain = config.unresolved(tree, self.raw)
        return found


def decode(source: Source, notes: Callable[[str], None] = lambda _: None, world: int | None = None) -> Run:
    """Decodes both halves and checks them against each other; one ConfigError names all that is wrong.

    `world`: the number of ranks where they run already; None: what the launch section will start.
    """
    problems: list[str] = []
    halves: dict[str, Any] = {}
    tree = dict(source.tree)
    launch = {"launch": tree.pop("launch", {"kind": "ray"})}
    for name, part, cls in (("job", tree, Job), ("launch", launch, _Launched)):
        try:
            halves[name] = config.decode(replace(source, tree=part), cls, notes)
        except ConfigError as error:
            problems += _with_launch(error.problems) if name == "job" else error.problems
    if not problems:
        problems = halves["job"].problems(world or runner.world(halves["launch"].launch))
    if problems:
        raise ConfigError(problems)
    return Run(job=_with_horizon(halves["job"]), launch=halves["launch"].launch, raw=source.raw)


@dataclass(frozen=True, kw_only=True)
class _Launched:
    launch: Launch


def _with_launch(problems: tuple[str, ...]) -> list[str]:
    """Adds the hint for a misspelt `launch`, which the job's own keys cannot give."""
    near = [p for p in problems if difflib.get_close_matches(p.split("=")[0], ["launch"], n=1, cutoff=0.7)]
    return [f"{p.split(': unknown key')[0]}: unknown key; did you mean launch?" if p in near else p for p in problems]


def _with_horizon(job: Job) -> Job:
    """Fixes the schedule's horizon at the first start: it does not move when train.steps does."""
    if isinstance(job.schedule, Constant) or job.schedule.steps is not None:
        return job
    return replace(job, schedule=replace(job.schedule, steps=job.train.steps))


def plan_of(run: Run, world: int | None = None) -> list[str]:
    """What the run will be, in lines; ValueError where the model does not fit the data."""
    return plan(run.job, world or runner.world(run.launch), runner.device(run.launch)).lines()


def start(run: Run, folder: Path) -> None:
    """Makes the folder of a new run; refuses one that exists."""
    if (folder / "config.yaml").exists() or (folder.is_dir() and any(folder.iterdir())):
        status = read_json(folder / "status.json")
        state = f" ({status['state']}, step {status.get('step')})" if "state" in status else ""
        raise ConfigError(
            [f"name={run.job.name}: the run {folder} exists{state}; add --resume to go on with it, or name=another"]
        )
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    write_whole(folder / "config.yaml", config.dump(run.tree()))


def resume(run: Run, folder: Path) -> Run:
    """Goes on with the run in `folder` from its own configuration; `run` may change only what `MAY_CHANGE` names."""
    path = folder / "config.yaml"
    if not path.exists():
        raise ConfigError([f"--resume: {folder} is no run (it has no config.yaml); leave --resume out to start it"])
    old = decode(config.read(path))
    wanted = replace(run, job=_with_horizon_of(old.job, run))
    differences = _differences(config.encode(old.job), config.encode(wanted.job))
    refused = [d for d in differences if not any(d[0] == key or d[0].startswith(f"{key}.") for key in MAY_CHANGE)]
    if refused:
        allowed = ", ".join(MAY_CHANGE)
        raise ConfigError(
            [
                f"{key}={new!r}: the run {folder} was started with {was!r}, and --resume may change only {allowed}; "
                "set it back, or start a run under a new name"
                for key, was, new in refused
            ]
        )
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
