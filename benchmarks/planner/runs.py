"""Plans made once and looked at by several sections, and the clock that they are timed with."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import _lru_cache_wrapper
from time import perf_counter
from typing import TypeVar

from gpp.plan import Plan
from gpp.planner.estimate import Problem
from gpp.planner.options import Options
from launch.comparison import Answer, answer

from .workloads import Workload

T = TypeVar("T")

Asked = tuple[str, str, int, Options, float | None]


@dataclass(frozen=True)
class Runs:
    """Planners' answers, kept: the same question is asked once."""

    answers: dict[Asked, Answer] = field(default_factory=dict)

    def answer(
        self,
        planner: str,
        workload: Workload,
        devices: int,
        options: Options,
        memory: float | None = None,
    ) -> Answer:
        """What a planner says, and the seconds that it took when it was asked first."""
        asked = (planner, workload.name, devices, options, memory)
        if asked not in self.answers:
            self.answers[asked] = answer(planner, workload.problem(devices, options, memory=memory))
        return self.answers[asked]

    def plan(
        self,
        planner: str,
        workload: Workload,
        devices: int,
        options: Options,
        memory: float | None = None,
    ) -> Plan | None:
        """The plan, None where there is none."""
        return self.answer(planner, workload, devices, options, memory).plan


def everything(options: Options) -> Options:
    """The options with all that `gpp` may search."""
    return replace(
        options,
        eager=True,
        split_backward=True,
        greedy=True,
        recompute=True,
        shard_optimizer=True,
        colocate=True,
    )


def best_of(work: Callable[[], T], times: int = 3, patience: float = 5.0) -> tuple[float, T]:
    """The least seconds of several runs after a first one that does not count, and what it answers.

    Work that takes longer than `patience` seconds is run once.
    """
    start = perf_counter()
    found = work()
    first = perf_counter() - start
    if first > patience:
        return first, found
    return min(_seconds(work) for _ in range(times)), found


def _seconds(work: Callable[[], T]) -> float:
    start = perf_counter()
    work()
    return perf_counter() - start


def planned_in(planner: str, problem: Problem, times: int = 3) -> tuple[float, Answer]:
    """`best_of` a planner; nothing is remembered from the run before."""

    def anew() -> Answer:
        for found in _caches():
            found.cache_clear()
        return answer(planner, replace(problem, graph=replace(problem.graph)))

    return best_of(anew, times)


def _caches() -> "list[_lru_cache_wrapper[object]]":
    """What the planners' modules remember."""
    modules = [module for name, module in sys.modules.items() if name.startswith("gpp.")]
    return [v for module in modules for v in vars(module).values() if isinstance(v, _lru_cache_wrapper)]
