"""The sweep over micro-batch sizes: which are worth planning for, and the plan with the shortest step.

Small micro-batches cost each operator's start every time, large ones cannot be split over stages. Where one
plan is known, most sizes can be seen to be no better before anything is planned; that changes no answer.
"""

from collections.abc import Callable, Iterable
from typing import TypeVar

from gpp.plan import Plan

from .estimate import Problem, busy_seconds, estimated, peak_memory, rough_seconds
from .loads import loads

CLOSE = 1e-6  # step times this close are ties
ROUGH = 1.15  # the rough step time is at most this factor above the simulated one

Source = TypeVar("Source")
Found = tuple[Plan, Source]  # a plan, and whatever its planner wants to know about it


def least_seconds(problem: Problem) -> dict[int, float]:
    """For each micro-batch size seconds that no step with it takes less than: the heaviest operator on its
    replicas, and all work over all devices. O(sizes x operators x divisors)."""
    options = problem.options
    found = loads(problem)
    pieces, speed = found.pieces, float(found.speeds.sum())
    rounds = pieces.rounds[:, 0]
    least = {}
    for size in options.micro_batches:
        own = rounds == options.mini_batch / size
        heaviest = float(pieces.alone[own].min(0).max())
        work = (pieces.rounds * pieces.whole * pieces.replicas)[own].min(0).sum()
        least[size] = max(heaviest, float(work) / speed) * (1 - 1e-9)
    return least


def sweep(problem: Problem, made: Callable[[int], Iterable[Found[Source]]]) -> Found[Source] | None:
    """The best, see `fastest`, of what is made for each micro-batch size without estimates; None: nothing."""
    best: Found[Source] | None = None
    found: list[Found[Source]] = []
    least = problem.least_seconds
    for size in sorted(least, key=lambda size: (least[size], -size)):
        if found and least[size] > min(rough_seconds(plan) for plan, _ in found):
            best, found = fastest(found, best), []
        if best is not None and least[size] > best[0].estimate:
            break
        found += made(size)
    return fastest(found, best) if found else best


def fastest(found: Iterable[Found[Source]], best: Found[Source] | None = None) -> Found[Source]:
    """The least simulated step time; ties to less memory, then to fewer stages. What cannot win is not
    simulated."""
    for plan, source in sorted(found, key=lambda item: rough_seconds(item[0])):
        least = max(busy_seconds(plan), rough_seconds(plan) / ROUGH)
        if best is None or least <= best[0].estimate * (1 + CLOSE):
            timed = estimated(plan)
            if best is None or better(timed, best[0]):
                best = timed, source
    assert best is not None
    return best


def better(one: Plan, other: Plan) -> bool:
    """The shorter step; ties to less memory, then to fewer stages."""
    if abs(one.estimate - other.estimate) > CLOSE * other.estimate:
        return one.estimate < other.estimate
    ties = [(peak_memory(plan), len(plan.stage_graph.stages)) for plan in (one, other)]
    return ties[0] < ties[1]
