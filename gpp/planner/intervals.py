"""What every interval of the leaf order would cost as one stage: the table that the search reads.

Every subgraph of the series-parallel space is an interval [a, b) of the tree's leaf order, so one table of
cumulative sums serves all of it. Seconds of one micro-batch, bytes, samples. N boundaries: arrays are [N, N],
indexed by the boundaries a < b.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from gpp.cost import CostModel, all_reduce_seconds
from gpp.graph import ComputationGraph, Operator, Tensor, Work
from gpp.topology import Device, DeviceTopology

from .options import Options
from .units import Units

Array = NDArray[np.float64]
Counts = NDArray[np.int64]


def takes_part_in_backward(graph: ComputationGraph, op: Operator) -> bool:
    """Whether the operator has a backward: it learns, passes gradients on, or starts them (a loss term: it
    has no output, but work in its input half and an input that needs a gradient)."""
    if op.has_backward:
        return True
    return op.backward_input != Work() and any(graph.tensors[name].needs_grad for name in op.inputs)


def operator_seconds(
    graph: ComputationGraph,
    costs: CostModel,
    devices: Sequence[Device],
    samples: float,
    of_unequal: Callable[[Iterable[float]], float] = max,
) -> Array:
    """Seconds [3, n] of forward, input half and weight half of every operator; of unequal devices the slowest
    (or with `min` the fastest)."""
    found = np.zeros((3, len(graph.operators)))
    for i, op in enumerate(graph.operators):
        halves = (costs.backward_input, costs.backward_weight) if takes_part_in_backward(graph, op) else ()
        for row, ask in enumerate((costs.forward, *halves)):
            times = [ask(op, samples, device) for device in devices]
            found[row, i] = times[0] if len(times) == 1 else of_unequal(times)
    return found


@dataclass(frozen=True)
class Intervals:
    """Costs of every interval [boundaries[a], boundaries[b]) of the leaf order as one stage.

    `seconds[d]` is the time of one micro-batch on d replicas, with its messages and its share of the step's
    all-reduce and update; inf where d replicas, or a stage at all, are not allowed. `reduces[d]` is the whole
    all-reduce of a step. `static` are bytes of a replica; `stash`, `received` and `sent` bytes per sample in
    flight, `copied` what is sent if every reader of a tensor is in a stage of its own.
    """

    micro_batch: int
    seconds: dict[int, Array]
    reduces: dict[int, Array]
    static: Array
    stash: Array
    received: Array
    sent: Array
    copied: Array

    def memory(
        self, degree: int, own: float | Counts, upstream: float | Counts, *, wary: bool = False
    ) -> Array:
        """Bytes on each device for `own` and `upstream` micro-batches in flight here and before."""
        held = self.stash + (self.copied if wary else self.sent)
        return self.static + self.micro_batch / degree * (held * own + self.received * upstream)

    def pick(self, places: tuple[NDArray[np.intp], ...]) -> "Intervals":
        """Some intervals, without their seconds."""
        parts = (self.static, self.stash, self.received, self.sent, self.copied)
        return Intervals(self.micro_batch, {}, {}, *(part[places] for part in parts))


class IntervalCosts:
    """Sums over intervals of one leaf order that do not depend on the micro-batch, and `table` for one that
    does. n operators: O(n^2) numbers each, O(n |degrees|) questions to the cost model a micro-batch, or to
    the `seconds_of` of another order."""

    def __init__(
        self,
        graph: ComputationGraph,
        order: Sequence[int],
        boundaries: Sequence[int],
        topology: DeviceTopology,
        costs: CostModel,
        options: Options,
        units: Units | None = None,
        seconds_of: Callable[[float], Array] | None = None,
    ) -> None:
        self.graph, self.topology, self.costs, self.options = graph, topology, costs, options
        self.order = np.asarray(order)
        self.boundaries = np.asarray(boundaries)
        self.kinds = tuple(dict.fromkeys(topology.devices))
        ops = [graph.operators[i] for i in order]
        forward = self._messages(lambda tensor: tensor.bytes)
        gradient = self._messages(lambda tensor: tensor.bytes * tensor.needs_grad)
        self.received, self.sent, self.copied = (f + g for f, g in zip(forward, gradient, strict=True))
        self.messages: Array = np.sum(
            [part > 0 for part in (*forward[:2], *gradient[:2])], axis=0, dtype=float
        )
        self.trainable = self._parameters(ops, trainable_only=True)
        parameters = self._parameters(ops, trainable_only=False)
        buffers = self._sums([op.buffer_bytes for op in ops])
        self.static = parameters + (1 + options.optimizer_factor) * self.trainable + buffers
        self.stash = self._sums([op.stash for op in ops])
        self.empty = np.tri(len(boundaries), dtype=bool)
        self.coupled = self._sums([op.batch_coupled for op in ops]) > 0
        self.fixed: dict[int, NDArray[np.bool_]] = {}
        if units is not None and units.constrained:
            self._constrain(units)
        self.seconds_of = seconds_of or cache(
            lambda samples: operator_seconds(graph, costs, self.kinds, samples)
        )

    def table(self, micro_batch: int) -> Intervals:
        """The intervals at one micro-batch size."""
        options, topology = self.options, self.topology
        rounds = options.mini_batch // micro_batch
        count = len(topology.devices)
        link = topology.inside if count <= topology.per_host else topology.between
        update = _affine(
            self.trainable, lambda size: max(self.costs.update(size, device) for device in self.kinds)
        )
        seconds, reduces = {}, {}
        allowed = options.degrees(micro_batch, count)
        for degree in sorted({*allowed, *(d for d in self.fixed if micro_batch % d == 0)}):
            work = self._sums(self.seconds_of(micro_batch / degree).sum(0)[self.order])
            size = (self.sent + self.received) * micro_batch / degree
            reduce = _affine(self.trainable, _all_reduce(degree, topology))
            total = work + self.messages * link.latency + size / link.bandwidth + (update + reduce) / rounds
            total[self.empty if degree == 1 else self.empty | self.coupled] = np.inf
            if self.fixed:
                total[self._otherwise(degree, degree in allowed)] = np.inf
            seconds[degree], reduces[degree] = total, reduce
        return Intervals(
            micro_batch=micro_batch,
            seconds=seconds,
            reduces=reduces,
            static=self.static,
            stash=self.stash,
            received=self.received,
            sent=self.sent,
            copied=self.copied,
        )

    def _constrain(self, units: Units) -> None:
        """Two labels, or two numbers of replicas, are not one stage."""
        unit = [units.unit_of[i] for i in self.order.tolist()]
        first = [i == 0 or unit[i] != unit[i - 1] for i in range(len(unit))]
        labels = self._sums([first[i] and units.labels[u] is not None for i, u in enumerate(unit)])
        numbers = sorted({number for number in units.replicas if number is not None})
        self.fixed = {d: self._sums([units.replicas[u] == d for u in unit]) > 0 for d in numbers}
        kinds = np.sum(list(self.fixed.values()), axis=0) if numbers else np.zeros_like(labels)
        self.empty = self.empty | (labels > 1) | (kinds > 1)

    def _otherwise(self, degree: int, allowed: bool) -> NDArray[np.bool_]:
        """Intervals that must have another number of replicas."""
        others = [found for d, found in self.fixed.items() if d != degree]
        if not allowed:
            others.append(~self.fixed[degree])
        return np.any(others, axis=0) if others else np.zeros_like(self.empty)

    def _sums(self, values: Sequence[float] | Array) -> Array:
        sums = np.concatenate([[0.0], np.cumsum(np.asarray(values, dtype=np.float64))])[self.boundaries]
        return np.asarray(sums[None, :] - sums[:, None])

    def _pairs(self, pairs: Sequence[tuple[int, int, float]]) -> Array:
        """Cumulative: [i, j] = the sum over pairs (u, v) of positions with u < i and v < j."""
        n = len(self.order)
        sums = np.zeros((n + 1, n + 1))
        for u, v, size in pairs:
            sums[u + 1, v + 1] += size
        return np.asarray(sums.cumsum(0).cumsum(1)[np.ix_(self.boundaries, self.boundaries)])

    def _messages(self, size: Callable[[Tensor], float]) -> tuple[Array, Array, Array]:
        """Bytes per sample that enter an interval; that leave it, a tensor once; that leave it, a tensor once
        for every operator that reads it."""
        position = {op: i for i, op in enumerate(self.order.tolist())}
        readers: dict[str, list[int]] = {}
        for op, place in position.items():
            for name in dict.fromkeys(self.graph.operators[op].inputs):
                readers.setdefault(name, []).append(place)
        entering, leaving, copied = [], [], []
        for name, found in readers.items():
            bytes_ = size(self.graph.tensors[name])
            source = position[self.graph.producer[name]]
            leaving.append((source, max(found), bytes_))
            copied += [(source, reader, bytes_) for reader in found]
            # it enters an interval at its first reader there: whose forerunner is before the interval
            entering += [(u, v, bytes_) for u, v in pairwise([source, *sorted(found)])]
        into = self._pairs(entering)
        return into - np.diagonal(into)[:, None], _out(self._pairs(leaving)), _out(self._pairs(copied))

    def _parameters(self, ops: Sequence[Operator], *, trainable_only: bool) -> Array:
        """Bytes of the parameters of an interval; tied ones count once."""
        each = np.zeros(len(ops))
        seen: dict[str, int] = {}
        again = []
        for i, op in enumerate(ops):
            for parameter in {p.name: p for p in op.parameters}.values():
                if parameter.trainable or not trainable_only:
                    each[i] += parameter.bytes
                    if parameter.name in seen:
                        again.append((seen[parameter.name], i, float(parameter.bytes)))
                    seen[parameter.name] = i
        total = self._sums(each)
        if again:
            pairs = self._pairs(again)
            total -= pairs[-1][None, :] - pairs  # both uses at or after a and before b
        return total


def _out(pairs: Array) -> Array:
    """From cumulative pairs to what goes from inside [a, b) to b and beyond."""
    last, own = pairs[:, -1], np.diagonal(pairs)
    return np.asarray(last[None, :] - last[:, None] - own[None, :] + pairs)


def _affine(sizes: Array, seconds: Callable[[float], float]) -> Array:
    """A cost that is affine in its size, for many sizes from two questions; nothing costs nothing."""
    largest = float(sizes.max())
    if largest <= 0:
        return np.zeros_like(sizes)
    fixed = seconds(0.0)
    return np.where(sizes > 0, fixed + (seconds(largest) - fixed) / largest * sizes, 0.0)


def _all_reduce(degree: int, topology: DeviceTopology) -> Callable[[float], float]:
    link = topology.inside if degree <= topology.per_host else topology.between
    return lambda size: all_reduce_seconds(size, degree, link)
