"""A job: what is trained, on what, and how. The left half of every configuration file."""

import os
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

from farspan.models.ffns import Sparse
from farspan.models.mixers import Softmax
from farspan.models.zoo import Model
from farspan.parallel.expert import DeepEp
from farspan.parallel.mesh import Gather, Parallel, Sizes, Zero
from farspan.parallel.recompute import KEEP, Recompute
from farspan.platform.config import kind
from farspan.platform.data import Data, Mixture
from farspan.platform.metrics import Metrics
from farspan.platform.optim import Adamw, Adamw8, Optim
from farspan.platform.optim.placement import Interleaved, Streamed
from farspan.platform.schedule import Schedule


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Held-out loss while training."""

    every: int
    """Steps between evaluations; the last step is always evaluated."""
    rows: int = 64
    """Held-out rows read each time, at most."""

    def __post_init__(self) -> None:
        if self.every < 1 or self.rows < 1:
            raise ValueError(f"every={self.every}, rows={self.rows}: must be at least 1; evaluate: null for none")


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A continuation written when training ends."""

    prompt: str
    """The text that is continued."""
    tokens: int = 200
    """How many tokens are written."""
    temperature: float = 0.8
    """0 takes the likeliest token each time."""

    def __post_init__(self) -> None:
        if self.tokens < 1 or self.temperature < 0:
            raise ValueError(f"tokens={self.tokens}, temperature={self.temperature}: at least 1, and not negative")
        if not self.prompt:
            raise ValueError("prompt='': needs at least one character to continue")


