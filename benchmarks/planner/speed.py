"""How long planning takes, and loading the planners."""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence

from benchmarks.section import Cell, Section
from gpp.planner.options import Options

from .runs import everything, planned_in
from .workloads import CHECKOUT, Workload

# Samples of a step, by devices: several hundred micro-batches to choose from.
MINI_BATCH: Mapping[int, int] = {32: 1024, 1024: 32768}
REACH: Mapping[tuple[str, int], float] = {
    ("graphpipe", 32): 0.5,
    ("graphpipe", 1024): 1.0,
    ("gpp", 32): 3.0,
    ("gpp", 1024): 10.0,
}
IMPORT_SECONDS = 0.2
MODULES = ("gpp", "graphpipe", "sequential", "pipedream", "piper")
FORBIDDEN = ("torch", "scipy")


def planning_seconds(
    models: Mapping[str, Workload], reach: Mapping[tuple[str, int], float] = REACH
) -> Section:
    """Seconds of a whole plan, every micro-batch size tried, `gpp` with everything that it may search."""
    rows: list[tuple[Cell, ...]] = []
    slowest: dict[tuple[str, int], float] = {}
    for name, work in models.items():
        for (planner, devices), limit in reach.items():
            options = Options(mini_batch=MINI_BATCH.get(devices, 32 * devices))
            problem = work.problem(devices, everything(options) if planner == "gpp" else options)
            seconds, found = planned_in(planner, problem)
            key = (planner, devices)
            slowest[key] = max(slowest.get(key, 0.0), seconds)
            stages = None if found.plan is None else len(found.plan.stage_graph.stages)
            rows.append((name, planner, devices, options.mini_batch, stages, seconds, limit))
    limits = [f"{planner} on {devices} < {limit:g} s" for (planner, devices), limit in reach.items()]
    worst = [f"{planner} on {devices} {time:.2f} s" for (planner, devices), time in slowest.items()]
    return Section(
        name="planning",
        what="planning the paper's models from the captured graph: graphpipe with its micro-batch sweep, gpp "
        "with all options",
        reach=", ".join(limits),
        measured=", ".join(worst),
        reached=all(slowest[key] < reach[key] for key in slowest),
        columns=("model", "planner", "devices", "mini-batch", "stages", "seconds", "to reach"),
        rows=tuple(rows),
        note="Best of three after a first that does not count; once where it takes more than 5 s.",
    )


def import_seconds(modules: Sequence[str] = MODULES, times: int = 5) -> Section:
    """Seconds that a fresh Python needs to load each planner, and what comes in that must not."""
    rows: list[tuple[Cell, ...]] = []
    for name in modules:
        found = [_load(f"gpp.planner.{name}") for _ in range(times)]
        seconds = min(item[0] for item in found)
        rows.append((f"gpp.planner.{name}", seconds, ", ".join(found[0][1]) or "none"))
    slowest = max(float(str(row[1])) for row in rows)
    clean = all(row[2] == "none" for row in rows)
    return Section(
        name="import",
        what="import of gpp.planner and what it needs",
        reach=f"no torch, no scipy, < {IMPORT_SECONDS} s",
        measured=f"{'neither' if clean else 'not clean'}, {slowest:.3f} s",
        reached=clean and slowest < IMPORT_SECONDS,
        columns=("module", "seconds", "of torch and scipy"),
        rows=tuple(rows),
        note=f"Best of {times} fresh processes each, numpy included.",
    )


def _load(module: str) -> tuple[float, list[str]]:
    program = (
        f"import json, sys, time; start = time.perf_counter(); import {module}; "
        f"seconds = time.perf_counter() - start; found = [m for m in {FORBIDDEN!r} if m in sys.modules]; "
        "print(json.dumps([seconds, found]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=CHECKOUT, capture_output=True, text=True, check=True
    )
    seconds, found = json.loads(done.stdout)
    return float(seconds), list(found)
