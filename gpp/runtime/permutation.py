"""A random order of many things, of which only the places that are asked for are computed.

A Feistel network is a permutation whatever its rounds are (Luby and Rackoff 1988), here of the least power of
4 that has room; what falls outside is sent through again until it is inside (cycle walking: Black and Rogaway
2002). Time and memory are those of the places asked for, however long the order is.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

ROUNDS = 8

Words = NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class Permuted:
    """The places [start, stop) of the order of `length` numbers that `entropy` gives."""

    length: int
    start: int
    stop: int
    entropy: tuple[int, ...]

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """The numbers at `places`, counted from `start`, each at least 0 and below the length of this."""
        half = max(1, (self.length - 1).bit_length() + 1 >> 1)
        keys = np.random.SeedSequence(self.entropy).generate_state(ROUNDS, np.uint64).astype(np.uint64)
        found = _network((places + self.start).astype(np.uint64), half, keys)
        while (outside := np.flatnonzero(found >= np.uint64(self.length))).size:
            found[outside] = _network(found[outside], half, keys)
        return found.astype(np.int64)


def mixed(counter: Words, key: np.uint64) -> Words:
    """The finaliser of splitmix64 (Steele, Lea and Flood 2014): random bits of a counter."""
    words: Words = (counter + key) * np.uint64(0x9E3779B97F4A7C15)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def _network(values: Words, half: int, keys: Words) -> Words:
    """A permutation of the numbers of 2 x `half` bits."""
    width, mask = np.uint64(half), np.uint64((1 << half) - 1)
    left, right = values >> width, values & mask
    for key in keys:
        left, right = right, left ^ (mixed(right, key) >> (np.uint64(64) - width))
    return (left << width) | right
