"""Rotary position embedding (Su et al., 2021): positions turn pairs of channels; scalings slow the turning down."""

from dataclasses import dataclass
from math import ceil, floor, log, pi

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Linear:
    """Every frequency divided by `factor`: positions are squeezed into the trained range (Chen et al., 2023)."""

    factor: float

    def __post_init__(self) -> None:
        _check_factor(self.factor)

    def slowed(self, frequencies: Tensor, theta: float) -> Tensor:
        """frequencies: K/2 of fp64, theta^(-2i/K) radians a token -> the same, scaled."""
        return frequencies / self.factor

    @property
    def amplitude(self) -> float:
        """What cosine and sine are multiplied with."""
        return 1.0


@dataclass(frozen=True, kw_only=True)
class Llama3:
    """Llama 3.1's rule (Grattafiori et al., 2024): by how often a pair turns within `original_length` tokens.

    Fewer turns than `low_frequency_factor`: divided by `factor`; more than `high_frequency_factor`: as it was; between
    them, a mixture that is linear in the number of turns.
    """

    factor: float
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    original_length: int
    """Tokens of the sequences that the weights were first trained on."""

    def __post_init__(self) -> None:
        _check_factor(self.factor)
        _check_length(self.original_length)
        low, high = self.low_frequency_factor, self.high_frequency_factor
        if not 0 < low < high:
            raise ValueError(
                f"low_frequency_factor={low}: must be positive and less than high_frequency_factor={high}; "
                "1 and 4 are usual"
            )

    def slowed(self, frequencies: Tensor, theta: float) -> Tensor:
        low, high = self.low_frequency_factor, self.high_frequency_factor
        turns = frequencies * (self.original_length / (2 * pi))
        return _mixed(frequencies, self.factor, whole=((turns - low) / (high - low)).clamp(0, 1))

    @property
    def amplitude(self) -> float:
        return 1.0


@dataclass(frozen=True, kw_only=True)
class Yarn:
    """YaRN (Peng et al., 2023): fast pairs stay, slow ones are divided by `factor`, and a ramp over pairs between.

    The ramp begins at the last pair that turns `beta_fast` times within `original_length` and ends at the first that
    turns `beta_slow` times, both rounded outwards to whole pairs as in the authors' code.
    """

    factor: float
    original_length: int
    """Tokens of the sequences that the weights were first trained on."""
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    """What cosine and sine are multiplied with; null: 0.1·ln(factor) + 1."""

    def __post_init__(self) -> None:
        _check_factor(self.factor)
        _check_length(self.original_length)
        if not 0 < self.beta_slow < self.beta_fast:
            raise ValueError(
                f"beta_slow={self.beta_slow}: must be positive and less than beta_fast={self.beta_fast}; "
                "1 and 32 are usual"
            )
        if self.attention_factor is not None and self.attention_factor <= 0:
            raise ValueError(f"attention_factor={self.attention_factor}: must be positive; null for 0.1·ln(factor) + 1")

    def slowed(self, frequencies: Tensor, theta: float) -> Tensor:
        key_dim = 2 * len(frequencies)
        first = max(floor(self._pair(self.beta_fast, key_dim, theta)), 0)
        last = min(ceil(self._pair(self.beta_slow, key_dim, theta)), key_dim - 1)
        pairs = torch.arange(len(frequencies), dtype=frequencies.dtype, device=frequencies.device)
        ramp = ((pairs - first) / max(last - first, 1e-3)).clamp(0, 1)
        return _mixed(frequencies, self.factor, whole=1 - ramp)

    def _pair(self, turns: float, key_dim: int, theta: float) -> float:
        """Which pair, as a fraction, turns so often within the original length."""
        return key_dim * log(self.original_length / (turns * 2 * pi)) / (2 * log(theta))

    @property
    def amplitude(self) -> float:
        return 0.1 * log(self.factor) + 1.0 if self.attention_factor is None else self.attention_factor


Scaling = Linear | Llama3 | Yarn


def _mixed(frequencies: Tensor, factor: float, *, whole: Tensor) -> Tensor:
    """`whole` (0 to 1) of each frequency as it was, the rest divided by `factor`."""
    return frequencies * (whole + (1 - whole) / factor)


def _check_factor(factor: float) -> None:
    if factor < 1:
        raise ValueError(
            f"factor={factor}: must be at least 1, the new length over the original; scaling: null for none"
        )


def _check_length(length: int) -> None:
    if length < 1:
        raise ValueError(f"original_length={length}: must be at least 1 token")


@dataclass(frozen=True, kw_only=True)
class Rope:
    """Angles position · theta^(-2i/K) for channel pair i of K; pairs are (i, i + K/2), as in Llama's weights."""

    theta: float = 10000.0
    """The base: the larger, the slower the slowest pair turns."""
    scaling: Scaling | None = None

    def __post_init__(self) -> None:
        if self.theta <= 1.0:
            raise ValueError(f"theta={self.theta}: must be greater than 1; 10000 is usual")

    def frequencies(self, key_dim: int, device: torch.device) -> Tensor:
        """Radians a token for each of the K/2 pairs, in fp64."""
        pairs = torch.arange(0, key_dim, 2, dtype=torch.float64, device=device)
        plain = self.theta ** (-pairs / key_dim)
        return plain if self.scaling is None else self.scaling.slowed(plain, self.theta)

    def angles(self, positions: Tensor, key_dim: int) -> tuple[Tensor, Tensor]:
        """Cosine and sine for positions (B T): B T 1 K/2 each, in fp32.

        Angles are fp64: at position 10⁶ an fp32 product is wrong by up to 0.06 radians (tests/models/test_rope.py).
        """
        angles = positions.double().unsqueeze(-1) * self.frequencies(key_dim, positions.device)
        amplitude = 1.0 if self.scaling is None else self.scaling.amplitude
        cos, sin = (amplitude * turned for turned in (angles.cos(), angles.sin()))
        return cos.float().unsqueeze(2), sin.float().unsqueeze(2)
