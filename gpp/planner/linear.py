"""The model as one line of operators, cut into stages: the space of a sequential pipeline (GraphPipe §7.1).

The line is the graph's own topological order, the order in which the model was written or captured, as
PipeDream linearises: branches come one after the other if the model runs them so. Every stage is an interval
of it, every stage waits for the one before, and the stage at position j from the end holds what a chain of j
stages has in flight. Units of the constraints (`gpp.planner.units`) are never parted.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from gpp.plan import Plan, PlanError, device_memory
from gpp.schedule.inflight import in_flight

from .estimate import Group, Problem, assemble, fits
from .intervals import IntervalCosts, Intervals
from .shortage import too_large
from .sizes import Found, sweep

MANY = 192  # runs from which on neighbours too light to matter are merged
TOLERANCE = 1e-9  # equal stages differ in the last bits of their sums
INF = 1 << 20
TRIES = 5  # at a smaller share of the memory, where skip edges hold more than a chain's would

Array = NDArray[np.float64]
Counts = NDArray[np.int32]


class Line:
    """What is the same for every micro-batch size. With `replicas` a stage may have any of the options'
    degrees, else one device, or what the constraints say."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self._found: dict[tuple[int, bool], list[Group] | None] = {}
        self.memory = min(device.memory for device in problem.topology.devices)
        self.devices = len(problem.topology.devices)
        self.runs = _runs(problem)
        units = problem.units
        self.order = units.operators(u for run in self.runs for u in run)
        sizes = [len(units.operators(run)) for run in self.runs]
        self.boundaries = tuple(int(b) for b in np.cumsum([0, *sizes]))
        graph, topology, options = problem.graph, problem.topology, problem.options
        self.costs = IntervalCosts(
            graph,
            self.order,
            self.boundaries,
            topology,
            problem.costs,
            options,
            problem.units,
            problem.operator_seconds,
        )

    def groups(self, micro_batch: int, *, replicas: bool) -> list[Group] | None:
        """The stages of least bottleneck, of those with as few stages as may be; None if nothing fits. Found
        once for each micro-batch size.

        n runs, D degrees, K devices: O(n^2 D) for each of about log2(n^2 D) thresholds, and O(n^2 D) more for
        every stage of the answer; K is no dimension of it.
        """
        key = (micro_batch, replicas)
        if key not in self._found:
            self._found[key] = self._stages(micro_batch, replicas)
        return self._found[key]

    def _stages(self, micro_batch: int, replicas: bool) -> list[Group] | None:
        search = _Search(self, micro_batch, replicas)
        memory = self.memory
        for _ in range(TRIES):
            stages = search.least(memory, self.memory)
            if stages is None:
                break
            groups = [Group(self._operators(a, b), d) for a, b, d in stages]
            plan = assemble(self.problem, groups, micro_batch, "", chained=True)
            if fits(plan):
                return groups
            memory *= min(self.memory / max(device_memory(plan)), 0.98)
        return None

    def shortage(self, *, replicas: bool) -> str:
        """Why nothing fits: about the least memory that a plan needs."""
        sizes = self.problem.options.micro_batches
        need, size = min((_Search(self, s, replicas).smallest(), s) for s in sizes)
        stages = f"{self.devices} device{'s' if self.devices > 1 else ''}"
        if not np.isfinite(need):
            return (
                f"no sequential pipeline on {stages} keeps the constraints; relax planner.constraints or use "
                "more devices"
            )
        return (
            f"no sequential pipeline fits {stages}: at micro-batch {size} the fullest needs about "
            f"{need / 2**20:.1f} MiB or more, a device of cluster {self.problem.topology.name} has "
            f"{self.memory / 2**20:.1f} MiB; use more devices, devices with more memory or a smaller "
            "train.mini_batch"
        )

    def allowed(self, degree: int, micro_batch: int, *, replicas: bool) -> NDArray[np.bool_]:
        """Which intervals may be a stage of so many replicas: [a, b) over boundaries of runs."""
        units = self.problem.units
        usual = self.problem.options.degrees(micro_batch, self.devices) if replicas else (1,)
        labels = self._count([any(units.labels[u] is not None for u in run) for run in self.runs])
        fixed = [{units.replicas[u] for u in run} - {None} for run in self.runs]
        other = self._count([bool(found - {degree}) for found in fixed])
        asked = self._count([degree in found for found in fixed])
        coupled = self.costs.coupled if degree > 1 else np.zeros_like(self.costs.coupled)
        return np.asarray(
            ~self.costs.empty & ~coupled & (labels <= 1) & (other == 0) & ((degree in usual) | (asked > 0))
        )

    def _count(self, marks: Sequence[bool]) -> NDArray[np.int64]:
        sums = np.concatenate([[0], np.cumsum(np.asarray(marks, dtype=np.int64))])
        return np.asarray(sums[None, :] - sums[:, None])

    def _operators(self, start: int, stop: int) -> tuple[int, ...]:
        return self.order[self.boundaries[start] : self.boundaries[stop]]


