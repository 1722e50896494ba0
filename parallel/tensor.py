"""Tensor parallelism with cut sequences: layers split over heads and channels, norms and residuals over tokens; experts
split over ranks of their own view of the mesh."""

from collections.abc import Iterator
from functools import cache
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from farspan.kernels.linear_cross_entropy import linear_cross_entropy
from farspan.parallel.comm import Group, gather, gather_rows, scatter
from farspan.parallel.context.shard import IGNORE
from farspan.parallel.expert import Dispatcher
from farspan.parallel.placement import Expert, Folded, Pieces, Placement, folded, pieces


class Vocabulary(Protocol):
    """The two ends of a model, where tokens come in and losses go out: received by models as `self.vocabulary`.

    Between them the residual stream is this rank's part of the tokens, B T/tp D.
    """

    def embed(self, tokens: Tensor, table: Tensor) -> Tensor:
        """tokens: B T, table: this rank's rows of V D -> B T/tp D."""

    def part(self, tokens: Tensor) -> Tensor:
        """What is said of all tokens, B T -> of this rank's, B T/tp."""

    def loss(self, hidden: Tensor, head: Tensor, labels: Tensor, z_loss: float) -> Tensor:
        """hidden: B T/tp D, head: this rank's rows of V D, labels: B T -> summed loss in nats, alike on all of tp.

        z_loss: what the squared log-sum-exp of each token's logits weighs in it.
        """

    def logits(self, hidden: Tensor, head: Tensor, at: Tensor) -> Tensor:
        """Logits N V at places `at` of row 0."""


class Whole:
    """tp is 1: every rank has all rows and all tokens."""

    def embed(self, tokens: Tensor, table: Tensor) -> Tensor:
        return F.embedding(tokens, table)

    def part(self, tokens: Tensor) -> Tensor:
        return tokens

    def loss(self, hidden: Tensor, head: Tensor, labels: Tensor, z_loss: float) -> Tensor:
        return linear_cross_entropy(hidden.flatten(0, 1), head, labels.flatten(), IGNORE, z_loss=z_loss)

    def logits(self, hidden: Tensor, head: Tensor, at: Tensor) -> Tensor:
        return hidden[0, at] @ head.T


class Spread:
    """Each rank of tp has its own rows of the vocabulary, and its own part of the tokens."""

    def __init__(self, group: Group) -> None:
        self.group = group

    def embed(self, tokens: Tensor, table: Tensor) -> Tensor:
        """Every rank looks up the tokens that it knows; the others' rows are zero, and the sum is the embedding."""
        places = tokens - self.group.rank * table.shape[0]
        known = (places >= 0) & (places < table.shape[0])
        return scatter(F.embedding(torch.where(known, places, 0), table) * known.unsqueeze(-1), self.group)

    def part(self, tokens: Tensor) -> Tensor:
        return tokens.flatten().chunk(self.group.size)[self.group.rank].view(len(tokens), -1)

    def loss(self, hidden: Tensor, head: Tensor, labels: Tensor, z_loss: float) -> Tensor:
        first, every = self.group.rank * head.shape[0], labels.flatten()
        tokens = gather(hidden, self.group).flatten(0, 1)
        return linear_cross_entropy(tokens, head, every, IGNORE, z_loss=z_loss, first=first, merge=self._merge)

    def logits(self, hidden: Tensor, head: Tensor, at: Tensor) -> Tensor:
        parts = gather_rows(gather(hidden, self.group)[0, at] @ head.T, self.group)  # tp N V/tp
        return parts.transpose(0, 1).flatten(1)

    def _merge(self, lse: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """The whole vocabulary's log-sum-exp and target logit: one exchange of two numbers a token."""
        lses, targets = gather_rows(torch.stack((lse, target), dim=1), self.group).unbind(-1)  # tp N each
        return lses.logsumexp(0), targets.amax(0)


def declared(model: nn.Module) -> Iterator[tuple[str, nn.Module, dict[str, Placement]]]:
    """(path, module, placements by name below it) of every module that says how its weights are cut."""
    for path, module in model.named_modules():
        if hasattr(module, "placements"):
            yield path, module, module.placements()


def cut(model: nn.Module, tp: int, ep: int = 1, etp: int = 1) -> dict[str, Pieces | Folded]:
    """Makes every declared weight of a model on the meta device one piece of itself; returns how, for all weights.

    ValueError: a weight cannot be dealt out to so many ranks; the message names it.
    """
    placements = {
        f"{path}.{name}" if path else name: placement
        for path, _, below in declared(model)
        for name, placement in below.items()
    }
    found: dict[str, Pieces | Folded] = {}
    for name, weight in list(model.named_parameters()):
        placement, shape = placements.get(name), tuple(weight.shape)
        try:
            if isinstance(placement, Expert):
                found[name] = folded(placement, shape, ep, etp)
            else:
                found[name] = pieces(placement, shape, tp)
        except ValueError as error:
            raise ValueError(f"model: {name}: {error}") from error
        path, _, last = name.rpartition(".")
        piece = torch.empty(found[name].shape(shape), dtype=weight.dtype, device=weight.device)
        model.get_submodule(path).register_parameter(last, nn.Parameter(piece))
    return found


def spread(model: nn.Module, group: Group) -> None:
    """Lays a cut model's work over `group`: its parts take all tokens in, and give their share of the sum out."""
    for path, module, placements in declared(model):
        if path and not any(isinstance(placement, Expert) for placement in placements.values()):
            module.__class__ = _exchanging(type(module))  # type: ignore[arg-type]
            module.group = group  # type: ignore[assignment]
    model.vocabulary = Spread(group)  # type: ignore[assignment]


def experts(model: nn.Module) -> list[nn.Module]:
    """The modules whose weights are cut over ep and etp."""
    return [module for _, module, below in declared(model) if any(isinstance(p, Expert) for p in below.values())]


def dispatch(model: nn.Module, dispatcher: Dispatcher) -> None:
    """Has a model's tokens meet its experts by `dispatcher`."""
    for module in (model, *experts(model)):
        module.dispatcher = dispatcher  # type: ignore[assignment]


@cache
def _exchanging(kind: type[nn.Module]) -> type[nn.Module]:
    """`kind` with exchanges around its forward: one class for all modules of a kind, so that they compile once."""

    def forward(self: Any, x: Tensor, *rest: object) -> Tensor:
        return scatter(kind.forward(self, gather(x, self.group), *rest), self.group)

    # What travels is the tensor: its codes are made where it arrives.
    return type(f"Spread{kind.__name__}", (kind,), {"forward": forward, "reads_codes": False})
