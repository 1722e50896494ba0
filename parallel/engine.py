"""A model spread over a mesh, and the few verbs that a training step is made of."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from farspan.kernels.random import Normal
from farspan.parallel import fsdp, recompute, tensor
from farspan.parallel.clock import Waits
from farspan.parallel.context import Runtime
from farspan.parallel.context.shard import Batch
from farspan.parallel.expert import Dispatcher
from farspan.parallel.fsdp import local
from farspan.parallel.lane import lane_to
from farspan.parallel.mesh import Gather, Mesh
from farspan.parallel.placement import Folded, Pieces, along
from farspan.parallel.stash import Stash
from farspan.parallel.sums import Now, Sums


class Optimizer(Protocol):
    """What the engine asks of an optimizer."""

    def update(self, rate: float, scale: Tensor) -> None:
        """One step on the weights' gradients times `scale`, a device scalar; where it is 0 nothing changes."""

    def state(self) -> dict[str, Tensor]:
        """Its tensors by name, cut like the weights they belong to: what a checkpoint holds and restores in place."""


@dataclass(frozen=True)
class Held:
    """What a rank holds between steps."""

    weights: torch.dtype
    gradients: torch.dtype


class Engine:
    """Owns the placed model. Order: cut and spread over tp, recompute, compile, stash, shard, fill."""

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[nn.Module],
        starts: Mapping[str, Normal],
        mesh: Mesh,
        *,
        context: Runtime,
        seed: int,
        compute: torch.dtype | None = None,
        held: Held | None = None,
        kept: float | None = None,
        stashed: bool = False,
        compiled: bool = False,
        gather: Gather = "layer",
        dispatcher: Dispatcher | None = None,
    ) -> None:
        """`model` lives on the meta device; `layers` are its units of sharding, `starts` its first values.

        context: what the model attends with; it cuts the batches, which the ranks of cp are all given whole.
        dispatcher: how the model's experts meet tokens; None: all experts are here, or there are none.
        compute: the type of products; None: the weights' own. held: the types of weights and gradients between steps;
        None: the model's own.
        kept: what stays of each layer until its backward, as `recompute.apply` has it; None: all of it.
        stashed: what stays, stays in host memory.
        """
        shapes = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
        sizes = mesh.sizes
        pieces = tensor.cut(model, sizes.tp, sizes.ep, sizes.etp)
        if sizes.tp > 1:
            tensor.spread(model, mesh.tensor)
        if dispatcher is not None:
            tensor.dispatch(model, dispatcher)
        self.stash = Stash(lane_to(mesh.device)) if stashed else None
        for layer in layers:
            recompute.apply(layer, kept, sizes.tp, None if compiled else self.stash)
            if compiled:
                layer.forward = torch.compile(layer.forward)
        if self.stash is not None:
            self.stash.watch(layers)
        if held is not None:
            model.to(held.weights)
            compute = compute or torch.float32
        folded = [(layer, unit) for layer in layers for unit in tensor.experts(layer)] if sizes.folded else []
        in_layers = {id(unit) for _, unit in folded}
        folded += [(model, unit) for unit in tensor.experts(model) if sizes.folded and id(unit) not in in_layers]
        between = sizes.expert_shard if sizes.folded else sizes.shard
        dealt = {id(w): along(tuple(w.shape), between) for unit in tensor.experts(model) for w in unit.parameters()}
        fsdp.shard(model, layers, folded, mesh, compute, gather, dealt)
        model.to_empty(device=mesh.device)
        self._dispatcher = dispatcher
        self._gradients = None if held is None or held.gradients == held.weights else held.gradients
        self.model, self.mesh, self.context, self.gather = model, mesh, context, gather
        self._parts = Parts(dict(model.named_parameters()), shapes, pieces, mesh)
        self.weights = self._parts.weights
        """The weights by name: DTensors of whole shape that keep their identity while the model gathers and frees
        copies. After `forward_backward` their `.grad` is this rank's part of the whole gradient."""
        for weight in [*model.parameters(), *self.weights.values()]:
            weight.grad_dtype = self._gradients or weight.dtype
        layer_of = {name: i for i, layer in enumerate(layers) for name in _names(model, layer)}
        self.units = [[n for n in self.weights if n not in layer_of]]
        """Names of the weights that are gathered together, in the order of the forward pass: what is in no layer comes
        first."""
        self.units += [[n for n in self.weights if layer_of.get(n) == i] for i in range(len(layers))]
        self._layers = layers
        self._last = True
        """Whether the backward under way is the last of its step."""
        self._norms: dict[str, Tensor] = {}
        """Of gradients that were given away."""
        self.buffers: dict[str, Tensor] = dict(model.named_buffers())
        """What the model keeps besides weights, by name: alike on all ranks."""
        self.step = 0
        """Optimizer steps made: what routers draw by chance differs from step to step."""
        self.cost = torch.zeros((), device=mesh.device)
        """What routers were charged in the last step, which `forward_backward` leaves out of the loss; as all that is
        said of routers, over all ranks."""
        self.loads: list[Tensor] = []
        """Tokens that chose each expert in the last step, layer by layer."""
        self.wishes: list[Tensor] = []
        """What routers would keep of these tokens, layer by layer; see `farspan.parallel.sums.Sums`."""
        self.told = torch.zeros(4, device=mesh.device)
        self.waits: Waits | None = None
        """How long this rank waited for exchanges of tokens in the last step; None where there are none."""
        self._seed, self._routes = seed, bool(getattr(model, "routes", False))
        fsdp.fill(self.weights, starts, seed)
        fsdp.fill(self.buffers, starts, seed)

    def forward_backward(self, batches: Sequence[Batch], labels: float) -> Tensor:
        """Adds the gradients of one step's micro-batches; returns this rank's part of the loss, a device scalar.

        `labels` counts what the whole step predicts on all ranks; the parts sum to the mean loss over it. Gradients are
        of that and of what routers are charged.
        """
        total = torch.zeros((), device=self.mesh.device)
        routed: list[Sums] = []
        self._waited()  # what was evaluated is in no step
        row = 0 if not self._routes else self.mesh.index("dp") * sum(len(batch.tokens) for batch in batches)
        for i, batch in enumerate(batches):
            last = self._last = i == len(batches) - 1
            self.model.set_is_last_backward(last)  # type: ignore[operator]
            self.model.set_requires_all_reduce(last)  # type: ignore[operator]
            self.model.set_reshard_after_backward(last or self.gather == "layer")  # type: ignore[operator]
            if self._routes:
                self.model.tell(Now(self._seed, self.step, row, i == 0))  # type: ignore[operator]
                row += len(batch.tokens)
            found = self.model(self._placed(batch))
            sums = found if isinstance(found, Sums) else None
            loss = (found if sums is None else sums.loss) / labels
            if self._gradients is not None:
                fsdp.keep_gradients_in(self.model, self._gradients)
            total += loss.detach()
            if sums is not None:
                charge = sums.cost / labels
                routed.append(sums._replace(cost=charge.detach()))
                loss = loss + charge
            loss.backward()
        if routed:
            self._add_up(routed)
        self._parts.finish()
        self.waits = self._waited()
        return total

    def _waited(self) -> Waits | None:
        return None if self._dispatcher is None else self._dispatcher.waited()

    def _add_up(self, routed: Sequence[Sums]) -> None:
        """What routers said of the step's micro-batches, over all ranks: every one of them has other tokens."""
        flat = [torch.cat([x.cost.view(1), x.told, *x.loads, *(w.view(-1) for w in x.wishes)]) for x in routed]
        total = torch.stack(flat).sum(0)
        dist.all_reduce(total)
        last, layers = routed[-1], len(routed[-1].loads)
        sizes = [x.numel() for x in (last.cost, last.told, *last.loads, *last.wishes)]
        cost, self.told, *rest = total.split(sizes)
        self.cost, self.loads, self.wishes = cost[0], rest[:layers], rest[layers:]

    def settle(self, scale: Tensor) -> None:
        """After the update of a step: what the model keeps besides weights follows them, unless `scale` is 0."""
        if self.loads:
            self.model.settle(self.loads, self.wishes, scale)  # type: ignore[operator]

    def _placed(self, batch: Batch) -> Batch:
        """This rank's part of the batch on the device, its rows as long as tp can cut them."""
        tp = self.mesh.sizes.tp
        apart = not getattr(self.model, "causal", True)
        mine = self.context.cut(batch).padded(tp, apart).to(self.mesh.device)
        if tp > 1 and mine.places is None:  # a rank's part of the tokens is no row any more
            mine = replace(mine, places=mine.numbered(), whole=mine.shape)
        if self._dispatcher is not None:
            self._dispatcher.expect(mine.tokens.numel() // tp, *mine.shape)
        return mine

    def sum(self, value: Tensor) -> Tensor:
        """The sum of a device tensor over the ranks that hold different data."""
        total = value.clone()
        for axis in self.mesh.weights.mesh_dim_names or ():
            dist.all_reduce(total, group=self.mesh.weights.get_group(axis))
        return total

    def gradient_norm(self) -> Tensor:
        """The Euclidean norm of the whole gradient, each weight counted once, as a device scalar in fp64."""
        held = {name: local(w.grad) for name, w in self.weights.items() if w.grad is not None}
        present = {name: gradient for name, gradient in held.items() if gradient.numel()}
        norms = self._norms | dict(zip(present, _norms(list(present.values())), strict=True))
        squares = torch.zeros((), dtype=torch.float64, device=self.mesh.device)
        for copies in {self._parts.copies(name): None for name in norms}:
            alike = [norms[name] for name in self.weights if name in norms and self._parts.copies(name) == copies]
            squares += torch.stack(alike).double().square().sum() / copies
        dist.all_reduce(squares)
        return squares.sqrt()

    def clear(self) -> None:
        """Drops the gradients."""
        self._parts.clear()
        self._norms = {}

    def give_away(self, names: Iterable[str], take: Callable[[str, Tensor], None]) -> None:
        """Has `take(name, gradient)` called with this rank's part of each of these gradients, in the last backward of a
        step and as soon as it is whole; after that the engine holds nothing of it but its norm.

        ValueError: tp, ep and etp make gradients whole after the backward only.
        """
        if self.mesh.sizes.folded:
            raise ValueError("parallel: with tp, ep or etp gradients are whole after the last backward only")

        def give(name: str, weight: Tensor) -> None:
            if self._last and weight.grad is not None and (gradient := local(weight.grad)).numel():
                [self._norms[name]] = _norms([gradient])
                take(name, gradient)
                weight.grad = None

        for name in names:
            self.weights[name].register_post_accumulate_grad_hook(partial(give, name))

    def gate(self, ready: Callable[[int, Sequence[Any]], None]) -> None:
        """Has `ready(unit, streams)` called before each of `units` is gathered for a forward pass: what the present
        stream and these are told from then on must find its weights updated."""
        for i, unit in enumerate([self.model, *self._layers]):
            hook = partial(_gate, ready, i)
            unit.register_forward_pre_hook(hook, prepend=True)

    def evaluate(self, batch: Batch, at: Tensor | None = None) -> Tensor:
        """The model's answer without gradients, alike on all of cp and tp: summed loss, or logits at `at` of row 0."""
        mine = self._placed(batch)
        places, here = (None, None) if at is None else self.context.find(mine, at)
        with torch.no_grad():
            answer: Tensor = self.model(mine, places)
        for unit in fsdp.units(self.model):
            unit.reshard()
        if self.context.ranks > 1:
            if here is not None:  # a token is on one rank of cp
                answer = answer.masked_fill(~here.to(answer.device)[:, None], 0.0)
            dist.all_reduce(answer, group=self.mesh.context.handle)
        return answer


def _norms(gradients: list[Tensor]) -> Sequence[Tensor]:
    """Each in at least fp32."""
    if not gradients:
        return []
    norms: Sequence[Tensor] = torch._foreach_norm(
        gradients, dtype=torch.promote_types(gradients[0].dtype, torch.float32)
    )
    return norms


def _gate(ready: Callable[[int, Sequence[Any]], None], unit: int, module: nn.Module, _: object) -> None:
    ready(unit, fsdp.gathering_streams(module))


def _names(model: nn.Module, layer: nn.Module) -> set[str]:
    """The names in `model` of a layer's weights."""
    own = {id(weight) for weight in layer.parameters()}
    return {name for name, weight in model.named_parameters() if id(weight) in own}


class Parts:
    """The weights as their owners hold them (sharded parts of tp's pieces) and as everyone else sees them: whole."""

    def __init__(
        self,
        held: Mapping[str, Tensor],
        shapes: Mapping[str, tuple[int, ...]],
        pieces: Mapping[str, Pieces | Folded],
        mesh: Mesh,
    ) -> None:
        self._held, self._shapes, self._pieces, self._mesh = held, shapes, pieces, mesh
        self.weights: dict[str, DTensor] = {name: self._whole(name, weight) for name, weight in held.items()}

    def copies(self, name: str) -> int:
        """How many ranks hold the same part of a weight."""
        pieces = self._pieces[name]
        return self._mesh.sizes.replicate * (pieces.copies if isinstance(pieces, Pieces) else 1)

    def finish(self) -> None:
        """After the last backward of a step: copies' gradients are summed, and every gradient is seen whole.

        What several ranks of tp hold has met other tokens or other heads on each: only the sum is its gradient.
        """
        if not self._mesh.sizes.folded:
            return
        dense = {name: pieces.copies for name, pieces in self._pieces.items() if isinstance(pieces, Pieces)}
        for copies in sorted(set(dense.values()) - {1}):
            shared = [w.grad for name, w in self._held.items() if w.grad is not None and dense.get(name) == copies]
            parts = [local(gradient) for gradient in shared]
            flat = torch.cat([part.flatten() for part in parts])
            dist.all_reduce(flat, group=self._mesh.pieces(copies).get_group("copies"))
            torch._foreach_copy_(
                parts, [f.view_as(p) for f, p in zip(flat.split([p.numel() for p in parts]), parts, strict=True)]
            )
        for name, weight in self._held.items():
            self.weights[name].grad = None if weight.grad is None else self._whole(name, weight.grad)

    def clear(self) -> None:
        for name, weight in self._held.items():
            weight.grad = self.weights[name].grad = None

    def _whole(self, name: str, tensor: Tensor) -> DTensor:
        """`tensor`, sharded like a held weight, as a part of the weight of whole shape; memory is shared."""
        if not self._mesh.sizes.folded:
            assert isinstance(tensor, DTensor)
            return tensor
        pieces, shape = self._pieces[name], self._shapes[name]
        cut: tuple[Shard | Replicate, ...]
        if isinstance(pieces, Folded):
            last = Shard(along(pieces.shape(shape), self._mesh.sizes.expert_shard))
            mesh, cut = self._mesh.experts, (Shard(0), Shard(pieces.channels), last)
        else:
            mesh, cut = self._mesh.pieces(pieces.copies), (Shard(pieces.dim), Replicate(), Shard(0))
        placements = (Replicate(), Replicate(), *cut)  # one for each axis of EXPERTS or PIECES
        strides = tuple(prod(shape[i + 1 :]) for i in range(len(shape)))
        return DTensor.from_local(
            local(tensor).detach(), mesh, placements, run_check=False, shape=torch.Size(shape), stride=strides
        )
