"""The counter hash: the same numbers for every cut, and numbers that look random."""

import pytest
import torch

from farspan.kernels.random import Normal, bits, key, normal, uniform


@pytest.mark.parametrize("shape", [(7,), (13, 5), (3, 4, 5)])
def test_every_cut_draws_the_same_numbers(shape: tuple[int, ...]) -> None:
    whole = torch.full(shape, torch.nan)
    Normal(0.5, 2.0).fill(whole, key(1, "w"), shape, (0,) * len(shape))
    for axis in range(len(shape)):
        for cut in range(1, shape[axis]):
            part = whole.narrow(axis, cut, shape[axis] - cut).clone().fill_(torch.nan)
            offset = tuple(cut if a == axis else 0 for a in range(len(shape)))
            Normal(0.5, 2.0).fill(part, key(1, "w"), shape, offset)
            assert torch.equal(part, whole.narrow(axis, cut, shape[axis] - cut))


def test_a_large_fill_in_pieces_is_one_fill(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, pieces = torch.empty(33, 7), torch.empty(33, 7)
    Normal(0.0, 1.0).fill(whole, 5, (33, 7), (0, 0))
    monkeypatch.setattr("farspan.kernels.random._ELEMENTS", 20)
    Normal(0.0, 1.0).fill(pieces, 5, (33, 7), (0, 0))
    assert torch.equal(whole, pieces)


def test_constants_and_empty_blocks() -> None:
    ones = torch.empty(4)
    Normal(1.0, 0.0).fill(ones, 1, (4,), (0,))
    assert torch.equal(ones, torch.ones(4))
    Normal(0.0, 1.0).fill(torch.empty(0, 3), 1, (4, 3), (4, 0))


def test_numbers_have_the_right_moments_and_no_correlation() -> None:
    index = torch.arange(1 << 20)
    drawn = normal(index, key(0, "a"))
    assert abs(drawn.mean()) < 5e-3 and abs(drawn.std() - 1) < 5e-3
    assert abs((drawn**3).mean()) < 2e-2 and abs((drawn**4).mean() - 3) < 5e-2
    for other in (normal(index, key(1, "a")), normal(index, key(0, "b")), normal(index + 1, key(0, "a"))):
        assert abs((drawn * other).mean()) < 5e-3
    flat = uniform(index, key(0, "c"))
    assert flat.min() > 0 and flat.max() <= 1
    counts = torch.histc(flat, 256, 0, 1)
    assert ((counts - 4096) ** 2 / 4096).sum() < 400  # chi-squared of 255 degrees: 400 is beyond 1 in 10^8


def test_both_words_of_index_and_key_count() -> None:
    low, high = bits(torch.tensor([5]), 7), bits(torch.tensor([5 + (1 << 32)]), 7)
    assert low != high and low != bits(torch.tensor([5]), 7 + (1 << 40))


def test_numbers_are_pinned() -> None:
    """A change here changes every run: initial weights are part of what a seed promises."""
    assert key(0, "layers.0.mixer.to_q.weight") == 12656800743259422108
    assert bits(torch.arange(4), 12345).tolist() == [2318249750, 2064642780, 2137560080, 1423144282]
