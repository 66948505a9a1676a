"""The other planners' plans, under the same options: what the search starts from and has to beat."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from gpp.plan import Plan, PlanError

from . import exact, graphpipe, pipedream, piper, sequential
from .estimate import Group, Problem

ANSWERS: tuple[Callable[[Problem], Plan], ...] = (
    graphpipe.answer,
    pipedream.answer,
    sequential.answer,
    partial(piper.answer, collapse=True, limit=exact.FEW),
)


@dataclass(frozen=True, slots=True)
class Rivals:
    """Their plans, in the order of `ANSWERS`, and what those without one say."""

    plans: tuple[Plan, ...]
    refusals: tuple[PlanError, ...]


def rivals(problem: Problem) -> Rivals:
    """Every planner's answer to the problem, without its lower bound."""
    plans, refusals = [], []
    for answer in ANSWERS:
        try:
            plans.append(answer(problem))
        except PlanError as error:
            refusals.append(error)
    return Rivals(tuple(plans), tuple(refusals))


def partitions(problem: Problem, micro_batch: int) -> list[list[Group]]:
    """Their partitions for one micro-batch size, each to run on its true stage graph; where nothing fits
    memory as it is, those of GraphPipe's space that would with more of it."""
    found = [
        *graphpipe.candidates(problem, micro_batch),
        pipedream.groups(problem, micro_batch),
        sequential.groups(problem, micro_batch),
        exact.downset_groups(problem, micro_batch),
    ]
    fitting = [groups for groups in found if groups is not None]
    return fitting or graphpipe.candidates(problem, micro_batch, ignore_memory=True)
