"""GraphPipe's planner: series-parallel stages, one micro-batch size, 1F1B (GraphPipe §5, Algorithm 1).

Minimises the bottleneck time per sample under each device's memory; of equal bottlenecks, the plan with the
fewest samples in flight and the one with the least memory are simulated and the faster one is kept. The
micro-batch size is chosen by simulated step time. Devices that lower neither bottleneck nor memory stay idle.

Where there are more branches than devices the tree cannot tell them apart; then, and where nothing in the
tree's space fits memory, stages may also span the end of one branch and the start of the next (the leaf order
as one chain), and the faster plan is kept.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from gpp.cost import CostModel
from gpp.graph import ComputationGraph
from gpp.plan import Plan, PlanError
from gpp.topology import DeviceTopology

from .bound import bound
from .estimate import Group, Problem, assemble, busy_seconds, estimated, peak_memory, rough_seconds
from .intervals import IntervalCosts, Intervals, operator_seconds
from .options import Options
from .outline import Chain, outline
from .series_parallel import decompose
from .threshold import Answer, Charge, ThresholdSearch

NAME = "graphpipe"
ROUGH = 1.15  # the rough step time is at most this factor above the simulated one
CLOSE = 1e-6  # step times this close are ties


@dataclass(frozen=True, slots=True)
class _Charge:
    """How warily memory is charged, see `Charge`, and what part of a device's memory may be charged."""

    margin: int
    wary: bool
    part: float


# first as most plans come out, then so that none comes out larger than charged
CHARGES = (_Charge(0, False, 1.0), _Charge(1, False, 1 - 1e-9), _Charge(1 << 20, True, 1 - 1e-9))
# what the tree puts in a row may be side by side, and hold less than charged: these plans may fit after all
HOPES = (_Charge(0, False, 1.5), _Charge(0, False, float("inf")))


