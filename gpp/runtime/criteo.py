"""Criteo's click logs as `gpp.models.dlrm.Dlrm` reads them: the files themselves, nothing prepared.

A line of the display advertising challenge (train.txt) and of a day of the 1 TB logs (day_0 to day_23) is a
click: a label, 13 whole numbers and 26 categories as hexadecimal numbers of 32 bits, with tabs between them;
what is not known is empty. They become inputs as in the reference implementation of DLRM (Naumov et al. 2019,
github.com/facebookresearch/dlrm): a number x is log(1 + max(x, 0)), a category its remainder by the rows of
a table, and what is empty counts as 0.
"""

import re
from collections.abc import Sequence
from glob import glob
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .cache import missing
from .data import DataError, Indices, checked
from .number_fields import Fields, split, whole_numbers
from .text_lines import TextLines

NUMBERS, CATEGORIES = 13, 26
COLUMNS = 1 + NUMBERS + CATEGORIES


class Criteo:
    """The lines of `files` (paths or patterns such as day_*, gzip or not) as samples, in order.

    `dense_i`, for `dense` of them, holds `features` numbers: float32 (n, features). `sparse_i`, for `tables`
    of them, holds `bag` categories: int64 (n, bag), below `rows`. Both take the columns of a line in their
    order, those that are left over are not read. `label` is float32 (n,). `cache`: the folder of what is
    made once of the files, see `TextLines`.

    Raises DataError for files that are missing or empty, and for more inputs than a line has columns;
    reading raises it for a damaged line.
    """

    def __init__(
        self,
        files: Sequence[str] | str | None,
        *,
        dense: int,
        features: int,
        tables: int,
        rows: int,
        bag: int,
        cache: str | None = None,
    ) -> None:
        _check_sizes(dense, features, tables, rows, bag)
        self._rows = rows
        self._columns = {"label": [0]}
        for i in range(dense):
            self._columns[f"dense_{i}"] = [1 + i * features + j for j in range(features)]
        for i in range(tables):
            self._columns[f"sparse_{i}"] = [1 + NUMBERS + i * bag + j for j in range(bag)]
        self.keys = (*list(self._columns)[1:], "label")
        self._files = [TextLines(path, cache) for path in _paths(files)]
        self._starts = np.cumsum([0, *map(len, self._files)])

    @staticmethod
    def problems(
        files: Sequence[str] | str | None = None,
        *,
        dense: int,
        features: int,
        tables: int,
        rows: int,
        bag: int,
        cache: str | None = None,
    ) -> list[str]:
        """What is wrong with such arguments, as far as it can be said without reading."""
        found = []
        try:
            _check_sizes(dense, features, tables, rows, bag)
        except DataError as error:
            found.append(str(error))
        try:
            return found + missing(_paths(files))
        except DataError as error:
            return [*found, str(error)]

    def __len__(self) -> int:
        return int(self._starts[-1])

    def read(self, indices: Sequence[int], keys: Sequence[str]) -> dict[str, Tensor]:
        """The samples at `indices`, see the class; of their lines only the columns of `keys` are parsed."""
        rows = checked(indices, len(self), keys, self.keys)
        found = {key: np.empty(self._shape(key, len(rows)), _dtype(key)) for key in keys}
        number = np.searchsorted(self._starts, rows, side="right") - 1
        for file in np.unique(number) if keys else ():
            here = np.flatnonzero(number == file)
            part = self._parse(self._files[file], rows[here] - self._starts[file], keys)
            for key, values in part.items():
                found[key][here] = values
        return {key: torch.from_numpy(values) for key, values in found.items()}

    def _shape(self, key: str, count: int) -> tuple[int, ...]:
        return (count,) if key == "label" else (count, len(self._columns[key]))

    def _parse(self, lines: TextLines, rows: Indices, keys: Sequence[str]) -> dict[str, NDArray[np.generic]]:
        fields = split(lines.read(rows), COLUMNS, lines.path, rows)
        return {key: self._values(key, fields) for key in keys}

    def _values(self, key: str, fields: Fields) -> NDArray[np.generic]:
        columns = self._columns[key]
        if key.startswith("sparse"):
            return whole_numbers(fields, columns, base=16, digits=8) % self._rows
        numbers = whole_numbers(fields, columns, base=10, digits=18)
        if key == "label":
            fields.require(((numbers == 0) | (numbers == 1)) & fields.filled(columns), columns, "0 or 1")
            return numbers[:, 0]
        return np.log1p(np.maximum(numbers, 0))


def _dtype(key: str) -> type[np.generic]:
    return np.int64 if key.startswith("sparse") else np.float32


def _check_sizes(dense: int, features: int, tables: int, rows: int, bag: int) -> None:
    if min(dense, tables) < 0 or min(features, rows, bag) < 1:
        raise DataError(
            f"towers and tables must be at least 0, their sizes at least 1: dense is {dense}, features "
            f"{features}, tables {tables}, rows {rows}, bag {bag}"
        )
    if dense * features > NUMBERS:
        raise DataError(
            f"a line of Criteo's files has {NUMBERS} numbers, {dense} towers of {features} need "
            f"{dense * features}: use model.dense=1 model.features={NUMBERS}, or model.dense={NUMBERS} "
            "model.features=1"
        )
    if tables * bag > CATEGORIES:
        raise DataError(
            f"a line of Criteo's files has {CATEGORIES} categories, {tables} bags of {bag} need "
            f"{tables * bag}: use model.tables={CATEGORIES} model.bag=1"
        )


def _paths(files: Sequence[str] | str | None) -> list[Path]:
    """The files that are named, in order; those of a pattern with day_2 before day_10."""
    names = [files] if isinstance(files, str) else list(files or ())
    if not names:
        raise DataError("no file of Criteo's is named: data.files=[day_0,day_1], or data.files='day_*'")
    found: list[Path] = []
    for name in map(str, names):
        if not re.search(r"[*?\[]", name):
            found.append(Path(name))
            continue
        matching = sorted(glob(name), key=lambda path: [int(t) if t.isdigit() else t for t in _parts(path)])
        if not matching:
            raise DataError(f"no file has a name like {name}")
        found += map(Path, matching)
    return found


def _parts(path: str) -> list[str]:
    """Text, digits, text, digits, ..."""
    return re.split(r"(\d+)", path)
