"""An instruction that was run as a span of the trace."""

from typing import assert_never

from gpp.schedule.task import Reduce, Update
from gpp.trace import Activity, Span

from .binding import Arrival, Bound, Call, Departure


def span(instruction: Bound, start: float, stop: float, rank: int, stage: int, step: int) -> Span:
    """Of what ran from `start` to `stop` seconds; `stage` is whose it is if the instruction does not say."""
    samples, edge = None, -1
    match instruction:
        case Arrival():
            activity, label = Activity.WAIT, "recv"
        case Departure():
            activity, label = Activity.SEND, "send"
        case Call():
            activity, label = Activity.COMPUTE, instruction.task.kind.value
            samples, stage = instruction.task.samples, instruction.task.stage
        case Reduce():
            activity, label = Activity.REDUCE, f"reduce {instruction.what.value}"
        case Update():
            activity, label = Activity.UPDATE, "update"
        case _:
            assert_never(instruction)
    if isinstance(instruction, Arrival | Departure):
        samples, edge = instruction.transfer.samples, instruction.transfer.edge
    return Span(
        rank=rank,
        activity=activity,
        label=label,
        start=start,
        stop=stop,
        stage=stage,
        samples=(samples.start, samples.stop) if samples is not None else None,
        edge=edge,
        step=step,
    )
