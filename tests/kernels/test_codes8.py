"""8-bit codes: every one of the 256 is a value of its own, order is kept, and chance rounds to the mean."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from farspan.kernels.codes8 import between_codes, decode, encode, place_of, values

BOTH = pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])


def fine() -> Tensor:
    """From far below the codes to 1, ends included."""
    return torch.logspace(-10, 0, 400_001, dtype=torch.float64).float().clamp(max=1.0)


@BOTH
def test_each_code_is_encoded_as_itself(signed: bool) -> None:
    codes, values_of = torch.arange(256, dtype=torch.uint8), torch.tensor(values(signed))
    for scale in (1.0, 3e-20, 7e11):
        again, scales = encode(values_of * scale, 256, signed=signed)
        torch.testing.assert_close(scales, torch.tensor([scale]))
        if signed:
            codes[128] = 0  # there is one zero
        assert torch.equal(again, codes)


@BOTH
def test_codes_grow_with_what_they_stand_for(signed: bool) -> None:
    found = torch.tensor(values(signed), dtype=torch.float64)
    magnitudes = found[:128] if signed else found
    assert (magnitudes.diff() > 0).all()
    assert (place_of(fine(), signed=signed).round().diff() >= 0).all()
    if signed:
        assert torch.equal(found[128:], -magnitudes), "symmetric, −1 included"
        assert magnitudes[0] == 0 and magnitudes[-1] == 1
    else:
        assert magnitudes[0] > 0, "never zero"


@BOTH
def test_the_published_map_lies_between_the_ends(signed: bool) -> None:
    """The middles of n equal cells of every decade, as the paper and bitsandbytes have them."""
    published = [
        10.0 ** (i - 6) * (low + high) / 2
        for i in range(7)
        for edges in [torch.linspace(0.1, 1, 2 ** (i + (not signed)) + 1, dtype=torch.float64).tolist()]
        for low, high in pairwise(edges)
    ]
    ours = values(signed)[1:127] if signed else values(signed)[1:255]
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(sorted(published)[: len(ours)]))


@BOTH
def test_a_number_gets_the_code_of_its_cell(signed: bool) -> None:
    """At most one code from the nearest, and the maximum, of either sign, exact."""
    y = fine()[::97]
    magnitudes = torch.tensor(values(signed)[: 128 if signed else 256])
    nearest = (magnitudes - y[:, None]).abs().argmin(1)
    assert (place_of(y, signed=signed).round().clamp(max=len(magnitudes) - 1) - nearest).abs().max() <= 1
    x = torch.tensor([[-3.5, 1.0, 0.25, -0.0] * 8, [0.0] * 32])
    codes, scales = encode(x if signed else x.abs(), 32, signed=signed)
    again = decode(codes, scales, 32, signed=signed)
    assert again[0, 0].abs() == 3.5 and again[1].abs().max() < 1e-29
    torch.testing.assert_close(again[0], x[0] if signed else x[0].abs(), rtol=0.02, atol=4e-6)


def test_chance_rounds_to_the_mean() -> None:
    """Between two neighbours the place is linear in the number, also across decades: its mean is the number."""
    y = fine()
    assert (between_codes(y[y < 2.0**-24]).abs() < 1e-5).all(), "the lowest code"
    y = y[y >= 2.0**-24]
    place, found = between_codes(y), torch.tensor(values(False))
    below = place.floor().long().clamp(max=254)
    mean = torch.lerp(found[below], found[below + 1], place - below)
    torch.testing.assert_close(mean, y, rtol=2e-5, atol=0.0)


def test_drawn_codes_have_the_mean_and_the_maximum_stays() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(64, generator=generator).pow(4).repeat(4000, 1)
    x[:, 0] = 1.0
    random = torch.randint(0, 1 << 32, x.shape, generator=generator)
    codes, scales = encode(x, 64, signed=False, random=random)
    drawn = decode(codes, scales, 64, signed=False)
    torch.testing.assert_close(drawn.mean(0), x[0], rtol=6e-3, atol=1e-7)
    torch.testing.assert_close(drawn[:, 0], torch.ones(4000))


@pytest.mark.parametrize("drawn", [0, 0xFFFFFFFF])
def test_no_chance_makes_a_code_that_there_is_not(drawn: int) -> None:
    """Codes are bytes that wrap: places stay between -1/2 and 255 1/2 with the least and the largest of all draws."""
    y = torch.cat((torch.zeros(1), fine(), torch.tensor([1 + 2.0**-22])))  # what a rounded reciprocal may make of 1
    place = between_codes(y) + ((drawn & 0xFFF0 | 8) * 2.0**-16 - 0.5)
    assert place.min() > -0.5 and place.max() < 255.5
    x = y[-257:-1].clone()
    codes, scales = encode(x, 256, signed=False, random=torch.full((256,), drawn))
    assert codes[-1] == 255
    torch.testing.assert_close(decode(codes, scales, 256, signed=False), x, rtol=0.01, atol=0.0)


@BOTH
def test_the_nearest_code_is_one_that_there_is(signed: bool) -> None:
    place = place_of(torch.cat((torch.zeros(1), fine(), torch.tensor([1 + 2.0**-22]))), signed=signed)
    assert place.min() > -0.5 and place.max() < (127.5 if signed else 255.5)
