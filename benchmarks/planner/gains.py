"""gpp against graphpipe on the paper's models, what each of its choices buys, and how far from the bound."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import median

from gpp.plan import Plan
from gpp.planner.options import Options

from .runs import Runs, everything
from .section import Cell, Section, geometric_mean
from .workloads import Workload

DEVICES = (8, 16, 32)
ROUNDS = (16, 32, 64, 128)  # micro-batches of a step, m
# Samples of a micro-batch: large enough for every number of replicas, and what the devices hold of it.
MICRO_BATCH: Mapping[str, int] = {"MMT": 32, "DLRM": 256, "CANDLE-Uno": 256}
REACH: Mapping[int, float] = {16: 0.72, 32: 0.78, 64: 0.85, 128: 0.87}
GAPS: Mapping[int, float] = {32: 0.12, 64: 0.12, 128: 0.05}

# What a plan of gpp's says it chose, in this order, after the best other planner's plan.
CHOICES = ("partition", "micro-batch", "schedule", "memory", "polish", "order", "colocate")


def asked(model: str, rounds: int) -> Options:
    """A step of so many micro-batches of the model's size."""
    size = MICRO_BATCH[model]
    return Options(mini_batch=rounds * size, micro_batch=size)


def over_graphpipe(
    runs: Runs,
    models: Mapping[str, Workload],
    devices: Sequence[int] = DEVICES,
    rounds: Sequence[int] = ROUNDS,
) -> Section:
    """Simulated step time of gpp over graphpipe's: geometric means for each m, and after each choice."""
    every = [(name, work, count) for name, work in models.items() for count in devices]
    columns = {m: _ratios(runs, every, [asked(name, m) for name, _, _ in every]) for m in rounds}
    rows: list[tuple[Cell, ...]] = []
    for step in ("best of the others", *CHOICES):
        rows.append((f"after: {step}", *(_mean(found, step) for found in columns.values())))
    for model in models:
        own = [i for i, (name, _, _) in enumerate(every) if name == model]
        cells = (_mean([found[i] for i in own], CHOICES[-1]) for found in columns.values())
        rows.append((f"{model} alone", *cells))
    for count in devices:
        own = [i for i, (_, _, number) in enumerate(every) if number == count]
        cells = (_mean([found[i] for i in own], CHOICES[-1]) for found in columns.values())
        rows.append((f"{count} devices alone", *cells))
    free = (
        _mean(_ratios(runs, every, [replace(asked(name, m), micro_batch="auto") for name, _, _ in every]), "")
        for m in rounds
    )
    rows.append(("both with any micro-batch size", *free))
    last = {m: _mean(found, CHOICES[-1]) for m, found in columns.items()}
    return Section(
        name="gains",
        what="gpp / graphpipe, simulated step time, MMT, DLRM and CANDLE-Uno at "
        f"{', '.join(map(str, devices))} V100s, geometric mean by m",
        reach=" / ".join(f"{REACH.get(m, 1):.2f}" for m in rounds)
        + f" at m = {' / '.join(map(str, rounds))}",
        measured=" / ".join("-" if mean is None else f"{mean:.3f}" for mean in last.values()),
        reached=all(mean is not None and mean <= REACH.get(m, 1.0) for m, mean in last.items()),
        columns=("gpp / graphpipe", *(f"m = {m}" for m in rounds)),
        rows=tuple(rows),
        note=f"Both with the same micro-batch (samples: {sizes_text(MICRO_BATCH)}) and a mini-batch of m of "
        "them. The rows 'after' follow gpp from the best other planner's plan through what it chooses: the "
        "share of each is the step from row to row. In the last row both choose their micro-batch size for "
        "the same mini-batch. Adam's state (2 bytes a byte), float32.",
    )


def sizes_text(sizes: Mapping[str, int]) -> str:
    """Model and samples, of each."""
    return ", ".join(f"{name} {size}" for name, size in sizes.items())


def _ratios(
    runs: Runs, cases: Sequence[tuple[str, Workload, int]], asked: Sequence[Options]
) -> list[dict[str, float]]:
    """For each case gpp / graphpipe after each choice; empty where one of them has no plan."""
    found = []
    for (_, work, count), options in zip(cases, asked, strict=True):
        base = runs.plan("graphpipe", work, count, options)
        own = runs.plan("gpp", work, count, everything(options))
        found.append({} if base is None or own is None else _after(own, base.estimate))
    return found


def _after(plan: Plan, base: float) -> dict[str, float]:
    """Ratios by choice; one that the plan does not name bought nothing."""
    named = {choice.name: choice.seconds for choice in plan.choices}
    first = plan.choices[0].seconds if plan.choices else plan.estimate
    ratios = {"best of the others": first / base}
    now = first
    for name in CHOICES:
        now = named.get(name, now)
        ratios[name] = now / base
    return ratios | {"": plan.estimate / base, CHOICES[-1]: plan.estimate / base}


def _mean(found: Sequence[Mapping[str, float]], step: str) -> float | None:
    ratios = [each[step] for each in found if each]
    return geometric_mean(ratios) if ratios else None


def gaps(
    runs: Runs,
    models: Mapping[str, Workload],
    devices: Sequence[int] = DEVICES,
    rounds: Sequence[int] = ROUNDS,
) -> Section:
    """How far gpp's plans are above the proven lower bound on any plan's step time."""
    rows: list[tuple[Cell, ...]] = []
    medians: dict[int, float] = {}
    for m in rounds:
        found = []
        for name, work in models.items():
            cells: list[Cell] = []
            for count in devices:
                plan = runs.plan("gpp", work, count, everything(asked(name, m)))
                gap = None if plan is None else max(plan.estimate / plan.lower_bound - 1, 0.0)
                cells.append(None if gap is None else f"{gap:.1%}")
                found += [gap] if gap is not None else []
            rows.append((m, name, *cells))
        medians[m] = median(found)
        rows.append((m, "median", f"{medians[m]:.1%}", *[None] * (len(devices) - 1)))
    return Section(
        name="gaps",
        what="gap of gpp's step time to its lower bound, the paper's models",
        reach="median at most 12% at m = 32 and 64, 5% at 128",
        measured=", ".join(f"{medians[m]:.1%} at m = {m}" for m in rounds),
        reached=all(medians[m] <= GAPS[m] for m in rounds if m in GAPS),
        columns=("m", "model", *(f"{count} devices" for count in devices)),
        rows=tuple(rows),
        note="The same plans as in the section gains, with everything switched on.",
    )
