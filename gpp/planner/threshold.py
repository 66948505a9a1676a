"""The least bottleneck: a search over thresholds, each answered by the fewest devices (GraphPipe §5)."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from gpp.plan import Policy

from .fewest import Fewest
from .intervals import Intervals
from .outline import Chain
from .sides import INF, Found, Table

LEVELS = 40  # from here on, depth is charged as the deepest
FIRST_LEVELS = 8  # tried first, then twice as many: most plans are shallow, and the programme is quadratic
NEAR = 0.01  # first step above a threshold that is too low, relative
DIRECT = 64  # devices up to which the interval optimum is found for all device counts at once
TOLERANCE = 1e-9  # equal branches differ in the last bits of their sums
MEMORY_STEPS = 8  # halvings of the peak memory among plans of equal bottleneck


@dataclass(frozen=True, slots=True)
class Answer:
    """Stages whose slowest takes `seconds` a micro-batch; the first are at `level` at most."""

    seconds: float
    level: int
    stages: tuple[Found, ...]


@dataclass(frozen=True, slots=True)
class Charge:
    """What the memory of a stage at a level is taken to be; `rounds` are the micro-batches of a step.

    Its messages come from one level above at least; a stage before a longer branch, or at the far end of a
    skip edge, is higher: `margin` more levels are charged, and with `wary` every reader of a tensor as a
    stage of its own.
    """

    policy: Policy
    rounds: int
    margin: int = 0
    wary: bool = False

    def held(self, level: int) -> int:
        """Micro-batches in flight at a level; `gpp.schedule.inflight` for equal micro-batches."""
        if self.policy.name == "gpipe":
            return self.rounds
        return min(level + self.policy.extra_warm_up * (level - 1), self.rounds)


class ThresholdSearch:
    """Stages for one micro-batch size on at most `devices` devices.

    The thresholds are the distinct times in the table, so the answer is exact. The optimum over all
    partitions of the leaf order into intervals, whatever is in flight, is where the search starts, and mostly
    where it ends: see `interval_optimum`, then a few times `Fewest`. `seconds` are the table's unless given.
    """

    def __init__(
        self,
        chain: Chain,
        intervals: Intervals,
        devices: int,
        charge: Charge,
        seconds: dict[int, NDArray[np.float64]] | None = None,
    ) -> None:
        self.chain, self.intervals, self.devices, self.charge = chain, intervals, devices, charge
        self.seconds = intervals.seconds if seconds is None else seconds
        self.depth = min(devices, chain.depth)
        self.top = min(self.depth, LEVELS)
        self.enough = min(self.top, FIRST_LEVELS)  # levels that decided the last threshold

    def answer(
        self,
        memory: float,
        *,
        level: int | None = None,
        within: tuple[float, float] = (0.0, float("inf")),
        precision: float = 0.0,
    ) -> Answer | None:
        """The least bottleneck with at most `memory` bytes on a device; then the least level. None: nothing
        fits. With `level`: of the plans that are no deeper. Bottlenecks outside `within` are of no interest;
        the answer is within a relative `precision` of the least."""
        level = self.top if level is None else min(level, self.top)
        fits = self._fits(memory)
        least = within[0] or interval_optimum(
            [(d, np.where(fits[d] > 0, self.seconds[d], np.inf)) for d in fits], self.devices
        )
        if not np.isfinite(least):
            return None
        times = self.times(least * (1 - TOLERANCE))
        times = times[times <= within[1]]
        if not len(times):
            return None
        found = self._solve(float(times[0]), fits, level)
        if found is not None:
            return found
        last = self._solve(float(times[-1]), fits, level)
        if last is None:
            return None
        low, high, step = 0, len(times) - 1, NEAR  # times[low] is infeasible, times[high] is not
        found = last
        while times[low] * (1 + step) < times[high]:  # mostly the answer is not far
            middle = max(low + 1, int(np.searchsorted(times, times[low] * (1 + step))))
            nearer = self._solve(float(times[middle]), fits, level)
            if nearer is not None:
                high, found = middle, nearer
                break
            low, step = middle, 4 * step
        while high - low > 1 and times[high] > times[low] * (1 + precision):
            middle = (low + high) // 2
            better = self._solve(float(times[middle]), fits, level)
            if better is None:
                low = middle
            else:
                high, found = middle, better
        return found

    def times(self, least: float = 0.0) -> NDArray[np.float64]:
        """The thresholds: all times of the table from `least` on, ascending."""
        return self._times[np.searchsorted(self._times, least) :]

    @cached_property
    def _times(self) -> NDArray[np.float64]:
        return np.unique(np.concatenate([t[np.isfinite(t)] for t in self.seconds.values()]))

    def leaner(self, answer: Answer) -> Answer:
        """An answer with (about) the least peak memory among those with the same bottleneck."""
        best, high = answer, self.peak(answer)
        low = self.heaviest_run()[1]
        for _ in range(MEMORY_STEPS):
            if high - low <= 0.01 * high:
                break
            middle = (low + high) / 2
            found = self._solve(answer.seconds, self._fits(middle), self.top)
            if found is None:
                low = middle
            else:
                best, high = found, self.peak(found)
        return best

    def peak(self, answer: Answer) -> float:
        """Bytes charged to the fullest device."""
        return max(
            float(self._memory(stage.devices, stage.level)[stage.start, stage.stop])
            for stage in answer.stages
        )

    def heaviest_run(self) -> tuple[int, float]:
        """The run that needs the most memory, and how much, messages left out: no plan needs less."""
        table = self.intervals
        samples = self.charge.held(1) * table.micro_batch
        each = np.full(len(table.static) - 1, np.inf)
        for degree, seconds in self.seconds.items():
            need = np.diagonal(table.static + table.stash * samples / degree, 1)
            each = np.minimum(each, np.where(np.isfinite(np.diagonal(seconds, 1)), need, np.inf))
        return int(each.argmax()), float(each.max())

    def smallest(self) -> float:
        """About the least memory of a device with which there is a plan at all; inf: there is none."""
        if self._solve(np.inf, self._fits(np.inf), self.top) is None:
            return float("inf")
        low, high = (
            0.0,
            max(
                float(self._memory(d, self.top)[np.isfinite(seconds)].max(initial=0.0))
                for d, seconds in self.seconds.items()
            ),
        )
        while high - low > 0.005 * high:
            middle = (low + high) / 2
            found = self._solve(np.inf, self._fits(middle), self.top)
            low, high = (middle, high) if found is None else (low, middle)
        return high

    def _held(self, level: int) -> tuple[int, int]:
        """Micro-batches in flight of a stage at a level and of those that send to it."""
        charge = self.charge
        level = self.depth if level == self.top else level
        upstream = max(level + 1, min(level + 1 + charge.margin, self.depth))
        return charge.held(level), charge.held(upstream)

    def _memory(self, degree: int, level: int) -> NDArray[np.float64]:
        return self.intervals.memory(degree, *self._held(level), wary=self.charge.wary)

    def _fits(self, memory: float) -> dict[int, NDArray[np.int64]]:
        """By degree: the highest level at which an interval fits; 0 where none does or it is no stage."""
        fits = {}
        for degree, seconds in self.seconds.items():
            least = self._memory(degree, 1) <= memory
            most = self._memory(degree, self.top) <= memory
            levels = np.where(most, self.top, least.astype(np.int64))
            between = np.nonzero(least & ~most & np.isfinite(seconds))
            levels[between] = self._highest(self.intervals.pick(between), degree, memory)
            levels[~np.isfinite(seconds)] = 0
            fits[degree] = levels
        return fits

    def _highest(self, part: Intervals, degree: int, memory: float) -> NDArray[np.int64]:
        """The highest level at which each interval fits, known to be at least 1 and below the top."""
        own, upstream = np.array([self._held(level) for level in range(1, self.top + 1)]).T
        low = np.zeros(len(part.static), dtype=np.int64)
        high = np.full_like(low, self.top - 1)
        while (low + 1 < high).any():
            middle = (low + high) // 2
            fit = part.memory(degree, own[middle], upstream[middle], wary=self.charge.wary) <= memory
            low, high = np.where(fit, middle, low), np.where(fit, high, middle)
        return low + 1

    def _solve(self, threshold: float, fits: dict[int, NDArray[np.int64]], level: int) -> Answer | None:
        """Stages within a threshold, with the least level, at most `level`."""
        top = min(self.enough, level + 1)
        while True:
            degrees = self._degrees(threshold * (1 + TOLERANCE), fits, top)
            ahead, counts = Fewest(degrees).whole(self.chain)
            found = bool(counts[min(top, level)] <= self.devices)
            lowest = int((counts <= self.devices).argmax()) if found else top
            # the highest level stands for all above: it decides only if memory does not tell them apart
            alike = not found and bool((degrees[..., 1] == degrees[..., top]).all())
            if top == self.top or lowest < top or alike or level < top:
                break
            top = min(2 * top, self.top)
            if not found:
                self.enough = top
        if not found:
            return None
        stages = tuple(ahead.trace(self.chain, ahead.count - 1, 0, lowest))
        return Answer(threshold, lowest, stages)

    def _degrees(self, limit: float, fits: dict[int, NDArray[np.int64]], top: int) -> Table:
        """The table of `Fewest`. With fewer levels than there are, the highest is charged as the deepest."""
        degrees: Table = np.full((*self.intervals.static.shape, top + 1), INF, dtype=np.int32)
        levels = np.arange(top + 1)
        for degree in sorted(fits, reverse=True):
            starts, stops = np.nonzero((self.seconds[degree] <= limit) & (fits[degree] > 0))
            highest = fits[degree][starts, stops]
            if top < self.top:
                highest = np.where(highest == self.top, top, np.minimum(highest, top - 1))
            allowed = (levels > 0) & (levels <= highest[:, None])
            degrees[starts, stops] = np.where(allowed, degree, degrees[starts, stops])
        return degrees


def interval_optimum(seconds: list[tuple[int, NDArray[np.float64]]], devices: int) -> float:
    """The least bottleneck of any partition into intervals, [a, b) on d devices taking seconds[d][a, b].

    O(n^2 |degrees| devices) directly over device counts; for many devices O(n^2 |degrees|) for each step of
    a bisection over the distinct times.
    """
    if devices > DIRECT:
        return _by_bisection(seconds, devices)
    n = seconds[0][1].shape[0] - 1
    best = np.full((n + 1, devices + 1), np.inf)
    best[n] = 0.0
    for a in reversed(range(n)):
        for degree, time in seconds:
            if degree > devices:
                continue
            rest = best[a + 1 :, : devices + 1 - degree]
            found = np.maximum(rest, time[a, a + 1 :, None]).min(0)
            best[a, degree:] = np.minimum(best[a, degree:], found)
        best[a] = np.minimum.accumulate(best[a])
    return float(best[0, devices])


def interval_fewest(seconds: list[tuple[int, NDArray[np.float64]]], limit: float) -> int:
    """The fewest devices of any partition into intervals that each take no longer than `limit`. O(n^2
    |degrees|)."""
    n = seconds[0][1].shape[0] - 1
    degrees = np.full((n + 1, n + 1), INF)
    for degree, time in sorted(seconds, key=lambda pair: -pair[0]):
        degrees[time <= limit] = degree
    need = np.zeros(n + 1, dtype=degrees.dtype)
    for a in reversed(range(n)):
        need[a] = (degrees[a, a + 1 :] + need[a + 1 :]).min()
    return int(need[0])


def _by_bisection(seconds: list[tuple[int, NDArray[np.float64]]], devices: int) -> float:
    low = at_least([time for _, time in seconds])
    times = np.unique(np.concatenate([t[(t >= low) & np.isfinite(t)] for _, t in seconds]))

    def enough(limit: float) -> bool:
        return interval_fewest(seconds, limit) <= devices

    if not len(times) or not enough(float(times[-1])):
        return float("inf")
    first, last = -1, len(times) - 1  # times[last] is enough
    step = 1.5
    while first + 1 < last and low * step < times[last]:  # the optimum is nearer to the low end
        middle = int(np.searchsorted(times, low * step))
        if enough(float(times[middle])):
            last = middle
            break
        first, step = middle, step * 1.5
    while last - first > 1:
        middle = (first + last) // 2
        first, last = (first, middle) if enough(float(times[middle])) else (middle, last)
    return float(times[last])


def at_least(seconds: Sequence[NDArray[np.float64]]) -> float:
    """A time below which no bottleneck is: of every run the least of all intervals that hold it. A run alone
    may take longer than with its neighbours: it sends more."""
    least = np.min(seconds, axis=0)
    least = np.minimum.accumulate(least, axis=0)
    least = np.minimum.accumulate(least[:, ::-1], axis=1)[:, ::-1]
    return float(np.diagonal(least, 1).max())
