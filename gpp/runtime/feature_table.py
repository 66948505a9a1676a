"""A table of features: for each id a row of numbers."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .data import DataError
from .delimited import Kept, kept, numbers, rows

FORMAT = 1  # part of what is kept: raise it when the same file gives other numbers


class FeatureTable:
    """The file at `path`: a header, an id in the first column, and a number in each of the others but `skip`.

    `values` is float32 (ids, width), mapped into memory and made once, see `cache.made_from`. What is missing
    is the mean of its column; `scale`: every column has mean 0 and variance 1 over the table (one that is
    constant is 0). Raises DataError for a file that is no such table, and an id that comes twice.
    """

    def __init__(
        self, path: Path, *, scale: bool, skip: Sequence[str] = (), cache: str | None = None
    ) -> None:
        self.path = path
        choices = hashlib.sha256(f"{FORMAT} {scale} {sorted(skip)}".encode()).hexdigest()[:8]
        found = kept(path, f"{choices}.features", cache, lambda: _parse(path, scale, frozenset(skip)), _fits)
        self.values: NDArray[np.float32] = found[0]
        self.rows = {name: row for row, name in enumerate(found[1]["ids"])}

    @property
    def width(self) -> int:
        """How many numbers an id has."""
        return int(self.values.shape[1])


def _fits(found: Kept) -> bool:
    values, names = found
    ids = names["ids"]
    right = values.dtype == np.float32 and values.ndim == 2 and len(ids) == len(values)
    return right and all(isinstance(name, str) for name in ids)


def _parse(path: Path, scale: bool, skip: frozenset[str]) -> Kept:
    lines: dict[str, int] = {}
    found: list[NDArray[np.float32]] = []
    names: list[str] = []
    columns: list[int] = []
    for line, fields in rows(path):
        if not names:
            columns = [i for i, name in enumerate(fields) if i and name not in skip]
            names = [fields[i] for i in columns]
            if not names:
                raise DataError(f"{path} has no column of numbers beside its first, the ids")
            continue
        name = fields[0]
        if name in lines:
            raise DataError(f"{path}, line {line}: the id {name!r} has been on line {lines[name]} already")
        lines[name] = line
        found.append(np.array(numbers(path, line, names, [fields[i] for i in columns]), np.float32))
    if not found:
        raise DataError(f"{path} is empty: it has a header and no rows")
    values = np.stack(found)
    found.clear()
    for start in range(0, values.shape[1], 64):  # some columns at a time: in float64 all would be large
        values[:, start : start + 64] = _complete(values[:, start : start + 64], scale)
    return values, {"ids": list(lines)}


def _complete(values: NDArray[np.float32], scale: bool) -> NDArray[np.float64]:
    """What is missing filled in, and columns scaled."""
    part = values.astype(np.float64)
    known = ~np.isnan(part)
    mean = np.where(known, part, 0).sum(0) / np.maximum(known.sum(0), 1)
    part = np.where(known, part, mean)
    if scale:
        part -= mean
        spread = part.std(0)
        part /= np.where(spread > 1e-7 * np.abs(mean), spread, 1)  # below: rounding of a constant
        part[:, spread <= 1e-7 * np.abs(mean)] = 0
    return part
