"""Drug responses as `gpp.models.candle_uno.CandleUno` reads them, joined from tables of text.

As in the benchmark (github.com/ECP-CANDLE/Benchmarks, Pilot1/Uno): a table of responses, a row for the growth
of a cell line under one drug or two, and tables of features of cells and of drugs. Features are imputed and,
but for fingerprints, scaled; a row whose cell or drug has no features is left out. Where there is no second
drug the first comes in two halves, each at half the concentration (doses are -log10 of it): the benchmark
draws a share at random.
"""

import hashlib
import logging
from array import array
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gpp.models.candle_uno import branch_features

from .cache import missing
from .data import DataError, Indices, checked
from .delimited import MISSING, Kept, kept, numbers, positions, rows
from .feature_table import FeatureTable

log = logging.getLogger(__name__)

FORMAT = 1  # part of what is kept: raise it when the same file gives other rows
_TEXTS, _NUMBERS = ("cell", "drug1", "drug2"), ("dose1", "dose2", "growth")
_ROW = np.dtype([*((name, "<i4") for name in _TEXTS), *((name, "<f4") for name in _NUMBERS)])
_NONE = -1  # the code of a drug that there is not
_UNSCALED = ("drug_fingerprints",)  # bits stay bits
_FEATURES = {  # feature set: whose, from which table
    "cell_rnaseq": ("cell", "cell_rnaseq"),
    "drug1_descriptors": ("drug1", "drug_descriptors"),
    "drug1_fingerprints": ("drug1", "drug_fingerprints"),
    "drug2_descriptors": ("drug2", "drug_descriptors"),
    "drug2_fingerprints": ("drug2", "drug_fingerprints"),
}
_HALF = np.float32(np.log10(2.0))  # what -log10 of a concentration rises by when it is halved


class DrugResponseFiles:
    """The rows of the table `responses` whose ids the tables of features have.

    `columns` says which column of it is cell, drug1, drug2, dose1, dose2 and growth (drug2 and dose2 null: no
    second drugs). The keys are the model's, `features` and `branches` as it has them: dose1 and dose2
    float32 (n, 1), cell_rnaseq, drug1_descriptors, ... float32 (n, columns of their table), and `growth`
    float32 (n,), the file's times `growth_scale`. `skip` names columns of the tables of features that are
    none. `cache`: the folder of what is made once of the files, see `cache.made_from`.

    Raises DataError for files that are missing, damaged or do not fit the model's widths, and if no row is
    left.
    """

    def __init__(
        self,
        *,
        responses: str | None,
        cell_rnaseq: str | None = None,
        drug_descriptors: str | None = None,
        drug_fingerprints: str | None = None,
        features: Mapping[str, int],
        branches: int,
        columns: Mapping[str, str | None],
        growth_scale: float = 1.0,
        skip: Sequence[str] = (),
        cache: str | None = None,
    ) -> None:
        self._source = _sources(features, branches)
        self.keys = (*self._source, "growth")
        self._scale = np.float32(growth_scale)
        files = {
            "cell_rnaseq": cell_rnaseq,
            "drug_descriptors": drug_descriptors,
            "drug_fingerprints": drug_fingerprints,
        }
        self._tables = _tables(self._source, files, skip, cache)
        _check_widths(features, set(self._source.values()), self._tables)
        path = _named("responses", responses)
        self._rows, self._names = _responses(path, columns, cache)
        self._places = {
            (who, table): self._found(who, table)
            for who, table in (_FEATURES[s] for s in self._source.values() if s in _FEATURES)
        }
        self._kept = self._joined(path)

    @staticmethod
    def problems(
        *, features: Mapping[str, int], branches: int, columns: Mapping[str, str | None], **given: Any
    ) -> list[str]:
        """What is wrong with the arguments of the class, as far as it can be said without reading."""
        found, names = [], ["responses"]
        try:
            names += _wanted(_sources(features, branches))
        except ValueError as error:
            found.append(str(error))
        try:
            _check_columns(columns, str(given.get("responses")))
        except DataError as error:
            found.append(str(error))
        found += [_unnamed(name) for name in names if given.get(name) is None]
        return found + missing(Path(given[name]) for name in names if given.get(name) is not None)

    def __len__(self) -> int:
        return len(self._kept)

    def read(self, indices: Sequence[int], keys: Sequence[str]) -> dict[str, Tensor]:
        """The samples at `indices`, see the class; tables that no key of `keys` is from are not touched."""
        wanted = self._rows[self._kept[checked(indices, len(self), keys, self.keys)]]
        return {key: torch.from_numpy(self._of(key, wanted)) for key in keys}

    def _of(self, key: str, wanted: NDArray[np.void]) -> NDArray[np.float32]:
        if key == "growth":
            growth: NDArray[np.float32] = wanted["growth"] * self._scale
            return growth
        source = self._source[key]
        if source in _FEATURES:
            who, table = _FEATURES[source]
            return self._tables[table].values[self._places[who, table][_codes(wanted, who)]]
        single = wanted["drug2"] == _NONE
        dose: NDArray[np.float32] = np.where(single, wanted["dose1"] + _HALF, wanted[source])
        return dose[:, None]

    def _found(self, who: str, table: str) -> Indices:
        """The row of `table` for each code, -1 where it has none."""
        known = self._tables[table].rows
        return np.array([known.get(name, -1) for name in self._names[_book(who)]], np.int64)

    def _joined(self, path: Path) -> Indices:
        """The rows of which all features are there."""
        good = np.ones(len(self._rows), np.bool_)
        lacking = ""
        for (who, table), place in self._places.items():
            here = place[_codes(self._rows, who)] >= 0
            if not lacking and not here.all():
                name = self._names[_book(who)][_codes(self._rows, who)[np.argmin(here)]]
                lacking = f"the first is {who} {name!r}, which {self._tables[table].path} has not"
            good &= here
        left = np.flatnonzero(good)
        if not len(left):
            raise DataError(f"no row of {path} has an id that all tables of features have: {lacking}")
        if lacking:
            log.info(
                "%s: %d of %d rows left out, their features are missing; %s",
                *(path, len(good) - len(left), len(good), lacking),
            )
        return left


