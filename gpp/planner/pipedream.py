"""PipeDream as GraphPipe compares with it (GraphPipe §7.1): linearised operators, replicas, synchronous 1F1B.

The least bottleneck time of a stage, with its messages and its share of the all-reduce, over all cuts of the
line into stages and all numbers of replicas; weights are updated once a step, so a stage holds what a chain
has in flight after it. PipeDream's own recurrence (A[i, j, m], over devices) is solved the other way round:
the fewest devices below a threshold, so the time does not grow with the cluster. Of equal bottlenecks the
fewest stages; the micro-batch size is chosen by simulated step time.
"""

from gpp.cost import CostModel
from gpp.graph import ComputationGraph
from gpp.plan import Plan
from gpp.topology import DeviceTopology

from .bound import with_bound
from .estimate import Group, Problem
from .linear import best
from .options import Options

NAME = "pipedream"


def plan(graph: ComputationGraph, topology: DeviceTopology, costs: CostModel, options: Options) -> Plan:
    """The plan for one training step, with its estimate and its lower bound.

    Raises PlanError if nothing fits. n operators, D degrees, S stages: O(n^2 D (log n + S)) a micro-batch
    size, times the thresholds tried where memory binds; neighbours are merged where there are more than 192.
    """
    problem = Problem(graph, topology, costs, options)
    return with_bound(problem, answer(problem))


def answer(problem: Problem) -> Plan:
    """The same, without its lower bound."""
    return best(problem.line, NAME, replicas=True)


def groups(problem: Problem, micro_batch: int) -> list[Group] | None:
    """The same stages for one micro-batch size, as they may also run on their true stage graph; None: nothing
    fits."""
    return problem.line.groups(micro_batch, replicas=True)
