"""Chance as a function of seed and place: the same on every machine, in whatever order it is asked."""

import hashlib
from typing import final

import numpy as np
from numpy.typing import NDArray

from farspan.kernels.random import key


@final
class Draws:
    """A stream of random numbers for each place: `Draws(seed, "objective", row, document)`.

    Its bits are Philox (Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", 2011), which every
    version of numpy gives alike; what is made of them here is arithmetic alone, unlike numpy's own distributions.
    """

    def __init__(self, *place: int | str) -> None:
        self._bits = np.random.Philox(key=key(*place))

    def uniform(self) -> float:
        """In [0, 1), with 53 random bits."""
        return int(self._bits.random_raw() >> 11) * 2.0**-53

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * self.uniform()

    def below(self, stop: int) -> int:
        """One of range(stop)."""
        return int(self.uniform() * stop)

    def integers(self, stop: int, count: int) -> NDArray[np.int64]:
        """`count` of range(stop), with repetition."""
        return ((self._bits.random_raw(count) >> np.uint64(11)) * (2.0**-53 * stop)).astype(np.int64)

    def choose(self, stop: int, count: int) -> NDArray[np.int64]:
        """`count` different ones of range(stop), ascending."""
        if not count:
            return np.empty(0, np.int64)
        return np.sort(np.argpartition(self._bits.random_raw(stop), count - 1)[:count])

    def order(self, count: int) -> NDArray[np.int64]:
        """A permutation of range(count)."""
        return np.argsort(self._bits.random_raw(count), kind="stable")


def permutation(count: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """A permutation of range(count), the same on every machine and version: indices sorted by their hashes."""
    label = hashlib.blake2b(f"{seed} {epoch}".encode(), digest_size=8).digest()
    keys = hashed(np.arange(count), int.from_bytes(label, "little"))
    return np.argsort(keys, kind="stable")


def hashed(numbers: NDArray[np.int64], seed: int) -> NDArray[np.uint64]:
    """64 random bits for each number under `seed`: splitmix64 (Steele, Lea, Flood, "Fast splittable pseudorandom
    number generators", 2014)."""
    keys = (numbers.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(seed)
    keys = (keys ^ (keys >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    keys = (keys ^ (keys >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return keys ^ (keys >> np.uint64(31))
