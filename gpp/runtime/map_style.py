"""A map-style torch data set, one sample at a time under [], as a Dataset."""

from collections.abc import Mapping, Sequence, Sized
from types import MappingProxyType
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from .data import DataError, Dataset, checked, unreadable
from .padding import Pad, padded

NO_PADS: Mapping[str, Pad] = MappingProxyType({})


class MapStyle(Protocol):
    """What torch calls a map-style data set."""

    def __len__(self) -> int:
        """How many samples there are."""

    def __getitem__(self, index: int, /) -> Any:
        """One sample."""


def adapt(
    dataset: object,
    parameters: Sequence[str],
    keys: Sequence[str] = (),
    pads: Mapping[str, Pad] = NO_PADS,
) -> Dataset:
    """`dataset` if it is a Dataset, else a map-style one as such.

    A sample that is a dictionary has its keys; the items of a tuple are matched to `parameters`, the names of
    the parameters of the model's `forward`, in order. `keys` names a tuple's items otherwise, and chooses
    among the keys of anything else. The samples of the keys in `pads` are brought to one length. Raises
    DataError for what is neither, is empty, or lacks one of `keys` or `pads`.
    """
    readable = hasattr(dataset, "read") and hasattr(dataset, "keys")
    if not isinstance(dataset, Sized) or not (readable or hasattr(dataset, "__getitem__")):
        raise DataError(
            f"{type(dataset).__name__} is no data set: it needs __len__ and either __getitem__ (a map-style "
            "torch data set) or keys and read(indices, keys). A stream has no samples to choose: collect it"
        )
    if not len(dataset):
        raise DataError(f"the data set {type(dataset).__name__} is empty: it has no samples")
    if readable:
        ready = cast(Dataset, dataset)
        if pads:
            raise DataError(
                f"data.pad is for data sets with __getitem__, {type(dataset).__name__} has "
                "read(indices, keys), which returns all samples of a key in one shape: pad there"
            )
        return _Columns(ready, _chosen(keys, ready.keys)) if keys else ready
    return MapDataset(cast(MapStyle, dataset), parameters, keys, pads)


class MapDataset:
    """A map-style data set with the keys of its first sample, see `adapt`."""

    def __init__(
        self,
        dataset: MapStyle,
        parameters: Sequence[str],
        keys: Sequence[str] = (),
        pads: Mapping[str, Pad] = NO_PADS,
    ) -> None:
        self._dataset = dataset
        self._pads = pads
        self._names: tuple[str, ...] = ()
        self.keys = self._found(self._item(0), parameters, keys)
        _chosen(tuple(pads), self.keys)

    def _found(
        self, first: Mapping[str, Any] | tuple[Any, ...], parameters: Sequence[str], keys: Sequence[str]
    ) -> tuple[str, ...]:
        if isinstance(first, Mapping):
            return _chosen(keys, tuple(map(str, first))) if keys else tuple(map(str, first))
        self._names = tuple(keys or parameters)[: len(first)]
        if len(self._names) < len(first):
            raise DataError(
                f"a sample has {len(first)} items, there are names for {len(self._names)} "
                f"({', '.join(self._names) or 'none'}): name them with data.keys=[...]"
            )
        return self._names

    def __len__(self) -> int:
        return len(self._dataset)

    def read(self, indices: Sequence[int], keys: Sequence[str]) -> dict[str, Tensor]:
        """See Dataset.read; also raises DataError for a sample that is unlike the first."""
        rows = checked(indices, len(self), keys, self.keys).tolist()
        if not keys:
            return {}
        samples = [self._sample(index) for index in rows]
        return {
            key: _stacked(key, rows, [sample[key] for sample in samples], self._pads.get(key)) for key in keys
        }

    def _item(self, index: int) -> Mapping[str, Any] | tuple[Any, ...]:
        try:
            item = self._dataset[index]
        except Exception as error:
            raise unreadable(f"sample {index}", error) from error
        if isinstance(item, Mapping):
            return item
        return tuple(item) if isinstance(item, tuple | list) else (item,)

    def _sample(self, index: int) -> Mapping[str, Any]:
        item = self._item(index)
        if isinstance(item, Mapping):
            lacking = [key for key in self.keys if key not in item]
            if lacking:
                raise DataError(f"sample {index} lacks the key {lacking[0]!r}, which sample 0 has")
            return item
        if len(item) != len(self._names):
            raise DataError(f"sample {index} has {len(item)} items, sample 0 has {len(self._names)}")
        return dict(zip(self._names, item, strict=True))


class _Columns:
    """Some of a data set's keys."""

    def __init__(self, dataset: Dataset, keys: tuple[str, ...]) -> None:
        self._dataset = dataset
        self.keys = keys

    def __len__(self) -> int:
        return len(self._dataset)

    def read(self, indices: Sequence[int], keys: Sequence[str]) -> dict[str, Tensor]:
        checked((), 0, keys, self.keys)
        return self._dataset.read(indices, keys)


def _chosen(keys: Sequence[str], known: Sequence[str]) -> tuple[str, ...]:
    checked((), 0, keys, known)
    return tuple(keys)


def _stacked(key: str, indices: Sequence[int], values: Sequence[Any], pad: Pad | None) -> Tensor:
    tensors = [_tensor(key, index, value) for index, value in zip(indices, values, strict=True)]
    if pad is not None:
        tensors = [padded(key, index, t, pad) for index, t in zip(indices, tensors, strict=True)]
    for index, tensor in zip(indices, tensors, strict=True):
        if tensor.shape != tensors[0].shape:
            raise DataError(
                f"{key!r} has shape {tuple(tensors[0].shape)} in sample {indices[0]} and "
                f"{tuple(tensor.shape)} in sample {index}: all samples of a key need one shape, "
                f"pad sequences to a bound, data.pad={{{key}: length}}"
            )
    return torch.stack(tensors)


def _tensor(key: str, index: int, value: Any) -> Tensor:
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        raise DataError(
            f"{key!r} of sample {index} is of type {type(value).__name__}, which is no tensor, array or "
            "number: convert it in the data set"
        ) from None
