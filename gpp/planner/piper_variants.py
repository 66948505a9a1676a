"""Piper's search where operators have variants: split over devices (tensor parallelism), or recomputing.

Its dynamic programme over nested downsets, devices k and the sum s of replicas, both "at most", and its
greedy choice of variants for a stage: the fastest ones, then the cheapest swaps per byte saved until it fits.
The greedy choice is not always the best one; the search above it is exact.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gpp.formats.piper import PiperInstance, PiperVariant
from gpp.plan import PlanError

from .downset_costs import Array, Index
from .downset_pass import CLOSE
from .downset_search import ANY
from .downsets import Downsets, contained
from .options import divisors

SLACK = 1e-9  # bytes that count as nothing


@dataclass(frozen=True, slots=True)
class VariantStage:
    """Nodes by position, replicas, tensor parallelism, and which variant of each node."""

    nodes: tuple[int, ...]
    replicas: int
    tensor_parallel: int
    variants: tuple[int, ...]


class VariantSearch:
    """`variants[t][v]` are those of node v on t devices, two at most; a stage whose nodes do not all have one
    cannot have that t. Only what can be part of an answer of at most `known` seconds is looked at.

    S sets in P nested pairs, n nodes, K devices: O(P K (n + K |t| |d|)) if all of them can.
    """

    def __init__(
        self,
        instance: PiperInstance,
        sets: Downsets,
        variants: Mapping[int, Sequence[Sequence[PiperVariant]]],
        known: float,
    ) -> None:
        self.instance, self.sets = instance, sets
        self.limit = min(known * (1 + CLOSE), ANY)
        self.replicas = min(instance.micro_batches, instance.devices)
        self.choices = {t: _Choices(instance, found) for t, found in variants.items()}
        # without tensor parallelism both axes are the same number
        self.two = set(variants) != {1}
        members = sets.members.astype(np.float64)
        work = members @ np.min([c.least_work for c in self.choices.values()], axis=0)
        self.before = np.ceil(work / self.limit * (1 - CLOSE)).astype(np.int64)
        self.rest = np.ceil((work[-1] - work) / self.limit * (1 - CLOSE)).astype(np.int64)
        self.kinds = [
            _Kind(t, d, t * d if self.two else 0, members @ choices.least(d), members @ choices.missing)
            for t, choices in self.choices.items()
            for d in divisors(instance.micro_batches)
            if t * d <= instance.devices and d <= self.replicas
        ]

    def optimum(self) -> tuple[float, tuple[VariantStage, ...]]:
        """Seconds of the slowest stage and the stages, first to last; inf and none if there is nothing."""
        rows = self.instance.devices + 1 if self.two else 1
        self.best = np.full((len(self.sets.words), rows, self.replicas + 1), np.inf)
        self.best[0] = 0.0
        for at in range(1, len(self.best)):
            here = self.best[at]
            for kind, _, found in self._stages(at):
                into = here[kind.shift :, kind.replicas :]
                np.minimum(into, found.min(0), out=into)
            np.minimum.accumulate(here, axis=0, out=here)
            np.minimum.accumulate(here, axis=1, out=here)
        seconds = float(self.best[-1].min())
        return seconds, self._traced() if np.isfinite(seconds) else ()

    def _stages(self, at: int) -> Iterator[tuple["_Kind", Index, Array]]:
        """Every kind of stage that ends a set: its pairs' smaller sets and [pair, k, s] the bottleneck."""
        level = int(np.searchsorted(self.sets.levels, at, side="right")) - 1
        words, devices = self.sets.words, self.instance.devices
        smaller = np.flatnonzero(contained(words[: self.sets.levels[level]], words[at : at + 1])[0])
        smaller = smaller[np.isfinite(self.best[smaller, -1, -1])]
        for kind in self.kinds:
            left = devices - self.rest[at] - kind.tensor_parallel * kind.replicas
            some = smaller[
                (self.before[smaller] <= left)
                & (kind.least[at] - kind.least[smaller] <= self.limit)
                & (kind.missing[at] == kind.missing[smaller])
            ]
            if len(some):
                d = kind.replicas
                most = min(-(-(devices - int(self.rest[at])) // d), self.replicas // d + 1)
                inside = self.sets.members[at] & ~self.sets.members[some]
                stages = self.choices[kind.tensor_parallel].at(inside, d)
                seconds = np.full((len(some), self.replicas // d + 2), np.inf)
                seconds[:, : most + 1] = stages.seconds(most, self.instance.memory)
                s = np.arange(d, self.replicas + 1)
                rest = self.best[some, : self.best.shape[1] - kind.shift, : self.replicas + 1 - d]
                yield kind, some, np.maximum(rest, seconds[:, None, -(-s // d)])

    def _traced(self) -> tuple[VariantStage, ...]:
        at, stages = len(self.best) - 1, []
        k, s = (int(i) for i in np.unravel_index(int(self.best[-1].argmin()), self.best[-1].shape))
        while at:
            value = self.best[at, k, s]
            while k and self.best[at, k - 1, s] == value:
                k -= 1
            while s and self.best[at, k, s - 1] == value:
                s -= 1
            stage, at, k, s = self._step(at, k, s)
            stages.append(stage)
        return tuple(stages)

    def _step(self, at: int, k: int, s: int) -> tuple[VariantStage, int, int, int]:
        for kind, smaller, found in self._stages(at):
            d, t = kind.replicas, kind.tensor_parallel
            if d > s or kind.shift > k:
                continue
            found = found[:, k - kind.shift, s - d]
            pair = int(found.argmin())
            if found[pair] == self.best[at, k, s]:
                source = int(smaller[pair])
                inside = self.sets.members[at] & ~self.sets.members[source]
                picked = self.choices[t].at(inside[None], d).picked(-(-s // d), self.instance.memory)
                nodes = np.flatnonzero(inside)
                stage = VariantStage(tuple(nodes.tolist()), d, t, tuple(picked[0, nodes].tolist()))
                return stage, source, k - kind.shift, s - d
        raise AssertionError("a value of the table has no stage that gives it")


@dataclass(frozen=True, eq=False)
class _Kind:
    """Degrees of parallelism, by how much they move on the axis of devices; of every set the least seconds
    of all its nodes and how many of them cannot be so."""

    tensor_parallel: int
    replicas: int
    shift: int
    least: Array
    missing: Array


class _Choices:
    """Two variants of every node at one degree of tensor parallelism: arrays [2, n], and [2, n, n] bytes that
    node v exchanges with u if they are in different stages."""

    def __init__(self, instance: PiperInstance, variants: Sequence[Sequence[PiperVariant]]) -> None:
        if any(len(found) > 2 for found in variants):
            raise PlanError("Piper's choice of variants is between two at most; leave out the others")
        n = len(variants)
        self.missing = np.array([not found for found in variants])
        self.work = np.zeros((4, 2, n))  # seconds, parameter bytes, slope and base of memory
        self.exchanged = np.zeros((2, n, n))
        for v, found in enumerate(variants):
            for i in range(2 if found else 0):
                one = found[min(i, len(found) - 1)]
                self.work[:, i, v] = one.seconds, one.parameter_bytes, one.slope, one.base
                for u, more in one.received.items():
                    self.exchanged[i, u, v] += 2 * (instance.edges[u, v] + more)
                for u, more in one.sent.items():
                    self.exchanged[i, u, v] += 2 * (instance.edges[v, u] + more)
        self.instance = instance

    @property
    def least_work(self) -> Array:
        """The least seconds of each node, on one replica."""
        return np.where(self.missing, np.inf, self.work[0].min(0))

    def least(self, d: int) -> Array:
        """The least seconds of each node on d replicas, 0 for one that cannot be."""
        seconds, size, _, _ = self.work
        reduce = 4 * (d - 1) * size / (d * self.instance.micro_batches * self.instance.bandwidth)
        return np.asarray((seconds / d + reduce).min(0))

    def at(self, inside: NDArray[np.bool_], d: int) -> "_Knapsack":
        """The stages [pairs, n] on d replicas."""
        seconds, size, slope, base = self.work
        rounds, bandwidth = self.instance.micro_batches, self.instance.bandwidth
        crossing = (~inside).astype(np.float64) @ self.exchanged  # [2, pairs, n]
        reduce = 4 * (d - 1) * size / (d * rounds)
        time = seconds[:, None] / d + (crossing / d + reduce[:, None]) / bandwidth
        time = np.where(self.missing & inside, np.inf, np.where(inside, time, 0.0))
        slower = (time[1] < time[0]).astype(np.int64)
        nodes = np.arange(inside.shape[1])
        return _Knapsack(
            first=slower,
            fast=np.where(slower, time[1], time[0]),
            other=np.where(slower, time[0], time[1]),
            slope=np.where(inside, slope[slower, nodes], 0.0),
            base=np.where(inside, base[slower, nodes], 0.0),
            other_slope=np.where(inside, slope[1 - slower, nodes], 0.0),
            other_base=np.where(inside, base[1 - slower, nodes], 0.0),
        )


@dataclass(frozen=True)
class _Knapsack:
    """Which variant is faster, and both variants' seconds and memory: [pairs, n], 0 outside a stage."""

    first: Index
    fast: Array
    other: Array
    slope: Array
    base: Array
    other_slope: Array
    other_base: Array

    def seconds(self, most: int, memory: float) -> Array:
        """The time of every stage with 0 to `most` micro-batches in flight; inf where it does not fit."""
        found = np.full((len(self.fast), most + 1), np.inf)
        fastest, slope, base = self.fast.sum(1), self.slope.sum(1), self.base.sum(1)
        for y in range(1, most + 1):
            fits = slope * y + base <= memory
            found[fits, y] = fastest[fits]
            rows = np.flatnonzero(~fits & np.isfinite(fastest))
            if len(rows):
                swapped = self._swapped(rows, y, memory)
                found[rows, y] = np.where(swapped, self.other[rows], self.fast[rows]).sum(1)
                found[rows[self._least(rows, y) > memory], y] = np.inf
        return found

    def picked(self, y: int, memory: float) -> Index:
        """The number of the variant of every node."""
        rows = np.arange(len(self.fast))
        fits = (self.slope * y + self.base).sum(1) <= memory
        swapped = self._swapped(rows, y, memory) & ~fits[:, None]
        return np.asarray(np.where(swapped, 1 - self.first, self.first))

    def _least(self, rows: Index, y: int) -> Array:
        need = self.slope[rows] * y + self.base[rows]
        return np.asarray(np.minimum(need, self.other_slope[rows] * y + self.other_base[rows]).sum(1))

    def _swapped(self, rows: Index, y: int, memory: float) -> NDArray[np.bool_]:
        """Which nodes take the other variant: the cheapest per byte first, until the stage fits."""
        need = self.slope[rows] * y + self.base[rows]
        saved = need - (self.other_slope[rows] * y + self.other_base[rows])
        useful = saved > SLACK
        price = np.full(saved.shape, np.inf)
        np.divide(self.other[rows] - self.fast[rows], saved, out=price, where=useful)
        order = price.argsort(1, kind="stable")
        excess = need.sum(1) - memory
        before = np.cumsum(np.take_along_axis(np.where(useful, saved, 0.0), order, 1), 1)
        # one is swapped while what those before it save is not enough
        before = np.concatenate([np.zeros((len(rows), 1)), before[:, :-1]], 1)
        swapped = np.zeros(saved.shape, dtype=bool)
        np.put_along_axis(swapped, order, excess[:, None] - before >= SLACK, 1)
        return np.asarray(swapped & useful)
