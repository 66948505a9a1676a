"""Whole numbers out of many lines of text at once: array operations where a loop would hold up the rank.

The interpreter's lock is let go inside of them, so a stage computes meanwhile.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .data import DataError, Indices

_DIGITS = np.full(256, 99, np.int64)  # the value of a byte as a digit
for _value, _digit in enumerate(b"0123456789abcdef"):
    _DIGITS[_digit] = _value
    _DIGITS[ord(chr(_digit).upper())] = _value

Whole = NDArray[np.int64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True, eq=False, slots=True)
class Fields:
    """Where each field of some lines starts and stops in `text`: arrays (lines, columns)."""

    text: NDArray[np.uint8]
    starts: Whole
    stops: Whole
    path: Path
    rows: Indices  # of the lines in the file, from 0

    def filled(self, columns: Sequence[int]) -> Mask:
        """Which fields are not empty, (lines, len(columns))."""
        return self.stops[:, columns] > self.starts[:, columns]

    def require(self, good: Mask, columns: Sequence[int], what: str) -> None:
        """Raise DataError naming the first field of `columns` that is not `good`, and `what` it must be."""
        if good.all():
            return
        line, position = np.argwhere(~good)[0]
        column = columns[position]
        text = self.text[self.starts[line, column] : self.stops[line, column]].tobytes()
        raise DataError(
            f"{self.path}, line {self.rows[line] + 1}: column {column + 1} must be {what}, it is "
            f"{text.decode(errors='replace')!r}"
        )


def split(lines: Sequence[bytes], columns: int, path: Path, rows: Indices) -> Fields:
    """The fields of tab-separated `lines`, which are those at `rows` of the file at `path`. Raises DataError
    for a line that has not so many columns."""
    text = np.frombuffer(b"".join(line + b"\t" for line in lines), np.uint8)
    stops = np.flatnonzero(text == ord("\t"))
    ends = np.cumsum([len(line) + 1 for line in lines]) - 1
    if len(stops) != columns * len(lines) or not np.array_equal(stops[columns - 1 :: columns], ends):
        counts = [line.count(b"\t") + 1 for line in lines]
        bad = next(i for i, count in enumerate(counts) if count != columns)
        raise DataError(
            f"{path}, line {rows[bad] + 1}: it has {counts[bad]} columns with tabs between them, "
            f"it must have {columns}"
        )
    starts = np.concatenate([[0], stops + 1])[:-1]
    return Fields(text, starts.reshape(-1, columns), stops.reshape(-1, columns), path, rows)


def whole_numbers(fields: Fields, columns: Sequence[int], *, base: int, digits: int) -> Whole:
    """The numbers in `columns`, (lines, len(columns)); an empty field is 0. Raises DataError for what is no
    number of at most `digits` digits; a minus is for base 10 alone."""
    starts, stops = fields.starts[:, columns], fields.stops[:, columns]
    last = len(fields.text) - 1
    negative = (
        (fields.text[np.minimum(starts, last)] == ord("-")) if base == 10 else np.zeros_like(starts, bool)
    )
    starts = starts + negative
    sizes = stops - starts
    good = (sizes <= digits) & ~(negative & (sizes == 0))
    value = np.zeros_like(starts)
    for i in range(min(int(sizes.max(initial=0)), digits)):
        inside = i < sizes
        digit = _DIGITS[fields.text[np.minimum(starts + i, last)]]
        good &= ~inside | (digit < base)
        value = np.where(inside, value * base + digit, value)
    kind = "a whole number" if base == 10 else f"a hexadecimal number of at most {digits} digits"
    fields.require(good, columns, f"{kind}, or empty")
    signed: Whole = np.where(negative, -value, value)
    return signed
