"""A language model, described by a list of runs of equal blocks."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor, nn

from farspan.kernels.random import Normal
from farspan.models.block import Block, NormPlacement
from farspan.models.ffns import ExpertChoice, Routed, Sparse
from farspan.models.ffns.router import RowSums, Scope, Tally, by_row
from farspan.models.mixers.softmax import Angles, Softmax
from farspan.models.norm import Layer, Norm, Rms
from farspan.models.roles import RoleKind
from farspan.models.rope import Rope
from farspan.parallel.context import Context, Runtime
from farspan.parallel.context.shard import IGNORE, Batch, Documents
from farspan.parallel.expert import Dispatcher, Local
from farspan.parallel.placement import Column, Placement
from farspan.parallel.sums import Now, Sums
from farspan.parallel.tensor import Vocabulary, Whole


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """A language model of equal or different layers."""

    width: int
    """Channels of the residual stream."""
    blocks: tuple[Block, ...]
    """Runs of equal layers, from the embedding to the head."""
    vocabulary: int | None = None
    """Rows of the embedding and the head; null: the tokenizer's size, rounded up to 64."""
    tied: bool = False
    """The head is the embedding."""
    norm: Norm = Rms()
    """The norm of every layer and of the output."""
    placement: NormPlacement = "pre"
    """Where the norms stand, see `farspan.models.block.Layer`. pre and peri norm the last layer's output as well, and
    peri the embedding, as its paper has it; under post the last layer has done so already."""
    stable_embedding: bool = False
    """A LayerNorm behind the embedding, whose first values are Xavier's: for 8-bit optimizer state (Dettmers et al.,
    2022)."""
    z_loss: float = 0.0
    """What the squared log-sum-exp of a token's logits weighs in its training loss, which keeps logits small
    (Chowdhery et al., 2022: 1e-4). Evaluation leaves it out."""

    def __post_init__(self) -> None:
        if self.width < 1:
            raise ValueError(f"width={self.width}: must be at least 1")
        if not self.blocks:
            raise ValueError("blocks=[]: needs at least one block")
        if self.z_loss < 0:
            raise ValueError(f"z_loss={self.z_loss}: must not be negative; 1e-4 is usual, 0 for none")
        if self.vocabulary is not None and self.vocabulary < 2:
            raise ValueError(f"vocabulary={self.vocabulary}: must be at least 2, or null")
        for i, block in enumerate(self.blocks):
            for problem in block.mixer.problems(self.width) if block.mixer else []:
                raise ValueError(f"blocks.{i}.mixer.{problem}")
            if isinstance(block.ffn, ExpertChoice) and self.causal:
                raise ValueError(
                    f"blocks.{i}.ffn.kind=expert_choice: experts choose among all tokens of a row, later ones too; "
                    "set mixer.causal: false, or ffn.kind: moe"
                )
        for problem in self.linear_problems(1):
            raise ValueError(problem)

    def tensor_problems(self, tp: int) -> list[str]:
        """What keeps the layers from being spread over `tp` ranks."""
        found = [
            f"blocks.{i}.{name}.{problem}"
            for i, block in enumerate(self.blocks)
            for name, part in (("mixer", block.mixer), ("ffn", block.ffn))
            for problem in (part.tensor_problems(tp) if part else [])
        ]
        found += self.linear_problems(tp)
        if (self.vocabulary or 64) % tp:
            given = f"vocabulary={self.vocabulary}" if self.vocabulary else "vocabulary=null, rounded up to 64"
            found.append(f"{given}: must be a multiple of parallel.tp={tp}; give one that holds the tokenizer's")
        return found

    def linear_problems(self, tp: int) -> list[str]:
        """What keeps the layers' products, cut over `tp` ranks, from being built as they are asked for."""
        return [
            f"blocks.{i}.linear: {name}.{problem}"
            for i, block in enumerate(self.blocks)
            for name, part in (("mixer", block.mixer), ("ffn", block.ffn))
            for problem in (part.linear_problems(block.linear, self.width, tp) if part else [])
        ]

    @property
    def depth(self) -> int:
        return sum(block.repeat for block in self.blocks)

    @property
    def causal(self) -> bool:
        """Whether no token sees a later one."""
        return all(block.mixer.causal for block in self.blocks if block.mixer)

    @property
    def routes(self) -> bool:
        """Whether some layer has experts."""
        return any(isinstance(block.ffn, Sparse) for block in self.blocks)

    @property
    def windowed(self) -> bool:
        """Whether most layers with softmax attention see a window only."""
        seen = [(block.mixer.window, block.repeat) for block in self.blocks if isinstance(block.mixer, Softmax)]
        return 2 * sum(repeat for window, repeat in seen if window) > sum(repeat for _, repeat in seen)

    def context_problems(self, context: Context, cp: int, tp: int) -> list[str]:
        """What keeps the mixers, cut over `tp` ranks, from being spread over `cp` more; each said of the first."""
        found: dict[str, int] = {}
        for i, block in enumerate(self.blocks):
            for problem in block.mixer.context_problems(context, cp, tp) if block.mixer else []:
                found.setdefault(problem, i)
        return [f"blocks.{i}.mixer: {problem}" for problem, i in found.items()]

    def expert_problems(self, ep: int, etp: int) -> list[str]:
        """What keeps the experts from being dealt out to `ep` ranks, and each of them to `etp`."""
        experts = {i: block.ffn for i, block in enumerate(self.blocks) if isinstance(block.ffn, Sparse)}
        if ep * etp > 1 and not experts:
            return [
                f"blocks: parallel.ep={ep}, etp={etp} are for experts, and no block has any (ffn.kind moe, block_ffn "
                "or smoe_dropout); set both to 1"
            ]
        return [f"blocks.{i}.ffn.{problem}" for i, f in experts.items() for problem in f.expert_problems(ep, etp)]

    def build(self, vocabulary: int, context: Runtime) -> "DecoderModel":
        """The model for a tokenizer of `vocabulary` tokens, on torch's current default device."""
        if self.vocabulary is not None and self.vocabulary < vocabulary:
            raise ValueError(
                f"model.vocabulary={self.vocabulary}: the tokenizer has {vocabulary} tokens; raise it, or set null"
            )
        return DecoderModel(self, self.vocabulary or -(-vocabulary // 64) * 64, context)


class DecoderModel(nn.Module):
    """Tokens to summed loss, or to logits at chosen places."""

    def __init__(self, config: Decoder, vocabulary: int, context: Runtime) -> None:
        super().__init__()
        width, depth, norm, placement = config.width, config.depth, config.norm, config.placement
        self.embed = nn.Embedding(vocabulary, width)
        runs = [block for block in config.blocks for _ in range(block.repeat)]
        layers = [block.build(width, depth, norm, placement, context) for block in runs]
        self.layers = nn.ModuleList(layers)
        peri = norm.build(width) if placement == "peri" else nn.Identity()
        self.embed_norm = Layer().build(width) if config.stable_embedding else peri
        self.embed_std = (2 / (vocabulary + width)) ** 0.5 if config.stable_embedding else width**-0.5
        self.norm = nn.Identity() if placement == "post" else norm.build(width)
        self.head = None if config.tied else nn.Linear(width, vocabulary, bias=False)
        repeats = [block.repeat for block in config.blocks]
        self.runs = list(zip(accumulate([0, *repeats]), repeats, strict=False))
        """(first layer, how many) of each run of equal layers."""
        self.shared_ffns = nn.ModuleList()
        """Those that the layers of a run have between them: no layer's own, and gathered all along."""
        for block, (first, repeat) in zip(config.blocks, self.runs, strict=True):
            if block.shared_ffn:
                ffn = layers[first].ffn
                assert ffn is not None, "Block lets no other pass"
                self.shared_ffns.append(ffn)
                for layer in layers[first : first + repeat]:
                    layer.share(ffn)
        self.vocabulary: Vocabulary = Whole()
        self.dispatcher: Dispatcher = Local()
        self.causal, self.routes = config.causal, config.routes
        """Whether no token sees a later one; whether `tell` and `settle` reach anybody."""
        self.rotations = [layer.rotation for layer in layers]
        self.z_loss = config.z_loss
        self.so_far: Tensor | None = None
        """Tokens, labels and choices of the step's micro-batches so far, on all ranks, where a router asks for them."""

    def placements(self) -> dict[str, Placement]:
        names = ["embed.weight"] if self.head is None else ["embed.weight", "head.weight"]
        return dict.fromkeys(names, Column())

    def roles(self) -> dict[str, RoleKind]:
        return {"embed.weight": "embedding", **({} if self.head is None else {"head.weight": "head"})}

    def initial(self) -> dict[str, Normal]:
        head = {} if self.head is None else {"head.weight": Normal(0.0, self.embed.embedding_dim**-0.5)}
        return {"embed.weight": Normal(0.0, self.embed_std), **head}

    def flops(self, lengths: tuple[int, ...]) -> int:
        """Forward operations for documents of these lengths; a backward is twice that."""
        layers = sum(repeat * self.layers[first].flops(lengths) for first, repeat in self.runs)  # type: ignore[operator]
        return int(layers + 2 * sum(lengths) * self.embed.weight.numel())

    def forward(self, batch: Batch, at: Tensor | None = None) -> Tensor | Sums:
        """Without `at`: the summed loss of the batch, in nats, and with gradients what routers report. With `at` (int64
        places in row 0): N V logits."""
        x = self.embed_norm(self.vocabulary.embed(batch.tokens, self.embed.weight))  # B T D
        angles, documents = self.angles(batch.positions), batch.documents
        if batch.places is not None:
            documents = documents._replace(places=self.vocabulary.part(batch.places))
        tallies: list[Tally] = []
        for layer, rotation in zip(self.layers, self.rotations, strict=True):
            x = layer(x, None if rotation is None else angles[rotation], documents)
            if isinstance(x, tuple):
                x, tally = x
                tallies.append(tally)
        head = self.embed.weight if self.head is None else self.head.weight
        if at is not None:
            return self.vocabulary.logits(self.norm(x), head, at)
        learns = torch.is_grad_enabled()
        loss = self.vocabulary.loss(self.norm(x), head, batch.labels, self.z_loss if learns else 0.0)
        if not tallies or not learns:
            return loss
        return self._sums(loss, tallies, documents, batch)

    def tell(self, now: Now) -> None:
        """Called before every micro-batch that is learnt from."""
        if now.first:
            self.so_far = None
        for name, ffn in self._routed():
            ffn.tell(name, now)

    def settle(self, loads: Sequence[Tensor], wishes: Sequence[Tensor], scale: Tensor) -> None:
        """Called after an optimizer step, with sums over all its tokens, layer by layer; see `Routed.settle`. Who runs
        in several layers is told their sum."""
        ffns = [ffn for _, ffn in self._routed()]
        for ffn in dict.fromkeys(ffns):
            mine = [i for i, other in enumerate(ffns) if other is ffn]
            load, wish = (torch.stack([said[i] for i in mine]).sum(0) for said in (loads, wishes))
            ffn.settle(load, wish, scale)

    def _routed(self) -> list[tuple[str, Routed]]:
        return [(f"layers.{i}.ffn", x.ffn) for i, x in enumerate(self.layers) if isinstance(x.ffn, Routed)]

    def _sums(self, loss: Tensor, tallies: list[Tally], documents: Documents, batch: Batch) -> Sums:
        labels = self.vocabulary.part((batch.labels != IGNORE).to(tallies[0].given.dtype)).flatten()  # N
        own = by_row(torch.stack((torch.ones_like(labels), labels), dim=1), documents, len(batch.tokens))
        told = [torch.stack(x).sum() for x in zip(*((x.dropped, x.z.sum(), x.unmet) for x in tallies), strict=True)]
        return Sums(
            loss=loss,
            cost=self._charge(tallies, own),
            loads=tuple(tally.given.sum(0) for tally in tallies),
            wishes=tuple(tally.wish for tally in tallies),
            told=torch.stack([*told, own[:, 0].sum() * len(tallies)]).detach(),
        )

    def _charge(self, tallies: list[Tally], own: Tensor) -> Tensor:
        """What this rank's tokens are charged for uneven loads and large logits: an exchange for all layers, and one
        more where loads are counted over the step. own: R 2, tokens and labels of this rank."""
        ffns = [ffn for _, ffn in self._routed()]
        counts = [own, *(tally.given for tally in tallies)]
        sizes, mine = [count.shape[1] for count in counts], torch.cat(counts, 1).detach()
        every = self.dispatcher.whole(mine)
        found: dict[Scope, Tensor] = {"row": every, "micro_batch": every.sum(0, keepdim=True)}
        if any(ffn.scope == "step" for ffn in ffns):
            now = self.dispatcher.everywhere(mine.sum(0, keepdim=True))
            found["step"] = self.so_far = now if self.so_far is None else self.so_far + now
        parts = []
        for i, (ffn, tally) in enumerate(zip(ffns, tallies, strict=True)):
            over, *given = found[ffn.scope].split(sizes, 1)
            rows = RowSums(*every[:, :2].unbind(1))
            parts.append(ffn.charge(tally, given[i], RowSums(*over.unbind(1)), rows))
        return torch.stack(parts).sum()

    def angles(self, positions: Tensor) -> dict[tuple[Rope, int], Angles]:
        """The rotations that the layers use, each computed once."""
        with torch.no_grad():
            return {r: r[0].angles(positions, r[1]) for r in dict.fromkeys(self.rotations) if r is not None}


def initial(model: nn.Module) -> dict[str, Normal]:
    """How every weight of a model begins, by its full name; what its modules declare, gathered."""
    return {
        f"{path}.{name}" if path else name: start
        for path, module in model.named_modules()
        if hasattr(module, "initial")
        for name, start in module.initial().items()
    }
