"""Activation checkpointing: a layer keeps its input and runs again in the backward."""

from functools import partial
from typing import Literal

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

Recompute = Literal["none", "block"]


def apply(layer: nn.Module, recompute: Recompute) -> None:
    """Wraps `layer.forward` in place. Attention's outputs are always kept, so that no exchange runs twice."""
    if recompute == "none":
        return
    kept = [torch.ops.farspan.attend.default]
    contexts = partial(create_selective_checkpoint_contexts, kept)
    layer.forward = partial(
        checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False, context_fn=contexts
    )
