"""The planners by name; what is not asked for is not loaded."""

from dataclasses import replace

from gpp.cost import CostModel
from gpp.graph import ComputationGraph
from gpp.plan import Plan, PlanError
from gpp.planner.options import Options
from gpp.topology import DeviceTopology

PLANNERS = ("gpp", "graphpipe", "sequential", "pipedream", "piper")


def planned(
    name: str,
    graph: ComputationGraph,
    cluster: DeviceTopology,
    times: CostModel,
    options: Options,
    *,
    k: int = 1,
) -> Plan:
    """What the planner of that name answers, under the schedule that the options name, `k` passes in a row.
    Raises PlanError saying why if it cannot."""
    from gpp.planner.estimate import Problem
    from gpp.planner.imposed import imposed, thought_of

    problem = Problem(graph, cluster, times, options)
    if name != "gpp":
        options = replace(options, policy=thought_of(options.policy))
    match name:
        case "gpp":
            from gpp.planner.gpp import plan
        case "graphpipe":
            from gpp.planner.graphpipe import plan
        case "sequential":
            from gpp.planner.sequential import plan
        case "pipedream":
            from gpp.planner.pipedream import plan
        case "piper":
            from gpp.planner.piper import plan
        case _:
            raise PlanError(f"there is no planner {name!r}: take one of {', '.join(PLANNERS)}")
    return imposed(problem, plan(graph, cluster, times, options), k)
