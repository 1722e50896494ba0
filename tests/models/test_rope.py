"""Scaled rotations equal their published formulas, and stay exact a million tokens in."""

import math
from math import log, pi

import pytest
import torch

from farspan.models.rope import Linear, Llama3, Rope, Scaling, Yarn

CPU = torch.device("cpu")


def linear(i: int, key_dim: int, theta: float, s: Linear) -> float:
    return theta ** (-2 * i / key_dim) / s.factor


def llama3(i: int, key_dim: int, theta: float, s: Llama3) -> float:
    """By wavelengths, as published."""
    frequency = theta ** (-2 * i / key_dim)
    wavelength = 2 * pi / frequency
    if wavelength < s.original_length / s.high_frequency_factor:
        return frequency
    if wavelength > s.original_length / s.low_frequency_factor:
        return frequency / s.factor
    smooth = s.original_length / wavelength - s.low_frequency_factor
    smooth /= s.high_frequency_factor - s.low_frequency_factor
    return (1 - smooth) * frequency / s.factor + smooth * frequency


def yarn(i: int, key_dim: int, theta: float, s: Yarn) -> float:
    """Peng et al., 2023: positions interpolated or not, weighed by a ramp over pairs."""

    def pair(turns: float) -> float:
        return key_dim / 2 * log(s.original_length / (2 * pi * turns)) / log(theta)

    low, high = max(math.floor(pair(s.beta_fast)), 0), min(math.ceil(pair(s.beta_slow)), key_dim - 1)
    ramp = min(1.0, max(0.0, (i - low) / (high - low)))
    frequency = theta ** (-2 * i / key_dim)
    return ramp * frequency / s.factor + (1 - ramp) * frequency


SCALINGS: dict[str, tuple[object, Scaling]] = {
    "linear": (linear, Linear(factor=4.0)),
    "llama3": (llama3, Llama3(factor=8.0, original_length=8192)),
    "llama3 odd": (llama3, Llama3(factor=3.0, original_length=777, low_frequency_factor=0.5, high_frequency_factor=7)),
    "yarn": (yarn, Yarn(factor=16.0, original_length=4096)),
    "yarn odd": (yarn, Yarn(factor=40.0, original_length=1000, beta_fast=20.0, beta_slow=2.0)),
}


@pytest.mark.parametrize("name", SCALINGS)
@pytest.mark.parametrize(("key_dim", "theta"), [(128, 5e5), (64, 1e4), (6, 100.0)])
def test_frequencies_equal_the_published_formula(name: str, key_dim: int, theta: float) -> None:
    formula, scaling = SCALINGS[name]
    found = Rope(theta=theta, scaling=scaling).frequencies(key_dim, CPU)
    wanted = [formula(i, key_dim, theta, scaling) for i in range(key_dim // 2)]  # type: ignore[operator]
    torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.float64), rtol=1e-12, atol=0)


def test_llama_3_1_by_hand() -> None:
    """Factor 8 over 8192 tokens, θ = 5·10⁵, 128 channels: one pair of each band, worked out with pen and paper.

    Pair 0 turns once in 6.3 tokens: as it was. Pair 32 has frequency 5e5^-½ = 1.414214e-3 and turns 1.843848 times in
    8192 tokens: smooth = 0.843848/3 = 0.281283, so it becomes 1.414214e-3 · (0.281283 + 0.718717/8) = 5.248466e-4.
    Pair 48 has 5e5^-¾ = 5.318296e-5, turns 0.0693 times, and is divided by 8.
    """
    found = Rope(theta=5e5, scaling=Llama3(factor=8.0, original_length=8192)).frequencies(128, CPU)
    assert found[0].item() == 1.0
    assert found[32].item() == pytest.approx(5.248466e-4, rel=1e-6)
    assert found[48].item() == pytest.approx(6.647870e-6, rel=1e-6)


def test_yarn_is_louder() -> None:
    """Cosine and sine are multiplied by 0.1·ln(factor) + 1, or by what is given."""
    positions = torch.arange(50)[None]
    for scaling, wanted in (
        (Yarn(factor=16.0, original_length=64), 1.2772588722),
        (Yarn(factor=16.0, original_length=64, attention_factor=0.5), 0.5),
        (Llama3(factor=16.0, original_length=64), 1.0),
    ):
        cos, sin = Rope(scaling=scaling).angles(positions, 16)
        torch.testing.assert_close((cos.square() + sin.square()).sqrt(), torch.full_like(cos, wanted))


@pytest.mark.parametrize("theta", [1e4, 5e5])
def test_angles_are_exact_at_a_million(theta: float) -> None:
    """Within the rounding of fp32; an fp32 product is off by hundredths of a radian there."""
    positions = torch.arange(10**6 - 300, 10**6 + 1)
    cos, sin = Rope(theta=theta).angles(positions[None], 128)
    assert cos.dtype == sin.dtype == torch.float32 and cos.shape == (1, 301, 1, 64)
    coarse = torch.zeros(())
    for i in (0, 1, 17, 40, 63):
        frequency = theta ** (-2 * i / 128)
        for place in (0, 123, 300):
            angle = int(positions[place]) * frequency
            assert abs(cos[0, place, 0, i].item() - math.cos(angle)) < 1e-7
            assert abs(sin[0, place, 0, i].item() - math.sin(angle)) < 1e-7
            product = positions[place].float() * torch.tensor(frequency, dtype=torch.float32)
            coarse = torch.maximum(coarse, (product.double() - angle).abs())
    assert coarse > 0.005


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Linear(factor=0.5), "factor=0.5: must be at least 1"),
        (lambda: Yarn(factor=2.0, original_length=0), "original_length=0: must be at least 1 token"),
        (lambda: Yarn(factor=2.0, original_length=9, beta_fast=1.0), "beta_slow=1.0: .* less than beta_fast=1.0"),
        (lambda: Yarn(factor=2.0, original_length=9, attention_factor=0.0), "attention_factor=0.0: must be positive"),
        (lambda: Llama3(factor=2.0, original_length=9, high_frequency_factor=1.0), "low_frequency_factor=1.0: .*=1.0"),
    ],
)
def test_errors_name_place_value_and_way_out(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]
