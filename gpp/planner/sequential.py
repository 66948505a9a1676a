"""A sequential pipeline without replicas: the model's line of operators, cut into balanced stages.

The least bottleneck of any cut into at most as many stages as there are devices, messages and update
included, under each device's memory with what a chain has in flight (GraphPipe §2, "SPP"); of equal
bottlenecks the fewest stages. The micro-batch size is chosen by simulated step time.
"""

from gpp.cost import CostModel
from gpp.graph import ComputationGraph
from gpp.plan import Plan
from gpp.topology import DeviceTopology

from .bound import with_bound
from .estimate import Group, Problem
from .linear import best
from .options import Options

NAME = "sequential"


def plan(graph: ComputationGraph, topology: DeviceTopology, costs: CostModel, options: Options) -> Plan:
    """The plan for one training step, with its estimate and its lower bound.

    Raises PlanError if nothing fits. n operators, S stages: O(n^2 (log n + S)) a micro-batch size; neighbours
    are merged where there are more than 192.
    """
    problem = Problem(graph, topology, costs, options)
    return with_bound(problem, answer(problem))


def answer(problem: Problem) -> Plan:
    """The same, without its lower bound."""
    return best(problem.line, NAME, replicas=False)


def groups(problem: Problem, micro_batch: int) -> list[Group] | None:
    """The same cut for one micro-batch size, as it may also run on its true stage graph; None: nothing
    fits."""
    return problem.line.groups(micro_batch, replicas=False)
