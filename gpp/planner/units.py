"""What stays together: the user's constraints as a graph of units, which every planner plans on.

A unit is a set of operators that must be one stage's: what the constraints name together, and whatever lies
on a path between two of its members, or between two sets that wait for each other. Contracting the strongly
connected components of the graph of those sets gives exactly that, and an acyclic graph. Without constraints
every operator is a unit.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from typing import TYPE_CHECKING, TypeVar

from gpp.graph import ComputationGraph, ancestor_masks
from gpp.plan import PlanError

from .options import Constraints, Options

if TYPE_CHECKING:
    from .estimate import Group, Problem

WHERE = "planner.constraints"
Value = TypeVar("Value", str, int)


@dataclass(frozen=True)
class Units:
    """Sets of operators that no stage may part, in a topological order of the graph between them.

    `members[u]` are positions of operators, ascending; `predecessors[u]` units, ascending. At most one unit
    has a given label, and no stage holds two labels. `replicas[u]` is what its stage must have, None: any.
    """

    members: tuple[tuple[int, ...], ...]
    predecessors: tuple[tuple[int, ...], ...]
    labels: tuple[str | None, ...]
    replicas: tuple[int | None, ...]

    @cached_property
    def unit_of(self) -> tuple[int, ...]:
        """For each operator its unit."""
        return tuple(u for _, u in sorted((i, u) for u, found in enumerate(self.members) for i in found))

    @cached_property
    def successors(self) -> tuple[tuple[int, ...], ...]:
        """For each unit those that wait for it, ascending."""
        out: list[list[int]] = [[] for _ in self.members]
        for v, us in enumerate(self.predecessors):
            for u in us:
                out[u].append(v)
        return tuple(tuple(vs) for vs in out)

    @cached_property
    def ancestors(self) -> tuple[int, ...]:
        """For each unit the bit set of the units that it depends on."""
        return ancestor_masks(self.predecessors)

    @property
    def constrained(self) -> bool:
        """Whether any constraint does anything."""
        return len(self.members) < len(self.unit_of) or any(self.labels) or any(self.replicas)

    def operators(self, units: Iterable[int]) -> tuple[int, ...]:
        """The operators of some units, in that order."""
        return tuple(i for u in units for i in self.members[u])


def units(graph: ComputationGraph, options: Options, devices: int) -> Units:
    """The units of a graph under `options.constraints`, on a cluster of so many devices.

    Raises PlanError for a pattern that matches no operator and for constraints that contradict each other or
    the cluster. O(operators + edges) after the patterns are matched.
    """
    sets, labels, replicas = _matched(graph, options.constraints)
    members = _components(graph, sets)
    owner = {i: u for u, found in enumerate(members) for i in found}
    before: list[set[int]] = [set() for _ in members]
    for i, j in graph.edges:
        if owner[i] != owner[j]:
            before[owner[j]].add(owner[i])
    result = Units(
        members,
        tuple(tuple(sorted(found)) for found in before),
        tuple(_one(graph, found, labels, "pins") for found in members),
        tuple(_one(graph, found, replicas, "replicas") for found in members),
    )
    _check_replicas(graph, options, devices, result)
    different = sorted({label for label in result.labels if label is not None})
    if len(different) > devices:
        raise PlanError(
            f"{WHERE}.pins names {len(different)} stages ({', '.join(different)}), the cluster has {devices} "
            "devices; use fewer labels or more devices"
        )
    return result


def stage_degrees(problem: "Problem", members: Iterable[int], micro_batch: int) -> tuple[int, ...]:
    """How many replicas a stage of these units may have at a micro-batch size, ascending; none if they may
    not be one stage: two labels, two numbers of replicas, or one that does not divide the micro-batch."""
    found = tuple(members)
    labels = {problem.units.labels[u] for u in found} - {None}
    replicas = {problem.units.replicas[u] for u in found} - {None}
    coupled = any(problem.graph.operators[i].batch_coupled for i in problem.units.operators(found))
    if len(labels) > 1 or len(replicas) > 1:
        return ()
    for number in replicas:
        assert number is not None
        return (number,) if micro_batch % number == 0 and not (coupled and number > 1) else ()
    return (1,) if coupled else problem.options.degrees(micro_batch, len(problem.topology.devices))


def check_constraints(problem: "Problem", groups: Sequence["Group"]) -> None:
    """Raise PlanError unless the stages to be keep the user's constraints."""
    found = problem.units
    names = [op.name for op in problem.graph.operators]
    stage_of = {i: number for number, group in enumerate(groups) for i in group.operators}
    for members in found.members:
        apart = next((i for i in members if stage_of[i] != stage_of[members[0]]), None)
        if apart is not None:
            raise PlanError(
                f"operators {names[members[0]]} and {names[apart]} must be in one stage, they are in two; "
                f"relax {WHERE}"
            )
    for group in groups:
        inside = sorted({found.unit_of[i] for i in group.operators})
        labels = sorted({label for u in inside if (label := found.labels[u]) is not None})
        if len(labels) > 1:
            raise PlanError(
                f"the stage of {names[group.operators[0]]} holds what is pinned to {' and '.join(labels)}; "
                f"part it or relax {WHERE}.pins"
            )
        for u in inside:
            number = found.replicas[u]
            if number is not None and number != group.devices:
                raise PlanError(
                    f"the stage of {names[found.members[u][0]]} must have {number} replicas, it has "
                    f"{group.devices}; relax {WHERE}.replicas"
                )


