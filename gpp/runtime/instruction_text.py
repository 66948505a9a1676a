"""An instruction in words, for reports of what a rank was at."""

from typing import assert_never

from gpp.plan import Plan
from gpp.schedule.task import Direction, Pass, Reduce, Reduction, Samples, Transfer, Update

from .binding import Arrival, Bound, Call, Departure

_PASSES = {
    Pass.FORWARD: "forward",
    Pass.BACKWARD: "backward",
    Pass.BACKWARD_INPUT: "input half of the backward",
    Pass.BACKWARD_WEIGHT: "weight half of the backward",
    Pass.RECOMPUTE: "forward again",
}
_SUMS = {
    Reduction.GRADIENTS: "the sum of gradients",
    Reduction.LOSS_WEIGHT: "the sum of the loss's weights",
    Reduction.NORM: "the gradients' global norm",
}


def instruction_text(plan: Plan, instruction: Bound) -> str:
    """What a rank does, as a clause without its subject."""
    stages = plan.stage_graph.stages
    match instruction:
        case Arrival(transfer=transfer):
            return f"waits for {_carried(plan, transfer)} from rank {transfer.source}"
        case Departure(transfer=transfer):
            return f"sends {_carried(plan, transfer)} to rank {transfer.target}"
        case Call(task=task):
            return f"{_PASSES[task.kind]} of {_samples(task.samples)} in stage {_stage(plan, task.stage)}"
        case Reduce():
            others = ", ".join(map(str, instruction.group))
            where = (
                f" of stage {_stage(plan, instruction.stage)}" if 0 <= instruction.stage < len(stages) else ""
            )
            return f"{_SUMS[instruction.what]}{where} with ranks {others}"
        case Update():
            return "the optimizer's step"
        case _:
            assert_never(instruction)


def _carried(plan: Plan, transfer: Transfer) -> str:
    edge = plan.stage_graph.edges[transfer.edge]
    stages = plan.stage_graph.stages
    what = "gradients" if transfer.direction is Direction.GRADIENT else "activations"
    ends = f"{stages[edge.source].name} -> {stages[edge.target].name}"
    return f"{what} of {_samples(transfer.samples)} on edge {transfer.edge} ({ends})"


def _samples(samples: Samples) -> str:
    return f"samples {samples.start}-{samples.stop - 1}"


def _stage(plan: Plan, stage: int) -> str:
    return f"{stage} ({plan.stage_graph.stages[stage].name})"
