"""What the runtime itself costs: stages that take no time, messages of a few bytes."""

from collections.abc import Sequence

from benchmarks.section import Cell, Section
from gpp.plan import Plan
from gpp.runtime.emulation import with_messages

from .emulate import timed
from .stage_graphs import chain, paced

RANKS = (2, 4, 8, 16, 32)
MICRO_BATCHES = 64
STEPS = 12
MESSAGE = 64  # bytes
MOST = 150e-6  # seconds of a task
GROWTH = 2.0


def task_overhead(ranks: Sequence[int] = RANKS, steps: int = STEPS) -> Section:
    """Seconds of a processor and of the clock for each task of a rank."""
    rows: list[tuple[Cell, ...]] = []
    cpu: list[float] = []
    wall: list[float] = []
    tasks = 2 * MICRO_BATCHES
    for count in ranks:
        found = timed({"empty": _empty(count)}, steps)
        each = [seconds / tasks for seconds in found.cpu["empty"]]
        cpu.append(sum(each) / count)
        wall.append(found.seconds["empty"] / tasks)
        rows.append((count, cpu[-1] * 1e6, max(each) * 1e6, wall[-1] * 1e6))
    return Section(
        name="overhead",
        what=f"runtime overhead of a task, chains of empty stages, {MICRO_BATCHES} micro-batches",
        reach="processor at most 150 us, at most 2 times as much from 2 to 32 ranks; clock at most 150 us "
        "at 2",
        measured=f"processor {cpu[0] * 1e6:.0f} to {max(cpu) * 1e6:.0f} us ({max(cpu) / cpu[0]:.2f} times), "
        "clock "
        f"{wall[0] * 1e6:.0f} us at {ranks[0]}",
        reached=max(cpu) <= MOST and max(cpu) <= GROWTH * cpu[0] and wall[0] <= MOST,
        columns=("ranks", "processor, mean of ranks (us)", "processor, worst rank (us)", "clock (us)"),
        rows=tuple(rows),
        note="A task is a forward or a backward with its messages; the time that a rank polls for messages "
        "is in it, "
        f"and the end of the step. Messages of {MESSAGE} bytes. Ranks share the cores, so the clock grows "
        "with them.",
    )


def _empty(ranks: int) -> Plan:
    return with_messages(paced(chain(ranks), MICRO_BATCHES, unit=0.0), MESSAGE)
