"""A plan under the schedule that the user has named, whoever planned it.

Planners other than `gpp` think of 1F1B and GPipe alone. What splits backwards or runs k at a time is put on
their stages afterwards: the partition stays, in-flight samples and lags follow the schedule and memory.
"""

from collections.abc import Sequence
from dataclasses import replace

from gpp.plan import Plan, PlanError, Policy, check_plan
from gpp.schedule.choices import candidates
from gpp.schedule.inflight import in_flight
from gpp.schedule.task import ScheduleError

from .bound import with_bound
from .estimate import Problem, estimated, fits
from .schedules import room

SPLIT = ("zero-bubble", "greedy")  # schedules with split backwards


def thought_of(wanted: Policy) -> Policy:
    """What a planner is asked that knows no split backwards."""
    return Policy(extra_warm_up=wanted.extra_warm_up) if wanted.name in SPLIT else wanted


def imposed(problem: Problem, plan: Plan, k: int = 1) -> Plan:
    """The plan with the schedule that the problem's options name, its estimate and bound renewed.

    `k`: forwards, then backwards, that every stage runs in a row (kFkB); under 1F1B only. Of "zero-bubble"
    and "greedy" the fastest that memory has room for. Raises PlanError if none fits. O(stages + edges) and
    one simulation for each of a handful of schedules.
    """
    wanted = problem.options.policy
    if k > 1:
        plan = _in_bursts(plan, wanted, k)
    if wanted.name not in SPLIT or plan.policy.name == wanted.name:
        return plan
    stages = plan.stage_graph.stages
    found = candidates(
        plan,
        room(plan),
        lags=[0 if stage.recompute else stage.in_flight for stage in stages],
        eager=False,
        greedy=wanted.name == "greedy",
    )
    best = _fastest([other for other in found if other.policy.name == wanted.name and fits(other)])
    if best is None:
        raise PlanError(
            f"schedule={wanted.name} does not fit the devices' memory with these stages: use schedule=1f1b, "
            "more devices or a smaller train.micro_batch"
        )
    return with_bound(problem, best)


def _in_bursts(plan: Plan, wanted: Policy, k: int) -> Plan:
    if wanted.name != "1f1b":
        raise PlanError(f"schedule.k is for schedule 1f1b alone, it is {k} under {wanted.name}")
    graph = plan.stage_graph
    most = min(plan.mini_batch // stage.micro_batch for stage in graph.stages)
    if k > most:
        raise PlanError(f"schedule.k must not exceed the {most} micro-batches of a step, it is {k}")
    sizes = [stage.micro_batch for stage in graph.stages]
    held = in_flight(graph.successors, sizes, wanted, plan.mini_batch, ks=[k] * len(sizes))
    stages = tuple(replace(s, k=k, in_flight=h) for s, h in zip(graph.stages, held, strict=True))
    found = replace(plan, stage_graph=replace(graph, stages=stages), policy=wanted)
    check_plan(found)
    return estimated(found)


def _fastest(plans: Sequence[Plan]) -> Plan | None:
    timed = []
    for plan in plans:
        try:
            timed.append(estimated(plan))
        except ScheduleError:  # the clock may stand still where memory is scarce
            continue
    return min(timed, key=lambda plan: plan.estimate, default=None)
