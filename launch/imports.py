"""`launch import`: a model as HuggingFace publishes it becomes a run at step 0, which training goes on with."""

import argparse
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from farspan.launch.exit import Exit
from farspan.launch.making import HF, RUNS, farewell, finish, kept_of, making, target_of, weights_of

if TYPE_CHECKING:  # torch takes a second to import: help does without
    from torch import Tensor

    from farspan.launch.published import Published
    from farspan.launch.run import Run
    from farspan.models.hf_weights import Pieces
    from farspan.models.roles import Role
    from farspan.platform.job import Job

    Shapes = Mapping[str, tuple[int, ...]]


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds `import`."""
    parser = commands.add_parser(
        "import",
        help="make a run of a model in HuggingFace's format",
        description="Write the run RUN: the weights of the model in FOLDER (config.json and safetensors) as its "
        "checkpoint of step 0, the model that they belong to, and all else as in X.yaml under the overrides. FOLDER is "
        "only read. One process on a CPU, a weight at a time.",
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="a folder with config.json and safetensors files")
    parser.add_argument("new", metavar="RUN", help="the run folder to make, or its name in runs")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="values that replace the file's and the model's")
    parser.add_argument(
        "--config", type=Path, metavar="X.yaml", help="data, train, optim, schedule and so on; its model is left out"
    )
    parser.set_defaults(run=_import)


def _import(parsed: argparse.Namespace) -> int:
    from farspan.launch.published import Published

    new = target_of(parsed.new, RUNS)
    published = Published(parsed.folder)
    with making(new) as aside:
        said = _make(published, aside, new, _run(published, aside, new, parsed))
    print(f"{said}\n{farewell(new)}")
    return int(Exit.DONE)


def _run(published: "Published", aside: Path, new: Path, parsed: argparse.Namespace) -> "Run":
    """The configuration: the file's, with the published model and its tokenizer, under the overrides."""
    from farspan.launch import run as runs
    from farspan.models.hf import model_of
    from farspan.platform import config

    tree = {} if parsed.config is None else config.read(runs.shipped(parsed.config)).raw
    data = tree.get("data", {"kind": "text"})
    if (published.folder / "tokenizer.json").is_file():
        data = _tokenized(data, str(published.folder))
    else:
        print(f"{published.folder} has no tokenizer.json: name one that gives the model's tokens in data.tokenizer")
    written = aside / "config.yaml"
    written.write_text(config.dump({**tree, "name": new.name, "model": model_of(published.config), "data": data}))
    run = runs.decode(config.read(written, parsed.overrides), print)
    if run.job.name != new.name:
        raise ValueError(f"name={run.job.name}: a run is named as its folder is, {new.name}; leave the override out")
    return run


def _tokenized(data: Any, tokenizer: str) -> Any:
    """A data section whose documents are read with this tokenizer."""
    if isinstance(data, dict) and data.get("kind") in ("text", "tokens"):
        return {**data, "tokenizer": tokenizer}
    if isinstance(data, dict) and isinstance(data.get("sources"), list):
        sources = [{**source, "data": _tokenized(source.get("data"), tokenizer)} for source in data["sources"]]
        return {**data, "sources": sources}
    return data


def _moved(tree: Any, old: str, new: str) -> Any:
    """The same with every tokenizer that is at `old` at `new`."""
    if isinstance(tree, dict):
        return {k: new if k == "tokenizer" and v == old else _moved(v, old, new) for k, v in tree.items()}
    return [_moved(item, old, new) for item in tree] if isinstance(tree, list) else tree


def _make(published: "Published", folder: Path, new: Path, run: "Run") -> str:
    """Fills the new folder; what is to be said of it."""
    from farspan.launch.published import beside
    from farspan.models.hf_weights import joined
    from farspan.platform.stored import store

    shapes, known = weights_of(run.job)
    pieces = _pieces(published, shapes)
    kept = new / HF
    place = os.path.relpath(kept) if kept.is_relative_to(Path.cwd()) else str(kept)
    tree = run.tree()
    data = _moved(tree["data"], str(published.folder), place)
    if data != tree["data"]:
        print(f"data.tokenizer: the model's own, kept in {place}")
    tree = {**tree, "data": data}

    def read(name: str) -> "Tensor":
        return joined(pieces[name], shapes[name], published.read)

    state = chain(kept_of(run.job).items(), _state(run.job, read, shapes, known))
    store(folder / "checkpoints", 0, state, _manifest(run, tree, published.folder))
    (folder / HF).mkdir()
    for path in beside(published.folder):
        shutil.copyfile(path, folder / HF / path.name)
    finish(folder, tree, step=0, reason=f"imported from {published.folder}")
    count = sum(prod(shape) for shape in shapes.values())
    return f"{published.config['architectures'][0]}: {count:,} parameters in {len(shapes)} weights"


