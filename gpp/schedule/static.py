"""Orders that one stage follows whatever the time: kFkB, GPipe, and 1F1B with trailing weight halves."""

from gpp.plan import Policy, Stage
from gpp.schedule.pieces import micro_batches
from gpp.schedule.task import Pass, ScheduleError, Task


def warm_up(stage: Stage) -> int:
    """Forwards before the first backward: as many micro-batches as may be in flight, less those that wait for
    their weight half. Raises ScheduleError if not even one may be in flight."""
    if stage.in_flight < stage.micro_batch:
        raise ScheduleError(
            f"stage {stage.name} may hold {stage.in_flight} samples in flight, less than its micro-batch "
            f"{stage.micro_batch}; nothing could ever run"
        )
    return stage.in_flight // stage.micro_batch - stage.weight_lag


def static_order(index: int, stage: Stage, policy: Policy, mini_batch: int) -> tuple[Task, ...]:
    """Whole micro-batches of one step, as if the stage had a backward whether or not it has one.

    kFkB (GraphPipe §6; 1F1B is k = 1): a warm-up of forwards, then k backwards and k forwards in turn, then
    the backwards that are left. "gpipe": all forwards, then all backwards. "zero-bubble": as kFkB, but a
    backward is its input half, followed by the weight half of the micro-batch `weight_lag` before it; what is
    left of these comes last (Qi et al., Zero Bubble Pipeline Parallelism, ZB-H1). With a lag of 0 the two
    halves are one.
    """
    parts = micro_batches(stage, mini_batch)
    lag = stage.weight_lag if policy.name == "zero-bubble" else 0
    warm = len(parts) if policy.name == "gpipe" else warm_up(stage) + stage.weight_lag - lag
    ahead = min(warm, len(parts))
    burst = min(stage.k, ahead)
    tasks = [Task(Pass.FORWARD, index, part) for part in parts[:ahead]]
    for done in range(0, len(parts), burst):
        for j in range(done, min(done + burst, len(parts))):
            tasks.append(Task(Pass.BACKWARD_INPUT if lag else Pass.BACKWARD, index, parts[j]))
            if 0 < lag <= j:
                tasks.append(Task(Pass.BACKWARD_WEIGHT, index, parts[j - lag]))
        tasks += [Task(Pass.FORWARD, index, part) for part in parts[ahead + done : ahead + done + burst]]
    if lag:
        tasks += [Task(Pass.BACKWARD_WEIGHT, index, part) for part in parts[max(len(parts) - lag, 0) :]]
    return tuple(tasks)
