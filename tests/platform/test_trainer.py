"""Stopped and resumed is never stopped; on other ranks the batches are the same; a bad step never moves a weight."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from farspan.models.block import Block
from farspan.models.decoder import Decoder
from farspan.models.ffns import Swiglu
from farspan.models.mixers import Softmax
from farspan.parallel.context import Auto, Context, Gather, Grid, Ring, TokenRing, Ulysses
from farspan.parallel.context.shard import Batch
from farspan.parallel.fsdp import full
from farspan.parallel.mesh import Mesh, Parallel
from farspan.platform import metrics
from farspan.platform.data import Text, Tokens
from farspan.platform.data.index import write
from farspan.platform.data.tokenizer import train_bpe
from farspan.platform.job import Checkpoint, Evaluate, Job, Sample, Train
from farspan.platform.metrics import Metrics
from farspan.platform.optim import Adamw
from farspan.platform.schedule import Cosine
from farspan.platform.trainer import Surroundings, Trainer

CONTEXTS: dict[str, Context] = {
    "auto": Auto(),
    "gather": Gather(groups=2),
    "grid": Grid(inner=2),
    "ring": Ring(),
    "token_ring": TokenRing(),
    "ulysses": Ulysses(),
}


def job(
    corpus: str,
    steps: int,
    micro: int = 2,
    policy: Any = "stop",
    every: int = 4,
    tp: int = 1,
    cp: int = 1,
    context: str = "auto",
) -> Job:
    block = Block(repeat=2, mixer=Softmax(heads=2), ffn=Swiglu(hidden=24))
    return Job(
        name="t",
        model=Decoder(width=16, tied=True, blocks=(block,)),
        data=Text(paths=(corpus,), sequence_length=48, held_out=0.2, cache=f"{corpus}/../cache"),
        train=Train(
            steps=steps,
            batch=4,
            micro_batch=micro,
            on_not_finite=policy,
            evaluate=Evaluate(every=3, rows=5),
            sample=Sample(prompt="def", tokens=5),
        ),
        optim=Adamw(rate=1e-2),
        schedule=Cosine(warmup=2, steps=12),
        parallel=Parallel(tp=tp, cp=cp, context=CONTEXTS[context]),
        checkpoint=Checkpoint(every=every),
        metrics=Metrics(every=2),
    )


class Session:
    """A trainer with what surrounds it, on this rank."""

    def __init__(self, wanted: Job, folder: str, stop_after: int | None = None) -> None:
        self.said: list[str] = []
        self.step = 0

        def beat(step: int) -> None:
            self.step = step

        around = Surroundings(
            folder=Path(folder),
            say=self.said.append,
            stopping=lambda: stop_after is not None and self.step >= stop_after,
            beat=beat,
            config={"secret": "no"},
        )
        sizes = wanted.parallel.sizes(dist.get_world_size())
        control = dist.new_group(backend="gloo")
        self.trainer = Trainer(wanted, Mesh(sizes, torch.device("cpu"), control), around)

    def run(self) -> dict[str, Any]:
        outcome = self.trainer.run()
        weights = {n: whole(w) for n, w in self.trainer.engine.weights.items()}
        return {**dataclasses.asdict(outcome), "weights": weights, "said": self.said}


def whole(tensor: Tensor) -> Tensor:
    return full(tensor).detach().clone()


def numbers(folder: Path) -> list[tuple[Any, ...]]:
    """What must not change: step, loss, norm, rate, tokens; and the held-out losses."""
    keys = ("step", "loss", "grad_norm", "rate", "tokens", "eval_loss")
    return [tuple(line.get(key) for key in keys) for line in metrics.latest(metrics.read(folder))]


def through(folder: str, corpus: str) -> dict[str, Any]:
    return Session(job(corpus, 12), folder).run()


def stopped_and_resumed(folder: str, corpus: str) -> dict[str, Any]:
    first = Session(job(corpus, 12), folder, stop_after=5).run()
    second = Session(job(corpus, 12), folder).run()
    return {"first": first, **second}


def test_stopped_and_resumed_is_never_stopped_bit_for_bit(ranks: Any, corpus: Path, tmp_path: Path) -> None:
    arguments = {"corpus": str(corpus)}
    once = ranks(2, through, folder=str(tmp_path / "a"), **arguments)[0]
    twice = ranks(2, stopped_and_resumed, folder=str(tmp_path / "b"), **arguments)[0]
    assert once["kind"] == twice["kind"] == "done" and once["step"] == twice["step"] == 12
    assert twice["first"]["kind"] == "preempted" and 5 <= twice["first"]["step"] <= 8
    assert numbers(tmp_path / "a") == numbers(tmp_path / "b") and len(numbers(tmp_path / "a")) == 12 + 4
    assert {line["attempt"] for line in metrics.read(tmp_path / "b")} == {0, 1}
    for name, weight in once["weights"].items():
        assert torch.equal(weight, twice["weights"][name]), name
    losses = [line[1] for line in numbers(tmp_path / "a") if line[1] is not None]
    assert losses[-1] < losses[0] - 0.5, "it learns"
    assert any(text.startswith("sample: def") for text in once["said"])


def seen(folder: str, corpus: str, steps: int, micro: int, tp: int = 1, cp: int = 1) -> dict[str, Any]:
    """Trains to `steps` of 12, keeping the tokens of each step on this rank."""
    session = Session(job(corpus, steps, micro, tp=tp, cp=cp), folder)
    tokens: list[list[list[int]]] = []
    real = session.trainer.engine.forward_backward

    def spy(batches: list[Batch], labels: float) -> Tensor:
        tokens.append([row for batch in batches for row in batch.tokens.tolist()])
        return real(batches, labels)

    session.trainer.engine.forward_backward = spy  # type: ignore[method-assign,assignment]
    return {**session.run(), "tokens": tokens}


@dataclasses.dataclass(frozen=True)
class Straight:
    """Twelve steps of one rank that nobody stopped."""

    corpus: Path
    folder: Path
    told: dict[str, Any]


@pytest.fixture(scope="module")
def straight(ranks: Any, write_corpus: Any, tmp_path_factory: pytest.TempPathFactory) -> Straight:
    folder = tmp_path_factory.mktemp("straight")
    corpus = write_corpus(folder)
    told = ranks(1, seen, folder=str(folder / "one"), corpus=str(corpus), steps=12, micro=4)[0]
    return Straight(corpus, folder / "one", told)


def test_resume_on_other_ranks_sees_the_same_batches(ranks: Any, straight: Straight, tmp_path: Path) -> None:
    folder, corpus = str(tmp_path), straight.corpus
    parts = [
        ranks(2, seen, folder=folder, corpus=str(corpus), steps=4, micro=1),
        ranks(4, seen, folder=folder, corpus=str(corpus), steps=8, micro=1),
        ranks(1, seen, folder=folder, corpus=str(corpus), steps=12, micro=3),
    ]
    steps = [[row for rank in part for row in rank["tokens"][i]] for part in parts for i in range(4)]
    assert steps == straight.told["tokens"]
    agree(straight, parts[2][0], tmp_path)


def agree(straight: Straight, told: dict[str, Any], folder: Path) -> None:
    """Losses, norms, held-out losses and final weights of two runs are the same, but for rounding."""
    left, right = ({(line[0], line[1] is None): line for line in numbers(f)} for f in (straight.folder, folder))
    assert len(left.keys() & right.keys()) >= 12 + 2
    for key in left.keys() & right.keys():
        a, b = ([value for value in line[key] if value is not None] for line in (left, right))
        assert a == pytest.approx(b, rel=1e-4)
    for name, weight in straight.told["weights"].items():
        torch.testing.assert_close(weight, told["weights"][name], rtol=1e-2, atol=2e-3)


def test_resume_on_another_tp(ranks: Any, straight: Straight, tmp_path: Path) -> None:
    """A checkpoint is of whole weights: written by tp=2, read by tp=2 with dp=2, then by one rank."""
    many = {"folder": str(tmp_path), "corpus": str(straight.corpus)}
    first = ranks(2, seen, steps=4, micro=2, tp=2, **many)
    assert first[0]["tokens"] == first[1]["tokens"] == straight.told["tokens"][:4], "ranks of tp read the same rows"
    ranks(4, seen, steps=8, micro=1, tp=2, **many)
    agree(straight, ranks(1, seen, steps=12, micro=4, **many)[0], tmp_path)


def test_resume_on_another_cp(ranks: Any, straight: Straight, tmp_path: Path) -> None:
    """Two ranks that cut sequences, then two that share rows out, then one."""
    many = {"folder": str(tmp_path), "corpus": str(straight.corpus)}
    first = ranks(2, seen, steps=4, micro=3, cp=2, **many)
    assert first[0]["tokens"] == first[1]["tokens"] == straight.told["tokens"][:4], "ranks of cp read the same rows"
    ranks(2, seen, steps=8, micro=1, **many)
    agree(straight, ranks(1, seen, steps=12, micro=4, **many)[0], tmp_path)


def curves(folder: str, corpus: str, cp: int, contexts: list[str]) -> list[str]:
    """Trains three steps under each context schedule; what each wrote at the end."""
    told = [Session(job(corpus, 3, cp=cp, context=name), f"{folder}/{name}").run()["said"] for name in contexts]
    return [next(line for line in said if line.startswith("sample:")) for said in told]


@pytest.mark.parametrize(
    ("cp", "contexts"),
    [(2, list(CONTEXTS)), pytest.param(4, ["grid", "token_ring", "ulysses"], marks=pytest.mark.laws)],
    ids=["cp=2", "cp=4"],
)
def test_every_context_schedule_gives_one_ranks_curve(
    ranks: Any, straight: Straight, tmp_path: Path, cp: int, contexts: list[str]
) -> None:
    """Losses, norms and held-out losses of the first steps; four ranks share two heads."""
    written = ranks(cp, curves, folder=str(tmp_path), corpus=str(straight.corpus), cp=cp, contexts=contexts)[0]
    assert len(set(written)) == 1
    expected = [value for line in numbers(straight.folder) if line[0] <= 3 for value in line if value is not None]
    for name in contexts:
        found = [value for line in numbers(tmp_path / name) for value in line if value is not None]
        assert found == pytest.approx(expected, rel=1e-5), name


def poisoned(folder: str, corpus: str, policy: str) -> dict[str, Any]:
    """Rank 1's loss is not a number in step 3; the weights after each step are kept."""
    session = Session(job(corpus, 8, policy=policy, every=2), folder)
    trainer, after = session.trainer, []
    real_loss, real_step = trainer.engine.forward_backward, trainer.step

    def forward_backward(batches: list[Batch], labels: float) -> Tensor:
        bad = trainer.state.step == 2 and dist.get_rank() == 1
        return real_loss(batches, float("nan") if bad else labels)

    def step(work: Any) -> None:
        real_step(work)
        after.append({n: whole(w) for n, w in trainer.engine.weights.items()})

    trainer.engine.forward_backward = forward_backward  # type: ignore[method-assign,assignment]
    trainer.step = step  # type: ignore[method-assign]
    return {**session.run(), "after": after, "latest": (Path(folder) / "checkpoints" / "LATEST").read_text()}


def equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return all(torch.equal(left[name], right[name]) for name in left)


def test_a_step_that_is_not_finite_stops_and_names_step_and_rank(ranks: Any, corpus: Path, tmp_path: Path) -> None:
    for told in ranks(2, poisoned, folder=str(tmp_path / "r"), corpus=str(corpus), policy="stop"):
        assert told["kind"] == "not_finite" and told["step"] == 3
        assert "step 3: the loss is not finite on rank 1; the weights were not updated" in told["reason"]
        assert all(equal(weights, told["after"][1]) for weights in told["after"][2:])
        assert told["latest"] == "step-00000002\n"
    assert [line["step"] for line in metrics.read(tmp_path / "r") if "loss" in line] == [1, 2, 3]


def test_a_step_that_is_not_finite_is_skipped(ranks: Any, corpus: Path, tmp_path: Path) -> None:
    for told in ranks(2, poisoned, folder=str(tmp_path / "r"), corpus=str(corpus), policy="skip"):
        assert told["kind"] == "done" and told["step"] == 8
        assert equal(told["after"][2], told["after"][1]) and not equal(told["after"][3], told["after"][2])
        assert all(weight.isfinite().all() for weight in told["weights"].values())


def refused(folder: str, corpus: str, change: str) -> str:
    """Trains on a corpus, changes one thing about it, and comes back."""
    learnt, prefix = Path(folder, "bpe.json"), str(Path(folder, "flat"))

    def prepare(letters: str) -> None:
        learnt.unlink(missing_ok=True)
        train_bpe(iter([letters * 9]), 270, [], learnt)
        for end in (".bin", ".idx"):
            Path(prefix + end).unlink(missing_ok=True)
        write(prefix, (np.frombuffer((letters * n).encode(), np.uint8) for n in range(9, 20)), np.dtype(np.uint16))

    Path(folder).mkdir()
    prepare("ab cd ")
    text = {"sequence_length": 48, "held_out": 0.2, "cache": f"{folder}/cache"}
    data = {
        "documents": Text(paths=(corpus,), **text),
        "tokenizer": Text(paths=(corpus,), tokenizer=str(learnt), **text),
        "index": Tokens(paths=(prefix,), tokenizer="bytes", sequence_length=48, held_out=0.2),
    }[change]
    wanted = dataclasses.replace(job(corpus, 2), data=data)
    Session(wanted, folder).run()
    if change == "documents":
        (Path(corpus) / "new.py").write_text("x = 1\n" * 30)
    else:
        prepare("ad cb ")
    try:
        Session(dataclasses.replace(wanted, train=dataclasses.replace(wanted.train, steps=4)), folder)
    except ValueError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("documents", "the corpus has changed since"),
        ("index", "the corpus has changed since"),
        ("tokenizer", "the tokenizer has changed since"),
    ],
)
def test_a_changed_corpus_is_refused(ranks: Any, corpus: Path, tmp_path: Path, change: str, message: str) -> None:
    """The .bin keeps its size and its index: only the tokens inside are others."""
    text = ranks(1, refused, folder=str(tmp_path / "r"), corpus=str(corpus), change=change)[0]
    assert message in text and "or start a run under a new name" in text


def failing_disk(folder: str, corpus: str) -> dict[str, Any]:
    """The first asynchronous save fails; training goes on and saves again at the next step."""
    session = Session(job(corpus, 8, every=3), folder)
    saver, real = session.trainer.saver, session.trainer.saver.finish
    broken = [True]

    def finish() -> None:
        pending = saver._pending
        if pending is not None and broken[0]:
            broken[0] = False
            real()
            saver._warn(pending[0], OSError("no space left on device"))
        else:
            real()

    saver.finish = finish  # type: ignore[method-assign]
    return session.run()


def test_a_save_that_fails_is_made_again(ranks: Any, corpus: Path, tmp_path: Path) -> None:
    told = ranks(2, failing_disk, folder=str(tmp_path / "r"), corpus=str(corpus))[0]
    assert told["kind"] == "done"
    saves = [line for line in told["said"] if line.startswith("saved checkpoint")]
    assert any(line.startswith("warning: checkpoint") for line in told["said"]) and len(saves) >= 3
