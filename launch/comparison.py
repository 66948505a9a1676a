"""Several planners on several clusters, side by side: rows of a table, and the table as text and CSV."""

import csv
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from io import StringIO
from time import perf_counter
from typing import TypeVar

from gpp.plan import Plan, PlanError, check_plan
from gpp.plan_table import readable_bytes, readable_seconds
from gpp.planner.estimate import Group, Problem, assemble, estimated, peak_memory
from gpp.planner.named import planned

T = TypeVar("T")

LINEAR = ("sequential", "pipedream", "piper")  # their stages run one after the other


@dataclass(frozen=True, slots=True)
class Row:
    """What a planner answers for a number of devices. Seconds, bytes, samples.

    `ratio`: throughput over that of the linear plan (planner sequential) on as many devices; `on_graph` the
    same for a linear plan's partition, each stage waiting for its true predecessors alone. `bubble` is the
    share of all devices' time that is not computing, `peak_memory` that of the fullest device, `gap` how far
    the step is above its proven lower bound, `bound_by` what gives that. Where there is no plan, `why` says
    so and numbers are None.
    """

    devices: int
    planner: str
    mini_batch: int
    micro_batch: str = ""
    micro_batches: str = ""
    step_seconds: float | None = None
    samples_per_second: float | None = None
    ratio: float | None = None
    on_graph: float | None = None
    bubble: float | None = None
    peak_memory: float | None = None
    stages: int | None = None
    depth: int | None = None
    schedule: str = ""
    planning_seconds: float | None = None
    gap: float | None = None
    bound_by: str = ""
    why: str = ""


@dataclass(frozen=True, slots=True)
class Answer:
    """A planner's plan, or why it has none, and the seconds that it took to say so."""

    plan: Plan | None
    seconds: float
    why: str = ""


def compared(problems: Mapping[str, Problem]) -> list[Row]:
    """A row for each planner's problem, all with the same model, cluster and mini-batch."""
    answers = {name: answer(name, problem) for name, problem in problems.items()}
    linear = answers.get("sequential") or answer("sequential", next(iter(problems.values())))
    return [row(name, problem, answers[name], linear.plan) for name, problem in problems.items()]


def answer(name: str, problem: Problem) -> Answer:
    """What a planner says; a plan is proven valid."""
    start = perf_counter()
    try:
        plan = planned(name, problem.graph, problem.topology, problem.costs, problem.options)
        check_plan(plan, problem.graph)
    except PlanError as error:
        return Answer(None, perf_counter() - start, " ".join(str(error).split()))
    return Answer(plan, perf_counter() - start)


def row(name: str, problem: Problem, found: Answer, linear: Plan | None) -> Row:
    """An answer as a row; throughput is compared with that of `linear`."""
    plan = found.plan
    if plan is None:
        count = len(problem.topology.devices)
        return Row(count, name, problem.options.mini_batch, planning_seconds=found.seconds, why=found.why)
    graph = plan.stage_graph
    sizes = sorted({stage.micro_batch for stage in graph.stages})
    free = on_true_graph(problem, plan) if name in LINEAR else None
    return Row(
        devices=len(plan.topology.devices),
        planner=name,
        mini_batch=plan.mini_batch,
        micro_batch=_range(sizes),
        micro_batches=_range(sorted(plan.mini_batch // size for size in sizes)),
        step_seconds=plan.estimate,
        samples_per_second=plan.mini_batch / plan.estimate if plan.estimate else math.inf,
        ratio=linear.estimate / plan.estimate if linear and plan.estimate else None,
        on_graph=linear.estimate / free.estimate if linear and free and free.estimate else None,
        bubble=idle_share(plan),
        peak_memory=peak_memory(plan),
        stages=len(graph.stages),
        depth=graph.depth,
        schedule=plan.policy.name,
        planning_seconds=found.seconds,
        gap=plan.gap,
        bound_by=plan.bound_by,
    )


def on_true_graph(problem: Problem, plan: Plan) -> Plan | None:
    """A plan's partition, each stage waiting for its true predecessors alone and holding what that needs.

    None if it does not fit the devices then.
    """
    if not any(edge.is_order for edge in plan.stage_graph.edges):
        return plan
    index = problem.graph.index
    groups = [
        Group(
            tuple(index[name] for name in stage.operators),
            len(stage.devices),
            stage.micro_batch,
            stage.k,
            stage.recompute,
            stage.shard_optimizer,
        )
        for stage in plan.stage_graph.stages
    ]
    size = plan.stage_graph.stages[0].micro_batch
    free = assemble(problem, groups, size, plan.planner, policy=plan.policy)
    try:
        check_plan(free)
    except PlanError:
        return None
    return replace(estimated(free), lower_bound=plan.lower_bound, bound_by=plan.bound_by)


def idle_share(plan: Plan) -> float:
    """The share of all devices' time in a step for which they do not compute."""
    busy = 0.0
    for stage in plan.stage_graph.stages:
        seconds = stage.seconds
        once = seconds.forward + seconds.backward + (seconds.recompute if stage.recompute else 0.0)
        busy += len(stage.devices) * (plan.mini_batch // stage.micro_batch * once + seconds.update)
    return max(0.0, 1 - busy / (len(plan.topology.devices) * plan.estimate)) if plan.estimate else 0.0


def _range(sizes: Sequence[int]) -> str:
    return str(sizes[0]) if sizes[0] == sizes[-1] else f"{sizes[0]}-{sizes[-1]}"


_COLUMNS: Mapping[str, Callable[[Row], str]] = {
    "devices": lambda row: str(row.devices),
    "planner": lambda row: row.planner,
    "step": lambda row: _said(row.step_seconds, readable_seconds),
    "samples/s": lambda row: _said(row.samples_per_second, lambda value: f"{value:.4g}"),
    "x linear": lambda row: _said(row.ratio, lambda value: f"{value:.3f}"),
    "on its DAG": lambda row: _said(row.on_graph, lambda value: f"{value:.3f}"),
    "bubble": lambda row: _said(row.bubble, lambda value: f"{value:.1%}"),
    "memory": lambda row: _said(row.peak_memory, readable_bytes),
    "stages": lambda row: _said(row.stages, str),
    "depth": lambda row: _said(row.depth, str),
    "micro-batch": lambda row: row.micro_batch or "-",
    "m": lambda row: row.micro_batches or "-",
    "schedule": lambda row: row.schedule or "-",
    "planned in": lambda row: _said(row.planning_seconds, lambda value: f"{value:.2f} s"),
    "gap": lambda row: _said(row.gap, lambda value: f"{value:.1%}"),
}


def _said(value: T | None, text: Callable[[T], str]) -> str:
    return "-" if value is None else text(value)


def comparison_table(rows: Sequence[Row]) -> str:
    """The rows as text, then why planners have no plan: one line for all device counts of the same reason."""
    cells = [list(_COLUMNS), *([text(row) for text in _COLUMNS.values()] for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(_COLUMNS))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells]
    lines.insert(1, "  ".join("-" * width for width in widths))
    missing: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row.step_seconds is None:
            missing.setdefault((row.planner, row.why), []).append(str(row.devices))
    lines += [f"{planner} on {', '.join(counts)}: {why}" for (planner, why), counts in missing.items()]
    return "\n".join(lines) + "\n"


def comparison_csv(rows: Sequence[Row]) -> str:
    """The rows as CSV with every field of `Row`; what is None is empty."""
    names = [field.name for field in fields(Row)]
    out = StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(names)
    for row in rows:
        writer.writerow([getattr(row, name) for name in names])
    return out.getvalue()
