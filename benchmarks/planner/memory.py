"""The least memory of a device at which each planner has a plan."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.section import Cell, Section, geometric_mean
from gpp.plan import Plan
from gpp.planner.downset_search import ANY, DownsetSearch
from gpp.planner.downsets import downsets
from gpp.planner.exact import memory_rule, unit_costs
from gpp.planner.options import Options
from launch.comparison import answer

from .runs import everything
from .workloads import Question, Workload

PLANNERS = ("piper", "graphpipe", "gpp")
JUDGED = "gpp"
EVERYTHING = "gpp, everything"
IN_A_ROW = "stages in a row"
PRECISION = 0.01
REACH = 0.8
MANY = 40_000  # downsets, as Piper itself


@dataclass(frozen=True, slots=True)
class Floor:
    """Bytes of a device below which a planner has no plan, and the step of the plan that it has there."""

    bytes: float
    step_seconds: float


def least_memory(
    workloads: Sequence[Question],
    devices: Sequence[int] = (8, 32),
    planners: Sequence[str] = PLANNERS,
) -> Section:
    """Bytes of a device below which each planner finds no plan; ratios to those of the first one."""
    rows: list[tuple[Cell, ...]] = []
    ratios: dict[str, list[float]] = {}
    for work, options in workloads:
        for count in devices:
            found = {name: floor(work, count, name, options) for name in planners}
            base = found[planners[0]]
            hints = [one.bytes for one in found.values() if one is not None]
            found[EVERYTHING] = floor(work, count, "gpp", everything(options), hint=min(hints, default=None))
            for name, one in found.items():
                ratio = None if one is None or base is None else one.bytes / base.bytes
                if ratio is not None:
                    ratios.setdefault(name, []).append(ratio)
                cells = (None, None) if one is None else (one.bytes / 2**20, one.step_seconds)
                rows.append((work.name, count, name, *cells, ratio))
            if planners[0] == "piper" and base is not None:
                least = in_a_row(work, count, options, base.bytes)
                rows.append((work.name, count, IN_A_ROW, least / 2**20, None, least / base.bytes))
    judged = ratios.get(JUDGED, [])
    return Section(
        name="memory",
        what="least memory of a device at which a plan exists, over Piper's, MMT",
        reach=f"20-30% below ({JUDGED})",
        measured=", ".join(_below(name, of) for name, of in ratios.items() if name != planners[0]),
        reached=bool(judged) and max(judged) <= REACH,
        columns=("workload", "devices", "planner", "least MiB", "step there, s", f"over {planners[0]}'s"),
        rows=tuple(rows),
        note="Micro-batches of one size, 64 of them; each memory found by bisection to 1%, one memory model "
        "for all (that of the plan that runs). graphpipe and piper have as much in flight as 1F1B asks for; "
        "gpp may have less, which the step shows. 'gpp, everything' may also recompute, share the "
        f"optimizer's state and put several stages on a device. '{IN_A_ROW}': no pipeline of Piper's space "
        "can do with less, what skip edges hold left out.",
    )


def _below(name: str, ratios: Sequence[float]) -> str:
    return (
        f"{name} {1 - max(ratios):.0%} to {1 - min(ratios):.0%} below (mean {1 - geometric_mean(ratios):.0%})"
    )


def floor(
    work: Workload, devices: int, planner: str, options: Options, *, hint: float | None = None
) -> Floor | None:
    """The least memory, to `PRECISION`; None if not even a device for the whole model is enough.

    `hint`: bytes at which there is a plan, if not by accident.
    """
    plans: dict[float, Plan] = {}

    def possible(memory: float) -> bool:
        plan = answer(planner, work.problem(devices, options, memory=memory)).plan
        if plan is not None:
            plans[memory] = plan
        return plan is not None

    parameters = {p.name: p for op in work.graph.operators for p in op.parameters}
    size = sum(p.bytes for p in parameters.values())
    trained = sum(p.bytes for p in parameters.values() if p.trainable)
    # each of them is on some device
    static = size + trained + work.optimizer_factor * trained
    stash = sum(op.stash for op in work.graph.operators)
    low = static / devices
    found = bisected(possible, low, hint) if hint is not None else None
    if found is None:
        found = bisected(possible, low, 4 * (static + size + stash * options.mini_batch))
    return None if found is None else Floor(found, plans[found].estimate)


def in_a_row(work: Workload, devices: int, options: Options, high: float) -> float:
    """Bytes below which no stages in a row exist, at most `high`, at which there are some: each stage with
    its parameters, and stash and messages of as many micro-batches as there are stages from it to the end."""
    problem = work.problem(devices, options)
    (size,) = options.micro_batches
    sets, costs = downsets(problem.units.successors, MANY), unit_costs(problem, size)

    def possible(memory: float) -> bool:
        rule = memory_rule(problem, size, memory, devices)
        return DownsetSearch(sets, costs, devices, rule).below(ANY) is not None

    low = 0.9 * high
    while possible(low):
        low *= 0.9
    while high > low * (1 + PRECISION):
        middle = (low * high) ** 0.5
        low, high = (low, middle) if possible(middle) else (middle, high)
    return low


def bisected(possible: Callable[[float], bool], low: float, high: float) -> float | None:
    """The least value that is possible, to `PRECISION`, if all above it are; None if `high` is not."""
    if not possible(high):
        return None
    while high > low * (1 + PRECISION):
        middle = (low * high) ** 0.5
        low, high = (low, middle) if possible(middle) else (middle, high)
    return high
