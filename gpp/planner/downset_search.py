"""The least bottleneck of a pipeline of nested downsets, exactly: Piper's space without tensor parallelism.

For a threshold, the fewest devices with which a set can be covered by stages of at most that time; the same
number decides memory where replicas take turns, else the place from the end is a second dimension. Given a
pipeline to beat, mostly the best already, one pass with a threshold just below it proves that. A pass looks
only at sets for which the devices left can still do the rest.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .downset_costs import Border, Branches, Index, Memory, SetCosts, UnitCosts
from .downsets import Downsets, contained

NONE = 1 << 20  # devices where there is no way
CLOSE = 1e-9  # a better plan is better by this factor at least
NOTHING = 1e-30  # seconds, a threshold that only stages without work meet
ANY = 1e300  # a threshold that every stage meets
GALLOP = (1 + 2 * CLOSE, 1.02, 1.1, 1.5, 4.0, ANY)  # from what no plan can beat to any plan
BLOCK = 1 << 20  # pairs looked at in one go


@dataclass(frozen=True, slots=True)
class Part:
    """A stage: units, ascending, on so many devices."""

    units: tuple[int, ...]
    devices: int


@dataclass(frozen=True, slots=True)
class Pipeline:
    """Stages, first to last, whose slowest takes `seconds` for a micro-batch."""

    seconds: float
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class _Pass:
    """One threshold: [sets, levels] devices, and by which stage each set was reached."""

    devices: NDArray[np.int32]
    before: NDArray[np.int32]
    degree: NDArray[np.int16]
    level: int  # of the whole graph


class DownsetSearch:
    """Stages on at most `devices` devices. Without `memory` nothing limits them. With `branches`, and the
    sets enumerated so that the first of equal branches is always ahead, exact up to their permutations."""

    def __init__(
        self,
        sets: Downsets,
        costs: UnitCosts,
        devices: int,
        memory: Memory | None = None,
        branches: Branches = (),
    ) -> None:
        self.sets, self.costs, self.devices, self.memory = sets, costs, devices, memory
        self.branches = branches
        self.sums = SetCosts(costs, sets.members, branches)
        self.levels = min(devices, sets.count) if memory is not None and memory.by_stages else 1

    def optimum(self, known: Pipeline | None = None, low: float = 0.0) -> Pipeline | None:
        """The pipeline of least bottleneck; None if there is none. `known` is one to beat, `low` what none
        can beat.

        S sets in P nested pairs: O(S^2 / 64 + P |degrees| levels) for every pass, one or two as a rule.
        """
        total = float(self.sums.device_seconds[-1])
        if not np.isfinite(total):
            return None
        best = known
        if best is not None and best.seconds <= low * (1 + CLOSE):
            return best
        if low > total / self.devices:
            at_once = self.below(low * (1 + CLOSE))
            if at_once is not None:
                return at_once
        low = max(low, total / self.devices, NOTHING) * (1 - CLOSE)
        for factor in GALLOP if best is None else ():
            best = self.below(min(low * factor, ANY))
            if best is not None:
                break
            low *= factor
        while best is not None and best.seconds * (1 - CLOSE) > low:
            # first whether anything at all is better, then halve
            better = self.below(best.seconds * (1 - CLOSE))
            if better is None:
                return best
            best = better
            middle = (low + best.seconds) / 2
            better = self.below(middle)
            low, best = (middle, best) if better is None else (low, better)
        return best

    def below(self, threshold: float) -> Pipeline | None:
        """A pipeline with no stage slower than `threshold`; None if there is none."""
        found = self._covered(threshold)
        return None if found is None else self._traced(found)

    def _covered(self, threshold: float) -> _Pass | None:
        sums, sets = self.sums, self.sets
        work = sums.device_seconds
        rest = np.ceil((work[-1] - work) / threshold * (1 - CLOSE)).astype(np.int64)
        least = np.ceil(work / threshold * (1 - CLOSE)).astype(np.int64)
        shape = (len(work), self.levels + 1)
        devices = np.full(shape, NONE, dtype=np.int32)
        before, degree = np.zeros(shape, dtype=np.int32), np.zeros(shape, dtype=np.int16)
        devices[0, 0] = 0
        live = np.zeros(len(work), dtype=np.int64)  # sets reached so far, and how many they are
        count = 1
        for size in range(1, sets.count + 1):
            targets = np.arange(sets.levels[size], sets.levels[size + 1])
            targets = targets[rest[targets] + np.maximum(least[targets], 1) <= self.devices]
            step = max(BLOCK // count, 1)
            for start in range(0, len(targets), step):
                block = targets[start : start + step]
                self._reach(block, live[:count], threshold, rest, devices, before, degree)
            reached = targets[devices[targets].min(1) + rest[targets] <= self.devices]
            live[count : count + len(reached)] = reached
            count += len(reached)
        last = devices[-1]
        if last.min() > self.devices:
            return None
        return _Pass(devices, before, degree, int(last.argmin()))

    def _reach(
        self,
        targets: Index,
        sources: Index,
        threshold: float,
        rest: Index,
        devices: NDArray[np.int32],
        before: NDArray[np.int32],
        degree: NDArray[np.int16],
    ) -> None:
        """Fill in the rows of `targets`, all of one size, from smaller sets."""
        sums, words = self.sums, self.sets.words
        work, fewest = sums.device_seconds, devices[sources].min(1)
        # a stage on all the devices left is the most that a source can be away
        reach = work[sources] + (self.devices - fewest) * threshold
        sources = sources[reach >= work[targets].min() * (1 - CLOSE)]
        fewest = devices[sources].min(1)
        left = self.devices - rest[targets][:, None] - fewest[None, :]
        near = work[targets][:, None] - work[sources][None, :] <= left * (threshold * (1 + CLOSE))
        near &= left > 0
        near &= contained(words[sources], words[targets])
        row, column = np.nonzero(near)
        larger, smaller, left = targets[row], sources[column], left[row, column]
        keep = self._fast(larger, smaller, left, threshold)
        larger, smaller, left = larger[keep], smaller[keep], left[keep]
        if not len(larger):
            return
        border = sums.border(larger, smaller, sums.crossing(larger, smaller))
        in_time = [
            sums.allowed(d, larger, smaller)
            & (left >= replicas)
            & (sums.time(d, larger, smaller, border) <= threshold)
            for d, replicas in enumerate(self.costs.degrees)
        ]
        for level in range(1, self.levels + 1):
            for source_level in (level - 1,) if self.levels > 1 else (0, 1):
                have = devices[smaller, source_level]
                if (have < NONE).any():
                    which = self._smallest(in_time, larger, smaller, border, have, level)
                    self._keep(larger, smaller, have, which, source_level, level, devices, before, degree)

    def _fast(self, larger: Index, smaller: Index, left: Index, threshold: float) -> NDArray[np.bool_]:
        """Whether a stage might be in time with some degree: with the least that can cross its border."""
        sums, costs = self.sums, self.costs
        crossed = abs(sums.entered[larger] - sums.entered[smaller])
        found = np.zeros(len(larger), dtype=bool)
        for d, replicas in enumerate(costs.degrees):
            time = sums.seconds[d, larger] - sums.seconds[d, smaller] + crossed * costs.per_byte[d]
            found |= (time <= threshold * (1 + CLOSE)) & (left >= replicas)
        return found

    def _smallest(
        self,
        in_time: Sequence[NDArray[np.bool_]],
        larger: Index,
        smaller: Index,
        border: Border,
        have: NDArray[np.int32],
        level: int,
    ) -> NDArray[np.int16]:
        """The number of the smallest degree that each stage may have, -1 if none."""
        which = np.full(len(larger), -1, dtype=np.int16)
        for d, replicas in enumerate(self.costs.degrees):
            ok = in_time[d] & (which < 0) & (have < NONE)
            some = np.flatnonzero(ok)
            if len(some) and self.memory is not None:
                place = have[some].astype(np.int64) + replicas
                if self.memory.by_stages:
                    place = np.full(len(some), level)
                part = Border(border.received[some], border.sent[some])
                need = self.sums.memory(self.memory, d, larger[some], smaller[some], part, place)
                some = some[need <= self.memory.limit]
            which[some] = d
        return which

    def _keep(
        self,
        larger: Index,
        smaller: Index,
        have: NDArray[np.int32],
        which: NDArray[np.int16],
        source_level: int,
        level: int,
        devices: NDArray[np.int32],
        before: NDArray[np.int32],
        degree: NDArray[np.int16],
    ) -> None:
        """The fewest devices of each set; pairs come sorted by the larger set."""
        some = np.flatnonzero(which >= 0)
        if not len(some):
            return
        total = have[some] + np.array(self.costs.degrees, dtype=np.int32)[which[some]]
        starts = np.flatnonzero(np.r_[True, np.diff(larger[some]) > 0])
        least = np.minimum.reduceat(total, starts)
        lengths = np.diff(np.r_[starts, len(some)])
        hit = np.flatnonzero(total == np.repeat(least, lengths))
        targets = larger[some[starts]]
        first = hit[np.searchsorted(hit, starts)]
        better = least < devices[targets, level]
        targets, first = targets[better], some[first[better]]
        devices[targets, level] = least[better]
        before[targets, level] = smaller[first]
        degree[targets, level] = which[first]

    def _traced(self, found: _Pass) -> Pipeline:
        """The stages, and the time of the slowest."""
        at, level = len(found.devices) - 1, found.level
        now = frozenset(range(self.sets.count))
        parts: list[Part] = []
        slowest = 0.0
        while at:
            source, d = int(found.before[at, level]), int(found.degree[at, level])
            pair = np.array([at]), np.array([source])
            border = self.sums.border(*pair, self.sums.crossing(*pair))
            slowest = max(slowest, float(self.sums.time(d, *pair, border)[0]))
            later = self._within(now, source)
            parts.append(Part(tuple(sorted(now - later)), self.costs.degrees[d]))
            now = later
            at = source
            level = level - 1 if self.levels > 1 else int(source > 0)
        return Pipeline(slowest, tuple(parts))

    def _within(self, now: frozenset[int], source: int) -> frozenset[int]:
        """The units of a smaller set, its equal branches permuted to lie in `now`, as many as can just as
        they are there."""
        later = set(np.flatnonzero(self.sets.members[source]).tolist())
        for group in self.branches:
            have = [sum(u in now for u in branch) for branch in group]
            want = [sum(u in later for u in branch) for branch in group]
            for branch, size in zip(group, _matched(have, want), strict=True):
                later -= set(branch)
                later |= set(branch[len(branch) - size :])
        return frozenset(later)


def _matched(have: Sequence[int], want: Sequence[int]) -> list[int]:
    """`want` in an order that is nowhere above `have`, equal to it as often as can be."""
    found = [-1] * len(have)
    left = sorted(want, reverse=True)
    for i, size in enumerate(have):
        if size in left:
            left.remove(size)
            found[i] = size
    rest = sorted((i for i, size in enumerate(found) if size < 0), key=lambda i: -have[i])
    for i, size in zip(rest, left, strict=True):
        found[i] = size
    return found
