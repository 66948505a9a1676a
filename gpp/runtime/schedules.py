"""The schedules of a run, and the sizes of call that each rank needs programs for."""

from collections.abc import Mapping
from dataclasses import dataclass

from gpp.plan import Plan
from gpp.schedule.lower import lower
from gpp.schedule.task import Compute, Pass, Samples, Schedule

from .data import evaluation_batches


@dataclass(frozen=True)
class Schedules:
    """The schedules of a run: a training step, and the evaluation of each size of batch."""

    train: Schedule
    evaluate: Mapping[int, Schedule]


def schedules(plan: Plan, evaluation: Plan, held_out: int) -> Schedules:
    """Lower both plans; `held_out` is the number of samples evaluated, 0 for none."""
    sizes = {len(batch) for batch in evaluation_batches(held_out, plan.mini_batch)}
    return Schedules(lower(plan), {n: lower(evaluation, forward_only=True, samples=n) for n in sorted(sizes)})


def call_sizes(schedule: Schedule, rank: int, stage: int) -> set[int]:
    """The numbers of samples that a rank's calls of one of its stages see."""
    return {len(piece) for piece in pieces_of(schedule, rank, stage)}


def pieces_of(schedule: Schedule, rank: int, stage: int) -> tuple[Samples, ...]:
    """The samples that a rank's forwards of a stage work on, in order; none where it has no such stage."""
    if rank >= len(schedule.programs):
        return ()
    return tuple(
        i.task.samples
        for i in schedule.programs[rank]
        if isinstance(i, Compute) and i.task.kind is Pass.FORWARD and i.task.stage == stage
    )
