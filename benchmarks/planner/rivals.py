"""gpp beside every rival: its simulated step is never longer, and its bottleneck is near the optimum."""

from collections.abc import Mapping, Sequence

from gpp.cost import all_reduce_seconds
from gpp.plan import Plan
from gpp.planner.estimate import assemble, estimated
from gpp.planner.exact import FEW, downset_groups, downset_optimum

from .runs import Runs, everything
from .section import Cell, Section
from .workloads import Question

RIVALS = ("graphpipe", "piper", "pipedream", "sequential")
DEVICES = (4, 8, 32)
TOLERANCE = 1e-9
NEAR = 1.04
MANY = 40_000  # downsets, as Piper itself


def never_worse(runs: Runs, workloads: Mapping[str, Question], devices: Sequence[int] = DEVICES) -> Section:
    """gpp's step over that of each rival's plan, the same memory and costs."""
    rows: list[tuple[Cell, ...]] = []
    worst, lost, compared = 0.0, 0, 0
    for name, (work, options) in workloads.items():
        for count in devices:
            own = runs.plan("gpp", work, count, everything(options))
            cells: list[Cell] = []
            for rival in RIVALS:
                plan = runs.plan(rival, work, count, options)
                ratio = None if plan is None or own is None else own.estimate / plan.estimate
                cells.append(ratio)
                if plan is not None:
                    compared += 1
                    lost += ratio is None or ratio > 1 + TOLERANCE
                    worst = max(worst, float("inf") if ratio is None else ratio)
            rows.append((name, count, None if own is None else own.estimate, *cells))
    return Section(
        name="rivals",
        what="gpp against every rival's plan, simulated step time, same memory and costs",
        reach="never worse",
        measured=f"worse in {lost} of {compared} comparisons, the largest ratio is {worst:.4f}",
        reached=lost == 0 and compared > 0,
        columns=("workload", "devices", "gpp, s", *(f"gpp / {rival}" for rival in RIVALS)),
        rows=tuple(rows),
        note="An empty cell: the rival has no plan (piper: too many downsets, or nothing fits).",
    )


def near_optimum(
    runs: Runs,
    workloads: Mapping[str, Question],
    devices: Sequence[int] = (8, 32),
    few: int = FEW,
    many: int = MANY,
) -> Section:
    """gpp's bottleneck over that of the exact search over downsets, where gpp itself does not run it."""
    rows: list[tuple[Cell, ...]] = []
    worst = 0.0
    for name, (work, options) in workloads.items():
        for count in devices:
            problem = work.problem(count, options)
            size = options.micro_batches[0]
            if downset_optimum(problem, size, limit=few) is not None:
                continue
            groups = downset_groups(problem, size, limit=many)
            own = runs.plan("gpp", work, count, everything(options))
            if groups is None or own is None:
                continue
            best = estimated(assemble(problem, groups, size, "downsets"))
            ratio = bottleneck(own) / bottleneck(best)
            worst = max(worst, ratio)
            step = own.estimate / best.estimate
            rows.append((name, count, bottleneck(best), bottleneck(own), ratio, step))
    return Section(
        name="optimum",
        what="gpp against the downset optimum on bottleneck, where the portfolio has no downsets",
        reach=f"within {NEAR - 1:.0%}",
        measured=f"largest ratio {worst:.4f} on {len(rows)} cases" if rows else "no such case",
        reached=worst <= NEAR if rows else None,
        columns=("workload", "devices", "optimum, s/sample", "gpp, s/sample", "ratio", "step / its step"),
        rows=tuple(rows),
        note=f"Workloads with {few} to {many} downsets. A stage's seconds with its messages and its share of "
        "the all-reduce and the update; gpp minimises the step, the last column, not this.",
    )


def bottleneck(plan: Plan) -> float:
    """Seconds a sample of the slowest stage: compute, messages both ways at its edges, and its share of the
    step's all-reduce and update."""
    graph, topology = plan.stage_graph, plan.topology
    spent = []
    for index, stage in enumerate(graph.stages):
        share = stage.micro_batch / len(stage.devices)
        once = stage.seconds.forward + stage.seconds.backward
        once += stage.seconds.recompute if stage.recompute else 0.0
        for edge in graph.edges:
            if index in (edge.source, edge.target):
                link = topology.link(
                    graph.stages[edge.source].devices[0], graph.stages[edge.target].devices[0]
                )
                once += link.seconds(edge.bytes * share)
                once += link.seconds(edge.gradient_bytes * share) if edge.needs_grad else 0.0
        ring = topology.inside if len({topology.host(d) for d in stage.devices}) == 1 else topology.between
        reduce = all_reduce_seconds(stage.trainable_bytes, len(stage.devices), ring)
        spent.append(once / stage.micro_batch + (reduce + stage.seconds.update) / plan.mini_batch)
    return max(spent)
