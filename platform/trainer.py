"""The training loop: the step reads on one screen, and everything around it serves the step."""

import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor

from farspan.models.decoder import DecoderModel, initial
from farspan.models.roles import Role, roles
from farspan.parallel.comm import Group
from farspan.parallel.context import Axis, Runtime
from farspan.parallel.engine import Engine, Held, Optimizer
from farspan.parallel.mesh import Mesh, Zero
from farspan.platform import checkpoint, evaluate
from farspan.platform.checkpoint import Saver
from farspan.platform.choices import Choices
from farspan.platform.data.corpus import Language
from farspan.platform.data.loader import Loader
from farspan.platform.feed import Feed, Work
from farspan.platform.job import Job
from farspan.platform.loads import LoadJournal
from farspan.platform.metrics import Journal, Line, Sinks, next_attempt, plain
from farspan.platform.optim import Adamw, Adamw8
from farspan.platform.optim.offload import Offloaded, split_for, units_of
from farspan.platform.optim.placement import Split, Streamed, lines
from farspan.platform.optim.queues import queues_of
from farspan.platform.optim.rates import Rates, measure, slowest
from farspan.platform.recorder import Recorder, peak, routed
from farspan.platform.sinks import sinks
from farspan.platform.state import RunState
from farspan.platform.tracing import Tracer

Say = Callable[[str], None]

SETTLED = 5
"""Steps after which an update takes as long as all later ones."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a run ended, and why."""

    kind: Literal["done", "preempted", "not_finite", "unsaved"]
    step: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """What the trainer hears from, and tells, the process it lives in."""

    folder: Path
    """The run folder."""
    say: Say
    """Prints a line, on rank 0 only."""
    stopping: Callable[[], bool]
    """Whether this process was asked to stop."""
    beat: Callable[[int], None]
    """A sign of life after each step."""
    config: Mapping[str, Any]
    """The run's configuration as a plain tree, free of secrets."""
    attempt: int = 0
    """Which start of the run this is, as far as its launcher knows."""


def compute_type(job: Job, device: torch.device) -> torch.dtype | None:
    """The type of products; None for the weights' own fp32."""
    wanted = job.train.precision
    return torch.bfloat16 if wanted == "bf16" or (wanted == "auto" and device.type == "cuda") else None


def held_types(job: Job, dp: int, compute: torch.dtype | None) -> Held:
    """What weights and gradients are held in: gradients in fp32, unless one micro-batch gives bf16 weights theirs."""
    rows = job.train.batch // dp
    alone = (job.train.micro_batch or rows) >= rows
    weights = job.optim.weight_type
    in_half = weights == compute == torch.bfloat16 and alone
    return Held(weights, torch.bfloat16 if in_half else torch.float32)


