"""In which order a stage works on its micro-batches: a bound on samples in flight and who goes first.

Whole micro-batches here; `gpp.schedule.lower` gives each replica its piece. Forwards and backwards of
micro-batches both run first in, first out in every policy: other orders would sum gradients to other bits.
"""

from gpp.plan import Policy, Stage
from gpp.schedule.task import Pass, Samples, ScheduleError, Task


def micro_batches(stage: Stage, samples: int) -> tuple[Samples, ...]:
    """The samples [0, samples) in micro-batches of the stage; the last one may be ragged."""
    b = stage.micro_batch
    return tuple(Samples(start, min(start + b, samples)) for start in range(0, samples, b))


def piece(stage: Stage, micro_batch: Samples, replica: int) -> Samples | None:
    """What the replica (its position in `stage.devices`) computes of a micro-batch of [0, micro_batch.stop).

    Every replica takes an equal contiguous share; of a ragged micro-batch the first replicas take whole
    shares until no samples are left, so a stage meets at most one size besides its usual one. None: nothing
    is left.
    """
    share = stage.micro_batch // len(stage.devices)
    start = micro_batch.start + replica * share
    stop = min(start + share, micro_batch.stop)
    return Samples(start, stop) if start < stop else None


def warm_up(stage: Stage) -> int:
    """Forwards before the first backward. Raises ScheduleError if not even one may be in flight."""
    if stage.in_flight < stage.micro_batch:
        raise ScheduleError(
            f"stage {stage.name} may hold {stage.in_flight} samples in flight, less than its micro-batch "
            f"{stage.micro_batch}; nothing could ever run"
        )
    return stage.in_flight // stage.micro_batch


def round_trips(index: int, stage: Stage, policy: Policy, mini_batch: int) -> tuple[Task, ...]:
    """Forwards and backwards of one step, as if the stage had a backward whether or not it has one.

    kFkB (GraphPipe §6; 1F1B is k = 1): as many forwards as may be in flight, then k backwards and k forwards
    in turn, then the backwards that are left. "gpipe": all forwards, then all backwards.
    """
    parts = micro_batches(stage, mini_batch)
    ahead = min(warm_up(stage) if policy.name == "1f1b" else len(parts), len(parts))
    burst = min(stage.k, ahead)
    tasks = [Task(Pass.FORWARD, index, part) for part in parts[:ahead]]
    for done in range(0, len(parts), burst):
        tasks += [Task(Pass.BACKWARD, index, part) for part in parts[done : done + burst]]
        tasks += [Task(Pass.FORWARD, index, part) for part in parts[ahead + done : ahead + done + burst]]
    return tuple(tasks)


def order(index: int, stage: Stage, policy: Policy, mini_batch: int) -> tuple[Task, ...]:
    """The tasks of one training step of stage number `index`; only forwards where it has no backward."""
    if not stage.has_backward:
        return forward_only(index, stage, mini_batch)
    return round_trips(index, stage, policy, mini_batch)


def forward_only(index: int, stage: Stage, samples: int) -> tuple[Task, ...]:
    """The tasks of an evaluation of `samples` samples."""
    return tuple(Task(Pass.FORWARD, index, part) for part in micro_batches(stage, samples))
