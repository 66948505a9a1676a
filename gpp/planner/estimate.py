"""A chosen partition becomes a Plan: stages, edges, devices, times, bytes, and the simulator's answer."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from gpp.cost import CostModel, all_reduce_seconds
from gpp.graph import ComputationGraph, Operator, Parameter
from gpp.made_for import Note, notes
from gpp.plan import (
    Edge,
    Fingerprints,
    Plan,
    PlanError,
    Policy,
    Shared,
    Stage,
    StageGraph,
    StageSeconds,
    device_memory,
    shared_out,
)
from gpp.schedule.inflight import in_flight
from gpp.timing import step_seconds
from gpp.topology import Device, DeviceTopology

from .intervals import operator_seconds, takes_part_in_backward
from .naming import stage_names
from .options import Options
from .placement import place
from .units import Units, units

if TYPE_CHECKING:
    from .linear import Line
    from .space import Space


@dataclass(frozen=True, slots=True)
class Group:
    """One stage to be: operators by position, how many devices it gets, and what else a planner decided.

    `micro_batch` None is the plan's own. Groups with the same `slot` (not None) share their devices, of which
    they must ask for equally many. `at` names the devices; either all groups have it or none.
    """

    operators: tuple[int, ...]
    devices: int
    micro_batch: int | None = None
    k: int = 1
    recompute: bool = False
    shard_optimizer: bool = False
    slot: int | None = None
    at: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Problem:
    """Everything that a planner is given."""

    graph: ComputationGraph
    topology: DeviceTopology
    costs: CostModel
    options: Options

    @cached_property
    def fingerprints(self) -> Fingerprints:
        """What its plans are made from."""
        return Fingerprints(self.graph.fingerprint(), self.costs.fingerprint(), self.topology.fingerprint())

    @cached_property
    def notes(self) -> tuple[Note, ...]:
        """What its plans are made for."""
        return notes(self.graph)

    @cached_property
    def units(self) -> Units:
        """What the user's constraints keep together. Raises PlanError if they contradict each other."""
        return units(self.graph, self.options, len(self.topology.devices))

    @cached_property
    def space(self) -> "Space":
        """The series-parallel space over its units, made once for every micro-batch size."""
        from .space import make_space

        return make_space(self)

    @cached_property
    def line(self) -> "Line":
        """The model as one line, made once for every micro-batch size."""
        from .linear import Line

        return Line(self)

    @cached_property
    def kinds(self) -> tuple[Device, ...]:
        """The different devices that there are."""
        return tuple(dict.fromkeys(self.topology.devices))

    @cached_property
    def least_seconds(self) -> dict[int, float]:
        """For each micro-batch size what no step takes less than, see `gpp.planner.sizes`."""
        from .sizes import least_seconds

        return least_seconds(self)

    def operator_seconds(self, samples: float) -> NDArray[np.float64]:
        """Those of `gpp.planner.intervals`, on the slowest device; asked once for each size."""
        if samples not in self._asked:
            self._asked[samples] = operator_seconds(self.graph, self.costs, self.kinds, samples)
        return self._asked[samples]

    @cached_property
    def _asked(self) -> dict[float, NDArray[np.float64]]:
        return {}


def assemble(
    problem: Problem,
    groups: Sequence[Group],
    micro_batch: int,
    planner: str,
    *,
    policy: Policy | None = None,
    chained: bool = False,
) -> Plan:
    """The plan for a partition of the operators into `groups`, without estimate and lower bound.

    Stages are numbered topologically, groups that could go either way in the order given; devices follow that
    order. `policy` is the options' own if not given; `chained` runs the stages as a sequential pipeline: each
    also waits for the one before it. Raises PlanError if the groups depend on each other in a circle or need
    more devices than exist.
    """
    graph, topology, options = problem.graph, problem.topology, problem.options
    policy = policy or options.policy
    groups = _in_topological_order(graph, groups)
    places = _places(groups, topology)
    stage_of = {i: number for number, group in enumerate(groups) for i in group.operators}
    edges = _edges(graph, stage_of)
    if chained:
        edges = in_a_row(edges, len(groups))
    successors = [[e.target for e in edges if e.source == s] for s in range(len(groups))]
    sizes = [group.micro_batch or micro_batch for group in groups]
    held = in_flight(successors, sizes, policy, options.mini_batch, ks=[group.k for group in groups])
    names = stage_names(graph, [group.operators for group in groups])
    stages = tuple(
        _stage(problem, group, size, name, devices, samples)
        for group, size, name, devices, samples in zip(groups, sizes, names, places, held, strict=True)
    )
    return Plan(
        stage_graph=StageGraph(stages, edges, _shared(graph, stage_of)),
        topology=topology,
        mini_batch=options.mini_batch,
        policy=policy,
        fingerprints=problem.fingerprints,
        planner=planner,
        precision=options.precision,
        loss_weighted=graph.loss_weighted,
        global_norm=options.global_norm,
        made_for=problem.notes,
    )


