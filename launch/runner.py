"""From a launch config to a finished run: place the nodes, supervise the ranks, always clean up."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from farspan.launch import on_local, on_ray
from farspan.launch.exit import Exit
from farspan.launch.on_local import Local, Placement
from farspan.launch.on_ray import Ray
from farspan.launch.pulse import publish, read
from farspan.launch.supervisor import Plan, Supervisor

Launch = Ray | Local

# What of the driver's environment the ranks get on any node. Secrets are not among it: a rank that needs one inherits
# it from its node, and no file or message of ours ever holds it.
_HANDED_ON = ("TRITON", "NCCL", "TORCH", "OMP_")
_HANDED_ON_EXACTLY = {"WANDB_MODE", "XDG_CACHE_HOME", "HF_HOME"}


def run(
    launch: Launch,
    *,
    command: list[str],
    folder: Path,
    say: Callable[[str], None],
    watch: Callable[[], None] | None = None,
    progress: Callable[[], int | None] | None = None,
) -> int:
    """Run `command` as every rank until it is done or not worth another attempt; returns the exit code.

    `command[0] == "python"` stands for each node's interpreter. `folder` is the run folder; `say` hears events;
    `watch` is called at every poll; `progress` returns the last durable step. Call it in the main thread.
    """
    folder = folder.absolute()
    placing = True
    try:
        with _placed(launch, say) as placement:
            placing = False
            plan = Plan(
                command=tuple(command),
                folder=folder,
                ranks=ranks(launch),
                retries=launch.retries,
                threads=None if launch.threads == "auto" else launch.threads,
                timeout=launch.timeout,
                grace=launch.grace,
                environment=handed_on(os.environ),
                directory=str(Path.cwd()),
            )
            return Supervisor(plan, placement, say=say, watch=watch, progress=progress).run()
    except (ValueError, OSError, RuntimeError) as error:
        if not placing:
            raise
        code = Exit.CONFIG if isinstance(error, ValueError) else Exit.RETRY
        _refuse(folder, code, f"cannot launch: {error}")
        say(f"cannot launch: {error}")
        return int(code)


def world(launch: Launch) -> int:
    """The number of ranks on all nodes."""
    return ranks(launch) * (launch.nodes if isinstance(launch, Ray) else 1)


def ranks(launch: Launch) -> int:
    """The number of ranks on each node; auto counts this machine's GPUs."""
    if launch.ranks != "auto":
        return launch.ranks
    return max(1, _gpus()) if device(launch) == "cuda" else 1


def device(launch: Launch) -> Literal["cpu", "cuda"]:
    """What the ranks compute on; auto looks at this machine, so say `cuda` where only the nodes have GPUs."""
    if launch.device != "auto":
        return launch.device
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def handed_on(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that reach the ranks on every node."""
    return {
        name: value for name, value in environment.items() if name.startswith(_HANDED_ON) or name in _HANDED_ON_EXACTLY
    }


@contextmanager
def _placed(launch: Launch, say: Callable[[str], None]) -> Iterator[Placement]:
    cuda = device(launch) == "cuda"
    joins = isinstance(launch, Ray) and launch.address is not None
    if cuda and not joins and ranks(launch) > _gpus():
        raise ValueError(f"launch.ranks={launch.ranks}: this machine has {_gpus()} GPUs; use fewer, or device: cpu")
    if isinstance(launch, Ray):
        with on_ray.placed(launch, ranks=ranks(launch), cuda=cuda, say=say) as placement:
            yield placement
    else:
        with on_local.placed() as placement:
            yield placement


def _refuse(folder: Path, code: Exit, reason: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    before = read(folder / "status.json")
    status = {"state": "failed", "exit_code": int(code), "step": before.get("step"), "reason": reason}
    publish(folder / "status.json", {**status, "attempt": before.get("attempt", 0)})


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()
