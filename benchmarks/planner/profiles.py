"""Every published profile planned on small and large clusters, with little and with much memory."""

from collections.abc import Mapping, Sequence

from gpp.planner.options import Options

from .runs import Runs, everything
from .section import Cell, Section
from .workloads import Workload

DEVICES = (8, 32)
ROUNDS = (8, 64)
MEMORY = (4, 16)  # GiB
PLANNERS = ("graphpipe", "gpp")
LIMIT = 3.0  # seconds


def every_profile(
    runs: Runs,
    profiles: Mapping[str, tuple[Workload, int]],
    devices: Sequence[int] = DEVICES,
    rounds: Sequence[int] = ROUNDS,
    memory: Sequence[float] = MEMORY,
) -> Section:
    """Seconds to a valid plan of every profile, or to the proof that there is none. One run of each."""
    rows: list[tuple[Cell, ...]] = []
    slowest: dict[str, tuple[float, str]] = dict.fromkeys(PLANNERS, (0.0, ""))
    planned, asked = 0, 0
    for name, (work, unit) in profiles.items():
        cases = [(count, n, gib) for count in devices for n in rounds for gib in memory]
        for planner in PLANNERS:
            seconds = []
            without: list[str] = []
            for count, n, gib in cases:
                options = Options(mini_batch=n * unit, micro_batch=unit)
                options = everything(options) if planner == "gpp" else options
                found = runs.answer(planner, work, count, options, gib * 2.0**30)
                case = f"{count} devices, N = {n}, {gib} GiB"
                seconds.append((found.seconds, case))
                asked += 1
                planned += found.plan is not None
                if found.plan is None:
                    without.append(case)
            worst, case = max(seconds)
            slowest[planner] = max(slowest[planner], (worst, f"{name}, {case}"))
            operators = len(work.graph.operators)
            rows.append((name, operators, planner, worst, case, "; ".join(without) or "none"))
    text = ", ".join(f"{planner} {found[0]:.2f} s ({found[1]})" for planner, found in slowest.items())
    return Section(
        name="profiles",
        what="every published profile at 8 and 32 devices, N = 8 and 64 micro-batches, 4 and 16 GiB",
        reach=f"a valid plan in at most {LIMIT:g} s",
        measured=f"{planned} of {asked} have a plan; slowest {text}",
        reached=all(found[0] <= LIMIT for found in slowest.values()),
        columns=("profile", "operators", "planner", "slowest, s", "which", "without a plan"),
        rows=tuple(rows),
        note="Every plan is checked against the graph and the memory. gpp searches everything. One run each.",
    )
