"""python -m benchmarks.planner [section ...]: see `benchmarks.command`."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

from benchmarks.command import run
from benchmarks.section import Section, unmeasured

from .answers import piper_answers
from .bottleneck import against_piper
from .gains import gaps, over_graphpipe
from .memory import least_memory
from .profiles import every_profile
from .rivals import near_optimum, never_worse
from .runs import Runs
from .speed import import_seconds, planning_seconds
from .throughput import over_linear
from .workloads import floors, paper_models, profiles_folder, published, questions

models = cache(paper_models)


def sections(runs: Runs) -> dict[str, Callable[[], Section]]:
    """All sections by name, in the order in which they are run."""
    return {
        "import": import_seconds,
        "piper": lambda: _of_profiles("piper", piper_answers),
        "bottleneck": lambda: _of_profiles("bottleneck", against_piper),
        "planning": lambda: planning_seconds(models()),
        "profiles": lambda: _of_profiles("profiles", lambda folder: every_profile(runs, published(folder))),
        "gains": lambda: over_graphpipe(runs, models()),
        "gaps": lambda: gaps(runs, models()),
        "throughput": lambda: over_linear(runs, models()),
        "rivals": lambda: never_worse(runs, questions(models(), profiles_folder())),
        "optimum": lambda: near_optimum(runs, questions(models(), profiles_folder())),
        "memory": lambda: _of_profiles("memory", lambda folder: least_memory(floors(folder))),
    }


def _of_profiles(name: str, measure: Callable[[Path], Section]) -> Section:
    folder = profiles_folder()
    if folder is None:
        why = "no published profiles: name their folder in GPP_PROFILES"
        return unmeasured(name, f"section {name}", "", why)
    return measure(folder)


if __name__ == "__main__":
    run("planner", "The planners, measured", sections(Runs()))
