"""Learning-rate schedules: pure functions of the step, as a share of the peak rate."""

from dataclasses import dataclass
from math import cos, pi


def _warm(step: int, warmup: int) -> float:
    """The ramp from 0: step 0 already moves, and step warmup-1 is at the peak."""
    return min(1.0, (step + 1) / warmup) if warmup else 1.0


def _part(step: int, start: int, end: int) -> float:
    """How far `step` has come from `start` to `end`, in [0, 1]."""
    return min(1.0, max(0.0, (step - start) / max(1, end - start)))


@dataclass(frozen=True, kw_only=True)
class _Shape:
    warmup: int = 0
    """Steps of linear rise."""
    floor: float = 0.1
    """The lowest share of the peak."""
    steps: int | None = None
    """The horizon; null: train.steps of the first start, fixed from then on."""

    def __post_init__(self) -> None:
        if self.warmup < 0:
            raise ValueError(f"warmup={self.warmup}: must not be negative")
        if not 0 <= self.floor <= 1:
            raise ValueError(f"floor={self.floor}: must be in [0, 1], a share of optim.rate")
        if self.steps is not None and self.steps < max(1, self.warmup):
            raise ValueError(f"steps={self.steps}: must be at least 1 and at least warmup={self.warmup}")

    @property
    def horizon(self) -> int:
        assert self.steps is not None, "the horizon is fixed when a job is decoded"
        return self.steps


@dataclass(frozen=True, kw_only=True)
class Cosine(_Shape):
    """Half a cosine from the peak to the floor (Loshchilov and Hutter, 2017)."""

    def factor(self, step: int) -> float:
        fall = 0.5 * (1 + cos(pi * _part(step, self.warmup, self.horizon)))
        return _warm(step, self.warmup) * (self.floor + (1 - self.floor) * fall)


@dataclass(frozen=True, kw_only=True)
class Linear(_Shape):
    """A straight line from the peak to the floor."""

    def factor(self, step: int) -> float:
        fall = 1 - _part(step, self.warmup, self.horizon)
        return _warm(step, self.warmup) * (self.floor + (1 - self.floor) * fall)


@dataclass(frozen=True, kw_only=True)
class Constant:
    """The peak after the warm-up, for ever."""

    warmup: int = 0
    """Steps of linear rise."""

    def __post_init__(self) -> None:
        if self.warmup < 0:
            raise ValueError(f"warmup={self.warmup}: must not be negative")

    def factor(self, step: int) -> float:
        return _warm(step, self.warmup)


@dataclass(frozen=True, kw_only=True)
class Wsd(_Shape):
    """Warm-up, stable, decay (Hu et al., 2024): the peak until `decay` of the horizon is left, then a line down."""

    decay: float = 0.2
    """Share of the horizon spent falling."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.decay <= 1:
            raise ValueError(f"decay={self.decay}: must be in [0, 1], a share of the horizon")

    def factor(self, step: int) -> float:
        start = self.horizon - round(self.decay * self.horizon)
        return _warm(step, self.warmup) * (1 - (1 - self.floor) * _part(step, start, self.horizon))


Schedule = Cosine | Linear | Constant | Wsd
