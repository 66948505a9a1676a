"""The least bottleneck: a search over thresholds, each answered by the fewest devices (GraphPipe §5)."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gpp.plan import Policy

from .fewest import Fewest
from .intervals import Intervals
from .outline import Chain
from .sides import INF, Found, Table

LEVELS = 40  # from here on, depth is charged as the deepest
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
    where it ends: O(n^2 |degrees| devices) for that, then a few times `Fewest`.
    """

    def __init__(self, chain: Chain, intervals: Intervals, devices: int, charge: Charge) -> None:
        self.chain, self.intervals, self.devices, self.charge = chain, intervals, devices, charge
        self.depth = min(devices, chain.depth)
        self.top = min(self.depth, LEVELS)

    def answer(self, memory: float) -> Answer | None:
        """The least bottleneck with at most `memory` bytes on a device; then the least level. None: nothing
        fits."""
        fits = self._fits(memory)
        least = interval_optimum(
            [(d, np.where(fits[d] > 0, self.intervals.seconds[d], np.inf)) for d in fits], self.devices
        )
        if not np.isfinite(least):
            return None
        times = np.unique(np.concatenate([t[np.isfinite(t)] for t in self.intervals.seconds.values()]))
        times = times[times >= least * (1 - TOLERANCE)]
        found = self._solve(float(times[0]), fits)
        if found is not None:
            return found
        low, step, high = 0, 1, 0  # times[low] is infeasible
        while found is None:
            if low == len(times) - 1:
                return None
            high = min(low + step, len(times) - 1)
            found = self._solve(float(times[high]), fits)
            low, step = (high, 2 * step) if found is None else (low, step)
        while high - low > 1:
            middle = (low + high) // 2
            better = self._solve(float(times[middle]), fits)
            if better is None:
                low = middle
            else:
                high, found = middle, better
        return found

    def leaner(self, answer: Answer) -> Answer:
        """An answer with (about) the least peak memory among those with the same bottleneck."""
        best, high = answer, self.peak(answer)
        low = self.heaviest_run()[1]
        for _ in range(MEMORY_STEPS):
            if high - low <= 0.01 * high:
                break
            middle = (low + high) / 2
            found = self._solve(answer.seconds, self._fits(middle))
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
        for degree, seconds in table.seconds.items():
            need = np.diagonal(table.static + table.stash * samples / degree, 1)
            each = np.minimum(each, np.where(np.isfinite(np.diagonal(seconds, 1)), need, np.inf))
        return int(each.argmax()), float(each.max())

    def smallest(self) -> float:
        """About the least memory of a device with which there is a plan at all."""
        single = float(self._memory(1, 1)[0, -1])
        low, high = 0.0, single
        while high - low > 0.005 * high:
            middle = (low + high) / 2
            found = self._solve(np.inf, self._fits(middle))
            low, high = (middle, high) if found is None else (low, middle)
        return high

    def _memory(self, degree: int, level: int) -> NDArray[np.float64]:
        charge = self.charge
        level = self.depth if level == self.top else level
        upstream = max(level + 1, min(level + 1 + charge.margin, self.depth))
        return self.intervals.memory(degree, charge.held(level), charge.held(upstream), wary=charge.wary)

    def _fits(self, memory: float) -> dict[int, NDArray[np.int64]]:
        """By degree: the highest level at which an interval fits; 0 where none does."""
        fits = {}
        for degree in self.intervals.seconds:
            levels = np.zeros(self.intervals.static.shape, dtype=np.int64)
            for level in range(1, self.top + 1):
                levels += self._memory(degree, level) <= memory
            fits[degree] = levels
        return fits

    def _solve(self, threshold: float, fits: dict[int, NDArray[np.int64]]) -> Answer | None:
        limit = threshold * (1 + TOLERANCE)
        levels = np.arange(self.top + 1)
        degrees: Table = np.full((*self.intervals.static.shape, self.top + 1), INF, dtype=np.int32)
        for degree in sorted(fits, reverse=True):
            seconds = self.intervals.seconds[degree]
            highest = np.where((seconds <= limit) & np.isfinite(seconds), fits[degree], 0)
            degrees[(levels > 0) & (levels <= highest[:, :, None])] = degree
        ahead, counts = Fewest(degrees).whole(self.chain)
        if counts[-1] > self.devices:
            return None
        level = int((counts <= self.devices).argmax())
        stages = tuple(ahead.trace(self.chain, ahead.count - 1, 0, level))
        return Answer(threshold, level, stages)


def interval_optimum(seconds: list[tuple[int, NDArray[np.float64]]], devices: int) -> float:
    """The least bottleneck of any partition into intervals, [a, b) on d devices taking seconds[d][a, b].

    Direct over device counts: O(n^2 |degrees| devices).
    """
    n = seconds[0][1].shape[0] - 1
    best = np.full((n + 1, devices + 1), np.inf)
    best[n] = 0.0
    for a in reversed(range(n)):
        for degree, time in seconds:
            rest = best[a + 1 :, : devices + 1 - degree]
            found = np.maximum(rest, time[a, a + 1 :, None]).min(0)
            best[a, degree:] = np.minimum(best[a, degree:], found)
        best[a] = np.minimum.accumulate(best[a])
    return float(best[0, devices])
