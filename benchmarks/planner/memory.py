"""The least memory of a device at which each planner has a plan."""

from collections.abc import Callable, Sequence

from gpp.planner.options import Options
from launch.comparison import answer

from .runs import everything
from .section import Cell, Section, geometric_mean
from .workloads import Workload

PLANNERS = ("piper", "graphpipe", "gpp")
PRECISION = 0.01
REACH = 0.8


def least_memory(
    workloads: Sequence[tuple[Workload, Options]],
    devices: Sequence[int] = (8, 32),
    planners: Sequence[str] = PLANNERS,
) -> Section:
    """Bytes of a device below which each planner finds no plan; ratios to Piper's."""
    rows: list[tuple[Cell, ...]] = []
    ratios: dict[str, list[float]] = {}
    for work, options in workloads:
        for count in devices:
            least = {name: floor(work, count, name, options) for name in planners}
            least["gpp, everything"] = floor(work, count, "gpp", everything(options))
            base = least[planners[0]]
            for name, found in least.items():
                ratio = None if found is None or base is None else found / base
                if ratio is not None:
                    ratios.setdefault(name, []).append(ratio)
                rows.append((work.name, count, name, None if found is None else found / 2**20, ratio))
    means = {name: geometric_mean(found) for name, found in ratios.items()}
    worst = means.get("graphpipe", 1.0)
    return Section(
        name="memory",
        what="least memory of a device at which a plan exists, over Piper's, MMT",
        reach="20-30% below",
        measured=", ".join(f"{name} {1 - mean:.0%} below" for name, mean in means.items() if name != "piper"),
        reached=worst <= REACH,
        columns=("workload", "devices", "planner", "least MiB", "over Piper's"),
        rows=tuple(rows),
        note="Micro-batches of one size, 64 of them; each memory found by bisection to 1%. 'gpp, everything' "
        "may also recompute, share the optimizer's state and put several stages on a device.",
    )


def floor(work: Workload, devices: int, planner: str, options: Options) -> float | None:
    """The least bytes, to `PRECISION`; None if not even a device for the whole model is enough."""

    def possible(memory: float) -> bool:
        return answer(planner, work.problem(devices, options, memory=memory)).plan is not None

    size = sum(p.bytes for op in work.graph.operators for p in op.parameters)
    stash = sum(op.stash for op in work.graph.operators)
    factor = 2 + work.optimizer_factor
    return bisected(possible, size / devices / 4, 4 * (factor * size + stash * options.mini_batch))


def bisected(possible: Callable[[float], bool], low: float, high: float) -> float | None:
    """The least value that is possible, to `PRECISION`, if all above it are; None if `high` is not."""
    if not possible(high):
        return None
    while high > low * (1 + PRECISION):
        middle = (low * high) ** 0.5
        low, high = (low, middle) if possible(middle) else (middle, high)
    return high
