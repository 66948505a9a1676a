"""What a data set is, which samples are held out, and which of them a step reads.

Everything is a function of seed and index: any rank finds the samples of any step by itself, the same on
every platform, and a run continues at a step without replaying those before. Samples count from 0.
"""

import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .permutation import Permuted

Indices = NDArray[np.int64]

_HOLD_OUT = 0x686F6C64  # keeps the split's random numbers apart from those of the epochs

# Up to so many samples an order is sorted: every order is as likely. Beyond, its places are computed as they
# are needed: sorting 200 million would take every rank 40 seconds an epoch and 5 GB.
SORTED = 1 << 22


class DataError(ValueError):
    """Data that cannot be read as asked, or does not fit."""


class Dataset(Protocol):
    """Samples of named tensors that can be read in any order, a few keys at a time."""

    @property
    def keys(self) -> tuple[str, ...]:
        """The names of a sample's tensors: the keyword arguments of the model's `forward`."""

    def __len__(self) -> int:
        """How many samples there are."""

    def read(self, indices: Sequence[int], keys: Sequence[str]) -> dict[str, Tensor]:
        """For each of `keys` a tensor of shape (len(indices), ...), row i being sample indices[i].

        Raises DataError for an index or key that there is not. May be called from another thread.
        """


@dataclass(frozen=True, eq=False)
class Subset:
    """The samples of `dataset` at `indices`, counted anew."""

    dataset: Dataset
    indices: Indices | Permuted

    @property
    def keys(self) -> tuple[str, ...]:
        """Those of the data set."""
        return self.dataset.keys

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, indices: Sequence[int], keys: Sequence[str]) -> dict[str, Tensor]:
        """See Dataset.read."""
        return self.dataset.read(self.indices[checked(indices, len(self), keys, self.keys)].tolist(), keys)


@dataclass(frozen=True, eq=False, slots=True)
class Split:
    """Which samples train and which are held out: each is in exactly one of both."""

    train: Indices | Permuted
    held_out: Indices | Permuted


@dataclass(frozen=True, slots=True)
class Batches:
    """The mini-batches of a training run over `length` samples, by global step from 0.

    Each epoch has its own order; the samples of its last, incomplete mini-batch are dropped. Raises DataError
    if not even one mini-batch can be filled.
    """

    length: int
    mini_batch: int
    seed: int

    def __post_init__(self) -> None:
        if not 1 <= self.mini_batch <= self.length:
            raise DataError(
                f"a mini-batch must have between 1 and all of the {self.length} training samples, "
                f"it has {self.mini_batch}: change train.mini_batch"
            )

    @property
    def per_epoch(self) -> int:
        """Steps of one epoch."""
        return self.length // self.mini_batch

    @property
    def dropped(self) -> int:
        """Samples that an epoch leaves out, others each time."""
        return self.length % self.mini_batch

    def epoch(self, step: int) -> int:
        """The epoch that a step belongs to."""
        return step // self.per_epoch

    def at(self, step: int) -> Indices:
        """The samples of a step, in the order of the mini-batch."""
        start, epoch = step % self.per_epoch * self.mini_batch, self.epoch(step)
        if self.length <= SORTED:
            return order(self.seed, epoch, self.length)[start : start + self.mini_batch]
        places = np.arange(start, start + self.mini_batch)
        return Permuted(self.length, 0, self.length, _entropy(self.seed, epoch))[places]


def evaluation_batches(length: int, mini_batch: int) -> tuple[range, ...]:
    """Every sample once and in order; the last mini-batch holds what is left."""
    return tuple(range(i, min(i + mini_batch, length)) for i in range(0, length, mini_batch))


@lru_cache(maxsize=4)
def order(seed: int, epoch: int, length: int) -> Indices:
    """The permutation of `length` samples in an epoch; read-only."""
    permutation = np.argsort(_random(length, seed, epoch), kind="stable")
    permutation.setflags(write=False)
    return permutation


def hold_out(length: int, seed: int, fraction: float = 0.1) -> Split:
    """Hold out `fraction` of the samples, rounded down to whole ones: those of the smallest random numbers,
    both parts in ascending order. Of more than SORTED samples a random part in a random order.

    A sample's number depends on seed and index alone, so a data set that grows (up to SORTED) keeps nearly
    all of its split. Raises DataError if nothing is left to train on.
    """
    if not 0 <= fraction < 1 or length < 1:
        raise DataError(
            f"a split needs samples and a held-out fraction in [0, 1): there are {length} samples, "
            f"the fraction is {fraction}"
        )
    count = int(length * fraction)
    if length > SORTED:
        entropy = _entropy(seed, _HOLD_OUT)
        return Split(Permuted(length, count, length, entropy), Permuted(length, 0, count, entropy))
    ranked = np.argsort(_random(length, seed, _HOLD_OUT), kind="stable")
    return Split(train=np.sort(ranked[count:]), held_out=np.sort(ranked[:count]))


def majority_share(labels: Tensor) -> float:
    """How much of the labels the most frequent one makes up: the accuracy of a guess that knows no input."""
    return float(torch.unique(labels, return_counts=True)[1].max()) / labels.numel()


def checked(indices: Sequence[int], length: int, keys: Sequence[str], known: Sequence[str]) -> Indices:
    """The indices as an array. Raises DataError for an index or key that the data set does not have."""
    for key in keys:
        if key not in known:
            raise DataError(f"the data set has no key {key!r}; it has {', '.join(known)}")
    rows = np.asarray(indices, dtype=np.int64)
    outside = rows[(rows < 0) | (rows >= length)]
    if outside.size:
        raise DataError(f"the data set has no sample {outside[0]}: it has {length}, counted from 0")
    return rows


def unreadable(what: str, error: Exception) -> DataError:
    """The error of a data set's own code as one message: which samples, what happened, in which file."""
    reason = f"{type(error).__name__}: {error}"
    trace = traceback.extract_tb(error.__traceback__)
    place = f" ({trace[-1].filename}:{trace[-1].lineno})" if trace else ""
    return DataError(f"{what} cannot be read: {reason}{place}")


def _random(length: int, *entropy: int) -> NDArray[np.uint64]:
    """`length` 64-bit numbers. The generator's raw words are the same in every version of numpy, on every
    platform; its shuffles are not promised to be."""
    return np.random.PCG64(np.random.SeedSequence(_entropy(*entropy))).random_raw(length)


def _entropy(*numbers: int) -> tuple[int, ...]:
    if min(numbers) < 0:
        raise DataError(f"a seed must not be negative, it is {min(numbers)}")
    return numbers
