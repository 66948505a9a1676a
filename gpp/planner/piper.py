"""Piper's planner (Tarnawski et al., NeurIPS 2021): the least bottleneck of any pipeline of convex stages.

Stages may be any differences of nested downsets, across branches too, but run one after the other: a stage
holds what a chain of all stages after it holds. The search is exact; where a graph has too many downsets it
refuses. `plan` works under this planner's cost model, for each micro-batch size; `solve` answers Piper's own
instances under Piper's own formulas, of which its published code is the source.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from gpp.cost import CostModel
from gpp.formats.piper import RECOMPUTED, PiperInstance, PiperVariant
from gpp.graph import ComputationGraph
from gpp.plan import Plan, PlanError
from gpp.topology import DeviceTopology

from .bound import with_bound
from .downset_costs import Memory, UnitCosts
from .downset_line import depth_first, line
from .downset_pass import CLOSE
from .downset_search import DownsetSearch
from .downsets import Downsets, Link, TooManyDownsets, downsets, equal_branches
from .estimate import Problem, assemble
from .exact import fitting, unit_costs
from .options import Options, divisors
from .piper_variants import VariantSearch
from .shortage import too_large
from .sizes import Found, sweep

NAME = "piper"
LIMIT = 40_000  # downsets above which Piper gives up
VARIANT_LIMIT = 4000  # with variants of operators, which cost more


def plan(graph: ComputationGraph, topology: DeviceTopology, costs: CostModel, options: Options) -> Plan:
    """The plan for one training step, a sequential pipeline; its micro-batch size by simulated step time.

    With `options.collapse` equal branches are not told apart: far fewer downsets, and the answer the same
    up to permuting them. Raises PlanError for a graph of too many downsets, at once, and if no pipeline fits
    the devices' memory. S downsets in P nested pairs, D degrees: O(S^2 / 64 + P D) for each of a few passes a
    micro-batch size; if memory binds, at most times the number of devices.
    """
    problem = Problem(graph, topology, costs, options)
    return with_bound(problem, answer(problem, collapse=options.collapse))


def answer(problem: Problem, *, collapse: bool = False, limit: int = LIMIT) -> Plan:
    """The same, without its lower bound, for up to `limit` downsets."""
    topology = problem.topology
    sets: Downsets | None = None

    def made(size: int) -> list[Found[None]]:
        nonlocal sets
        unit = unit_costs(problem, size)
        if sets is None or collapse:
            sets = _sets(problem, unit, collapse=collapse, limit=limit)
        groups = fitting(problem, sets, unit, size, chained=True)
        return [] if groups is None else [(assemble(problem, groups, size, NAME, chained=True), None)]

    found = sweep(problem, made)
    if found is None:
        raise too_large(problem.space) or PlanError(
            f"no sequential pipeline fits the {len(topology.devices)} devices of cluster {topology.name}, of "
            f"{min(d.memory for d in topology.devices) / 2**20:.1f} MiB; use more devices, devices with more "
            "memory or a smaller train.mini_batch, or relax planner.constraints"
        )
    return found[0]


def _sets(problem: Problem, unit: UnitCosts, *, collapse: bool, limit: int) -> Downsets:
    needs = problem.units.successors
    try:
        return downsets(needs, limit, unit.equal_branches if collapse else ())
    except TooManyDownsets as error:
        if collapse or not unit.equal_branches:
            raise
        raise TooManyDownsets(
            f"{error}, or planner.collapse=true, as some of its branches are equal"
        ) from None


@dataclass(frozen=True, slots=True)
class PiperStage:
    """Nodes by position, ascending; data and tensor parallelism; the name of each node's variant."""

    nodes: tuple[int, ...]
    replicas: int
    tensor_parallel: int
    variants: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Answer:
    """Stages, first to last, whose slowest takes `seconds` for a micro-batch; if nothing fits none, and inf.
    Exact up to permutations of equal branches, where these were collapsed."""

    seconds: float
    stages: tuple[PiperStage, ...]
    downsets: int


def solve(
    instance: PiperInstance,
    devices: int | None = None,
    *,
    memory: float | None = None,
    bandwidth: float | None = None,
    tensor_parallelism: bool = False,
    recompute: bool = False,
    collapse: bool = False,
    limit: int = LIMIT,
) -> Answer:
    """The best pipeline of an instance under Piper's formulas; what is not given is the instance's own.

    A stage S of d replicas takes sum p / d + (2 bytes over its border / d + 4 (d - 1) w / (d N)) / bandwidth
    for each of N micro-batches, d divides N, and it needs sum a y + b bytes, y = ceil(s / d) for the s
    replicas of it and of all stages after it. Raises TooManyDownsets above `limit` downsets (as `collapse`
    leaves them).
    """
    instance = replace(
        instance,
        devices=instance.devices if devices is None else devices,
        memory=instance.memory if memory is None else memory,
        bandwidth=instance.bandwidth if bandwidth is None else bandwidth,
    )
    usable = {
        t: [_usable(node.variants.get(t, ()), recompute) for node in instance.nodes]
        for t in sorted({t for node in instance.nodes for t in node.variants} if tensor_parallelism else {1})
    }
    ones = usable.get(1, [()] * len(instance.nodes))
    plain = set(usable) == {1} and all(len(found) <= 1 and not _exchanges(found) for found in ones)
    space = _space(instance, ones, limit, collapse=collapse and plain)
    # the fastest variants and the leanest, on one device each: the answer, or something to beat
    known = min((_plain(instance, space, ones, key) for key in _KEYS), key=lambda answer: answer.seconds)
    if plain or known.seconds == 0:
        return known
    alike = all(len({one.parameter_bytes for one in found}) < 2 and not _exchanges(found) for found in ones)
    if alike and set(usable) == {1}:  # then only memory is a reason for a slower variant
        free = _plain(replace(instance, memory=np.inf), space, ones, _KEYS[0])
        if known.seconds <= free.seconds * (1 + CLOSE):
            return known
    count = len(space.sets.words)
    if count > VARIANT_LIMIT:
        raise TooManyDownsets(
            f"the graph has {count} downsets; with variants of operators at most {VARIANT_LIMIT} are looked "
            "at, switch recomputation and tensor parallelism off"
        )
    if any(not any(usable[t][v] for t in usable) for v in range(len(instance.nodes))):
        return Answer(np.inf, (), count)
    seconds, stages = VariantSearch(instance, space.sets, usable, known.seconds).optimum()
    if seconds >= known.seconds:
        return known
    named = [
        PiperStage(
            stage.nodes,
            stage.replicas,
            stage.tensor_parallel,
            tuple(
                _name(usable[stage.tensor_parallel][v], i)
                for v, i in zip(stage.nodes, stage.variants, strict=True)
            ),
        )
        for stage in stages
    ]
    return Answer(seconds, tuple(named), count)


