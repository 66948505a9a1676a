"""Seconds to the least bottleneck, beside Piper's own planner in C++."""

from dataclasses import replace
from pathlib import Path

from benchmarks.section import Cell, Section
from gpp.formats import read_profile
from gpp.formats.profile import Profile
from gpp.planner.estimate import Problem
from gpp.planner.graphpipe import bottleneck
from gpp.planner.options import Options
from gpp.topology import Device, DeviceTopology, Link

from .references import LONG, Reference, references
from .runs import best_of

FASTER, LIMIT, TIMES = 50.0, 0.1, 20
MUCH_FASTER = {"mmt4x8_layers": 1000.0}
LONG_ENOUGH = 0.1  # seconds of Piper's, of which a fiftieth is more than Python needs for anything


def against_piper(folder: Path) -> Section:
    """graphpipe's search over the bottleneck, on Piper's multi-branch instances."""
    cases = [case for case in (*references(folder), *LONG) if case.file.startswith("multibranch/")]
    rows: list[tuple[Cell, ...]] = []
    ratios: dict[str, list[float]] = {}
    worth: list[bool] = []  # whether the mark is reached, of those that take Piper long enough
    slowest, below, above = 0.0, 0, 0.0
    for case in cases:
        profile = read_profile((folder / case.file).read_text(), case.file)
        ours, found = _searched(profile, case)
        ratio, mark = case.seconds / ours, MUCH_FASTER.get(case.name, FASTER)
        ratios.setdefault(case.name, []).append(ratio)
        slowest, below = max(slowest, ours), below + (ratio < mark)
        if case.seconds >= LONG_ENOUGH:
            worth.append(ratio >= mark)
        quality = None if case.tps is None else found / case.tps
        above = max(above, quality or 0.0)
        operators = len(profile.graph.operators)
        rows.append((case.name, operators, case.devices, case.seconds, ours, ratio, mark, quality))
    every = [ratio for found in ratios.values() for ratio in found]
    long = ", ".join(f"{name} {min(ratios[name]):.3g}" for name in MUCH_FASTER if name in ratios)
    return Section(
        name="bottleneck",
        what="bottleneck search time against Piper's C++ seconds, multi-branch instances",
        reach=f">= {FASTER:g} times faster on each (mmt4x8_layers >= 1000); < {LIMIT:g} s at 32 devices",
        measured=f"{min(every):.3g} to {max(every):.3g} times ({long}), below the mark on {below} of "
        f"{len(rows)}; reached on {sum(worth)} of the {len(worth)} that take Piper {LONG_ENOUGH:g} s or "
        f"more; slowest {slowest:.3f} s; bottleneck at most {above:.3f} of Piper's",
        reached=below == 0 and slowest < LIMIT,
        columns=(
            *("instance", "operators", "devices", "Piper C++, s", "ours, s", "times faster", "to reach"),
            "bottleneck / Piper's",
        ),
        rows=tuple(rows),
        note="Best of twenty after a first, one process, tables and tree included, reading the file not. "
        "Piper's seconds are those of its published answers (mmt4x8_layers: of a run of minutes), not of "
        "this run. Where they are milliseconds, a fiftieth is less than Python needs for anything. The "
        "bottleneck is graphpipe's under its own costs: an all-reduce moves half of what Piper charges, a "
        "tensor with several readers is sent once, and its stages keep branches apart.",
    )


def _searched(profile: Profile, case: Reference) -> tuple[float, float]:
    """Seconds of the search, and the bottleneck that it finds."""
    device, link = Device("piper", case.memory, 1e13, 1e12), Link(0.0, case.bandwidth)
    cluster = DeviceTopology("piper", (device,) * case.devices, case.devices, link, link)
    options = Options(
        mini_batch=profile.unit * case.micro_batches,
        micro_batch=profile.unit,
        optimizer_factor=profile.optimizer_factor,
    )

    def search() -> float:
        graph = replace(profile.graph)  # nothing remembered from the run before
        return bottleneck(Problem(graph, cluster, profile.costs, options), profile.unit)

    return best_of(search, TIMES)