def best(line: Line, planner: str, *, replicas: bool) -> Plan:
    """The plan over all micro-batch sizes with the least simulated step time, run as a sequential pipeline;
    without its lower bound.

    Raises PlanError if none fits.
    """
    problem = line.problem

    def made(size: int) -> list[Found[None]]:
        groups = line.groups(size, replicas=replicas)
        return [] if groups is None else [(assemble(problem, groups, size, planner, chained=True), None)]

    found = sweep(problem, made)
    if found is None:
        raise too_large(problem.space) or PlanError(line.shortage(replicas=replicas))
    return found[0]


class _Search:
    """One micro-batch size. Stages are (start, stop, devices), boundaries of runs."""

    def __init__(self, line: Line, micro_batch: int, replicas: bool) -> None:
        self.line = line
        self.table: Intervals = line.costs.table(micro_batch)
        self.seconds = {}
        for degree, seconds in self.table.seconds.items():
            allowed = line.allowed(degree, micro_batch, replicas=replicas)
            if allowed.any():
                self.seconds[degree] = np.where(allowed, seconds, np.inf)
        self.count = len(line.runs)
        self.empty: Counts = np.zeros_like(self.table.static, dtype=np.int32)
        self.depth = min(line.devices, self.count)
        options = line.problem.options
        chain = [(s + 1,) if s < self.depth else () for s in range(self.depth + 1)]
        held = in_flight(chain, [micro_batch] * len(chain), options.policy, options.mini_batch)
        self.held = np.array([0, *reversed(held)]) / micro_batch  # micro-batches, by position from the end

    def least(self, memory: float, has: float) -> list[tuple[int, int, int]] | None:
        """The least bottleneck with at most `memory` bytes charged to a device that `has` so much; of equal
        ones the fewest stages. None: nothing fits."""
        fits = self.fits(min(memory, has))
        each = [t[(fits[degree] > 0) & np.isfinite(t)] for degree, t in self.seconds.items()]
        times = np.unique(np.concatenate([np.zeros(0), *each]))
        if not len(times):
            return None
        low, high = -1, len(times) - 1
        while high - low > 1:  # whatever is in flight
            middle = (low + high) // 2
            low, high = (low, middle) if self._fewest(times[middle], fits) else (middle, high)
        if not any(self._last(fits)[1 : self.depth]):
            return self._stages(times[high], fits)  # memory tells no positions apart
        low, step, found = high - 1, 1, None
        while found is None:  # the position from the end counts
            high = min(low + step, len(times) - 1)
            if high <= low:
                return None
            found = self._stages(times[high], fits)
            low, step = (low, step) if found else (high, 2 * step)
        while high - low > 1:
            middle = (low + high) // 2
            better = self._stages(times[middle], fits)
            low, high, found = (middle, high, found) if better is None else (low, middle, better)
        return found

    def smallest(self) -> float:
        """About the least memory with which there is a plan at all; inf if constraints leave none."""
        high = float(self._memory(1, *np.broadcast_arrays(self.held[-1], self.held[-1])).max())
        if self._stages(np.inf, self.fits(high)) is None:
            return float("inf")
        low = 0.0
        while high - low > 0.005 * high:
            middle = (low + high) / 2
            possible = self._stages(np.inf, self.fits(middle)) is not None
            low, high = (low, middle) if possible else (middle, high)
        return high

    def fits(self, memory: float) -> dict[int, Counts]:
        """By degree: the last position from the end at which an interval fits; 0 where none does."""
        found = {}
        for degree in self.seconds:
            low = np.zeros(self.table.static.shape, dtype=np.int32)
            high = np.full_like(low, self.depth + 1)  # does not fit
            for _ in range(int(self.depth + 1).bit_length()):
                middle = (low + high) // 2
                above = np.minimum(middle + 1, self.depth + 1)
                need = self._memory(degree, self.held[middle], self.held[above])
                low, high = np.where(need <= memory, (middle, high), (low, middle))
            found[degree] = np.where(np.isfinite(self.seconds[degree]), low, 0)
        return found

    def _memory(self, degree: int, own: Array, upstream: Array) -> Array:
        """Bytes on each device for so many micro-batches in flight here and in the stage before."""
        table = self.table
        held = (table.stash + table.sent) * own + table.received * upstream
        return np.asarray(table.static + table.micro_batch / degree * held)

    def _last(self, fits: dict[int, Counts]) -> list[int]:
        """How many intervals have each position as their last from the end."""
        counts = [np.bincount(found.ravel(), minlength=self.depth + 1) for found in fits.values()]
        return [int(count) for count in np.sum(counts, axis=0)]

    def _fewest(self, threshold: float, fits: dict[int, Counts]) -> bool:
        """Whether the devices suffice, were every stage the last."""
        devices = self._devices(threshold, fits, 1)
        need = np.full(self.count + 1, INF, dtype=np.int32)
        need[-1] = 0
        for a in reversed(range(self.count)):
            need[a] = (devices[a, a + 1 :] + need[a + 1 :]).min()
        return bool(need[0] <= self.line.devices)

    def _stages(self, threshold: float, fits: dict[int, Counts]) -> list[tuple[int, int, int]] | None:
        """The fewest stages below a threshold, from the last to the first."""
        need = np.full(self.count + 1, INF, dtype=np.int32)
        need[-1] = 0
        needs = [need]
        last = self._last(fits)
        devices = self._devices(threshold, fits, 1)
        for position in range(1, self.depth + 1):
            if position > 1 and last[position - 1]:
                devices = self._devices(threshold, fits, position)
            need = np.minimum(INF, (devices + need).min(1))
            needs.append(need)
            if need[0] <= self.line.devices:
                return self._trace(threshold, fits, needs)
        return None

    def _trace(
        self, threshold: float, fits: dict[int, Counts], needs: Sequence[Counts]
    ) -> list[tuple[int, int, int]]:
        stages, a = [], 0
        for position in reversed(range(1, len(needs))):
            row = self._devices(threshold, fits, position, a)
            b = int((row + needs[position - 1]).argmin())
            stages.append((a, b, int(row[b])))
            a = b
        return stages

    def _devices(
        self, threshold: float, fits: dict[int, Counts], position: int, row: int | slice = slice(None)
    ) -> Counts:
        """The fewest devices of every interval as a stage at a position from the end."""
        limit = threshold * (1 + TOLERANCE)
        devices: Counts = np.full_like(self.empty[row], INF)
        for degree in sorted(fits, reverse=True):
            may = (self.seconds[degree][row] <= limit) & (fits[degree][row] >= position)
            np.putmask(devices, may, degree)
        return devices