def _pieces(published: "Published", shapes: "Shapes") -> "dict[str, Pieces]":
    """What each weight is in the folder. ValueError: not what the model wants."""
    from farspan.models.hf import FAMILIES, architecture_in
    from farspan.models.hf_weights import layout_in, misfits, pieces_of

    config, found = published.config, published.shapes()
    family = FAMILIES[architecture_in(config)]
    pieces = pieces_of(shapes, family, layout_in(found), config["vocab_size"])
    if problems := misfits(pieces, found, bool(config.get("tie_word_embeddings", False))):
        more = [f"and {len(problems) - 5} more"] if len(problems) > 5 else []
        raise ValueError("\n".join([f"{published.folder}: {problem}" for problem in problems[:5]] + more))
    return pieces


def _manifest(run: "Run", tree: Mapping[str, Any], source: Path) -> dict[str, Any]:
    """Of a checkpoint that nothing was trained for. The data is read, or found in its cache, to be known again."""
    import torch

    from farspan.launch import runner
    from farspan.platform.checkpoint import FORMAT
    from farspan.platform.state import RunState

    job = run.job
    corpus, sizes = job.data.build(job.seed), job.parallel.sizes(runner.world(run.launch))
    for note in corpus.notes:
        print(note)
    return {
        "format": FORMAT,
        "state": vars(RunState()),
        "data": {"fingerprint": corpus.fingerprint, "tokenizer": corpus.tokenizer.name},
        "mesh": {**vars(sizes), "world": sizes.world},
        "config": tree,
        "versions": {"torch": torch.__version__},
        "time": time.time(),
        "imported_from": str(source),
    }


def _state(
    job: "Job", read: "Callable[[str], Tensor]", shapes: "Shapes", roles: "Mapping[str, Role]"
) -> "Iterator[tuple[str, Tensor]]":
    """The tensors of a checkpoint before the first step. ValueError: the optimizer begins with more than zeros."""
    import torch

    from farspan.platform.optim import Adamw, Adamw8, Muon
    from farspan.platform.optim.convert import convert, layout

    optim = job.optim
    if isinstance(optim, Adamw | Adamw8):  # as if from the same optimizer over fp32 weights: zeros need no new codes
        of = optim.in_halves if isinstance(optim, Adamw) and optim.offload else optim
        before = replace(of, master="fp32", offload=None) if isinstance(of, Adamw8) else of
        return convert(_Beginning(read, layout(before, shapes, roles)), before, optim, shapes, roles)
    if not isinstance(optim, Muon):
        raise ValueError("optim.kind: a run is imported under adamw, adamw8 or muon; set one of them")
    with torch.device("meta"):
        weights = {name: torch.empty(shape) for name, shape in shapes.items()}
    made = {f"optim.{name}": tensor for name, tensor in optim.build(weights, roles, job.seed).state().items()}
    found = _Beginning(read, {**{f"model.{name}": weight for name, weight in weights.items()}, **made})
    return iter(found.items())


@dataclass(frozen=True)
class _Beginning(Mapping[str, "Tensor"]):
    """A checkpoint's tensors before the first step, made when asked for: weights that are read, and zeros."""

    read: "Callable[[str], Tensor]"
    layout: "Mapping[str, Tensor]"
    """What they are like, by name."""

    def __getitem__(self, name: str) -> "Tensor":
        import torch

        like = self.layout[name]
        if name.startswith("model."):
            return self.read(name.removeprefix("model."))
        return torch.zeros(like.shape, dtype=like.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self.layout)

    def __len__(self) -> int:
        return len(self.layout)
