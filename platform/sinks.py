"""Which sinks of metrics a job asks for; only what is asked for is imported."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from farspan.platform.metrics import Metrics, Sink, Wandb


def sinks(metrics: Metrics, folder: Path, config: Mapping[str, Any]) -> dict[str, Callable[[], Sink]]:
    """How to open each, which is done in its own thread."""

    def wandb(settings: Wandb) -> Sink:
        from farspan.platform.wandb_sink import WandbSink

        return WandbSink(folder, settings, config)

    def tensorboard() -> Sink:
        from farspan.platform.tensorboard_sink import TensorboardSink

        return TensorboardSink(folder)

    wanted: dict[str, Callable[[], Sink]] = {}
    if metrics.wandb is not None:
        wanted["metrics.wandb"] = partial(wandb, metrics.wandb)
    if metrics.tensorboard:
        wanted["metrics.tensorboard"] = tensorboard
    return wanted
