"""One rank: reads its place from the environment, joins the others, trains, and says how it ended."""

import faulthandler
import os
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import FrameType

from farspan.launch import pulse
from farspan.launch.exit import Exit
from farspan.platform.config import ConfigError


class Ears:
    """Hears the wish to stop: SIGTERM, SIGUSR1 and SIGINT are the same to a rank."""

    def __init__(self) -> None:
        self.asked = False
        self.joined = False
        """Whether all ranks have met: until then there is nothing to save and nobody to agree with."""
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._hear)
        faulthandler.register(signal.SIGUSR2)  # the agent asks a rank that hangs where it is

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if not self.joined:
            os._exit(Exit.PREEMPTED)
        self.asked = True


def work(folder: Path, keep_status: bool = False) -> int:
    """Trains the run in `folder` as the rank that RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT name.

    Returns the exit code, with the last words written.

    `keep_status`: no supervisor watches, so this rank writes status.json itself.
    """
    ears = Ears()
    if keep_status:
        _status(folder, "running", None, None, "")
    step: list[int | None] = [None]
    try:
        code, reason = _train(folder, ears, step)
    except ConfigError as error:
        print(f"error on rank {os.environ['RANK']}: {error}", file=sys.stderr)
        code, reason = Exit.CONFIG, str(error)
    except BaseException as error:  # DCP and gloo raise beyond Exception; whatever it is, the agent must hear of it
        traceback.print_exception(error)
        print(f"error on rank {os.environ['RANK']}: {error}", file=sys.stderr)
        code, reason = Exit.RETRY, f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
    pulse.farewell(code, step[0], reason)
    if keep_status:
        states = {Exit.DONE: "done", Exit.PREEMPTED: "preempted"}
        _status(folder, states.get(code, "failed"), int(code), step[0], reason)
        print(f"{states.get(code, 'failed')} at step {step[0]}: {reason}\nrun folder: {folder}")
    sys.stdout.flush()
    sys.stderr.flush()
    if code not in (Exit.DONE, Exit.PREEMPTED):
        os._exit(code)  # other ranks may be gone: no collective clean-up can be waited for
    return int(code)


def _status(folder: Path, state: str, code: int | None, step: int | None, reason: str) -> None:
    attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    told = {"state": state, "exit_code": code, "step": step, "reason": reason, "attempt": attempt}
    pulse.publish(folder / "status.json", told)


@contextmanager
def _refusing() -> Iterator[None]:
    """While a run is put together, a ValueError is the user's to mend: trying again would change nothing."""
    try:
        yield
    except ValueError as error:
        raise ConfigError(str(error).splitlines()) from error


def _train(folder: Path, ears: Ears, step: list[int | None]) -> tuple[Exit, str]:
    import torch
    import torch.distributed as dist

    from farspan.launch import run as runs
    from farspan.launch import runner
    from farspan.parallel.mesh import Mesh
    from farspan.platform import config
    from farspan.platform.data.loader import DataError
    from farspan.platform.dispatching import settled
    from farspan.platform.trainer import Surroundings, Trainer, compute_type, prepare

    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=timedelta(minutes=10))
    dist.barrier(group=(control := dist.new_group(backend="gloo")))  # under torchrun, rank 0 writes the config first
    ears.joined = True
    with _refusing():
        run = runs.decode(config.read(folder / "config.yaml"), world=world)
    cuda = runner.device(run.launch) == "cuda"
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    prepare(run.job)

    def say(text: str) -> None:
        if rank == 0:
            print(text, flush=True)

    def beat(now: int) -> None:
        step[0] = now
        pulse.beat(now)

    around = Surroundings(
        folder=folder,
        say=say,
        stopping=lambda: ears.asked,
        beat=beat,
        config=run.tree(),
        attempt=int(os.environ.get("FARSPAN_ATTEMPT", "0")),
    )
    with _refusing():
        mesh = Mesh(run.job.parallel.sizes(world), device, control)
        compute = compute_type(run.job, device) or torch.float32
        job, mesh = settled(run.job, mesh, folder, compute, say)
        trainer = Trainer(job, mesh, around)
    beat(trainer.state.step)
    try:
        outcome = trainer.run()
    except DataError as error:
        raise ConfigError([f"step {trainer.state.step + 1} or after: {error}"]) from error
    step[0] = outcome.step
    codes = {"done": Exit.DONE, "preempted": Exit.PREEMPTED, "not_finite": Exit.NOT_FINITE, "unsaved": Exit.RETRY}
    if codes[outcome.kind].clean:
        dist.barrier(group=control)
        dist.destroy_process_group()
    return codes[outcome.kind], outcome.reason