def in_a_row(edges: Sequence[Edge], stages: int) -> tuple[Edge, ...]:
    """The edges of a stage graph and, where neighbours in its numbering have none, an order between them."""
    found = {(e.source, e.target): e for e in edges}
    for s in range(stages - 1):
        found.setdefault((s, s + 1), Edge(s, s + 1, (), 0, 0))
    return tuple(found[pair] for pair in sorted(found))


def estimated(plan: Plan) -> Plan:
    """The plan with the simulator's step time as its estimate."""
    return replace(plan, estimate=step_seconds(plan))


def busy_seconds(plan: Plan) -> float:
    """Compute and update of the busiest device in one step: no schedule of the plan takes less."""
    return max(
        plan.mini_batch // stage.micro_batch * (stage.seconds.forward + stage.seconds.backward)
        + stage.seconds.update
        for stage in plan.stage_graph.stages
    )


def rough_seconds(plan: Plan) -> float:
    """About the step time: the longest way there and back, one bottleneck for every other micro-batch, and
    the slowest end of a step. Exact for balanced stages, a few percent above the simulation for others."""
    graph, topology = plan.stage_graph, plan.topology
    incoming: dict[int, list[Edge]] = defaultdict(list)
    for edge in graph.edges:
        incoming[edge.target].append(edge)
    reached: list[float] = []
    slowest = end = 0.0
    for index, stage in enumerate(graph.stages):
        here = stage.seconds.forward + stage.seconds.backward
        before = 0.0
        for edge in incoming[index]:
            source = graph.stages[edge.source].devices[0]
            link = topology.link(source, stage.devices[0])
            share = stage.micro_batch / len(stage.devices)
            there_and_back = link.seconds(edge.bytes * share) + (
                link.seconds(edge.gradient_bytes * share) if edge.needs_grad else 0.0
            )
            before = max(before, reached[edge.source] + there_and_back)
        reached.append(before + here)
        slowest = max(slowest, here)
        ring = topology.inside if len(stage.devices) <= topology.per_host else topology.between
        reduce = all_reduce_seconds(stage.trainable_bytes, len(stage.devices), ring)
        end = max(end, reduce + stage.seconds.update)
    rounds = plan.mini_batch // graph.stages[0].micro_batch
    return max(reached) + (rounds - 1) * slowest + end


def peak_memory(plan: Plan) -> float:
    """Bytes on the fullest device."""
    return max(device_memory(plan))


def fits(plan: Plan) -> bool:
    """Whether every device has the memory that the plan needs there."""
    devices = plan.topology.devices
    return all(need <= device.memory for need, device in zip(device_memory(plan), devices, strict=True))


def _places(groups: Sequence[Group], topology: DeviceTopology) -> list[tuple[int, ...]]:
    """Devices of every group; those of one slot are placed once."""
    decided = [group.at for group in groups if group.at is not None]
    if decided:
        if len(decided) < len(groups):
            raise PlanError("either every stage says which devices it is on, or none does")
        return decided
    slots = [("slot", group.slot) if group.slot is not None else ("own", i) for i, group in enumerate(groups)]
    counts = {slot: group.devices for slot, group in zip(slots, groups, strict=True)}
    for slot, group in zip(slots, groups, strict=True):
        if counts[slot] != group.devices:
            raise PlanError(
                f"stages that share devices need equally many, not {counts[slot]} and {group.devices}"
            )
    found = dict(zip(counts, place(list(counts.values()), topology), strict=True))
    return [found[slot] for slot in slots]


def _in_topological_order(graph: ComputationGraph, groups: Sequence[Group]) -> list[Group]:
    owner = {i: number for number, group in enumerate(groups) for i in group.operators}
    waits: list[set[int]] = [set() for _ in groups]
    for u, v in graph.edges:
        if owner[u] != owner[v]:
            waits[owner[v]].add(owner[u])
    ordered: list[int] = []
    left = list(range(len(groups)))
    while left:
        ready = next((g for g in left if waits[g] <= set(ordered)), None)
        if ready is None:
            raise PlanError(
                f"{len(left)} stages depend on each other in a circle; every stage must be a convex set of "
                "operators and their graph acyclic"
            )
        ordered.append(ready)
        left.remove(ready)
    return [groups[g] for g in ordered]


