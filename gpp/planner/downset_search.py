"""The least bottleneck of a pipeline of nested downsets, exactly: Piper's space without tensor parallelism.

For a threshold, the fewest devices with which a set can be covered by stages of at most that time; the same
number decides memory where replicas take turns, else the place from the end is a second dimension. Given a
pipeline to beat, mostly the best already, one pass with a threshold just below it proves that.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .downset_costs import Memory, SetCosts, UnitCosts
from .downset_pass import CLOSE, Pass
from .downsets import Downsets

NOTHING = 1e-30  # seconds, a threshold that only stages without work meet
ANY = 1e300  # a threshold that every stage meets
GALLOP = (1 + 2 * CLOSE, 1.02, 1.1, 1.5, 4.0)  # from what no plan can beat upwards


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


class DownsetSearch:
    """Stages on at most `devices` devices. Without `memory` nothing limits them. Where the sets' equal
    branches are collapsed, exact up to their permutations."""

    def __init__(self, sets: Downsets, costs: UnitCosts, devices: int, memory: Memory | None = None) -> None:
        self.sets, self.costs, self.devices, self.memory = sets, costs, devices, memory
        self.sums = SetCosts(costs, sets.members, sets.branches)

    def optimum(self, known: Pipeline | None = None, low: float = 0.0) -> Pipeline | None:
        """The pipeline of least bottleneck; None if there is none. `known` is one to beat, `low` what none
        can beat. One or two passes as a rule, each as `Pass.run`.
        """
        total = float(self.sums.device_seconds[-1])
        if not np.isfinite(total) or not self._each_fits():
            return None
        best = known
        if best is not None and best.seconds <= low * (1 + CLOSE):
            return best
        if low > total / self.devices:
            at_once = self.below(low * (1 + CLOSE))
            if at_once is not None:
                return at_once
        low = max(low, total / self.devices, NOTHING) * (1 - CLOSE)
        if best is None:
            best = self.below(ANY)
            for factor in GALLOP if best is not None else ():
                better = self.below(low * factor)
                if better is not None:
                    best = better
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
        found = Pass(self.sets, self.sums, self.devices, self.memory, threshold)
        return self._traced(found) if found.run() else None

    def _each_fits(self) -> bool:
        """Whether no unit is too large for any stage."""
        if self.memory is None:
            return True
        held = self.memory.share.min() * self.memory.held[1] if self.memory.by_stages else 1.0
        return bool((self.costs.static + self.costs.stash * held).max() <= self.memory.limit)

    def _traced(self, found: Pass) -> Pipeline:
        """The stages, and the time of the slowest."""
        at, place = len(found.devices) - 1, int(found.devices[-1].argmin())
        now = frozenset(range(self.sets.count))
        parts: list[Part] = []
        slowest = 0.0
        while at:
            source, d = int(found.before[at, place]), int(found.degree[at, place])
            pair = np.array([at]), np.array([source])
            border = self.sums.border(*pair, self.sums.crossing(*pair))
            slowest = max(slowest, float(self.sums.time(d, *pair, border)[0]))
            later = self._within(now, source)
            parts.append(Part(tuple(sorted(now - later)), self.costs.degrees[d]))
            now, at, place = later, source, max(place - 1, 0)
        return Pipeline(slowest, tuple(parts))

    def _within(self, now: frozenset[int], source: int) -> frozenset[int]:
        """The units of a smaller set, its equal branches permuted to lie in `now`, as many as can just as
        they are there."""
        later = set(np.flatnonzero(self.sets.members[source]).tolist())
        for group in self.sets.branches:
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
