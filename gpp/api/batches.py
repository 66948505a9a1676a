"""A user's batch against what the model was captured with: one sentence for what does not fit."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count

import torch
from torch import Tensor

from gpp.capture.capture import Captured
from gpp.runtime.data import DataError, Dataset

from .crew import Crew, RefusedError

Batch = Mapping[str, Tensor]  # by key a tensor of shape (samples, ...)


@dataclass(frozen=True, slots=True)
class KeySpec:
    """A key of the batch: data type, and shape of one sample."""

    dtype: torch.dtype
    shape: tuple[int, ...]


class Checked:
    """A data set whose every read is what the model was captured with."""

    def __init__(self, dataset: Dataset, specs: Mapping[str, KeySpec]) -> None:
        self._dataset, self._specs = dataset, specs
        self.keys = dataset.keys

    def __len__(self) -> int:
        return len(self._dataset)

    def read(self, indices: Sequence[int], keys: Sequence[str]) -> dict[str, Tensor]:
        """See Dataset.read. Raises DataError for what does not fit."""
        found = self._dataset.read(indices, keys)
        error = misfit(found, self._specs, keys, len(indices)) if len(indices) else None
        if error is not None:
            raise DataError(f"samples {min(indices)} to {max(indices)} of the data set: {error}")
        return found


def key_specs(captured: Captured) -> dict[str, KeySpec]:
    """What the model's batches are made of."""
    found = {}
    for mode in (captured.traced.train, captured.traced.evaluate):
        for node, key in mode.batch_keys.items():
            value = mode.nodes[node].meta["val"]
            found[key] = KeySpec(value.dtype, tuple(int(size) for size in value.shape[1:]))
    return found


def samples_of(batch: Batch, specs: Mapping[str, KeySpec]) -> int | None:
    """How many samples a batch has, None where it has no key of the model's."""
    known = (v for k, v in batch.items() if k in specs and isinstance(v, Tensor) and v.dim())
    return next((len(v) for v in known), None)


def misfit(
    batch: Batch, specs: Mapping[str, KeySpec], needed: Collection[str], samples: int | None
) -> str | None:
    """Why the batch cannot be used; None if it can. Only `needed` keys must be there; `samples` is how many
    there must be of each, None for any number. What the model does not know is left alone."""
    missing = [key for key in needed if key not in batch]
    if missing:
        return f"the batch has no key {missing[0]!r}; it has {', '.join(map(repr, batch)) or 'none'}"
    for key in (key for key in specs if key in batch):
        value: object = batch[key]
        spec = specs[key]
        if not isinstance(value, Tensor):
            return f"batch key {key!r} must be a tensor, it is {type(value).__name__}"
        if value.dim() == 0 or tuple(value.shape[1:]) != spec.shape:
            shape = ", ".join(map(str, ("samples", *spec.shape)))
            return f"batch key {key!r} must have the shape ({shape}), it has {tuple(value.shape)}"
        if value.dtype != spec.dtype:
            return f"batch key {key!r} must be {spec.dtype}, as the example batch was, it is {value.dtype}"
        if samples is None:
            samples = len(value)
        if len(value) != samples or samples == 0:
            wanted = f"{samples} samples" if samples else "at least one sample"
            return f"batch key {key!r} must have {wanted}, it has {len(value)}"
    return None


def agreed(batches: Iterable[Batch], specs: Mapping[str, KeySpec], crew: Crew) -> Iterator[tuple[Batch, int]]:
    """Each batch with its samples, of which all ranks have as many. Raises RefusedError where they differ."""
    given = iter(batches)
    for number in count():
        batch = next(given, None)
        size = None if batch is None else samples_of(batch, specs)
        known = crew.all_gather((batch is None, size))
        over = [ended for ended, _ in known]
        if all(over):
            return
        sizes = {size for _, size in known if size is not None}
        if any(over) or len(sizes) != 1:
            raise RefusedError(
                f"all ranks must give as many batches of as many samples: of number {number} they have "
                + ", ".join("none" if ended else f"{size} samples" for ended, size in known)
            )
        assert batch is not None
        yield batch, sizes.pop()
