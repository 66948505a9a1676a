"""Looks for faster configurations on the GPU and writes kernels/tuned/<gpu>.json.

An operator is run once at each of its sizes to learn which configurations it asks for. Of each of these one
field after the other is varied, while that makes the operator faster by more than noise and it computes the
same.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import inf
from typing import Any

import torch

from kernels.tuning import REFUSALS, SPACES, Table, using

from .clock import Clock
from .measure import APART, Work
from .work import distance, prepared, results

GAIN = 0.02  # of the time: less is noise

Asked = tuple[str, str]  # operator and bucket


@dataclass(frozen=True)
class Recorder(Table):
    """A table that notes what it is asked for."""

    asked: dict[Asked, Any] = field(default_factory=dict)

    def find(self, operator: str, bucket: str, static: Any) -> Mapping[str, int]:
        """As a table; the static configuration is kept."""
        self.asked[operator, bucket] = static
        return super().find(operator, bucket, static)


Found = dict[str, dict[str, dict[str, int]]]


def tune(
    works: Sequence[Work],
    clock: Clock,
    gpu: str,
    left: Callable[[], float],
    say: Callable[[str], None],
    start: Table | None = None,
) -> Table:
    """The table for these works, in their order while there is time; what `start` has is kept where it is not
    measured anew."""
    entries: Found = {
        operator: {bucket: dict(changes) for bucket, changes in buckets.items()}
        for operator, buckets in (start.operators if start is not None else {}).items()
    }
    done: set[Asked] = set()
    for work in works:
        if left() <= 0:
            break
        with _session(gpu, entries) as asked:
            with clock.scope():
                results(work.kernel.ours, work.fresh(clock))
        for key in [key for key in asked if key not in done]:
            if left() <= 0:
                break
            done.add(key)
            best = _best(work, clock, gpu, entries, key, asked[key], left)
            buckets = entries.setdefault(key[0], {})
            buckets.pop(key[1], None)
            if best:
                buckets[key[1]] = best
            say(f"{key[0]} {key[1]}: {best or 'as it is'}")
        clock.forget()
    return Table(gpu, {operator: buckets for operator, buckets in entries.items() if buckets})


def _best(
    work: Work, clock: Clock, gpu: str, entries: Found, key: Asked, static: Any, left: Callable[[], float]
) -> dict[str, int]:
    """The changes to the static configuration that make the work fastest; none if none does."""
    operator, bucket = key
    with clock.scope():
        sets = work.inputs(clock)
        expected = results(work.kernel.ours, work.fresh(clock))

    def seconds(changes: Mapping[str, int]) -> float:
        trial = {**entries, operator: {**entries.get(operator, {}), bucket: dict(changes)}}
        with using(Table(gpu, trial)):
            try:
                return _seconds(work, clock, sets, expected)
            except REFUSALS:
                return inf  # the chip has not the memory for it

    best: dict[str, int] = {}
    record = seconds(best)
    for _ in range(2):
        before = record
        for name, values in SPACES[operator].options.items():
            now = best.get(name, getattr(static, name))
            for value in values:
                if value != now and left() > 0:
                    took = seconds({**best, name: value})
                    if took < (1 - GAIN) * record:
                        best, record = {**best, name: value}, took
        if record == before:
            break
    return {name: value for name, value in best.items() if value != getattr(static, name)}


def _seconds(work: Work, clock: Clock, sets: Sequence[Any], expected: Sequence[torch.Tensor]) -> float:
    """GPU seconds of all passes; infinity if the results are others."""
    function = work.kernel.ours
    which = "both" if "both" in work.kernel.passes else work.kernel.passes[0]
    with clock.scope():
        if distance(results(function, work.fresh(clock)), expected) > APART[work.dtype]:
            return inf
        calls = [prepared(function, inputs, which) for inputs in sets]
    return clock.gpu(calls).median


@contextmanager
def _session(gpu: str, entries: Found) -> Iterator[dict[Asked, Any]]:
    """What is asked for meanwhile."""
    recorder = Recorder(gpu, entries)
    with using(recorder):
        yield recorder.asked
