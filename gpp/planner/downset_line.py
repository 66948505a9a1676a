"""A first answer: the best pipeline along one line of operators, every stage an interval of it.

Its stages are differences of nested downsets too, n + 1 of them instead of all: most of the time no other is
better, and the exact search has only to prove that.
"""

from collections.abc import Iterable, Sequence

import numpy as np

from .downset_costs import Array, Memory, SetCosts, UnitCosts
from .downset_search import Part, Pipeline

MANY = 1 << 22  # numbers in the table above which there is no first answer


def depth_first(needs: Sequence[Iterable[int]]) -> list[int]:
    """Units in an order that respects `needs`, one branch after the other."""
    missing = [len(set(us)) for us in needs]
    dependents: list[list[int]] = [[] for _ in needs]
    for v, us in enumerate(needs):
        for u in set(us):
            dependents[u].append(v)
    ready = [v for v, count in enumerate(missing) if not count][::-1]
    order = []
    while ready:
        v = ready.pop()
        order.append(v)
        for w in dependents[v]:
            missing[w] -= 1
            if not missing[w]:
                ready.append(w)
    return order


def line(costs: UnitCosts, order: Sequence[int], devices: int, memory: Memory | None) -> Pipeline | None:
    """The pipeline of least bottleneck over intervals of `order`, which starts at the sinks; None if there is
    none or the table would be too large. O(n^2 |degrees| devices levels)."""
    found = _Line(costs, order, devices, memory)
    return found.traced() if found.solved() else None


class _Line:
    """best[i, k, h]: the least bottleneck of the last i units on at most k devices in h stages (where memory
    does not ask: h = 0)."""

    def __init__(self, costs: UnitCosts, order: Sequence[int], devices: int, memory: Memory | None) -> None:
        self.costs, self.order, self.devices, self.memory = costs, order, devices, memory
        self.levels = min(devices, len(order)) if memory is not None and memory.by_stages else 0
        members = np.tri(len(order) + 1, len(order), -1, dtype=bool)[:, np.argsort(order)]
        self.sums = SetCosts(costs, members)
        self.crossing = self.sums.outside @ self.sums.entering.T

    def solved(self) -> bool:
        """Fill the table; whether there is any answer."""
        n, degrees = len(self.order), self.costs.degrees
        if (n + 1) * (self.devices + 1) * (self.levels + 1) > MANY:
            return False
        self.best = np.full((n + 1, self.devices + 1, self.levels + 1), np.inf)
        self.best[0, :, 0] = 0.0
        for i in range(1, n + 1):
            for d, replicas in enumerate(degrees):
                if replicas <= self.devices:
                    into = self.best[i, replicas:, -self.levels :]
                    np.minimum(into, self._stages(i, d).min(0), out=into)
            np.minimum.accumulate(self.best[i], axis=0, out=self.best[i])
        return bool(np.isfinite(self.best[n, self.devices]).any())

    def traced(self) -> Pipeline:
        """The stages of the best answer, those with the fewest devices."""
        i, k = len(self.order), self.devices
        h = int(self.best[i, k].argmin())
        seconds = float(self.best[i, k, h])
        parts = []
        while i:
            while self.best[i, k - 1, h] == self.best[i, k, h]:
                k -= 1
            d, j = self._choice(i, k, h)
            parts.append(Part(tuple(sorted(self.order[j:i])), self.costs.degrees[d]))
            i, k, h = j, k - self.costs.degrees[d], max(h - 1, 0)
        return Pipeline(seconds, tuple(parts))

    def _choice(self, i: int, k: int, h: int) -> tuple[int, int]:
        for d, replicas in enumerate(self.costs.degrees):
            if replicas <= k:
                found = self._stages(i, d)[:, k - replicas, h - 1 if self.levels else 0]
                if found.min() == self.best[i, k, h]:
                    return d, int(found.argmin())
        raise AssertionError("a value of the table has no stage that gives it")

    def _stages(self, i: int, d: int) -> Array:
        """[j, k, h]: the bottleneck if units j to i are one stage, k + its replicas devices in all."""
        replicas, memory, sums = self.costs.degrees[d], self.memory, self.sums
        larger, smaller = np.full((i, 1), i), np.arange(i)[:, None]
        border = sums.border(larger, smaller, self.crossing[i, :i, None])
        time = sums.time(d, larger, smaller, border)
        time[~sums.allowed(d, larger, smaller)] = np.inf
        found = np.maximum(self.best[:i, : self.devices + 1 - replicas, : self.levels or 1], time[:, :, None])
        if memory is not None:
            level = np.arange(1 if memory.by_stages else replicas, (self.levels or self.devices) + 1)[None, :]
            full = sums.memory(memory, d, larger, smaller, border, level) > memory.limit
            full = full[:, None, :] if memory.by_stages else full[:, :, None]
            found[np.broadcast_to(full, found.shape)] = np.inf
        return np.asarray(found)
