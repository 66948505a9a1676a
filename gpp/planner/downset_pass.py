"""One threshold: the fewest devices with which every downset is covered by stages of at most that time.

A state is a set and how memory counts what was laid before: by stages (the place from the end) or by devices.
Sets are reached in order of size, and only states from which the devices left can still do the rest, in time
and in memory; of two of one set with as many devices, the one with fewer stages is always as good.
"""

import numpy as np
from numpy.typing import NDArray

from .downset_costs import Array, Border, Index, Memory, SetCosts
from .downsets import Downsets, contained

NONE = 1 << 20  # devices where there is no way
CLOSE = 1e-9  # a better plan is better by this factor at least
BLOCK = 1 << 20  # pairs looked at in one go


class Pass:
    """`devices` [sets, places], and by which stage each state was reached: the smaller set in `before`, the
    number of its degree in `degree`. The place is that from the end where memory counts by stages, else 0."""

    def __init__(
        self, sets: Downsets, sums: SetCosts, devices: int, memory: Memory | None, threshold: float
    ) -> None:
        self.sets, self.sums, self.most, self.memory, self.threshold = sets, sums, devices, memory, threshold
        places = 1 + (min(devices, sets.count) if memory is not None and memory.by_stages else 0)
        shape = (len(sets.words), places)
        self.devices = np.full(shape, NONE, dtype=np.int32)
        self.before, self.degree = np.zeros(shape, dtype=np.int32), np.zeros(shape, dtype=np.int16)
        work = sums.device_seconds
        self.least, self.rest = self._rounds(work / threshold), self._rounds((work[-1] - work) / threshold)

    def run(self) -> bool:
        """Whether the whole graph is reached. S sets, P pairs of a state and a larger set that it might be a
        stage away from: O(S^2 / 64 + P |degrees|)."""
        sets, places = self.sets, self.devices.shape[1]
        self.devices[0, 0] = 0
        # states from which the whole can be reached, by place
        states = np.zeros((2, 1), dtype=np.int64)
        for size in range(1, sets.count + 1):
            targets = np.arange(sets.levels[size], sets.levels[size + 1])
            targets = targets[self.rest[targets] + np.maximum(self.least[targets], 1) <= self.most]
            step = max(BLOCK // states.shape[1], 1)
            for start in range(0, len(targets), step):
                self._reach(targets[start : start + step], *states)
            found = self.devices[targets]
            if places > 1:
                found[:, 1:][found[:, 1:] >= np.minimum.accumulate(found, 1)[:, :-1]] = NONE
            row, place = np.nonzero(found + self._left(targets) <= self.most)
            states = np.concatenate([states, [targets[row], place]], axis=1)
            states = states[:, states[1].argsort(kind="stable")]
        return bool(self.devices[-1].min() <= self.most)

    def _left(self, sets: Index) -> Index:
        """[sets, places]: the devices that what is outside needs at least."""
        rest = np.broadcast_to(self.rest[sets][:, None], (len(sets), self.devices.shape[1]))
        if self.memory is None:
            return rest
        need = self.sums.bytes_left(self.memory, sets, self.devices[sets])
        return np.maximum(rest, self._rounds(need / max(self.memory.limit, 1.0)))

    def _reach(self, targets: Index, sources: Index, places: Index) -> None:
        """Fill in the rows of `targets`, all of one size, from the states (`sources`, `places`)."""
        words, work = self.sets.words, self.sums.device_seconds
        have = self.devices[sources, places]
        # a stage on all the devices left is the most that a source can be away
        reach = work[sources] + (self.most - have) * (self.threshold * (1 + CLOSE))
        want = work[targets] + self.rest[targets] * self.threshold
        some = np.flatnonzero(reach >= want.min())
        near = want[:, None] <= reach[some]
        near &= self.rest[targets][:, None] < (self.most - have)[some]
        near &= contained(words[sources[some]], words[targets])
        row, column = np.nonzero(near)
        larger, state = targets[row], some[column]
        keep = self._fast(larger, sources[state], have[state], places[state])
        larger, state = larger[keep], state[keep]
        smaller, have, places = sources[state], have[state], places[state]
        which = self._smallest(larger, smaller, have, places)
        some = np.flatnonzero(which >= 0)
        if len(some):
            self._keep(larger[some], smaller[some], have[some], places[some], which[some])

    def _fast(
        self, larger: Index, smaller: Index, have: NDArray[np.int32], place: Index
    ) -> NDArray[np.bool_]:
        """Whether a stage might be fast enough and fit: with the least that can cross its border."""
        sums, costs = self.sums, self.sums.costs
        crossed = abs(sums.entered[larger] - sums.entered[smaller])
        left = self.most - self.rest[larger] - have
        found = np.zeros(len(larger), dtype=bool)
        for d, replicas in enumerate(costs.degrees):
            time = sums.seconds[d, larger] - sums.seconds[d, smaller] + crossed * costs.per_byte[d]
            ok = (time <= self.threshold * (1 + CLOSE)) & (left >= replicas)
            if self.memory is not None:
                some = np.flatnonzero(ok & ~found)
                level = self._level(d, have[some], place[some])
                ok[some] = self._fits(d, larger[some], smaller[some], None, level)
            found |= ok
        return found

    def _smallest(
        self, larger: Index, smaller: Index, have: NDArray[np.int32], place: Index
    ) -> NDArray[np.int16]:
        """The number of the smallest degree that each stage may have, -1 if none."""
        sums = self.sums
        border = sums.border(larger, smaller, sums.crossing(larger, smaller))
        left = self.most - self.rest[larger] - have
        which = np.full(len(larger), -1, dtype=np.int16)
        for d, replicas in enumerate(sums.costs.degrees):
            some = np.flatnonzero((which < 0) & (left >= replicas))
            bigger, less = larger[some], smaller[some]
            part = Border(border.received[some], border.sent[some])
            ok = sums.allowed(d, bigger, less) & (sums.time(d, bigger, less, part) <= self.threshold)
            ok &= self._fits(d, bigger, less, part, self._level(d, have[some], place[some]))
            which[some[ok]] = d
        return which

    def _level(self, degree: int, have: NDArray[np.int32], place: Index) -> Index:
        """What memory counts by: the stages or the devices up to and with a stage of this degree."""
        if self.memory is not None and self.memory.by_stages:
            return place + 1
        return have.astype(np.int64) + self.sums.costs.degrees[degree]

    def _fits(
        self, degree: int, larger: Index, smaller: Index, border: Border | None, level: Index
    ) -> NDArray[np.bool_]:
        if self.memory is None:
            return np.ones(len(larger), dtype=bool)
        need = self.sums.memory(self.memory, degree, larger, smaller, border, level)
        return np.asarray(need <= self.memory.limit)

    def _keep(
        self,
        larger: Index,
        smaller: Index,
        have: NDArray[np.int32],
        place: Index,
        which: NDArray[np.int16],
    ) -> None:
        """The fewest devices of each state; stages come sorted by the larger set, then by place."""
        total = have + np.array(self.sums.costs.degrees, dtype=np.int32)[which]
        starts = np.flatnonzero(np.r_[True, (np.diff(larger) > 0) | (np.diff(place) > 0)])
        least = np.minimum.reduceat(total, starts)
        hit = np.flatnonzero(total == np.repeat(least, np.diff(np.r_[starts, len(total)])))
        first = hit[np.searchsorted(hit, starts)]
        into = larger[starts], np.minimum(place[starts] + 1, self.devices.shape[1] - 1)
        self.devices[into] = least
        self.before[into], self.degree[into] = smaller[first], which[first]

    def _rounds(self, devices: Array) -> Index:
        return np.ceil(np.minimum(devices * (1 - CLOSE), NONE)).astype(np.int64)