@dataclass(frozen=True, kw_only=True)
class Train:
    """The loop."""

    steps: int
    """Optimizer steps from the beginning of the run, those before a resume included."""
    batch: int
    """Rows per optimizer step over all ranks: a multiple of dp."""
    micro_batch: int | None = None
    """At most so many rows at once per dp rank; null: all of a rank's rows."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Type of products; the optimizer decides what weights are held in. auto: bf16 on a GPU, fp32 on a CPU."""
    recompute: Recompute = "none"
    """What of a layer the backward computes again: nothing; the block but for attention; or all but chosen products.
    offload: as selective, and what stays waits in host memory."""
    keep: float | None = None
    """With recompute: selective or offload, the share of the products' bytes that stays; null: 0.5."""
    compile: bool = False
    """torch.compile for each layer."""
    deterministic: bool = False
    """Only kernels that give the same bits every time (on a CPU they always do)."""
    on_not_finite: Literal["stop", "skip"] = "stop"
    """What a loss or gradient that is not finite leads to; the weights never see it."""
    evaluate: Evaluate | None = None
    sample: Sample | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "micro_batch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: must be at least 1")
        if self.keep is not None and self.recompute not in ("selective", "offload"):
            raise ValueError(
                f"keep={self.keep}: recompute={self.recompute} has no use for it; set recompute: selective or offload"
            )
        if self.keep is not None and self.recompute == "selective" and not 0 < self.keep <= 1:
            raise ValueError(f"keep={self.keep}: must be more than 0 and at most 1; recompute: block keeps nothing")
        if self.keep is not None and not 0 <= self.keep <= 1:
            raise ValueError(f"keep={self.keep}: must be from 0 to 1; at 0 only inputs and attention's outputs stay")

    @property
    def kept(self) -> float | None:
        """The share of the products' bytes that stays; None: whatever the backward needs does."""
        share = KEEP if self.keep is None else self.keep
        return {"none": None, "block": 0.0, "selective": share, "offload": share}[self.recompute]

    @property
    def stashed(self) -> bool:
        """Whether what stays does so in host memory."""
        return self.recompute == "offload"


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Saves while training; the last step is always saved."""

    every: int | None = None
    """Steps between saves; null: only at the end and when stopped."""
    keep: int = 2
    """How many of the newest are kept."""

    def __post_init__(self) -> None:
        if self.every is not None and self.every < 1:
            raise ValueError(f"every={self.every}: must be at least 1; null for none")
        if self.keep < 1:
            raise ValueError(f"keep={self.keep}: must be at least 1")


@dataclass(frozen=True, kw_only=True)
class Job:
    name: str
    """Names the run folder runs/<name>."""
    seed: int = 0
    """Decides the first weights, the order of the data, and every other random choice."""
    model: Model
    """What is trained."""
    data: Data
    """What it is trained on."""
    train: Train
    optim: Optim
    """How weights move along their gradients."""
    schedule: Schedule
    """How the learning rate changes over the steps."""
    parallel: Parallel = Parallel()
    checkpoint: Checkpoint = Checkpoint()
    metrics: Metrics = Metrics()

    def __post_init__(self) -> None:
        if not self.name or self.name.startswith(".") or any(c in self.name for c in (os.sep, "\0", " ", "\n")):
            raise ValueError(f"name={self.name!r}: must be usable as a folder's name, without / or spaces")

    @property
    def offload(self) -> Streamed | Interleaved | None:
        """Where the optimizer's state lives; None: on the device."""
        return self.optim.offload if isinstance(self.optim, Adamw | Adamw8) else None

    def gathering(self, sizes: Sizes) -> Gather:
        """How long gathered weights stay: whoever offloads state has no room for a second copy of all weights."""
        offloads = self.offload is not None and self.parallel.gather == "auto"
        return "layer" if offloads else self.parallel.gathering(sizes)

    def problems(self, world: int) -> list[str]:
        """What keeps the sections from fitting each other on `world` ranks."""
        found = self.parallel.problems(world)
        if not found and self.train.batch % (dp := self.parallel.sizes(world).dp):
            near = max(dp, round(self.train.batch / dp) * dp)
            found.append(f"train.batch={self.train.batch}: must be a multiple of dp={dp}; try {near}")
        uneven = self.model.tensor_problems(self.parallel.tp) if self.parallel.tp > 1 else []
        found += [f"model.{problem}" for problem in uneven]
        ep = self.parallel.dealt if self.model.routes else self.parallel.ep
        found += [f"model.{problem}" for problem in self.model.expert_problems(ep, self.parallel.etp)]
        if self.parallel.cp > 1 and not uneven:
            found += self._spread_problems()
        if isinstance(self.parallel.engine, Zero):
            found += self._zero_problems()
        found += self._dispatch_problems()
        found += self._gradient_problems(world)
        warmup = self.schedule.warmup
        if warmup >= self.train.steps > 1:
            found.append(
                f"schedule.warmup={warmup}: must be less than train.steps={self.train.steps}; try 0 for a short trial"
            )
        if (trace := self.metrics.trace) is not None and trace.first > self.train.steps:
            found.append(
                f"metrics.trace.first={trace.first}: is beyond train.steps={self.train.steps}; lower it, or trace: null"
            )
        if self.train.evaluate and self.data.held_out == 0:
            found.append(
                f"{self._documents}.held_out=0: train.evaluate needs held-out documents; try 0.01, or evaluate: null"
            )
        found += self._sight_problems()
        return found + (self._one_way() if self.data.both_ways else [])

    @property
    def _documents(self) -> str:
        """Where the configuration says how documents are read, of a mixture the first."""
        return "data.sources.0.data" if isinstance(self.data, Mixture) else "data"

    def _sight_problems(self) -> list[str]:
        """What keeps tokens from being told from what the mixers show."""
        mixers = [(i, block.mixer) for i, block in enumerate(self.model.blocks) if block.mixer]
        objective, found = f"{self._documents}.objective", []
        if self.model.causal and not self.data.causal:
            free = next((f"set model.blocks.{i}.mixer.causal=false" for i, mixer in mixers if not mixer.window), "")
            way = free or "add a mixer without a window and with causal: false"
            found.append(
                f"{objective}.kind=masked: hidden tokens are told from both sides, and every mixer looks back only; "
                f"{way}, or another objective"
            )
        if self.data.causal and not self.model.causal:
            at = next(i for i, mixer in mixers if not mixer.causal)
            found.append(
                f"model.blocks.{at}.mixer.causal=False: tokens would see what they are to predict; set "
                f"{objective}={{kind: masked}}, or causal: true"
            )
        if self.train.sample is not None and not self.model.causal:
            found.append(
                "train.sample: text is written from left to right, which needs causal mixers; set sample: null"
            )
        return found

    def _spread_problems(self) -> list[str]:
        """What keeps the sequences from being cut across the ranks of cp."""
        parallel = self.parallel
        problems = self.model.context_problems(parallel.context, parallel.cp, parallel.tp)
        found = [f"model.{problem}" for problem in problems]
        if self.data.both_ways:
            found.append(
                f"parallel.cp={parallel.cp}: data's objective shows a prefix both ways, which cannot be cut across "
                "ranks; set it to bidirectional: false, or parallel.cp=1"
            )
        return found

    def _gradient_problems(self, world: int) -> list[str]:
        """What keeps gradients from waiting in host memory."""
        if not (isinstance(self.offload, Streamed) and self.offload.gradients) or self.parallel.problems(world):
            return []
        found, place = [], "optim.offload.gradients=True"
        sizes = self.parallel.sizes(world)
        rows = self.train.batch // sizes.dp
        if (micro := self.train.micro_batch) is not None and micro < rows:
            found.append(
                f"train.micro_batch={micro}: {place} is for a single micro-batch a step, and a rank has {rows} rows; "
                "set micro_batch: null and recompute: selective, or gradients: false"
            )
        for axis in ("tp", "ep", "etp"):
            if (size := getattr(sizes, axis)) > 1:
                found.append(f"parallel.{axis}={size}: {place} is for {axis}=1; set that, or gradients: false")
        return found

    def _zero_problems(self) -> list[str]:
        """What DeepSpeed's engine cannot do, or this machine without it."""
        zero, train, optim = "parallel.engine.kind=zero", self.train, kind(type(self.optim))
        refused = {
            f"{zero}: DeepSpeed is not installed; pip install 'farspan[deepspeed]'": find_spec("deepspeed") is None,
            f"optim.kind={optim}: {zero} steps adamw only; set that": not isinstance(self.optim, Adamw),
            "optim.offload: is fsdp's; parallel.engine.offload is that of DeepSpeed": isinstance(self.optim, Adamw)
            and self.offload is not None,
            f"train.compile=True: {zero} runs layers as they are; set it to false": train.compile,
            f"model.blocks: experts: {zero} does not charge their routers; set another ffn": self.model.routes,
            f"train.recompute={train.recompute}: {zero} keeps activations on the device; set selective": train.stashed,
        }
        return [f"{problem}, or parallel.engine: {{kind: fsdp}}" for problem, found in refused.items() if found]

    def _dispatch_problems(self) -> list[str]:
        """What DeepEP cannot do, or this machine without it."""
        dispatch, train, ep = self.parallel.dispatch, self.train, self.parallel.ep
        if not isinstance(dispatch, DeepEp) or ep == 1:
            return []
        place = "parallel.dispatch.kind=deep_ep"
        refused = {
            f"{place}: DeepEP is not installed; build it from github.com/deepseek-ai/DeepEP": find_spec("deep_ep")
            is None,
            f"train.precision={train.precision}: {place} sends tokens in bf16; set bf16": train.precision == "fp32",
            f"train.deterministic=True: {place} cannot go with how torch then fills new memory; set it to false": (
                train.deterministic
            ),
        }
        wishes = max((block.ffn.wishes for block in self.model.blocks if isinstance(block.ffn, Sparse)), default=0)
        found = [problem for problem, is_so in refused.items() if is_so]
        found += dispatch.problems(ep, self.model.width, wishes)
        return [f"{problem}, or parallel.dispatch: {{kind: all_to_all}}" for problem in found]

    def _one_way(self) -> list[str]:
        """The mixers that cannot show a prefix both ways."""
        way = "or set data's objective to bidirectional: false"
        found = []
        for i, block in enumerate(self.model.blocks):
            at, mixer = f"model.blocks.{i}.mixer", block.mixer
            if isinstance(mixer, Softmax) and mixer.window is not None:
                found.append(f"{at}.window={mixer.window}: a window hides part of a prefix; set it to null, {way}")
            elif mixer is not None and not isinstance(mixer, Softmax):
                found.append(f"{at}: {type(mixer).__name__} cannot see a prefix both ways; use softmax, {way}")
        return found
