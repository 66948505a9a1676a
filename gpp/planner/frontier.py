"""Partitions worth simulating: what a step takes is not its bottleneck alone.

About (m - 1 + h) t + a: m micro-batches, h levels, t the slowest stage's time without all-reduce, a the
longest all-reduce, which comes once after the last micro-batch. So besides the least bottleneck: the least t
of stages whose all-reduce takes at most a, for several a; then a larger t with fewer levels, as long as the
sum may still be less than the best. Both over the tree and over leaf orders whose stages join branches.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from .estimate import Group, assemble, peak_memory
from .space import CHARGES, Space
from .threshold import Answer, interval_fewest, interval_optimum

REDUCES = 12  # values of the longest all-reduce that are tried
SLACK = 1.2  # an estimate this much above the best may still be the fastest
POINTS = 24  # that are looked for besides the least bottlenecks
COARSE = 2e-3  # two thresholds this close are as good as one


@dataclass(frozen=True, slots=True)
class _Point:
    """A partition and about its step's seconds."""

    seconds: float
    space: Space
    answer: Answer


def frontier(
    space: Space, micro_batch: int, *, limit: int = 12, ignore_memory: bool = False
) -> list[list[Group]]:
    """At most `limit` partitions for one micro-batch size, by their estimated step time; the first has the
    least bottleneck. Each fits the devices' memory under the options' schedule, unless that is ignored.

    Deterministic. About REDUCES interval optima and a few dozen thresholds, see `ThresholdSearch`.
    """
    memory = float("inf") if ignore_memory else space.memory
    found: list[list[Group]] = []
    seen: set[frozenset[Group]] = set()
    for point in _points(space, micro_batch, memory):
        groups = point.space.groups(point.answer)
        if frozenset(groups) in seen:
            continue
        seen.add(frozenset(groups))
        if ignore_memory or peak_memory(assemble(space.problem, groups, micro_batch, "")) <= space.memory:
            found.append(groups)
        if len(found) == limit:
            break
    return found


def _points(space: Space, micro_batch: int, memory: float) -> Iterator[_Point]:
    """One after the other, for who asks for few needs no more than the first."""
    best = float("inf")
    for point in _least(space, micro_batch, memory):
        best = min(best, point.seconds)
        yield point
    others = _Frontier(space, micro_batch, memory, best)
    found = list(islice(others.points(), POINTS))
    rest = [point for point in found if point.seconds <= SLACK * others.best]
    yield from sorted(rest, key=lambda point: point.seconds)


def _least(space: Space, micro_batch: int, memory: float) -> Iterator[_Point]:
    """The least bottleneck, all-reduce and update shared out over the micro-batches, memory charged ever
    more warily."""
    for chain in (space.tree, space.leaves):
        answers = set()
        for wariness in CHARGES if np.isfinite(memory) else CHARGES[:1]:
            if memory == space.memory:
                answer = space.least(chain, micro_batch, wariness)
            else:
                search = space.search(chain, micro_batch, wariness)
                answer = search.answer(memory * wariness.part, precision=space.precision)
            if answer is not None and answer not in answers:
                answers.add(answer)
                yield _Point(_seconds(space, micro_batch, answer), space, answer)


class _Frontier:
    """The best estimate so far, and what is tried to beat it."""

    def __init__(self, space: Space, micro_batch: int, memory: float, best: float) -> None:
        self.space, self.micro_batch, self.memory, self.best = space, micro_batch, memory, best
        self.rounds = space.problem.options.mini_batch // micro_batch

    def points(self) -> Iterator[_Point]:
        """The most promising first: by what a step would take at least."""
        for longest, least in sorted(self.reduces(), key=lambda pair: self.rounds * pair[1] + pair[0]):
            for space in (self.space, *self.space.deferred):
                seconds = _masked(space, self.micro_batch, longest)
                if space is not self.space:
                    if interval_fewest(list(seconds.items()), least * (1 + COARSE)) > space.devices:
                        continue
                if self.rounds * least + longest > SLACK * self.best:
                    break
                if space is self.space:
                    yield from self.shallower(space, seconds, longest, least)
                flat = space.search(space.leaves, self.micro_batch, seconds=seconds)
                answer = flat.answer(self.memory, within=(least, float("inf")), precision=COARSE)
                if answer is not None:
                    yield self.point(space, answer)

    def reduces(self) -> Iterator[tuple[float, float]]:
        """Values that the longest all-reduce may have, and the interval optimum then; only those that lower
        it."""
        before = float("inf")
        for longest in _reduces(self.space, self.micro_batch):
            seconds = _masked(self.space, self.micro_batch, longest)
            least = interval_optimum(list(seconds.items()), self.space.devices)
            if least < before * (1 - COARSE):
                yield longest, least
                before = least

    def shallower(
        self, space: Space, seconds: dict[int, NDArray[np.float64]], longest: float, least: float
    ) -> Iterator[_Point]:
        """The least threshold, then for as long as it may pay the least with fewer levels."""
        search = space.search(space.tree, self.micro_batch, seconds=seconds)
        answer = search.answer(self.memory, within=(least, float("inf")), precision=COARSE)
        while answer is not None:
            yield self.point(space, answer)
            level = answer.level - 1
            if level < 1:
                return
            most = (SLACK * self.best - longest) / (self.rounds - 1 + level)
            answer = search.answer(self.memory, level=level, within=(answer.seconds, most), precision=COARSE)

    def point(self, space: Space, answer: Answer) -> _Point:
        """What comes of an answer."""
        point = _Point(_seconds(space, self.micro_batch, answer), space, answer)
        self.best = min(self.best, point.seconds)
        return point


def _seconds(space: Space, micro_batch: int, answer: Answer) -> float:
    """The estimate: fill, one bottleneck for every micro-batch, drain, and the longest all-reduce."""
    table = space.table(micro_batch)
    rounds = space.problem.options.mini_batch // micro_batch
    reduce = max(float(table.reduces[s.devices][s.start, s.stop]) for s in answer.stages)
    slowest = max(
        float(table.seconds[s.devices][s.start, s.stop])
        - float(table.reduces[s.devices][s.start, s.stop]) / rounds
        for s in answer.stages
    )
    return (rounds - 1 + answer.level) * slowest + reduce


def _masked(space: Space, micro_batch: int, longest: float) -> dict[int, NDArray[np.float64]]:
    """Times without all-reduce; inf where it takes longer than `longest`."""
    table = space.table(micro_batch)
    rounds = space.problem.options.mini_batch // micro_batch
    return {
        d: np.where(table.reduces[d] <= longest, seconds - table.reduces[d] / rounds, np.inf)
        for d, seconds in table.seconds.items()
    }


def _reduces(space: Space, micro_batch: int) -> list[float]:
    """Some values that the longest all-reduce may have: none, and of those of all stages some between the
    least and the largest, in a geometric series."""
    table = space.table(micro_batch)
    found = [table.reduces[d][np.isfinite(seconds)] for d, seconds in table.seconds.items()]
    values = np.unique(np.concatenate(found))
    positive = values[values > 0]
    if len(positive) == 0:
        return [0.0]
    series = np.geomspace(positive[0], positive[-1], REDUCES)
    places = np.unique(np.searchsorted(positive, series * (1 + 1e-9)) - 1)
    return [0.0, *(float(v) for v in positive[places])]
