"""A model spread over a mesh, and the few verbs that a training step is made of."""

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from farspan.kernels.random import Normal
from farspan.parallel import fsdp, recompute
from farspan.parallel.context.shard import Batch
from farspan.parallel.fsdp import local
from farspan.parallel.mesh import Mesh


class Optimizer(Protocol):
    """What the engine asks of an optimizer."""

    def update(self, rate: float, scale: Tensor) -> None:
        """One step on the weights' gradients times `scale`, a device scalar; where it is 0 nothing changes."""

    def state(self) -> dict[str, Tensor]:
        """Its tensors by name, cut like the weights they belong to: what a checkpoint holds and restores in place."""


class Engine:
    """Owns the placed model. Order: recompute, compile, shard, materialise."""

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[nn.Module],
        starts: Mapping[str, Normal],
        mesh: Mesh,
        *,
        seed: int,
        compute: torch.dtype | None = None,
        recomputing: recompute.Recompute = "none",
        compiled: bool = False,
    ) -> None:
        """`model` lives on the meta device; `layers` are its units of sharding, `starts` its first values."""
        for layer in layers:
            recompute.apply(layer, recomputing)
            if compiled:
                layer.forward = torch.compile(layer.forward)
        fsdp.shard(model, layers, mesh, compute)
        fsdp.materialise(model, dict(starts), mesh.device, seed)
        self.model = model
        self.mesh = mesh
        self.weights = dict(model.named_parameters())
        """The sharded weights by name: DTensors that keep their identity while the model gathers and frees copies."""

    def forward_backward(self, batches: Sequence[Batch], labels: float) -> Tensor:
        """Adds the gradients of one step's micro-batches; returns this rank's part of the loss, a device scalar.

        `labels` counts what the whole step predicts on all ranks; the parts sum to the mean loss over it.
        """
        total = torch.zeros((), device=self.mesh.device)
        for i, batch in enumerate(batches):
            last = i == len(batches) - 1
            self.model.set_is_last_backward(last)  # type: ignore[operator]
            self.model.set_requires_all_reduce(last)  # type: ignore[operator]
            loss = self.model(batch.to(self.mesh.device)) / labels
            loss.backward()
            total += loss.detach()
        return total

    def sum(self, value: Tensor) -> Tensor:
        """The sum of a device scalar over the ranks that hold different data."""
        total = value.clone()
        for axis in self.mesh.weights.mesh_dim_names or ():
            dist.all_reduce(total, group=self.mesh.weights.get_group(axis))
        return total

    def gradient_norm(self) -> Tensor:
        """The Euclidean norm of the whole gradient, each weight counted once, as a device scalar in fp64."""
        parts = [local(w.grad) for w in self.weights.values() if w.grad is not None]
        norms = torch._foreach_norm([part for part in parts if part.numel()])
        zero = torch.zeros(1, dtype=torch.float64, device=self.mesh.device)
        squares = torch.cat([zero, *(norm.double().square().view(1) for norm in norms)]).sum()
        dist.all_reduce(squares, group=self.mesh.weights.get_group("shard"))  # copies in `replicate` are equal
        return squares.sqrt()

    def clear(self) -> None:
        """Drops the gradients."""
        for weight in self.weights.values():
            weight.grad = None

    def evaluate(self, batch: Batch, at: Tensor | None = None) -> Tensor:
        """The model's answer without gradients: summed loss, or logits at places `at` of row 0."""
        with torch.no_grad():
            answer: Tensor = self.model(batch.to(self.mesh.device), at)
        self.model.reshard()  # type: ignore[operator]
        return answer
