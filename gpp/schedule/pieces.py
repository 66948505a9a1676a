"""A mini-batch in micro-batches, and a micro-batch in the pieces of a stage's replicas."""

from gpp.plan import Stage
from gpp.schedule.task import Samples


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
