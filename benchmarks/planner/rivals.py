"""gpp beside every rival: its simulated step is never longer, and its bottleneck is near the optimum."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product

from benchmarks.section import Cell, Section
from gpp.cost import all_reduce_seconds
from gpp.plan import Plan
from gpp.planner.estimate import assemble, estimated
from gpp.planner.exact import FEW, downset_groups, downset_optimum
from gpp.planner.rivals import partitions

from .runs import Runs, everything
from .workloads import Question

RIVALS = ("graphpipe", "piper", "pipedream", "sequential")
DEVICES = (4, 8, 16, 32)
MEMORY = (None, 4.0)  # GiB of a device; None: the cluster's own
TOLERANCE = 1e-9
NEAR = 1.04
MANY = 40_000  # downsets, as Piper itself


def never_worse(
    runs: Runs,
    workloads: Mapping[str, Question],
    devices: Sequence[int] = DEVICES,
    memory: Sequence[float | None] = MEMORY,
) -> Section:
    """gpp's step over that of each rival's plan, the same memory and costs."""
    rows: list[tuple[Cell, ...]] = []
    worst, lost, compared = 0.0, 0, 0
    for name, (work, options) in workloads.items():
        for count, gib in product(devices, memory):
            limit = None if gib is None else gib * 2.0**30
            own = runs.plan("gpp", work, count, everything(options), limit)
            cells: list[Cell] = []
            for rival in RIVALS:
                plan = runs.plan(rival, work, count, options, limit)
                ratio = None if plan is None or own is None else own.estimate / plan.estimate
                cells.append(ratio)
                if plan is not None:
                    compared += 1
                    lost += ratio is None or ratio > 1 + TOLERANCE
                    worst = max(worst, float("inf") if ratio is None else ratio)
            have = work.problem(count, options, memory=limit).topology.devices[0].memory / 2**30
            rows.append((name, count, have, None if own is None else own.estimate, *cells))
    return Section(
        name="rivals",
        what="gpp against every rival's plan, simulated step time, same memory and costs",
        reach="never worse",
        measured=f"worse in {lost} of {compared} comparisons, the largest ratio is {worst:.4f}",
        reached=lost == 0 and compared > 0,
        columns=("workload", "devices", "GiB", "gpp, s", *(f"gpp / {rival}" for rival in RIVALS)),
        rows=tuple(rows),
        note="Steps of 32 micro-batches. An empty cell: there is no plan (piper: too many downsets, or "
        "nothing fits). A ratio of 1: both have the same plan, often one stage on all devices.",
    )


def near_optimum(
    runs: Runs,
    workloads: Mapping[str, Question],
    devices: Sequence[int] = (8, 32),
    rounds: Sequence[int] = (32, 128),
    few: int = FEW,
    many: int = MANY,
) -> Section:
    """gpp's bottleneck over that of the exact search over downsets, where gpp itself does not run it."""
    rows: list[tuple[Cell, ...]] = []
    worst: dict[int, float] = {}
    chosen = 0.0
    for (name, (work, options)), count, m in product(workloads.items(), devices, rounds):
        size = options.micro_batches[0]
        options = replace(options, mini_batch=m * size)
        problem = work.problem(count, everything(options))
        if downset_optimum(problem, size, limit=few) is not None:
            continue
        optimum = downset_optimum(problem, size, limit=many)
        groups = downset_groups(work.problem(count, options), size, limit=many)
        own = runs.plan("gpp", work, count, everything(options))
        if optimum is None or groups is None or own is None:
            continue
        best = estimated(assemble(problem, groups, size, "downsets"))
        tried = [assemble(problem, each, size, "tried") for each in partitions(problem, size)]
        least = bottleneck(best)
        near = min(map(bottleneck, (own, *tried))) / least
        worst[m] = max(worst.get(m, 0.0), near)
        chosen = max(chosen, bottleneck(own) / least)
        step = own.estimate / best.estimate
        rows.append((name, count, m, least, optimum / size / least, near, bottleneck(own) / least, step))
    return Section(
        name="optimum",
        what="gpp against the downset optimum on bottleneck, where the portfolio has no downsets",
        reach=f"within {NEAR - 1:.0%}",
        measured=f"the portfolio's best: largest ratio {_worst(worst)}, {len(rows)} cases; of the plans "
        f"chosen for their step {chosen:.4f}"
        if rows
        else "no such case",
        reached=max(chosen, *worst.values()) <= NEAR if rows else None,
        columns=(
            *("workload", "devices", "m", "downset plan, s/sample", "bound / it", "portfolio / it"),
            *("gpp's plan / it", "gpp's step / its step"),
        ),
        rows=tuple(rows),
        note=f"Workloads with {few} to {many} downsets, equal branches collapsed. The bottleneck is what the "
        "busiest device does for a sample: passes, and its share of all-reduce and update; messages take no "
        "device's time. The downset plan is the exact search's, which charges messages and memory; the bound "
        "is the least of any stages, one a device, without both. The portfolio is what gpp starts from and "
        "what it ends with; gpp minimises the step (last column), and then a busier device may be worth a "
        "shorter way through the pipeline or an all-reduce that hides.",
    )


def _worst(found: Mapping[int, float]) -> str:
    return ", ".join(f"{ratio:.4f} at m = {m}" for m, ratio in found.items())


def bottleneck(plan: Plan) -> float:
    """Seconds a sample of the busiest device: passes, and its share of the step's all-reduces and updates."""
    graph, topology = plan.stage_graph, plan.topology
    spent = dict.fromkeys(range(len(topology.devices)), 0.0)
    for stage in graph.stages:
        once = stage.seconds.forward + stage.seconds.backward
        once += stage.seconds.recompute if stage.recompute else 0.0
        ring = topology.inside if len({topology.host(d) for d in stage.devices}) == 1 else topology.between
        reduce = all_reduce_seconds(stage.trainable_bytes, len(stage.devices), ring)
        for device in stage.devices:
            spent[device] += once / stage.micro_batch + (reduce + stage.seconds.update) / plan.mini_batch
    return max(spent.values())
