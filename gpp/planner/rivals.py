"""The other planners' plans, under the same options: what the search starts from and has to beat."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from math import inf

from gpp.plan import Plan, PlanError

from . import exact, graphpipe, pipedream, piper, sequential
from .estimate import Group, Problem
from .options import Constraints

SEVERAL = 10_000  # downsets up to which Piper's pipeline mostly takes tenths of a second
ANSWERS: tuple[Callable[[Problem], Plan], ...] = (
    graphpipe.answer,
    pipedream.answer,
    partial(piper.answer, collapse=True, limit=SEVERAL),
    sequential.answer,
)


@dataclass(frozen=True, slots=True)
class Rivals:
    """Their plans, in the order of `ANSWERS`, and what those without one say."""

    plans: tuple[Plan, ...]
    refusals: tuple[PlanError, ...]


def rivals(problem: Problem) -> Rivals:
    """Every planner's answer, without its lower bound; of a pipeline without replicas only if it
    may be the best."""
    plans: list[Plan] = []
    refusals: list[PlanError] = []
    for answer in ANSWERS:
        if answer is sequential.answer and _alone(problem) > min((p.estimate for p in plans), default=inf):
            continue
        try:
            plans.append(answer(problem))
        except PlanError as error:
            refusals.append(error)
    return Rivals(tuple(plans), tuple(refusals))


def _alone(problem: Problem) -> float:
    """Seconds that no step takes less than in which no stage has replicas that the user did not ask for."""
    if any(problem.units.replicas):
        return 0.0
    options = replace(problem.options, max_replicas=1, constraints=Constraints())
    return min(Problem(problem.graph, problem.topology, problem.costs, options).least_seconds.values())


def partitions(problem: Problem, micro_batch: int) -> list[list[Group]]:
    """Their partitions for one micro-batch size, each to run on its true stage graph; where nothing fits
    memory as it is, those of GraphPipe's space that would with more of it."""
    found = [
        *graphpipe.candidates(problem, micro_batch),
        pipedream.groups(problem, micro_batch),
        sequential.groups(problem, micro_batch),
        exact.downset_groups(problem, micro_batch),
        exact.downset_groups(problem, micro_batch, reduce=False),
    ]
    fitting = [groups for groups in found if groups is not None]
    return fitting or graphpipe.candidates(problem, micro_batch, ignore_memory=True)
