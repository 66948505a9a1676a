"""Zero-bubble against 1F1B on emulated devices: is what the simulator promises what a clock shows?"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.section import Cell, Section, geometric_mean
from gpp.plan import Plan
from gpp.planner.estimate import estimated
from gpp.runtime.emulation import slower, with_messages
from gpp.schedule.choices import candidates

from .emulate import timed
from .orders import LESS, leanest, light_plan
from .stage_graphs import GRAPHS, paced

NAMES = ("chain 4", "chain 8", "4 x 2 + 1", "7 x 1 + 2", "1, 4 + 1", "diamond 2 x 2", "two diamonds 3 x 2")
RATIOS = (1, 2, 4, 8)  # micro-batches over depth, m / D
UNIT = 10e-3  # seconds of a pass
SPREAD = 0.25  # of the passes' seconds by stage, on every other graph
STEPS = 3
MESSAGE = 1 << 10  # bytes
LEAN_UNIT = 20e-3  # where branches hold no more than they must, nothing hides what the machine adds
LEAN = ("chain 4", "chain 8", "two diamonds 3 x 2")
LIGHT_ONES = ("8 light, 2 heavy + 2", "7 light + 4")


@dataclass(frozen=True)
class Pair:
    """1F1B and what it is compared with; `ratio` is m / D."""

    name: str
    ratio: float
    plain: Plan
    split: Plan

    @property
    def promised(self) -> float:
        """The simulated step time over 1F1B's."""
        return self.split.estimate / self.plain.estimate


def pairs(names: Sequence[str] = NAMES, ratios: Sequence[int] = RATIOS, unit: float = UNIT) -> list[Pair]:
    """For each graph and m / D the best schedule with split backwards in which no stage holds more than
    1F1B's first one; stages alternate between equal and unequal from graph to graph."""
    found = []
    for number, name in enumerate(names):
        spread = SPREAD if number % 2 else 0.0
        depth = paced(GRAPHS[name], 1).stage_graph.depth
        for ratio in ratios:
            plain = estimated(paced(GRAPHS[name], ratio * depth, spread=spread, unit=unit))
            plain = estimated(with_messages(plain, MESSAGE))
            found.append(Pair(name, ratio, plain, _best(plain, depth)))
    return found


def lean_pairs(names: Sequence[str] = LEAN, rounds: int = 16, unit: float = LEAN_UNIT) -> list[Pair]:
    """What three quarters of 1F1B's peak do, and light branches that hold less at no time."""
    found = []
    for name in names:
        plain = estimated(with_messages(paced(GRAPHS[name], rounds, unit=unit), MESSAGE))
        depth = plain.stage_graph.depth
        found.append(
            Pair(f"{name}, {LESS} of the peak", rounds / depth, plain, _best(plain, int(LESS * depth)))
        )
    for name in LIGHT_ONES:
        plain = estimated(with_messages(slower(light_plan(name, rounds, 0.0), unit), MESSAGE))
        lean = estimated(leanest(plain))
        found.append(Pair(name, rounds / plain.stage_graph.depth, plain, lean))
    return found


def _best(plain: Plan, cap: int) -> Plan:
    caps = [cap] * len(plain.stage_graph.stages)
    return min(map(estimated, candidates(plain, caps)), key=lambda plan: plan.estimate)


def zero_bubble(cases: Sequence[Pair] | None = None, steps: int = STEPS) -> Section:
    """Measured over measured, beside simulated over simulated."""
    cases = pairs() if cases is None else cases
    seconds = _measured(cases, steps)
    rows: list[tuple[Cell, ...]] = []
    measured, off = [], []
    for number, case in enumerate(cases):
        plain, split = seconds[f"{number} plain"], seconds[f"{number} split"]
        measured.append(split / plain)
        off.append(split / plain / case.promised - 1)
        rows.append(
            (
                case.name,
                case.ratio,
                case.split.policy.name,
                case.plain.estimate,
                plain / case.plain.estimate,
                case.promised,
                split / plain,
                f"{off[-1]:+.1%}",
            )
        )
    mean, worst, furthest = geometric_mean(measured), max(measured), max(map(abs, off))
    return Section(
        name="zero-bubble",
        what="zero-bubble over 1F1B at equal peak memory, emulated devices, chains and branched graphs, "
        f"m / D = {', '.join(map(str, sorted({case.ratio for case in cases})))}",
        reach="the simulated gain within 3%; geometric mean at most 0.90; never above 1.01",
        measured=f"within {furthest:.1%}; geometric mean {mean:.3f}; at most {worst:.3f}",
        reached=furthest <= 0.03 and mean <= 0.90 and worst <= 1.01,
        columns=(
            *("graph", "m / D", "schedule", "1F1B simulated (s)", "1F1B measured / simulated"),
            *("simulated gain", "measured gain", "off by"),
        ),
        rows=tuple(rows),
        note=f"A rank for each stage, all on this machine; passes of {UNIT * 1e3:.0f} ms (forward and each "
        f"half of the backward), every second graph's stages +-{SPREAD:.0%}; messages of {MESSAGE} bytes. No "
        "stage holds more micro-batches than 1F1B's first one.",
    )


def less_on_a_clock(cases: Sequence[Pair] | None = None, steps: int = STEPS) -> Section:
    """What saves memory, measured: 1F1B's time and less in flight."""
    cases = lean_pairs() if cases is None else cases
    seconds = _measured(cases, steps)
    rows: list[tuple[Cell, ...]] = []
    off = []
    for number, case in enumerate(cases):
        ratio = seconds[f"{number} split"] / seconds[f"{number} plain"]
        off.append(ratio / case.promised - 1)
        held = [sum(s.in_flight for s in plan.stage_graph.stages) for plan in (case.split, case.plain)]
        peaks = [max(s.in_flight for s in plan.stage_graph.stages) for plan in (case.split, case.plain)]
        rows.append(
            (
                *(case.name, case.split.policy.name, peaks[0] / peaks[1], held[0] / held[1]),
                *(case.promised, ratio, f"{off[-1]:+.1%}"),
            )
        )
    return Section(
        name="memory-clock",
        what="less memory than 1F1B on emulated devices: the split at 0.75 of the peak, light branches",
        reach="as simulated, within 3%",
        measured=f"within {max(map(abs, off)):.1%}",
        reached=max(map(abs, off)) <= 0.03,
        columns=(
            *("graph", "schedule", "peak over 1F1B's", "in flight over 1F1B's, all stages"),
            *("time over 1F1B's, simulated", "measured", "off by"),
        ),
        rows=tuple(rows),
        note=f"As section zero-bubble; m = 16, passes of {LEAN_UNIT * 1e3:.0f} ms (light stages' less).",
    )


def _measured(cases: Sequence[Pair], steps: int) -> Mapping[str, float]:
    """Seconds of a step by number and side; one job for each number of ranks."""
    plans: dict[int, dict[str, Plan]] = {}
    for number, case in enumerate(cases):
        ranks = plans.setdefault(len(case.plain.topology.devices), {})
        ranks |= {f"{number} plain": case.plain, f"{number} split": case.split}
    return {name: s for found in plans.values() for name, s in timed(found, steps).seconds.items()}
