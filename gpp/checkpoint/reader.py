"""Reads a checkpoint by parameter names: a rank opens the files that hold its own, whoever wrote them."""

from collections.abc import Hashable, Iterable, Mapping
from typing import TypeVar

from torch import Tensor

from .folder import Kept
from .manifest import OptimizerEntry
from .tensors import CheckpointError, read_tensors

K = TypeVar("K", bound=Hashable)


def weights(kept: Kept, names: Iterable[str], *, averaged: bool = False) -> dict[str, Tensor]:
    """Parameters and buffers by full name, or averages, in the files' pages: to be copied at once. Raises
    CheckpointError for one that is not there."""
    part = kept.manifest.part
    files = part.averages if averaged else part.weights
    return _read(kept, {name: name for name in names}, files, copy=False)


def buffers(kept: Kept, names: Iterable[str]) -> dict[str, Tensor]:
    """Buffers that no state_dict has, by full name, as `weights`."""
    return _read(kept, {name: name for name in names}, kept.manifest.part.buffers, copy=False)


def optimizer(kept: Kept, names: Iterable[str]) -> dict[str, tuple[dict[str, Tensor], OptimizerEntry]]:
    """The optimizer's tensors of some parameters by key, and the rest of their state; those without any are
    left out."""
    entries = {
        name: kept.manifest.part.optimizer[name] for name in names if name in kept.manifest.part.optimizer
    }
    places = {(name, key): f"{name}/{key}" for name, entry in entries.items() for key in entry.tensors}
    found = _read(kept, places, {f"{name}/{key}": entries[name].file for name, key in places})
    state: dict[str, dict[str, Tensor]] = {name: {} for name in entries}
    for (name, key), value in found.items():
        state[name][key] = value
    return {name: (state[name], entry) for name, entry in entries.items()}


def _read(
    kept: Kept, wanted: Mapping[K, str], files: Mapping[str, str], *, copy: bool = True
) -> dict[K, Tensor]:
    missing = [name for name in wanted.values() if name not in files]
    if missing:
        raise CheckpointError(
            f"{kept.path} has no {missing[0]} ({len(missing)} names are missing): it is of another model"
        )
    by_file: dict[str, list[str]] = {}
    for name in wanted.values():
        by_file.setdefault(files[name], []).append(name)
    found: dict[str, Tensor] = {}
    for file, names in by_file.items():
        found |= read_tensors(kept.path / file, names, copy=copy)
    return {key: found[name] for key, name in wanted.items()}
