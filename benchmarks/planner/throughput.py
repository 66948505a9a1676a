"""The paper's table: throughput over the linear plan on its cluster (GraphPipe §7.3, Figure 6)."""

from collections.abc import Mapping, Sequence

from benchmarks.section import Cell, Section
from gpp.planner.options import Options
from launch.comparison import on_true_graph

from .runs import Runs, everything
from .workloads import MICRO_BATCH, Workload, sizes_text

DEVICES = (4, 8, 16, 32)
ROUNDS = (32, 64, 128)
# Samples of a mini-batch for each device where the micro-batch size is swept, as in the paper.
PER_DEVICE: Mapping[str, int] = {"MMT": 16, "DLRM": 512, "CANDLE-Uno": 512}
REACH = (1.14, 1.5)


def over_linear(
    runs: Runs,
    models: Mapping[str, Workload],
    devices: Sequence[int] = DEVICES,
    rounds: Sequence[int] = ROUNDS,
) -> Section:
    """Throughput of graphpipe and gpp over that of the linear plan, with and without replicas."""
    rows: list[tuple[Cell, ...]] = []
    seen: list[float] = []
    for name, work in models.items():
        for replicas in (1, None):
            for count in devices:
                for m in (*rounds, None):
                    cells, ratio = _row(runs, name, work, count, m, replicas)
                    rows.append(cells)
                    if name == "MMT" and count == max(devices) and replicas == 1 and m and ratio:
                        seen.append(ratio)
    low, high = REACH
    return Section(
        name="throughput",
        what="simulated throughput over the linear plan, 4 to 32 V100s",
        reach=f"graphpipe on MMT, {max(devices)} devices, no replicas, m = 32 to 128: {low} to {high} times",
        measured=", ".join(f"{ratio:.2f}" for ratio in seen) or "no such plan",
        reached=bool(seen) and min(seen) >= low,
        columns=(
            *("model", "replicas", "devices", "m", "mini-batch", "linear, samples/s"),
            *("linear on its DAG", "graphpipe", "gpp", "what bounds any plan", "gpp's gap"),
        ),
        rows=tuple(rows),
        note="The linear plan is planner sequential (no replicas) or pipedream (with replicas). The numbers "
        "after its throughput are ratios to it; 'on its DAG' is its own partition, every stage waiting for "
        f"its true predecessors alone. With m the micro-batch is fixed (samples: {sizes_text(MICRO_BATCH)}) "
        "and the mini-batch m times that; in the rows 'swept' the mini-batch grows with the devices (samples "
        f"each: {sizes_text(PER_DEVICE)}) and every planner chooses its micro-batch size. What bounds any "
        "plan and gpp's gap to that say why a ratio is small or more devices bring nothing. A partition can "
        "be slower on its DAG than in a row: its stages hold fewer micro-batches there, and wait more.",
    )


def _row(
    runs: Runs, name: str, work: Workload, count: int, m: int | None, replicas: int | None
) -> tuple[tuple[Cell, ...], float | None]:
    """The cells, and graphpipe's ratio."""
    if m is None:
        options = Options(mini_batch=PER_DEVICE[name] * count, max_replicas=replicas)
    else:
        size = MICRO_BATCH[name]
        options = Options(mini_batch=m * size, micro_batch=size, max_replicas=replicas)
    linear = runs.plan("sequential" if replicas == 1 else "pipedream", work, count, options)
    base = linear.estimate if linear is not None else None
    free = None if linear is None else on_true_graph(work.problem(count, options), linear)
    graph = runs.plan("graphpipe", work, count, options)
    own = runs.plan("gpp", work, count, everything(options))
    ratios = [base / p.estimate if base is not None and p is not None else None for p in (free, graph, own)]
    cells = (
        *(name, "no" if replicas == 1 else "yes", count, "swept" if m is None else m, options.mini_batch),
        *(None if base is None else options.mini_batch / base, *ratios),
        *(None if own is None else own.bound_by, None if own is None else f"{own.gap:.1%}"),
    )
    return cells, ratios[1]
