"""Random inputs with a target that follows from them: for models whose real data are no part of this project.

Sample i is a function of seed, key and i alone, computed when it is read, so a data set of any size takes no
memory. The target is a fixed random linear rule of the inputs, for a model to find.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gpp.models.candle_uno import branch_features

from .data import DataError, Indices, checked
from .permutation import Words, mixed

Target = Literal["value", "click", "label"]


class Synthetic:
    """`samples` samples of float32 `numbers` (key to shape) and int64 `tokens` (key to (rows, length)).

    Numbers are uniform of mean 0 and variance 1, tokens uniform below `rows`. The key `name` holds the
    target: every key has a weight for each of its numbers or rows, its score is their weighted mean over the
    sample, scaled to variance 1, and the sample's is the keys' sum, scaled likewise. `value` is the score,
    `click` 1.0 if it is positive, else 0.0, `label` the one of `classes` equally likely intervals that it is
    in (normally distributed scores taken for granted). Raises DataError for no sample or no input.
    """

    def __init__(
        self,
        samples: int,
        *,
        name: str,
        target: Target,
        numbers: Mapping[str, Sequence[int]],
        tokens: Mapping[str, tuple[int, int]] | None = None,
        classes: int = 2,
        seed: int = 0,
    ) -> None:
        if samples < 1 or not (numbers or tokens):
            raise DataError(f"synthetic data need samples and inputs: there are {samples} samples")
        self._samples, self._name, self._target, self._seed = samples, name, target, seed
        self._numbers = {key: tuple(shape) for key, shape in numbers.items()}
        self._tokens = dict(tokens or {})
        inner = torch.arange(1, classes, dtype=torch.float64) / classes
        self._borders = torch.special.ndtri(inner)
        self.keys = (*self._numbers, *self._tokens, name)

    def __len__(self) -> int:
        return self._samples

    def read(self, indices: Sequence[int], keys: Sequence[str]) -> dict[str, Tensor]:
        """The samples at `indices`, see the class."""
        rows = checked(indices, len(self), keys, self.keys)
        return {key: self._of(key, rows) for key in keys}

    def _of(self, key: str, rows: Indices) -> Tensor:
        if key in self._numbers:
            shape = self._numbers[key]
            values = _uniform(self._words(key, rows, int(np.prod(shape, dtype=np.int64))))
            return torch.from_numpy(values).reshape(len(rows), *shape)
        if key in self._tokens:
            limit, length = self._tokens[key]
            words = self._words(key, rows, length) % np.uint64(limit)
            return torch.from_numpy(words.astype(np.int64))
        score = self._score(rows)
        if self._target == "label":
            label: Tensor = torch.bucketize(score, self._borders)
            return label
        return (score > 0).float() if self._target == "click" else score.float()

    def _score(self, rows: Indices) -> Tensor:
        total = torch.zeros(len(rows), dtype=torch.float64)
        for key in (*self._numbers, *self._tokens):
            values = self._of(key, rows).flatten(1)
            if key in self._tokens:
                words = mixed(values.numpy().astype(np.uint64), _key(self._seed, f"{key} rule"))
                terms = torch.from_numpy(_uniform(words)).double()
            else:
                counter = np.arange(values.shape[1], dtype=np.uint64)
                words = mixed(counter, _key(self._seed, f"{key} rule"))
                rule = torch.from_numpy(_uniform(words)).double()
                terms = values.double() * rule / rule.square().mean().sqrt()
            total += terms.sum(1) / values.shape[1] ** 0.5
        scaled: Tensor = total / (len(self._numbers) + len(self._tokens)) ** 0.5
        return scaled

    def _words(self, key: str, rows: Indices, count: int) -> Words:
        """64 random bits for each of `count` elements of each row."""
        counter = rows[:, None] * count + np.arange(count)
        return mixed(counter.astype(np.uint64), _key(self._seed, key))


def clicks(
    samples: int,
    *,
    dense: int,
    features: int,
    tables: int,
    rows: int,
    bag: int,
    seed: int = 0,
) -> Synthetic:
    """What `gpp.models.dlrm.Dlrm` reads."""
    return Synthetic(
        samples,
        name="label",
        target="click",
        numbers={f"dense_{i}": (features,) for i in range(dense)},
        tokens={f"sparse_{i}": (rows, bag) for i in range(tables)},
        seed=seed,
    )


def drug_responses(samples: int, *, features: Mapping[str, int], branches: int, seed: int = 0) -> Synthetic:
    """What `gpp.models.candle_uno.CandleUno` reads."""
    widths = branch_features(features, branches)
    numbers = {name: (width,) for name, width in widths.items()}
    return Synthetic(samples, name="growth", target="value", numbers=numbers, seed=seed)


def vectors(
    samples: int, *, branches: int, sequence: int, hidden: int, classes: int, seed: int = 0
) -> Synthetic:
    """What `gpp.models.case_study.CaseStudy` reads."""
    numbers = {f"vectors_{i}": (sequence, hidden) for i in range(branches)}
    return Synthetic(samples, name="label", target="label", numbers=numbers, classes=classes, seed=seed)


def _key(seed: int, name: str) -> np.uint64:
    """Where the numbers of a key begin: far from those of every other."""
    word = np.random.SeedSequence([seed, *name.encode()]).generate_state(1, np.uint64)[0]
    return np.uint64(word)


def _uniform(words: Words) -> NDArray[np.float32]:
    """Floats of mean 0 and variance 1 from the upper 24 bits."""
    unit = (words >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)
    return (unit - np.float32(0.5)) * np.float32(12.0**0.5)
