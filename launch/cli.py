"""`launch`: trains, verifies, reports. What a person types."""

import argparse
import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from farspan.launch import convert, data, exports, imports, pulse
from farspan.launch.exit import Exit

if TYPE_CHECKING:
    from farspan.launch.run import Run  # torch takes a second to import: help and report do without

if __name__ == "__mp_main__":
    logging.disable(logging.WARNING)  # a rank's process that writes checkpoints imports this file again, talkative


def main(arguments: Sequence[str] | None = None) -> int:
    """Parses the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="launch", description="Train large models on long sequences.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_train(commands)
    _add_worker(commands)
    data.add(commands)
    convert.add(commands)
    imports.add(commands)
    exports.add(commands)
    verify = commands.add_parser("verify", help="check every byte of a checkpoint against its manifest")
    verify.add_argument("checkpoint", type=Path, help="runs/NAME/checkpoints/step-N, or runs/NAME for all of them")
    verify.set_defaults(run=_verify)
    report = commands.add_parser("report", help="write one HTML page with the curves of one or more runs")
    report.add_argument(
        "folders", type=Path, nargs="+", metavar="RUN", help="run folders, for instance runs/quickstart"
    )
    report.add_argument("--out", type=Path, help="the page to write; default: report.html in the first folder")
    report.add_argument(
        "--png", nargs="?", const="", metavar="DIR", help="also write PNGs; default: plots in the first folder"
    )
    report.set_defaults(run=_report)
    explain = commands.add_parser("config", help="explain the keys of a configuration file")
    explain.add_argument(
        "--explain", nargs="?", const="", required=True, metavar="PATH", help="a key such as model.blocks; none: all"
    )
    explain.set_defaults(run=_explain)
    parsed, rest = parser.parse_known_args(arguments)
    if hasattr(parsed, "overrides"):  # argparse takes overrides in one place only, people write them anywhere
        parsed.overrides += [word for word in rest if not word.startswith("-")]
        rest = [word for word in rest if word.startswith("-")]
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        return int(parsed.run(parsed))
    except KeyboardInterrupt:
        print("launch: stopped before the ranks were up; nothing to save", file=sys.stderr)
        return int(Exit.PREEMPTED)
    except ValueError as error:  # ConfigError among them: said to a person, without a traceback
        problems = getattr(error, "problems", str(error).splitlines())
        print(f"launch: {len(problems)} problem{'s' * (len(problems) > 1)}", file=sys.stderr)
        for problem in problems:
            print(f"  {problem}", file=sys.stderr)
        return int(Exit.CONFIG)


def _add_train(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    text = """Keys of a configuration:
  name seed model data train optim schedule parallel checkpoint metrics launch
  docs/configuration.md describes each; configs/ holds examples. An override names a key by dots and gives its
  value as YAML: train.steps=1000  optim.rate=3e-4  model.blocks.0.mixer.kv_heads=2  launch.kind=local