def _codes(wanted: NDArray[np.void], who: str) -> NDArray[np.int32]:
    codes: NDArray[np.int32] = wanted[who]
    return np.where(codes == _NONE, wanted["drug1"], codes) if who == "drug2" else codes


def _book(who: str) -> str:
    return "cells" if who == "cell" else "drugs"


def _named(key: str, path: str | None) -> Path:
    if path is None:
        raise DataError(_unnamed(key))
    return Path(path)


def _unnamed(key: str) -> str:
    return f"data.{key} is missing: name the file, data.{key}=path"


def _sources(features: Mapping[str, int], branches: int) -> dict[str, str]:
    """The feature set of each branch's key."""
    return dict(zip(branch_features(features, branches), cycle(features), strict=False))


def _tables(
    sources: Mapping[str, str], files: Mapping[str, str | None], skip: Sequence[str], cache: str | None
) -> dict[str, FeatureTable]:
    """The tables that feature sets are from."""
    return {
        name: FeatureTable(_named(name, files[name]), scale=name not in _UNSCALED, skip=skip, cache=cache)
        for name in _wanted(sources)
    }


def _wanted(sources: Mapping[str, str]) -> list[str]:
    """The names of the tables that feature sets are from."""
    for source in sources.values():
        if source not in _FEATURES and source not in ("dose1", "dose2"):
            known = ", ".join(("dose1", "dose2", *_FEATURES))
            raise DataError(f"the files have no feature set {source!r} of model.features; they have {known}")
    return list(dict.fromkeys(_FEATURES[source][1] for source in sources.values() if source in _FEATURES))


def _check_widths(features: Mapping[str, int], used: set[str], tables: Mapping[str, FeatureTable]) -> None:
    wrong = []
    for source in (name for name in features if name in used):
        width = tables[_FEATURES[source][1]].width if source in _FEATURES else 1
        if features[source] != width:
            wrong.append(f"model.features.{source}={width}")
    if wrong:
        raise DataError(f"the model has other widths than the files: use {' '.join(wrong)}")


def _responses(path: Path, columns: Mapping[str, str | None], cache: str | None) -> Kept:
    """The rows as numbers and codes, and the names of the codes; made once."""
    _check_columns(columns, path)
    choices = hashlib.sha256(f"{FORMAT} {sorted(columns.items())}".encode()).hexdigest()[:8]
    return kept(path, f"{choices}.responses", cache, lambda: _parse(path, columns), _fits)


def _fits(found: Kept) -> bool:
    table, names = found
    if (
        table.dtype != _ROW
        or table.ndim != 1
        or not all(isinstance(n, str) for b in names.values() for n in b)
    ):
        return False
    least = {"cell": 0, "drug1": 0, "drug2": _NONE}
    return all(least[who] <= table[who].min() and table[who].max() < len(names[_book(who)]) for who in _TEXTS)


def _check_columns(columns: Mapping[str, str | None], path: Path | str) -> None:
    for name in (*_TEXTS, *_NUMBERS):
        if columns.get(name) is None and name not in ("drug2", "dose2"):
            raise DataError(f"data.columns.{name} must name a column of {path}")
    unknown = [name for name in columns if name not in (*_TEXTS, *_NUMBERS)]
    if unknown:
        raise DataError(f"there is no data.columns.{unknown[0]}; it has {', '.join((*_TEXTS, *_NUMBERS))}")


def _parse(path: Path, columns: Mapping[str, str | None]) -> Kept:
    known = [name for name in (*_TEXTS, *_NUMBERS) if columns.get(name) is not None]
    names = [str(columns[name]) for name in known]
    books: dict[str, dict[str, int]] = {"cells": {}, "drugs": {}}
    codes = {name: array("i") for name in _TEXTS}
    values = {name: array("f") for name in _NUMBERS}
    lines = rows(path)
    where = dict(zip(known, positions(path, next(lines)[1], names), strict=True))
    for line, fields in lines:
        for who in _TEXTS:
            text = fields[where[who]] if who in where else ""
            if text.lower() not in MISSING:
                book = books[_book(who)]
                codes[who].append(book.setdefault(text, len(book)))
            elif who == "drug2":
                codes[who].append(_NONE)
            else:
                raise DataError(
                    f"{path}, line {line}: column {columns[who]!r} is empty, it must name a {who}"
                )
        read = [name for name in _NUMBERS if name in where]
        texts = [fields[where[name]] for name in read]
        found = dict(zip(read, numbers(path, line, [str(columns[n]) for n in read], texts), strict=True))
        if codes["drug2"][-1] == _NONE:
            found["dose2"] = 0.0
        for name in _NUMBERS:
            value = found.get(name, float("nan"))
            if value != value:
                raise DataError(f"{path}, line {line}: column {columns.get(name)!r} has no number")
            values[name].append(value)
    table = np.empty(len(codes["cell"]), _ROW)
    for name, column in (codes | values).items():
        table[name] = column
    if not len(table):
        raise DataError(f"{path} is empty: it has a header and no rows")
    return table, {name: list(book) for name, book in books.items()}
