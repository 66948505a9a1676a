"""Sequences of different lengths brought to one: what `data.pad` says."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor

from .data import DataError


@dataclass(frozen=True, slots=True)
class Pad:
    """Samples get `length` entries in their dimension 0: shorter ones are filled up with `value` at the end,
    longer ones are refused or cut off at the end."""

    length: int
    value: float = 0
    longer: Literal["refuse", "cut"] = "refuse"

    def __post_init__(self) -> None:
        if not _whole(self.length) or self.length < 1:
            raise DataError(f"a length to pad to must be a whole number of at least 1, it is {self.length!r}")
        if isinstance(self.value, bool) or not isinstance(self.value, int | float):
            raise DataError(f"the value to pad with must be a number, it is {self.value!r}")
        if self.longer not in ("refuse", "cut"):
            raise DataError(f"longer must be refuse or cut, it is {self.longer!r}")


def pads(given: Any) -> dict[str, Pad]:
    """`{key: length}` or `{key: {length: 64, value: -1, longer: cut}}` as records. Raises DataError."""
    if not isinstance(given, Mapping):
        raise DataError(f"data.pad must say a length for each of its keys, {{key: length}}, it is {given!r}")
    found = {}
    for key, entry in given.items():
        if not isinstance(entry, Mapping):
            entry = {"length": entry}
        known = [field.name for field in fields(Pad)]
        unknown = [str(name) for name in entry if name not in known]
        if unknown or "length" not in entry:
            what = f"no {unknown[0]}" if unknown else "no default length"
            raise DataError(f"data.pad.{key}: there is {what}; it has {', '.join(known)}")
        try:
            found[str(key)] = Pad(**entry)
        except DataError as error:
            raise DataError(f"data.pad.{key}: {error}") from None
    return found


def padded(key: str, index: int, sample: Tensor, pad: Pad) -> Tensor:
    """`sample` (n, ...) as (pad.length, ...). Raises DataError for one that is too long, has no dimension, or
    cannot hold the value."""
    if not sample.dim():
        raise DataError(f"{key!r} of sample {index} is a single number, data.pad is for sequences")
    size = len(sample)
    if size > pad.length and pad.longer == "refuse":
        raise DataError(
            f"{key!r} of sample {index} has length {size}, more than data.pad.{key} allows ({pad.length}): "
            f"raise it, or cut what is longer with data.pad.{key}={{length: {pad.length}, longer: cut}}"
        )
    if size >= pad.length:
        return sample[: pad.length]
    value = torch.tensor(float(pad.value), dtype=torch.float64).to(sample.dtype)
    if not sample.dtype.is_floating_point and value.item() != pad.value:
        raise DataError(f"{key!r} is of type {sample.dtype}, which cannot hold data.pad.{key}'s {pad.value}")
    return torch.cat([sample, value.expand(pad.length - size, *sample.shape[1:])])


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
