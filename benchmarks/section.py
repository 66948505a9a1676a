"""A section of the benchmark: what was measured, what was to be reached, and its rows."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, log

Cell = str | int | float | bool | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """`what` was measured, `reach` and `measured` in words, `reached` None where nothing was to be reached.

    `rows` have a cell for each of `columns`; `note` says what the numbers are made of.
    """

    name: str
    what: str
    reach: str
    measured: str
    reached: bool | None
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""


def geometric_mean(values: Sequence[float]) -> float:
    """Of positive numbers. Raises ValueError for none."""
    if not values:
        raise ValueError("the mean of no numbers is not defined")
    return exp(sum(log(value) for value in values) / len(values))


def unmeasured(name: str, what: str, reach: str, why: str) -> Section:
    """A section that could not be run here, and why."""
    return Section(
        name=name, what=what, reach=reach, measured=why, reached=None, columns=(), rows=(), note=""
    )
