"""python -m benchmarks.planner [section ...]: measures, prints, and writes JSON and Markdown.

Sections that are not named keep what benchmarks/results/planner.json has of an earlier run.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from time import perf_counter
from typing import Any

from benchmarks.report import machine, markdown, merged, record, text
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
from .workloads import CHECKOUT, floors, paper_models, profiles_folder, published, questions

RESULTS = CHECKOUT / "benchmarks" / "results"

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


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the sections asked for."""
    known = sections(Runs())
    parser = argparse.ArgumentParser(prog="python -m benchmarks.planner", description=__doc__)
    parser.add_argument("sections", nargs="*", help=f"of {', '.join(known)}; all if none is named")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of planner.json and planner.md")
    asked = parser.parse_args(arguments)
    unknown = [name for name in asked.sections if name not in known]
    if unknown:
        parser.error(f"there is no section {unknown[0]}; there are {', '.join(known)}")
    target = asked.out / "planner.json"
    for name in asked.sections or known:
        start = perf_counter()
        section = known[name]()
        print(text(section), flush=True)
        found = record(section, perf_counter() - start, machine())
        _write(target, merged([found], target, list(known)))


def _write(target: Path, found: dict[str, Any]) -> None:
    """After each section: a run that is stopped keeps what it has."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(found, indent=1) + "\n")
    target.with_suffix(".md").write_text(
        markdown(found["sections"], "The planners, measured", "python -m benchmarks.planner")
    )


if __name__ == "__main__":
    main()