def _matched(
    graph: ComputationGraph, constraints: Constraints
) -> tuple[list[set[int]], dict[int, list[str]], dict[int, list[int]]]:
    """Sets that stay together; the labels of operators; their replicas."""
    together = [
        set().union(*(_match(graph, pattern, "together") for pattern in entry))
        for entry in constraints.together
    ]
    labels: dict[int, list[str]] = {}
    by_label: dict[str, set[int]] = {}
    for pattern, label in constraints.pins:
        for i in _match(graph, pattern, "pins"):
            labels.setdefault(i, []).append(label)
            by_label.setdefault(label, set()).add(i)
    for producer, consumer in constraints.uncut:
        sources, targets = (_match(graph, p, "uncut") for p in (producer, consumer))
        edges = [{u, v} for u, v in graph.edges if u in sources and v in targets]
        if not edges:
            raise PlanError(
                f"{WHERE}.uncut: nothing that matches {producer!r} feeds anything that matches {consumer!r}; "
                "name a producer and its consumer"
            )
        together += edges
    replicas: dict[int, list[int]] = {}
    for pattern, number in constraints.replicas:
        for i in _match(graph, pattern, "replicas"):
            replicas.setdefault(i, []).append(number)
    return [*together, *by_label.values()], labels, replicas


def _match(graph: ComputationGraph, pattern: str, where: str) -> set[int]:
    found = {i for i, op in enumerate(graph.operators) if fnmatchcase(op.name, pattern)}
    if not found:
        from difflib import get_close_matches

        names = [op.name for op in graph.operators]
        near = get_close_matches(pattern, names, n=3, cutoff=0.0)
        raise PlanError(
            f"{WHERE}.{where}: {pattern!r} matches no operator of the model; the nearest are "
            f"{', '.join(near)}"
        )
    return found


def _components(graph: ComputationGraph, sets: Sequence[set[int]]) -> tuple[tuple[int, ...], ...]:
    """Operators by unit, in a topological order: those of several sets join these, and what is strongly
    connected after that is one."""
    if not sets:
        return tuple((i,) for i in range(len(graph.operators)))
    import networkx as nx

    # a circle through a set is what makes its members strongly connected
    joined = nx.DiGraph(list(graph.edges))
    joined.add_nodes_from(range(len(graph.operators)))
    for members in sets:
        nx.add_cycle(joined, sorted(members))
    contracted = nx.condensation(joined)
    groups = {g: tuple(sorted(found)) for g, found in contracted.nodes(data="members")}
    return tuple(groups[g] for g in nx.lexicographical_topological_sort(contracted, key=groups.__getitem__))


def _one(
    graph: ComputationGraph, group: Sequence[int], found: dict[int, list[Value]], where: str
) -> Value | None:
    """The one value of a unit; None if it has none."""
    values: dict[Value, int] = {}
    for i in group:
        for value in found.get(i, []):
            values.setdefault(value, i)
    if len(values) > 1:
        (one, i), (other, j), *_ = sorted(values.items())
        names = [graph.operators[k].name for k in (i, j)]
        what = f"operator {names[0]} is given {one} and {names[1]} {other}"
        same = "which is the same one" if i == j else "which have to be in one stage (with what lies between)"
        raise PlanError(f"{WHERE}.{where}: {what}, {same}; drop one of the two")
    return next(iter(values), None)


def _check_replicas(graph: ComputationGraph, options: Options, devices: int, found: Units) -> None:
    for members, number in zip(found.members, found.replicas, strict=True):
        if number is None:
            continue
        said = f"{WHERE}.replicas: operator {graph.operators[members[0]].name} is to have {number} replicas"
        if number < 1:
            raise PlanError(f"{said}; it needs at least 1")
        if number > devices:
            raise PlanError(f"{said}, the cluster has {devices} devices; use at most so many")
        if options.max_replicas is not None and number > options.max_replicas:
            raise PlanError(
                f"{said}, planner.max_replicas is {options.max_replicas}; raise it or use fewer replicas"
            )
        coupled = next((i for i in members if graph.operators[i].batch_coupled), None)
        if coupled is not None and number > 1:
            raise PlanError(
                f"{said}, but {graph.operators[coupled].name} mixes the samples of its batch and cannot be "
                "split; use 1"
            )
        if all(size % number for size in options.micro_batches):
            sizes = ", ".join(map(str, options.micro_batches))
            raise PlanError(f"{said}, which divides no micro-batch size ({sizes}); use a divisor of one")
