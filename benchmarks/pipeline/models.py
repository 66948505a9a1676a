"""The paper's models on emulated devices: is the simulated step the measured one, and the gain the gain?"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from benchmarks.planner.runs import Runs, everything
from benchmarks.planner.workloads import MICRO_BATCH, Workload, sizes_text
from benchmarks.section import Cell, Section
from gpp.plan import Plan
from gpp.planner.estimate import estimated
from gpp.planner.options import Options
from gpp.runtime.emulation import slower, with_links, with_messages
from gpp.topology import Link

from .emulate import timed

DEVICES = (8, 16, 32)
ROUNDS = 32  # micro-batches of a step
PASS = 10e-3  # seconds of a stage's forward of a micro-batch, in the mean
MESSAGE = 1 << 10  # bytes
PLANNERS = ("gpp", "sequential")
STEPS = 4
WITHIN = 0.05


def emulations(plans: Mapping[str, Plan], message: int | None) -> dict[str, Plan]:
    """Plans of one model, all as much slower: slow enough for a clock, the one with the shortest passes too.
    Messages of a size; None: their own."""
    means = [_mean_forward(plan) for plan in plans.values()]
    found = {name: slower(plan, PASS / min(means)) for name, plan in plans.items()}
    if message is None:
        return found
    return {name: with_messages(plan, message) for name, plan in found.items()}


def _mean_forward(plan: Plan) -> float:
    stages = plan.stage_graph.stages
    return sum(stage.seconds.forward for stage in stages) / len(stages)


def paper_models(
    runs: Runs,
    models: Mapping[str, Workload],
    devices: Sequence[int] = DEVICES,
    message: int | None = MESSAGE,
    steps: int = STEPS,
) -> Section:
    """Each model on each number of devices, planned by gpp and as a line, measured and simulated."""
    plans: dict[int, dict[str, Plan]] = {count: {} for count in devices}
    for count in devices:
        for name, work in models.items():
            size = MICRO_BATCH[name]
            options = Options(mini_batch=ROUNDS * size, micro_batch=size)
            made: dict[str, Plan] = {}
            for planner in PLANNERS:
                asked = everything(options) if planner == "gpp" else replace(options, max_replicas=1)
                plan = runs.plan(planner, work, count, asked)
                if plan is not None:
                    made[f"{name} {planner}"] = plan
            if made:
                plans[count] |= emulations(made, message)
    rows: list[tuple[Cell, ...]] = []
    off: list[float] = []
    gains: list[float] = []
    for count in devices:
        found = timed(plans[count], steps, "device" if message is None else "host", links=True)
        link = Link(found.latency, found.bandwidth)
        simulated = {n: estimated(with_links(p, link)).estimate for n, p in plans[count].items()}
        for name in models:
            ratio = {}
            for planner in PLANNERS:
                key = f"{name} {planner}"
                if key not in simulated:
                    continue
                ratio[planner] = found.seconds[key] / simulated[key]
                off.append(abs(ratio[planner] - 1))
            if len(ratio) < len(PLANNERS):
                rows.append((name, count, "no plan"))
                continue
            gain = simulated[f"{name} sequential"] / simulated[f"{name} gpp"]
            measured = found.seconds[f"{name} sequential"] / found.seconds[f"{name} gpp"]
            gains.append(abs(measured / gain - 1))
            plan = plans[count][f"{name} gpp"]
            rows.append(
                (
                    name,
                    count,
                    len(plan.stage_graph.stages),
                    plan.policy.name,
                    simulated[f"{name} gpp"],
                    ratio["gpp"],
                    ratio["sequential"],
                    gain,
                    measured,
                    link.latency * 1e6,
                    link.bandwidth / 1e9,
                )
            )
    sizes = "full-size messages" if message is None else f"messages of {message} bytes"
    return Section(
        name="models" if message is not None else "models-full",
        what=f"MMT, DLRM and CANDLE-Uno on {', '.join(map(str, devices))} emulated devices, {sizes}: "
        "measured "
        "over simulated step time, and gpp over the linear plan",
        reach="within 5%, both",
        measured=f"within {max(off):.1%}; gpp's gain within {max(gains):.1%}",
        reached=max(off) <= WITHIN and max(gains) <= WITHIN,
        columns=(
            *("model", "devices", "gpp's stages", "schedule", "simulated (s)", "gpp measured / simulated"),
            *("linear measured / simulated", "gain simulated", "gain measured"),
            *("latency (us)", "bandwidth (GB/s)"),
        ),
        rows=tuple(row + (None,) * (11 - len(row)) for row in rows),
        note=f"Plans for the paper's cluster, m = {ROUNDS} (micro-batches of {sizes_text(MICRO_BATCH)}). "
        f"Both plans of a model are as much slower: {PASS * 1e3:.0f} ms a stage's forward in the mean of the "
        "one where it is shorter. Simulated with links as two ranks of the same job measured them. A rank "
        "for each device, all on this machine. The linear plan has no replicas. Sums of gradients over "
        "replicas are waited for as long as the simulator says: only messages between stages are real. "
        + (
            "Devices write and join these themselves, and they get on while devices compute."
            if message is None
            else ""
        ),
    )