class Trainer:
    def __init__(self, job: Job, mesh: Mesh, around: Surroundings) -> None:
        self.job, self.mesh, self.around, self.say = job, mesh, around, around.say
        self.corpus = job.data.build(job.seed)
        for note in self.corpus.notes:
            self.say(note)
        if job.train.evaluate is not None and not len(self.corpus.held_out):
            raise ValueError(
                f"data: held_out={job.data.held_out}: no document is held out (a single one never is), and "
                "train.evaluate needs some; add documents, or set train.evaluate=null"
            )
        if job.train.sample is not None:
            _check_prompt(job.train.sample.prompt, self.corpus.tokenizer)
        self.engine, flops, roles_of = self._engine()
        self.split: Split | None = None
        """What was foretold of offloaded state and has not been compared yet."""
        if isinstance(job.parallel.engine, Zero):
            self.optimizer: Optimizer = cast(Any, self.engine).optimizer
        else:
            self.optimizer = self._optimizer(roles_of)
        self.saver = Saver(around.folder / "checkpoints", job.checkpoint.keep, mesh.control, self.say)
        compute = compute_type(job, mesh.device)
        rate = peak(mesh.device, compute)
        self.recorder = Recorder(mesh.device, None if rate is None else rate * mesh.sizes.world)
        self.state = self._restore()
        if job.checkpoint.every is not None and not isinstance(self.optimizer, Offloaded):
            self.saver.prepare(self._tensors())
        self.sound = torch.ones((), dtype=torch.bool, device=mesh.device)
        """Falls for good at the first step that is not finite, under the policy `stop`."""
        self.save_due = False
        self.choices = Choices(around.folder, self.engine.context, mesh.control, self.say)
        self.micro_batch = min(job.train.micro_batch or job.train.batch, job.train.batch // mesh.sizes.dp)
        self.loader = Loader(
            self.corpus.train,
            start=self.state.rows,
            end=self.corpus.tokenizer.end,
            batch=job.train.batch,
            micro_batch=self.micro_batch,
            dp_rank=mesh.index("dp"),
            dp=mesh.sizes.dp,
            pin=mesh.device.type == "cuda",
        )
        self.feed = Feed(
            self.loader,
            mesh.control,
            flops,
            lambda: (around.stopping(), self.saver.failed),
            readers=mesh.sizes.world // mesh.sizes.dp,
        )
        self.journal, self.sinks = self._journal()
        self.loads = LoadJournal(around.folder)
        self.tracer = Tracer(job.metrics.trace, around.folder, mesh.rank, mesh.device, self.say)

    def run(self) -> Outcome:
        """Trains to the last step, or until asked to stop; always leaves the state on disk if it can."""
        try:
            return self._loop()
        finally:
            self.loader.close()
            self.saver.close()
            if isinstance(self.optimizer, Offloaded):
                self.optimizer.close()
            if self.journal is not None:
                self.journal.close()
            self.sinks.close()

    def _loop(self) -> Outcome:
        work = iter(self.feed)
        while self.state.step < self.job.train.steps:
            self.tracer.before(self.state.step + 1)
            todo = next(work)
            if todo.stop:
                self.tracer.close()
                return self._broken() or self._save_now("preempted", "asked to stop; the state is saved")
            self.save_due |= todo.save_failed
            self.step(todo)
            self.tracer.after(self.state.step)
            if outcome := self._after():
                return outcome
        self.tracer.close()
        return self._end()

    def step(self, work: Work) -> None:
        """One optimizer step. Nothing in it waits for the device."""
        if self.job.model.routes:
            self.engine.step = self.state.step
        part = self.engine.forward_backward(work.batches, work.labels)
        loss = self.engine.sum(part)
        norm = self.engine.gradient_norm()
        rate = self.job.optim.rate * self.job.schedule.factor(self.state.step)
        self.saver.staged()  # a save in flight reads the weights until here
        self.optimizer.update(rate, scale := self._scale(loss, norm))
        if self.job.model.routes:
            self.engine.settle(scale)
        self.engine.clear()
        self.state = self.state.advance(rows=self.job.train.batch, tokens=work.tokens)
        engine = self.engine if isinstance(self.engine, Engine) else None
        self.recorder.note(
            self.state.step,
            loss=loss,
            norm=norm,
            part=part,
            rate=rate,
            tokens=work.tokens,
            total=self.state.tokens,
            flops=work.flops,
            more={} if engine is None else routed(engine),
            loads=() if engine is None else engine.loads,
            waits=None if engine is None else engine.waits,
        )

    def _scale(self, loss: Tensor, norm: Tensor) -> Tensor:
        """What the gradient is multiplied by: at most 1, and 0 to leave the weights alone; decided on the device."""
        finite = torch.isfinite(loss) & torch.isfinite(norm)
        if self.job.train.on_not_finite == "stop":
            self.sound &= finite
            finite = self.sound
        limit = self.job.optim.max_norm
        clipped = torch.ones_like(norm) if limit is None else (limit / (norm + 1e-6)).clamp(max=1.0)
        return torch.where(finite, clipped, 0.0)

    def _after(self) -> Outcome | None:
        """What follows a step: metrics, evaluation, a save, each when its turn has come."""
        job, step = self.job, self.state.step
        last = step == job.train.steps
        self.saver.poll()
        self.around.beat(step)
        self.choices.tell()
        self._tell_split()
        self.save_due |= job.checkpoint.every is not None and step % job.checkpoint.every == 0
        evaluating = job.train.evaluate is not None and (last or step % job.train.evaluate.every == 0)
        if (last or evaluating or self.save_due or step % job.metrics.every == 0) and (broken := self._broken()):
            return broken
        if evaluating:
            self._evaluate()
        if self.save_due and self.finite_last and not last:
            resume = self.recorder.pause()
            # A save beside training would copy the state aside, and the host hold all of what is offloaded twice.
            save = self.saver.save if isinstance(self.optimizer, Offloaded) else self.saver.start
            save(step, self._tensors(), self._manifest())
            self.save_due = False
            resume()
        return None

    def _tell_split(self) -> None:
        """How long an update of offloaded state takes, and was to take: once, when a few have been made."""
        if self.split is not None and self.state.step % SETTLED == 0 and isinstance(self.optimizer, Offloaded):
            measured = self.optimizer.seconds()
            if measured is not None:
                for line in lines(self.split, measured):
                    self.say(line)
                self.split = None

    def _end(self) -> Outcome:
        outcome = self._save_now("done", f"trained {self.state.step} steps")
        if self.job.train.sample is not None:
            wanted = self.job.train.sample
            text = evaluate.sample(
                self.engine,
                self.corpus.tokenizer,
                wanted.prompt,
                tokens=wanted.tokens,
                temperature=wanted.temperature,
                context=self.job.data.sequence_length,
                seed=self.job.seed,
                beat=self._beat,
            )
            self.say(f"sample: {wanted.prompt}{text}")
        return outcome

    def _beat(self) -> None:
        self.around.beat(self.state.step)

    def _save_now(self, kind: Literal["done", "preempted"], reason: str) -> Outcome:
        """Saves the present step if it is not on disk yet, and ends the run."""
        self.saver.finish()
        step = self.state.step
        if self.saver.saved == step or self.saver.save(step, self._tensors(), self._manifest()):
            return Outcome(kind=kind, step=step, reason=reason)
        kept = self.saver.saved
        return Outcome(
            kind="unsaved",
            step=step,
            reason=f"step {step} could not be saved in {self.saver.root} (the last that stands is {kept}); "
            "make room or mend the disk, then launch train --resume",
        )

    def _broken(self) -> Outcome | None:
        """Writes the metrics so far; an outcome if a step was not finite and the policy is to stop."""
        lines = self.recorder.flush()
        bad = [
            line for line in lines if not (math.isfinite(line["loss"] or 0) and math.isfinite(line["grad_norm"] or 0))
        ]
        self.finite_last = not bad or lines[-1] is not bad[-1]
        stop = bad and self.job.train.on_not_finite == "stop"
        end = lines.index(bad[0]) + 1 if stop else len(lines)
        self._write(lines[:end])
        if self.journal is not None and self.recorder.loads is not None and lines:
            self.loads.write(self.recorder.loads)
        if lines and self.journal is not None:
            self.say(plain(lines[end - 1]))
        for line in bad[: 1 if stop else None]:
            step = int(line["step"] or 0)
            reason = f"step {step}: {self._culprit(step)}; the weights were not updated"
            if stop:
                hint = "look at the data of that step, or start a run under a new name with a lower optim.rate, "
                hint += "a lower optim.max_norm, or train.on_not_finite=skip"
                return Outcome(kind="not_finite", step=step, reason=f"{reason}; {hint}")
            self.say(f"warning: {reason}")
        return None

    def _culprit(self, step: int) -> str:
        """Which ranks' losses were not finite at `step`; all ranks ask together."""
        mine = not math.isfinite(dict(self.recorder.parts)[step])
        all_ranks = [False] * dist.get_world_size()
        dist.all_gather_object(all_ranks, mine, group=self.mesh.control)
        ranks = [str(rank) for rank, bad in enumerate(all_ranks) if bad]
        if not ranks:
            return "the gradient norm is not finite, though every rank's loss is"
        return f"the loss is not finite on rank {', '.join(ranks)}"

    def _evaluate(self) -> None:
        assert self.job.train.evaluate is not None
        resume = self.recorder.pause()
        loss = evaluate.held_out_loss(
            self.engine,
            self.corpus.held_out,
            self.corpus.tokenizer.end,
            limit=self.job.train.evaluate.rows,
            micro_batch=self.micro_batch,
            beat=self._beat,
        )
        line: Line = {"step": self.state.step, "eval_loss": loss}
        self._write([line])
        self.say(plain(line))
        resume()

    def _write(self, lines: list[Line]) -> None:
        if self.journal is None:
            return
        for line in lines:
            self.journal.write(line)
            self.sinks.write(line)

    def _tensors(self) -> dict[str, Tensor]:
        weights: dict[str, Tensor] = {f"model.{name}": weight.detach() for name, weight in self.engine.weights.items()}
        if self.job.model.routes:
            weights |= {f"model.{name}": buffer for name, buffer in self.engine.buffers.items()}
        return weights | {f"optim.{name}": tensor for name, tensor in self.optimizer.state().items()}

    def _manifest(self) -> dict[str, Any]:
        """Everything of a checkpoint that is no tensor. The metrics up to here are on disk before it can commit."""
        if self.journal is not None:
            self.journal.sync()
            self.loads.sync()
        sizes = self.mesh.sizes
        return {
            "format": checkpoint.FORMAT,
            "state": vars(self.state),
            "data": {"fingerprint": self.corpus.fingerprint, "tokenizer": self.corpus.tokenizer.name},
            "mesh": {**vars(sizes), "world": sizes.world},
            "config": dict(self.around.config),
            "versions": {"torch": torch.__version__},
            "time": time.time(),
        }

    def _restore(self) -> RunState:
        """The newest checkpoint that verifies, or the beginning."""
        root, self.finite_last = self.saver.root, True
        step = checkpoint.newest(root, self.mesh.control, self.say)
        if step is None:
            return RunState()
        manifest = checkpoint.manifest_of(checkpoint.folder_of(root, step))
        self._refuse_other_data(manifest["data"], checkpoint.folder_of(root, step))
        checkpoint.load(root, step, tensors := self._tensors(), self.mesh.control)
        if isinstance(self.job.parallel.engine, Zero):
            cast(Any, self.engine).restore(tensors)  # they are copies
        if isinstance(self.optimizer, Offloaded):
            self.optimizer.restored()
        self.saver.saved = step
        self.say(f"resumed from {checkpoint.folder_of(root, step)}")
        return RunState.of(manifest)

    def _refuse_other_data(self, saved: Mapping[str, str], folder: Path) -> None:
        """ValueError: a checkpoint that was made with another tokenizer or other documents."""
        way_out = "or start a run under a new name"
        if saved["tokenizer"] != (name := self.corpus.tokenizer.name):
            raise ValueError(
                f"data: the tokenizer has changed since {folder}: {saved['tokenizer']} then, {name} now; "
                f"restore its file, {way_out}"
            )
        if saved["fingerprint"] != (now := self.corpus.fingerprint):
            raise ValueError(
                f"data: the corpus has changed since {folder} (fingerprint {saved['fingerprint'][:9]} then, "
                f"{now[:9]} now); restore the files, {way_out}"
            )

    def _journal(self) -> tuple[Journal | None, Sinks]:
        """Rank 0 writes; the others do not."""
        if self.mesh.rank != 0:
            return None, Sinks({}, self.say)
        folder = self.around.folder
        journal = Journal(folder, max(self.around.attempt, next_attempt(folder)))
        if journal.note:
            self.say(journal.note)
        return journal, Sinks(sinks(self.job.metrics, folder, self.around.config), self.say)

    def _optimizer(self, roles_of: Mapping[str, Role]) -> Optimizer:
        """The job's optimizer; where its state is offloaded, the layers wait for their updates."""
        optim, engine = self.job.optim, self.engine
        if not isinstance(optim, Adamw | Adamw8) or optim.offload is None:
            return optim.build(engine.weights, roles_of, self.job.seed)
        device, control = self.mesh.device, self.mesh.control
        mine = measure(device, lambda: dist.barrier(group=control))
        every: list[Rates] = [mine] * dist.get_world_size(control)
        dist.all_gather_object(every, mine, group=control)
        units = units_of(optim, engine.weights, roles_of, self.job.seed, engine.units)
        held = held_types(self.job, self.mesh.sizes.dp, compute_type(self.job, device)).gradients
        away = held if isinstance(optim.offload, Streamed) and optim.offload.gradients else None
        self.split = split = split_for(optim.offload, units, slowest(every), away)
        self.say(
            f"optimizer state: {split.code} (resident, streamed, cpu), an update of {split.predicted.update:.3g} s"
        )
        offloaded = Offloaded(units, split.places, queues_of(device), device, away)
        engine.gate(offloaded.ready)
        if away is not None:
            engine.give_away(offloaded.taken, offloaded.take)
        return offloaded

    def _context(self) -> Runtime:
        """What attention runs with, spread over cp; a group of ranks is made only where there are several."""
        mesh, context = self.mesh, self.job.parallel.context
        if mesh.sizes.cp == 1:
            return context.build()
        axis = Axis(
            group=mesh.context,
            device=mesh.device,
            multiple=mesh.sizes.tp,
            windowed=self.job.model.windowed,
            run=Group(mesh.control),
        )
        return context.build(axis)

    def _engine(self) -> tuple[Engine, Callable[[tuple[int, ...]], float], dict[str, Role]]:
        job = self.job
        context = self._context()
        with torch.device("meta"):  # the engine cuts one of the two; the other keeps the whole's shapes, to count by
            model, whole = (job.model.build(job.data.vocabulary, context) for _ in range(2))
        compute = compute_type(job, self.mesh.device)
        if isinstance(job.parallel.engine, Zero):
            return self._zero(job.parallel.engine, model, context, compute), whole.flops, roles(whole)
        engine = Engine(
            model,
            list(model.layers),
            initial(model),
            self.mesh,
            context=context,
            seed=job.seed,
            compute=compute,
            held=held_types(job, self.mesh.sizes.dp, compute),
            kept=job.train.kept,
            stashed=job.train.stashed,
            compiled=job.train.compile,
            gather=job.gathering(self.mesh.sizes),
            dispatcher=job.parallel.dispatch.build(self.mesh.expert_axes) if job.model.routes else None,
        )
        return engine, whole.flops, roles(whole)

    def _zero(self, zero: Zero, model: DecoderModel, context: Runtime, compute: torch.dtype | None) -> Any:
        """DeepSpeed's engine, which has the verbs of ours; whoever does not ask for it need not have it."""
        os.environ.setdefault("DS_ACCELERATOR", self.mesh.device.type)  # it would take a GPU wherever it sees one
        from farspan.parallel.zero import ZeroEngine

        job = self.job
        assert isinstance(job.optim, Adamw), "Job.problems lets no other pass"
        return ZeroEngine(
            model,
            list(model.layers),
            initial(model),
            self.mesh,
            context=context,
            seed=job.seed,
            compute=compute,
            kept=job.train.kept,
            zero=zero,
            decay=job.optim,
        )


def _check_prompt(prompt: str, tokenizer: Language) -> None:
    """ValueError: what the sample at the end begins with is nothing to this tokenizer."""
    try:
        held = len(tokenizer.encode(prompt))
    except ValueError as error:
        raise ValueError(f"train.sample.prompt={prompt!r}: {error}") from error
    if not held:
        raise ValueError(f"train.sample.prompt={prompt!r}: is no token to the tokenizer {tokenizer.name}; name others")


def prepare(job: Job) -> None:
    """Settings of the whole process that a job asks for; before the first product on a GPU."""
    if job.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