def _edges(graph: ComputationGraph, stage_of: dict[int, int]) -> tuple[Edge, ...]:
    """All tensors from stage to stage; one that several operators of a stage read is sent once."""
    found: dict[tuple[int, int], dict[str, None]] = defaultdict(dict)
    for (u, v), tensors in graph.edges.items():
        if stage_of[u] != stage_of[v]:
            found[stage_of[u], stage_of[v]].update({t.name: None for t in tensors})
    edges = []
    for (source, target), names in sorted(found.items()):
        sent = [graph.tensors[name] for name in names]
        size = sum(t.bytes for t in sent)
        gradient = sum(t.bytes for t in sent if t.needs_grad)
        edges.append(Edge(source, target, tuple(names), size, gradient))
    return tuple(edges)


def _stage(
    problem: Problem, group: Group, micro_batch: int, name: str, devices: tuple[int, ...], held: int
) -> Stage:
    graph = problem.graph
    ops = [graph.operators[i] for i in sorted(group.operators)]
    parameters = _parameters(ops)
    sizes = {p.name: p.bytes for p in parameters.values() if p.trainable}
    trainable = sum(sizes.values())
    owned = trainable  # of which a replica keeps the optimizer's state
    if group.shard_optimizer:
        shares = shared_out(sizes, len(devices))
        owned = max(sum(n for p, n in sizes.items() if shares[p] == i) for i in range(len(devices)))
    return Stage(
        name=name,
        operators=tuple(op.name for op in ops),
        devices=devices,
        micro_batch=micro_batch,
        in_flight=held,
        seconds=_seconds(problem, group, ops, micro_batch / len(devices), trainable, owned, devices),
        k=group.k,
        recompute=group.recompute,
        shard_optimizer=group.shard_optimizer,
        stash=sum(op.stash for op in ops),
        weight_stash=sum(op.weight_stash for op in ops),
        parameter_bytes=sum(p.bytes for p in parameters.values()),
        trainable_bytes=trainable,
        optimizer_bytes=int(problem.options.optimizer_factor * owned),
        buffer_bytes=sum(op.buffer_bytes for op in ops),
        batch_keys=tuple(dict.fromkeys(key for op in ops for key in op.batch_keys)),
        terms=tuple(dict.fromkeys(term for op in ops for term in op.terms)),
        has_backward=any(takes_part_in_backward(graph, op) for op in ops),
    )


def _parameters(ops: Sequence[Operator]) -> dict[str, Parameter]:
    """By name: tied parameters are one."""
    return {p.name: p for op in ops for p in op.parameters}


def _seconds(
    problem: Problem,
    group: Group,
    ops: Sequence[Operator],
    samples: float,
    trainable: int,
    owned: int,
    devices: Sequence[int],
) -> StageSeconds:
    """Replicas wait for each other: the slowest device counts. Where the optimizer's state is shared out, an
    update ends when each replica has the others' parameters (half of an all-reduce)."""
    costs = problem.costs
    kinds = tuple(dict.fromkeys(problem.topology.devices[d] for d in devices))
    back = [op for op in ops if takes_part_in_backward(problem.graph, op)]
    forward = max(sum(costs.forward(op, samples, d) for op in ops) for d in kinds)
    shares = group.devices if group.shard_optimizer else 1
    hosts = {problem.topology.host(d) for d in devices}
    ring = problem.topology.inside if len(hosts) == 1 else problem.topology.between
    update = max(costs.update(owned, d) for d in kinds) if trainable else 0.0
    return StageSeconds(
        forward=forward,
        recompute=forward if group.recompute and back else 0.0,
        backward_input=max(sum(costs.backward_input(op, samples, d) for op in back) for d in kinds),
        backward_weight=max(sum(costs.backward_weight(op, samples, d) for op in back) for d in kinds),
        update=update + (all_reduce_seconds(trainable, shares, ring) / 2 if trainable else 0.0),
    )


def _shared(graph: ComputationGraph, stage_of: dict[int, int]) -> tuple[Shared, ...]:
    """Trainable parameters that several stages hold, by the stages that do."""
    holders: dict[str, set[int]] = defaultdict(set)
    sizes: dict[str, int] = {}
    for i, op in enumerate(graph.operators):
        for p in op.parameters:
            if p.trainable:
                holders[p.name].add(stage_of[i])
                sizes[p.name] = p.bytes
    groups: dict[tuple[int, ...], list[str]] = defaultdict(list)
    for name, stages in sorted(holders.items()):
        if len(stages) > 1:
            groups[tuple(sorted(stages))].append(name)
    return tuple(
        Shared(tuple(names), sum(sizes[name] for name in names), stages)
        for stages, names in sorted(groups.items())
    )
