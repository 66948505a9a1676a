"""The exact search over downsets on a planner's own problem: the least bottleneck of any stages.

Any partition into convex stages whose graph is acyclic is a pipeline of nested downsets, so the least
bottleneck over these is that of all plans with one stage a device. Where a graph has few downsets, that
settles a bound, and what no search over intervals can find.
"""

from collections.abc import Callable

import numpy as np

from gpp.cost import all_reduce_seconds
from gpp.graph import Parameter
from gpp.plan import device_memory

from .downset_costs import Array, Memory, UnitCosts
from .downset_line import depth_first, line
from .downset_search import DownsetSearch, Pipeline
from .downsets import Downsets, Link, TooManyDownsets, downsets
from .estimate import Group, Problem, assemble
from .intervals import operator_seconds
from .options import divisors

FEW = 3000  # downsets up to which the search takes a moment
TRIES = 4  # at a smaller share of the memory, where skip edges hold more than a chain's would


def downset_optimum(problem: Problem, micro_batch: int, *, limit: int = FEW) -> float | None:
    """Seconds of one micro-batch on the slowest stage, at least, whatever the stages; None above `limit`
    downsets.

    Compute, and the step's share of update and all-reduce; messages and memory cost nothing. No plan with one
    stage a device and this micro-batch size for all of them takes less than as many of it as it has
    micro-batches. Of unequal devices the fastest counts.
    """
    costs = unit_costs(problem, micro_batch, lower=True)
    sets = _sets(problem, limit, costs)
    if sets is None:
        return None
    found = fastest(problem, sets, costs, None)
    return None if found is None else found.seconds


def downset_groups(
    problem: Problem, micro_batch: int, *, limit: int = FEW, reduce: bool = True
) -> list[Group] | None:
    """The stages of least bottleneck that fit memory, in topological order; None above `limit` downsets or
    where none were found. Without `reduce` a step's all-reduce and update cost nothing: they come once, and
    often while others still compute.

    Memory is that of the plan's own stage graph: what a pipeline of so many stages in a row would hold is
    charged only as far as plans turn out too large without.
    """
    costs = unit_costs(problem, micro_batch, reduce=reduce)
    sets = _sets(problem, limit, costs)
    return None if sets is None else fitting(problem, sets, costs, micro_batch, chained=False)


def fitting(
    problem: Problem, sets: Downsets, costs: UnitCosts, micro_batch: int, *, chained: bool
) -> list[Group] | None:
    """The stages of least bottleneck whose plan fits memory, `chained` as a sequential pipeline or not; None
    where none were found.

    First without a thought of memory. Else as many micro-batches as a pipeline of so many stages in a row
    would hold are charged, of a plan that is not chained step by step, and then less memory is given than
    there is, as a skip edge may hold more than a chain's.
    """
    have = min(device.memory for device in problem.topology.devices)
    free = fastest(problem, sets, costs, None)
    if free is None:
        return None
    depth = min(sets.count, len(problem.topology.devices))
    steps = (0,) if chained else (0, *(d for d in (1, 2, 4, 8) if d < depth))
    low = 0.0
    for deepest in (*steps, *[depth] * TRIES):
        rule = memory_rule(problem, micro_batch, have, deepest)
        found = fastest(problem, sets, costs, rule, low) if deepest else free
        if found is None:
            return None
        groups = [Group(problem.units.operators(part.units), part.devices) for part in found.parts]
        need = max(device_memory(assemble(problem, groups, micro_batch, "", chained=chained)))
        if need <= min(device.memory for device in problem.topology.devices):
            return groups
        low = found.seconds
        have *= min(have / need, 0.98) if deepest == depth else 1.0
    return None


def fastest(
    problem: Problem, sets: Downsets, costs: UnitCosts, memory: Memory | None, low: float = 0.0
) -> Pipeline | None:
    """The pipeline of least bottleneck, which is `low` at least."""
    devices = len(problem.topology.devices)
    search = DownsetSearch(sets, costs, devices, memory)
    return search.optimum(line(costs, depth_first(problem.units.successors), devices, memory), low)


def memory_rule(problem: Problem, micro_batch: int, limit: float, deepest: int) -> Memory:
    """What stages hold at each place from the end, at most as much as at `deepest` (GraphPipe §6)."""
    options = problem.options
    devices = len(problem.topology.devices)
    rounds = options.mini_batch // micro_batch
    level = np.minimum(np.arange(devices + 2), deepest)
    held = np.minimum(level + options.policy.extra_warm_up * np.maximum(level - 1, 0), rounds)
    held = np.full(devices + 2, rounds) if options.policy.name == "gpipe" else held
    share = np.array([micro_batch / d for d in _degrees(problem, micro_batch)])
    return Memory(limit, True, share, held.astype(np.float64))


