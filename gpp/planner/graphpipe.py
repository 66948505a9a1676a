"""GraphPipe's planner: series-parallel stages, one micro-batch size, 1F1B (GraphPipe §5, Algorithm 1).

Minimises the bottleneck time per sample under each device's memory; of equal bottlenecks, the plan with the
fewest samples in flight and the one with the least memory are simulated and the faster one is kept. The
micro-batch size is chosen by simulated step time. Devices that lower neither bottleneck nor memory stay idle.

Where there are more branches than devices the tree cannot tell them apart; then, and where nothing in the
tree's space fits memory, stages may also span the end of one branch and the start of the next (the leaf order
as one chain), and the faster plan is kept.

As options, off by default as in the paper: every stage its own micro-batch size, and the k of kFkB
(`gpp.planner.configured`); kept where the simulated step is faster.
"""

from gpp.cost import CostModel
from gpp.graph import ComputationGraph
from gpp.plan import Plan
from gpp.topology import DeviceTopology

from .bound import with_bound
from .configured import SIZES, configured
from .estimate import Group, Problem, assemble, estimated, peak_memory
from .frontier import frontier
from .options import Options
from .outline import Chain
from .shortage import shortage
from .sizes import Found, better, fastest, sweep
from .space import CHARGES, HOPES, Space
from .threshold import Answer, ThresholdSearch

NAME = "graphpipe"
PARTS = (1.0, 0.9, 0.75, 0.5)  # of the memory, where a stage before a longer branch holds more than charged


def plan(graph: ComputationGraph, topology: DeviceTopology, costs: CostModel, options: Options) -> Plan:
    """The plan for one training step, with its estimate and its lower bound.

    Raises PlanError if no plan fits the devices' memory or keeps the constraints. Of unequal devices every
    stage is planned for the slowest and the smallest. n units (merged to about 160 runs where there are
    more), K devices, H levels, per micro-batch size: O(n^2 K log K) for the first threshold, O(n^2 H^2) for
    every one, mostly one to ten of them; then a simulation of the best few.
    """
    problem = Problem(graph, topology, costs, options)
    return with_bound(problem, answer(problem))


def answer(problem: Problem) -> Plan:
    """The same, without its lower bound."""
    space = problem.space
    best = sweep(problem, lambda size: _candidates(space, size))
    plans = _configured(space, best)
    if best is not None:
        plans.append(fastest(_leaner(space, best), best)[0])
    if not plans:
        raise shortage(space)
    chosen = plans[0]
    for other in plans[1:]:
        chosen = other if not better(chosen, other) else chosen
    return chosen


def bottleneck(problem: Problem, micro_batch: int) -> float:
    """Seconds of one micro-batch on the slowest stage of the plan with the least, as its memory is charged
    first; inf where nothing fits. The search alone: nothing is simulated, and no plan is made."""
    space = problem.space
    answers = [
        space.search(chain, micro_batch).answer(space.memory, precision=space.precision)
        for chain in space.forms
    ]
    return min((answer.seconds for answer in answers if answer is not None), default=float("inf"))


def candidates(
    problem: Problem, micro_batch: int, *, limit: int = 12, ignore_memory: bool = False
) -> list[list[Group]]:
    """At most `limit` partitions worth simulating at one micro-batch size, see `frontier`: the first has the
    least bottleneck, the others a shorter all-reduce, fewer levels, or stages across branches. Each fits the
    devices' memory under the options' schedule, unless that is ignored; none where nothing fits."""
    return frontier(problem.space, micro_batch, limit=limit, ignore_memory=ignore_memory)


_Candidate = Found[tuple[Answer, ThresholdSearch]]  # a plan and where it came from


def _candidates(space: Space, micro_batch: int) -> list[_Candidate]:
    """Plans with one micro-batch size, not yet simulated; none where nothing fits."""
    found = [candidate for chain in space.forms for candidate in _in_memory(space, chain, micro_batch)]
    return found or _in_memory(space, space.leaves, micro_batch)


def _in_memory(space: Space, chain: Chain, micro_batch: int) -> list[_Candidate]:
    """The plan with the least bottleneck and of those with the fewest samples in flight."""
    least = 0.0
    for wariness in (*CHARGES, *HOPES):
        search = space.search(chain, micro_batch, wariness)
        answer = space.least(chain, micro_batch, wariness, least if wariness in CHARGES else 0.0)
        if answer is not None:
            found = assemble(space.problem, space.groups(answer), micro_batch, NAME)
            if peak_memory(found) <= space.memory:
                return [(found, (answer, search))]
            least = answer.seconds  # more warily charged, nothing is faster
    return []


def _leaner(space: Space, candidate: _Candidate) -> list[_Candidate]:
    """The plan with the least memory of those with the same bottleneck, if it is another one."""
    _, (known, search) = candidate
    answer = search.leaner(known)
    if answer == known:
        return []
    found = assemble(space.problem, space.groups(answer), search.intervals.micro_batch, NAME)
    return [(found, (answer, search))] if peak_memory(found) <= space.memory else []


def _configured(space: Space, best: _Candidate | None) -> list[Plan]:
    """With stages of their own micro-batch sizes and bursts, if the options allow any: around the size that
    is best for all (each size by itself where all stages have the same)."""
    options = space.problem.options
    if not options.stage_micro_batches and options.bursts == (1,):
        return []
    sizes = [size for size in options.micro_batches if size & (size - 1) == 0] or [*options.micro_batches]
    windows: list[tuple[int, ...]] = [(size,) for size in sizes]
    if options.stage_micro_batches:
        usual = best[1][1].intervals.micro_batch if best is not None else sizes[-1]
        middle = max(i for i, size in enumerate(sizes) if size <= usual)
        first = min(max(0, middle - SIZES + 2), max(0, len(sizes) - SIZES))
        windows = [tuple(sizes[first : first + SIZES])]
    plans = []
    for window in windows:
        for part in PARTS:
            answer = configured(space, window, space.memory * part)
            if answer is None:
                break
            whole = assemble(space.problem, answer[1], window[0], NAME)
            if peak_memory(whole) <= space.memory:
                plans.append(estimated(whole))
                break
    return plans
