"""python -m benchmarks.pipeline [section ...]: see `benchmarks.command`."""

from collections.abc import Callable
from functools import cache

from benchmarks.command import run
from benchmarks.planner.runs import Runs
from benchmarks.planner.workloads import paper_models as captured_models
from benchmarks.section import Section

from .bubbles import less_on_a_clock, zero_bubble
from .compute import two_cores
from .models import paper_models
from .orders import less_memory, light_branches, order_quality
from .overhead import task_overhead
from .peaks import peak_memory
from .share import share_of_ideal

models = cache(captured_models)


def sections(runs: Runs) -> dict[str, Callable[[], Section]]:
    """All sections by name, in the order in which they are run."""
    return {
        "share": share_of_ideal,
        "orders": order_quality,
        "zero-bubble": zero_bubble,
        "memory": less_memory,
        "light": light_branches,
        "memory-clock": less_on_a_clock,
        "models": lambda: paper_models(runs, models()),
        "models-full": lambda: paper_models(runs, models(), message=None),
        "compute": two_cores,
        "overhead": task_overhead,
        "peaks": peak_memory,
    }


if __name__ == "__main__":
    run("pipeline", "The runtime and its schedules, measured", sections(Runs()))