def unit_costs(problem: Problem, micro_batch: int, *, lower: bool = False, reduce: bool = True) -> UnitCosts:
    """The sums of `problem.units` for one micro-batch: seconds with the step's share of update and
    all-reduce (unless `reduce` is off), bytes per sample. With `lower` nothing that a plan might save: no
    messages, the fastest device, any degree, tied parameters once."""
    graph, topology, options, costs = problem.graph, problem.topology, problem.options, problem.costs
    units = problem.units
    degrees = _degrees(problem, micro_batch, every=lower)
    allowed = set(degrees if lower else options.degrees(micro_batch, len(topology.devices)))
    kinds = tuple(dict.fromkeys(topology.devices))
    rounds = options.mini_batch // micro_batch
    choose: Callable[..., float] = min if lower else max
    owner = np.array(units.unit_of)
    trainable = _by_unit(problem, lambda p: p.trainable, once=lower)
    parameters = _by_unit(problem, lambda p: True, once=lower)
    most = float(trainable.sum()) or 1.0
    seconds, fixed = [], []
    for d in degrees:
        work = operator_seconds(graph, costs, kinds, micro_batch / d, choose).sum(0)

        def step_end(size: float, d: int = d) -> float:
            links = [topology.inside] if d <= topology.per_host else []
            links += [topology.between] if lower or not links else []
            ring = min(all_reduce_seconds(size, d, link) for link in links)
            sharded = d if lower and options.shard_optimizer else 1  # a bound: no stage here shares it
            return ring + choose(costs.update(size / sharded, kind) for kind in kinds)

        start = step_end(0.0) if reduce else 0.0
        slope = (step_end(most) - start) / most if reduce else 0.0
        seconds.append(np.bincount(owner, work, len(units.members)) + slope * trainable / rounds)
        fixed.append(start / rounds)
    coupled = [any(graph.operators[i].batch_coupled for i in found) for found in units.members]
    barred = [
        [(c and d > 1) + (r not in (None, d)) for c, r in zip(coupled, units.replicas, strict=True)]
        for d in degrees
    ]
    link = topology.inside if len(topology.devices) <= topology.per_host else topology.between
    per_byte = [0.0 if lower else micro_batch / d / link.bandwidth for d in degrees]
    buffers = np.array([op.buffer_bytes for op in graph.operators], dtype=np.float64)
    stash = np.array([op.stash for op in graph.operators], dtype=np.float64)
    return UnitCosts(
        degrees=degrees,
        seconds=np.array(seconds),
        trains=trainable,
        fixed=np.array(fixed),
        per_byte=np.array(per_byte),
        latency=0.0 if lower else 2 * link.latency,
        links=_links(problem),
        static=parameters
        + (1 + options.optimizer_factor) * trainable
        + np.bincount(owner, buffers, len(units.members)),
        stash=np.asarray(np.bincount(owner, stash, len(units.members)), dtype=np.float64),
        barred=np.array(barred, dtype=np.float64),
        wanted=np.array([[r == d for r in units.replicas] for d in degrees], dtype=np.float64),
        only_wanted=tuple(d not in allowed for d in degrees),
        labelled=np.array([label is not None for label in units.labels], dtype=np.float64),
    )


def _sets(problem: Problem, limit: int, costs: UnitCosts) -> Downsets | None:
    """Equal branches are not told apart: permuting them changes no bottleneck."""
    try:
        return downsets(problem.units.successors, limit, costs.equal_branches)
    except TooManyDownsets:
        return None


def _degrees(problem: Problem, micro_batch: int, *, every: bool = False) -> tuple[int, ...]:
    """Replicas that some stage may have, ascending; with `every` as any planner might allow."""
    options, count = problem.options, len(problem.topology.devices)
    limit = min(count, options.max_replicas or count)
    allowed = set(divisors(micro_batch) if every else options.degrees(micro_batch, count))
    fixed = {r for r in problem.units.replicas if r is not None and micro_batch % r == 0}
    return tuple(sorted({d for d in allowed if d <= limit} | fixed))


def _by_unit(problem: Problem, counts: Callable[[Parameter], bool], *, once: bool) -> Array:
    """Bytes of the parameters of each unit; of tied ones in every unit that holds them, or only in one."""
    found = np.zeros(len(problem.units.members))
    seen: set[str] = set()
    for u, members in enumerate(problem.units.members):
        if not once:
            seen = set()
        for i in members:
            for p in problem.graph.operators[i].parameters:
                if counts(p) and p.name not in seen:
                    seen.add(p.name)
                    found[u] += p.bytes
    return found


def _links(problem: Problem) -> tuple[Link, ...]:
    """Every tensor between units: its bytes there and its gradient's back."""
    graph, unit_of = problem.graph, problem.units.unit_of
    readers: dict[str, set[int]] = {}
    for i, op in enumerate(graph.operators):
        for name in op.inputs:
            readers.setdefault(name, set()).add(unit_of[i])
    found = []
    for name, units in readers.items():
        source = unit_of[graph.producer[name]]
        others = frozenset(units - {source})
        if others:
            tensor = graph.tensors[name]
            found.append(Link(source, others, float(tensor.bytes * (1 + tensor.needs_grad))))
    return tuple(found)