@dataclass(frozen=True, slots=True)
class _Space:
    """All downsets, grown from the sinks."""

    sets: Downsets
    needs: tuple[tuple[int, ...], ...]
    links: tuple[Link, ...]


# which of a node's variants: the fastest, or the one with the least memory
_KEYS: tuple[Callable[[PiperVariant], float], ...] = (lambda v: v.seconds, lambda v: v.base + v.slope)


def _usable(variants: Sequence[PiperVariant], recompute: bool) -> tuple[PiperVariant, ...]:
    return tuple(v for v in variants if recompute or v.name != RECOMPUTED)


def _exchanges(variants: Sequence[PiperVariant]) -> bool:
    return any(any(v.received.values()) or any(v.sent.values()) for v in variants)


def _name(variants: Sequence[PiperVariant], number: int) -> str:
    return variants[min(number, len(variants) - 1)].name


def _space(
    instance: PiperInstance, variants: Sequence[Sequence[PiperVariant]], limit: int, *, collapse: bool
) -> _Space:
    needs: list[set[int]] = [set() for _ in instance.nodes]
    for u, v in instance.edges:
        needs[u].add(v)
    # Piper charges every edge by itself, both ways
    links = tuple(Link(u, frozenset([v]), 2 * size) for (u, v), size in instance.edges.items())
    alike = [tuple((v.seconds, v.parameter_bytes, v.slope, v.base) for v in found) for found in variants]
    branches = equal_branches(links, alike) if collapse else ()
    sets = downsets(needs, limit, branches)
    return _Space(sets, tuple(tuple(sorted(found)) for found in needs), links)


def _plain(
    instance: PiperInstance,
    space: _Space,
    variants: Sequence[Sequence[PiperVariant]],
    key: Callable[[PiperVariant], float],
) -> Answer:
    """One variant a node: the devices used and the sum of replicas are the same number."""
    chosen = [min(found, key=key) for found in variants if found]
    sets = space.sets
    if len(chosen) < len(variants):
        return Answer(np.inf, (), len(sets.words))
    count = min(instance.devices, instance.micro_batches)
    degrees = tuple(d for d in divisors(instance.micro_batches) if d <= count)
    links = [
        replace(
            link,
            # what either end adds is charged to both
            bytes=link.bytes
            + 2 * (chosen[link.source].sent.get(v, 0.0) + chosen[v].received.get(link.source, 0.0)),
        )
        for link in space.links
        for v in link.readers
    ]
    costs = _costs(instance, chosen, degrees, links)
    memory = Memory(instance.memory, False, np.ones(len(degrees)), np.zeros(0))
    first = line(costs, depth_first(space.needs), count, memory)
    found = DownsetSearch(sets, costs, count, memory).optimum(first)
    if found is None:
        return Answer(np.inf, (), len(sets.words))
    stages = [
        PiperStage(part.units, part.devices, 1, tuple(chosen[u].name for u in part.units))
        for part in found.parts
    ]
    return Answer(found.seconds, tuple(stages), len(sets.words))


def _costs(
    instance: PiperInstance, variants: Sequence[PiperVariant], degrees: Sequence[int], links: Sequence[Link]
) -> UnitCosts:
    n, rounds = len(variants), instance.micro_batches
    seconds = np.array([v.seconds for v in variants])
    size = np.array([v.parameter_bytes for v in variants])
    each = [seconds / d + 4 * (d - 1) * size / (d * rounds * instance.bandwidth) for d in degrees]
    none = np.zeros((len(degrees), n))
    return UnitCosts(
        degrees=tuple(degrees),
        seconds=np.array(each),
        trains=size,
        fixed=np.zeros(len(degrees)),
        per_byte=np.array([1 / d / instance.bandwidth for d in degrees]),
        latency=0.0,
        links=tuple(links),
        static=np.array([v.base for v in variants]),
        stash=np.array([v.slope for v in variants]),
        barred=none,
        wanted=none,
        only_wanted=(False,) * len(degrees),
        labelled=np.zeros(n),
    )