def _runs(problem: Problem) -> list[tuple[int, ...]]:
    """Units in a row, at most about MANY runs: of more units, neighbours that together weigh less than a
    small part of the whole, in time and in bytes, are merged. What has a label or fixed replicas stays
    alone."""
    units, graph = problem.units, problem.graph
    runs: list[tuple[int, ...]] = [(u,) for u in range(len(units.members))]
    if len(runs) <= MANY:
        return runs
    work = problem.operator_seconds(problem.options.micro_batches[-1]).sum(0)
    size = np.array([sum(p.bytes for p in op.parameters) for op in graph.operators], dtype=float)
    share = np.maximum(work / (work.sum() or 1.0), size / (size.sum() or 1.0))
    weights = [float(share[list(members)].sum()) for members in units.members]
    limit = 0.5 / MANY
    while len(runs) > MANY and limit < 1:
        runs = list(_merged(weights, limit, problem))
        limit *= 1.25
    return runs


def _merged(weights: Sequence[float], limit: float, problem: Problem) -> Iterator[tuple[int, ...]]:
    units = problem.units
    starts = [0]
    total = 0.0
    for u, weight in enumerate(weights):
        special = units.labels[u] is not None or units.replicas[u] is not None
        if u and (total + weight > limit or special):
            starts.append(u)
            total = 0.0
        total = total + weight if not special else np.inf
    return (tuple(range(a, b)) for a, b in pairwise([*starts, len(weights)]))
