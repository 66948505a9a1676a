"""A proven lower bound on the step time of any plan: between two updates of its slowest stage.

For plans of convex stages in which a stage's devices split its micro-batch evenly, each stage's micro-batch
size is one of those considered, and an all-reduce and an update wait for their device's last pass. Messages
are asynchronous and take no device's time, recomputing only adds to it, and steps follow each other without a
barrier, so a step may begin while others of its devices are still at the one before. The largest counts of:

- operator: its d replicas each compute r pieces, then reduce and update, whatever else they do;
- path: a micro-batch travels to an operator, all its pieces are done, a gradient travels back
  (`gpp.planner.round_trip`);
- work, packing, waiting: what fits on K devices in a step (`gpp.planner.packing`);
- stages: the least that the busiest device does, over all partitions (`gpp.planner.bottleneck`).

Bounds that charge a stage its messages, as a minimum cut around a heavy operator, do not hold here: cutting
costs no device's time, and a message may go to as many devices at once as there are. Nor does a cover of
chains by stages say more than the area: without messages it costs nothing to cut a chain.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from gpp.plan import Plan

from .bottleneck import bottleneck
from .estimate import Problem
from .loads import loads, may_split
from .packing import SAFE, area, unpackable, waiting
from .round_trip import RoundTrips

FEW = 1000  # downsets that take no more than a moment
EXACT = 1e-7  # share of the step time
SAME = 1e-6  # of two arguments that say the same, the simpler one is named


def with_bound(problem: Problem, plan: Plan) -> Plan:
    """The plan with the problem's lower bound, and what gives it."""
    seconds, which = bound(problem)
    return replace(plan, lower_bound=seconds, bound_by=which)


def bound(problem: Problem, *, downsets: int = FEW) -> tuple[float, str]:
    """Seconds that no step can beat, and what says so: "operator NAME", "path through NAME", "work",
    "packing", "waiting" or "stages".

    Asks the cost model O(n divisors(mini_batch)) times; O(n |splits|) for each of about 35 step times; then
    "stages" where the graph has up to `downsets` downsets (equal branches collapsed), O(downsets^2).
    """
    graph, topology, options = problem.graph, problem.topology, problem.options
    found = loads(problem)
    pieces, shares, devices = found.pieces, found.shares, len(topology.devices)
    trips = RoundTrips(graph, pieces, options.global_norm or graph.loss_weighted)
    alone = pieces.alone.min(0)
    least, which = float(alone.max()), f"operator {graph.operators[int(alone.argmax())].name}"

    def tell(seconds: float, name: str) -> tuple[float, str]:
        """The larger one; by the name of what came first if they are as good as equal."""
        return max(seconds, least), name if seconds > least * (1 + SAME) else which

    raised = _raised(least, lambda step: float(trips.needs(step).max()))
    worst = graph.operators[int(trips.needs(raised).argmax())].name
    least, which = tell(raised, f"path through {worst}")
    least, which = tell(_raised(least, lambda step: area(shares, found.speeds, step)), "work")
    least, which = tell(_refuted(least, lambda step: unpackable(shares, devices, step)), "packing")
    if not options.colocate:
        if not may_split(problem):
            idle = _raised(least, lambda step: waiting(pieces, np.add(*trips.ways(step)), devices, step))
            least, which = tell(idle, "waiting")
        stages = bottleneck(problem, shares, least, downsets)
        least, which = tell(stages or 0.0, "stages")
    return least * SAFE, which  # a simulated step is a difference of sums


def _raised(low: float, need: Callable[[float], float]) -> float:
    """About the most that follows if for every T a step takes longer than T, or need(T) at least, which falls
    with T."""
    high = need(low)
    if high == np.inf:
        return _refuted(low, lambda step: need(step) > step)
    high = max(low, high)
    probe = high
    while high - low > EXACT * high:
        found = need(probe)
        if found >= probe:
            low = probe
        else:
            low, high = max(low, found), probe
        probe = (low + high) / 2
    return low


def _refuted(low: float, impossible: Callable[[float], bool]) -> float:
    """About the longest step time, `low` at least, that is proven to be impossible. Of a model without any
    work (low = 0) nothing is."""
    if low <= 0 or not impossible(low):
        return low
    high = 2 * low
    while impossible(high):
        low, high = high, 2 * high
    while high - low > EXACT * high:
        middle = (low + high) / 2
        low, high = (middle, high) if impossible(middle) else (low, middle)
    return low