def plan(graph: ComputationGraph, topology: DeviceTopology, costs: CostModel, options: Options) -> Plan:
    """The plan for one training step, with its estimate and its lower bound.

    Raises PlanError if no plan fits the devices' memory. Of unequal devices every stage is planned for the
    slowest and the smallest. n operators (merged to about 160 runs where there are more), K devices, H
    levels, per micro-batch size: O(n^2 K log K) for the first threshold, O(n^2 H^2) for every one, mostly one
    to ten of them; then a simulation of the best few.
    """
    problem = Problem(graph, topology, costs, options)
    search = _Search(problem)
    found = [candidate for size in options.micro_batches for candidate in search.candidates(size)]
    if not found:
        raise PlanError(search.shortage())
    best = _fastest(found)
    best = _fastest(search.leaner(best), best)
    seconds, _ = bound(graph, topology, costs, options)
    return replace(best.plan, lower_bound=seconds)


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A plan and where it came from."""

    plan: Plan
    answer: Answer
    search: ThresholdSearch


def _fastest(found: Sequence[_Candidate], best: _Candidate | None = None) -> _Candidate:
    """The least simulated step time; ties to less memory, then to fewer stages."""
    for candidate in sorted(found, key=lambda c: rough_seconds(c.plan)):
        least = max(busy_seconds(candidate.plan), rough_seconds(candidate.plan) / ROUGH)
        if best is None or least <= best.plan.estimate * (1 + CLOSE):
            candidate = replace(candidate, plan=estimated(candidate.plan))
            if best is None or _better(candidate.plan, best.plan):
                best = candidate
    assert best is not None
    return best


def _better(one: Plan, other: Plan) -> bool:
    if abs(one.estimate - other.estimate) > CLOSE * other.estimate:
        return one.estimate < other.estimate
    ties = [(peak_memory(p), len(p.stage_graph.stages)) for p in (one, other)]
    return ties[0] < ties[1]


class _Search:
    """What is the same for every micro-batch size."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.memory = min(device.memory for device in problem.topology.devices)
        self.devices = len(problem.topology.devices)
        graph, topology, costs, options = problem.graph, problem.topology, problem.costs, problem.options
        kinds = tuple(dict.fromkeys(topology.devices))
        work = operator_seconds(graph, costs, kinds, options.micro_batches[-1]).sum(0)
        static = np.array([sum(p.bytes for p in op.parameters) for op in graph.operators], dtype=float)
        weights = np.maximum(work / (work.sum() or 1.0), static / (static.sum() or 1.0))
        self.outline = outline(decompose(graph, work.tolist()), weights.tolist(), self.devices)
        self.costs = IntervalCosts(
            graph, self.outline.order, self.outline.boundaries, topology, costs, options
        )
        self.tree = self.outline.chain
        self.leaves = self.outline.flat()

    def candidates(self, micro_batch: int) -> list[_Candidate]:
        """Plans with one micro-batch size, not yet simulated; none where nothing fits."""
        intervals = self.costs.table(micro_batch)
        found = self.in_memory(self.tree, intervals)
        if not found or self.tree.width > self.devices:
            found += self.in_memory(self.leaves, intervals)
        return found

    def in_memory(self, chain: Chain, intervals: Intervals) -> list[_Candidate]:
        """The plan with the least bottleneck and of those with the fewest samples in flight."""
        for charge in (*CHARGES, *HOPES):
            search = self.search(chain, intervals, charge)
            answer = search.answer(self.memory * charge.part)
            if answer is not None:
                plan = self.assembled(answer, intervals.micro_batch)
                if peak_memory(plan) <= self.memory:
                    return [_Candidate(plan, answer, search)]
        return []

    def leaner(self, candidate: _Candidate) -> list[_Candidate]:
        """The plan with the least memory of those with the same bottleneck, if it is another one."""
        search = candidate.search
        answer = search.leaner(candidate.answer)
        if answer == candidate.answer:
            return []
        plan = self.assembled(answer, search.intervals.micro_batch)
        return [_Candidate(plan, answer, search)] if peak_memory(plan) <= self.memory else []

    def search(self, chain: Chain, intervals: Intervals, charge: _Charge) -> ThresholdSearch:
        """A search over one form of the model."""
        options = self.problem.options
        rounds = options.mini_batch // intervals.micro_batch
        charged = Charge(options.policy, rounds, charge.margin, charge.wary)
        return ThresholdSearch(chain, intervals, self.devices, charged)

    def assembled(self, answer: Answer, micro_batch: int) -> Plan:
        """An answer as a plan; stages in the leaf order."""
        stages = sorted(answer.stages, key=lambda stage: stage.start)
        groups = [Group(self.outline.operators(s.start, s.stop), s.devices) for s in stages]
        return assemble(self.problem, groups, micro_batch, NAME)

    def shortage(self) -> str:
        """Why nothing fits: the operator that is too large, or about how much the whole model is short of."""
        sizes = self.problem.options.micro_batches
        tables = [self.costs.table(size) for size in sorted({sizes[0], sizes[-1]})]
        # a small micro-batch leaves less in flight, a large one may be split over more replicas
        runs = [(self.search(self.tree, table, CHARGES[0]).heaviest_run(), table) for table in tables]
        (run, least), table = min(runs, key=lambda pair: pair[0][1])
        need = least
        if least <= self.memory:
            need, table = min(((self.need(t), t) for t in tables), key=lambda pair: pair[0])
        has = f"a device of cluster {self.problem.topology.name} has {self.memory / 2**20:.1f} MiB"
        needs = f"needs about {need / 2**20:.1f} MiB at micro-batch {table.micro_batch}, {has}"
        less = "train.micro_batch" if len(sizes) == 1 and sizes[0] > 1 else "train.mini_batch"
        if least <= self.memory:
            count = f"{self.devices} device{'s' if self.devices > 1 else ''}"
            return (
                f"the model does not fit {count}: the fullest {needs}; use more devices, devices with more "
                f"memory or a smaller {less}"
            )
        operators = self.outline.operators(run, run + 1)
        name = self.problem.graph.operators[operators[0]].name
        others = f" with the {len(operators) - 1} after it" if operators[1:] else ""
        return (
            f"operator {name}{others} by itself {needs}; use devices with more memory, a smaller {less} or "
            "an optimizer with less state"
        )

    def need(self, table: Intervals) -> float:
        """About the least memory of a device with which there is a plan."""
        need = 0.0
        for charge in CHARGES:
            if need <= self.memory:
                both = [self.search(chain, table, charge) for chain in (self.tree, self.leaves)]
                need = min(search.smallest() for search in both)
        return need
