"""Tables as text: rows of fields between tabs or commas under a header, and what is kept of them."""

import csv
import gzip
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from .cache import damaged, made_from
from .data import DataError

MISSING = frozenset(("", "-", "na", "n/a", "nan", "null", "none"))  # in any case, spaces around left aside

Row = tuple[int, list[str]]  # the number of the line that it ends in, from 1, and its fields
Kept = tuple[NDArray[Any], dict[str, Any]]


def rows(path: Path) -> Iterator[Row]:
    """The rows of a table, the header first; gzip or not, quoted as CSV is.

    What the header has between its fields (tabs, else commas) all rows have. Blank lines do not count.
    Raises DataError for a file that is missing or empty, no text, and for a row with another number of
    columns than the header.
    """
    try:
        with path.open("rb") as raw:
            packed = raw.read(2) == b"\x1f\x8b"
        with (gzip.open if packed else open)(path, "rt", encoding="utf-8-sig", newline="") as file:
            first = file.readline()
            file.seek(0)
            reader = csv.reader(file, delimiter="\t" if "\t" in first else ",")
            width = 0
            for fields in reader:
                if not fields:
                    continue
                width = width or len(fields)
                if len(fields) != width:
                    raise DataError(
                        f"{path}, line {reader.line_num}: it has {len(fields)} columns, "
                        f"the header has {width}"
                    )
                yield reader.line_num, fields
            if not width:
                raise DataError(f"{path} is empty: it has no header")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no text in UTF-8: {error}") from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path} is a damaged gzip file: {error}") from error
    except (OSError, csv.Error) as error:
        raise DataError(f"the file {path} cannot be read: {error}") from error


def positions(path: Path, header: Sequence[str], wanted: Sequence[str]) -> list[int]:
    """Where the columns `wanted` are. Raises DataError for one that the header lacks."""
    for name in wanted:
        if name not in header:
            known = [
                field if field.isprintable() and len(field) <= 60 else ascii(field[:57]) for field in header
            ]
            shown = ", ".join(known[:8]) + (", ..." if len(header) > 8 else "")
            raise DataError(f"{path} has no column {name!r}; it has {shown}")
    return [header.index(name) for name in wanted]


def numbers(path: Path, line: int, names: Sequence[str], fields: Sequence[str]) -> list[float]:
    """The fields as numbers, NaN for one that is missing. Raises DataError naming the first that is none."""
    try:
        found = list(map(float, fields))
    except ValueError:
        found = [_number(path, line, name, field) for name, field in zip(names, fields, strict=True)]
    if float("inf") in found or float("-inf") in found:
        position = next(i for i, value in enumerate(found) if value in (float("inf"), float("-inf")))
        raise DataError(f"{path}, line {line}: column {names[position]!r} is infinite")
    return found


def kept(
    source: Path, what: str, cache: str | None, make: Callable[[], Kept], fits: Callable[[Kept], bool]
) -> Kept:
    """The array, mapped into memory, and the names that `make` finds in `source`, made once for all runs.
    Raises DataError where the file that was made cannot be read any more, or does not hold what `fits`."""

    def write(file: BinaryIO) -> None:
        array, names = make()
        np.save(file, array, allow_pickle=False)
        file.write(json.dumps(names).encode())  # behind the array, where np.load does not look

    path = made_from(source, what, cache, write)
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        with path.open("rb") as file:
            file.seek(array.offset + array.nbytes)
            found = array, json.loads(file.read().decode())
        good = fits(found)
    except Exception as error:  # numpy parses a header as Python does its source: it may raise anything
        raise damaged(path, source, type(error).__name__) from error
    if not good:
        raise damaged(path, source, "its parts do not belong together")
    return found


def _number(path: Path, line: int, name: str, field: str) -> float:
    if field.strip().lower() in MISSING:
        return float("nan")
    try:
        return float(field)
    except ValueError:
        raise DataError(f"{path}, line {line}: column {name!r} must be a number, it is {field!r}") from None