Exit codes:
  0 done   2 configuration   75 worth another try   76 loss or gradient not finite   85 stopped, state saved"""
    train = commands.add_parser(
        "train",
        help="train the job of a configuration file",
        epilog=text,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Train. Under torchrun (RANK set) this process is one rank; otherwise it launches the ranks.",
    )
    train.add_argument("--config", required=True, type=Path, metavar="X.yaml", help="the configuration file")
    train.add_argument("overrides", nargs="*", metavar="a.b=c", help="values that replace the file's")
    train.add_argument("--resume", action="store_true", help="go on with an existing run from its last checkpoint")
    train.add_argument("--dry-run", action="store_true", help="check the configuration, print the plan, start nothing")
    train.add_argument(
        "--runs", type=Path, default=Path("runs"), metavar="DIR", help="where run folders live; default: runs"
    )
    train.set_defaults(run=_train)


def _add_worker(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    worker = commands.add_parser("worker", help="be one rank of a run (what launchers start)")
    worker.add_argument("--run", dest="folder", required=True, type=Path, metavar="FOLDER", help="the run folder")
    worker.set_defaults(run=_worker)


def _train(parsed: argparse.Namespace) -> int:
    from farspan.launch import run as runs
    from farspan.platform import config

    world = int(os.environ["WORLD_SIZE"]) if "RANK" in os.environ else None
    run = runs.decode(config.read(runs.shipped(parsed.config), parsed.overrides), _note, world=world)
    folder = (parsed.runs / run.job.name).absolute()
    if run.launch_is_here and world is None:
        run.job.data.find()
    if world is not None and not parsed.dry_run:
        return _as_rank(run, folder, parsed.resume)
    if parsed.dry_run:
        print(config.dump(run.tree()))
    lines = runs.plan_of(run, world)  # the model is built on the meta device: what does not fit fails here
    if parsed.dry_run:
        print("\n".join(lines))
        return int(Exit.DONE)
    with runs.held(folder, resume=parsed.resume):
        if parsed.resume:
            run = runs.resume(run, folder)
        else:
            runs.start(run, folder)
        return _launch(run, folder, lines)


def _note(text: str) -> None:
    """A remark on the way; under torchrun only rank 0 makes it."""
    if os.environ.get("RANK", "0") == "0":
        print(text, flush=True)


def _launch(run: "Run", folder: Path, lines: Sequence[str]) -> int:
    """Starts the ranks, shows what they do, and says how it ended."""
    from farspan.launch import runner
    from farspan.launch.view import View
    from farspan.platform import checkpoint

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # until the supervisor listens, TERM is a Ctrl-C
    view = View(folder, run.job.train.steps)
    for line in lines:
        view.say(line)
    try:
        code = runner.run(
            run.launch,
            command=["python", "-m", "farspan.launch.cli", "worker", "--run", str(folder)],
            folder=folder,
            say=view.say,
            watch=view.poll,
            progress=lambda: checkpoint.latest(folder / "checkpoints"),
        )
    finally:
        view.poll()
        view.close()
    status = pulse.read(folder / "status.json")
    ended = f"{status.get('state', 'ended')} at step {status.get('step')}: {status.get('reason')}"
    print(f"{ended}\nrun folder: {os.path.relpath(folder)}", flush=True)
    return code


def _as_rank(run: "Run", folder: Path, resume: bool) -> int:
    """Under torchrun: rank 0 prepares the folder and keeps its status, every rank trains."""
    from farspan.launch import run as runs
    from farspan.launch import worker

    if os.environ["RANK"] != "0":
        return worker.work(folder)
    again = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    with runs.held(folder, resume=resume or again):
        if resume and not again:
            runs.resume(run, folder)
        elif not again:
            runs.start(run, folder)
        return worker.work(folder, keep_status=True)


def _worker(parsed: argparse.Namespace) -> int:
    from farspan.launch import worker

    return worker.work(parsed.folder)


def _verify(parsed: argparse.Namespace) -> int:
    """Exit code 0 if every checkpoint stands, 2 otherwise."""
    from farspan.platform import checkpoint

    folder: Path = parsed.checkpoint
    inside = folder / "checkpoints" if (folder / "checkpoints").is_dir() else folder
    found = (
        [folder]
        if folder.name.startswith("step-")
        else [checkpoint.folder_of(inside, s) for s in checkpoint.steps_in(inside)]
    )
    if not found or not all(path.is_dir() for path in found):
        raise ValueError(f"{folder}: no checkpoint here; give runs/NAME or runs/NAME/checkpoints/step-N")
    sound = True
    for path in found:
        problems = checkpoint.verify(path)
        sound &= not problems
        print(f"{path}: {'sound' if not problems else 'DAMAGED'}")
        for problem in problems:
            print(f"  {problem}")
    return int(Exit.DONE if sound else Exit.CONFIG)


def _report(parsed: argparse.Namespace) -> int:
    from farspan.launch.report import pictures, report

    try:
        print(report(parsed.folders, parsed.out))
        if parsed.png is not None:
            for path in pictures(parsed.folders, Path(parsed.png) if parsed.png else None):
                print(path)
    except OSError as error:
        raise ValueError(f"report: cannot be written ({error}); name another --out or --png") from error
    return int(Exit.DONE)


def _explain(parsed: argparse.Namespace) -> int:
    from farspan.launch.explain import explain

    print(explain(parsed.explain))
    return int(Exit.DONE)


if __name__ == "__main__":
    sys.exit(main())
