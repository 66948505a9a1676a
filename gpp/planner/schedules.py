"""A plan with other schedules, as far as its devices' memory goes: what the simulator compares last."""

import math

from gpp.plan import Plan, Stage, device_memory
from gpp.schedule.choices import candidates
from gpp.schedule.task import ScheduleError

from .estimate import estimated, fits
from .options import Options

CLOCKED = 40_000  # passes of a step above which no order is made on a clock, which takes 10 us for each


def rescheduled(plan: Plan, options: Options) -> list[Plan]:
    """The plan with each schedule that the options allow and memory has room for, with estimates.

    O(passes x edges of a stage) for each, on the clock about 10 us a pass. None if the options allow no other
    schedule, or nothing fits.
    """
    if not (options.eager or options.split_backward or options.greedy):
        return []
    stages = plan.stage_graph.stages
    shared = any(len(held) > 1 for held in plan.residents.values())
    passes = sum(3 * plan.mini_batch // stage.micro_batch for stage in stages)
    if passes > CLOCKED and shared:
        return []
    found = candidates(
        plan,
        room(plan),
        lags=[0 if stage.recompute else stage.in_flight for stage in stages],
        eager=options.eager,
        split=options.split_backward,
        greedy=options.greedy and passes <= CLOCKED,
    )
    timed = []
    for other in found:
        if fits(other):
            try:
                timed.append(estimated(other))
            except ScheduleError:  # the clock may stand still where memory is scarce
                continue
    return timed


def room(plan: Plan) -> list[int]:
    """About the most micro-batches that each stage may hold: what is in flight, and what its fullest device
    still has room for (or lacks), shared by the stages on it. At least 1."""
    graph = plan.stage_graph
    need = device_memory(plan)
    found = []
    for index, stage in enumerate(graph.stages):
        left = min(
            (plan.topology.devices[d].memory - need[d]) / len(plan.residents[d]) for d in stage.devices
        )
        each = _micro_batch_bytes(plan, index, stage)
        held = stage.in_flight // stage.micro_batch
        most = plan.mini_batch // stage.micro_batch
        bounded = each > 0 and math.isfinite(left)
        found.append(max(min(held + int(left // each), most), 1) if bounded else most)
    return found


def _micro_batch_bytes(plan: Plan, index: int, stage: Stage) -> float:
    """Of one more micro-batch in flight on each replica, messages at both ends included."""
    edges = [edge for edge in plan.stage_graph.edges if index in (edge.source, edge.target)]
    messages = sum(edge.bytes + edge.gradient_bytes for edge in edges)
    return (stage.stash + messages) * stage.micro_batch / len(stage.devices)
