"""Loss and metrics of a step from the terms that the stages report, in float64; and predictions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from gpp.program.stage import Results, TermSum

from .data import DataError

Terms = Mapping[str, Sequence[tuple[int, int, float]]]  # by name: (start, stop, value) of each piece


@dataclass(frozen=True, slots=True)
class Total:
    """A result's numerator and divisor, to be added up over steps."""

    value: float
    weight: float

    def __add__(self, other: "Total") -> "Total":
        return Total(self.value + other.value, self.weight + other.weight)

    @property
    def mean(self) -> float:
        """The result; not a number where nothing had weight."""
        return self.value / self.weight if self.weight else float("nan")


@dataclass(frozen=True)
class Prediction:
    """A value for each of some samples of a mini-batch, on the host."""

    name: str
    start: int
    stop: int
    value: Tensor


def add_up(totals: dict[str, Total], more: Mapping[str, Total]) -> None:
    """Add results to those of the same names, in place."""
    for name, total in more.items():
        totals[name] = totals.get(name, Total(0.0, 0.0)) + total


def combine(result: TermSum, terms: Terms, samples: int) -> Total:
    """A result over `samples` samples from its terms' values on pieces of them.

    The pieces are added in the order of their samples, whichever rank they come from.
    """
    if result.weight is None:
        value = result.constant * samples
        for name, coefficient in result.terms:
            value += coefficient * sum(v * (stop - start) for start, stop, v in sorted(terms[name]))
        return Total(value, float(samples))
    return Total(_sum(result.terms, terms), _sum(result.weight, terms))


def _sum(combination: Sequence[tuple[str, float]], terms: Terms) -> float:
    return sum(c * sum(v for _, _, v in sorted(terms[name])) for name, c in combination)


def local_weight(result: TermSum, terms: Terms) -> float:
    """What a rank's own terms add to the weight of a (sum, weight) result."""
    assert result.weight is not None
    return _sum([(n, c) for n, c in result.weight if n in terms], terms)


def check_labels(results: Results, terms: Terms) -> None:
    """Raise DataError where a mean loss left out labels in one of several micro-batches."""
    for name in results.ignored:
        pieces = sorted(terms[name])
        found = next(((start, stop) for start, stop, count in pieces if count), None)
        if found is not None and len(pieces) > 1:
            raise DataError(
                f"among samples {found[0]} to {found[1] - 1} of a mini-batch are labels that the loss leaves "
                "out (cross entropy ignores -100): the mean of micro-batch means is then not the loss. "
                "Return (sum, weight) from forward: cross_entropy(..., reduction='sum') and the number of "
                "labels that count; or set train.micro_batch to the whole mini-batch"
            )
