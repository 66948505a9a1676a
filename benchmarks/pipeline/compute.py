"""Real compute on two cores: what the pipeline costs beside two processes that know nothing of each other."""

from benchmarks.section import Section

from .jobs import measured

MINI_BATCH, MICRO_BATCH, STEPS = 512, 64, 8


def two_cores(mini_batch: int = MINI_BATCH, micro_batch: int = MICRO_BATCH, steps: int = STEPS) -> Section:
    """Two ranks with one thread each, a model of two equal towers."""
    asked = {"mini_batch": mini_batch, "micro_batch": micro_batch, "steps": steps}
    found: dict[str, float] = measured("benchmarks.pipeline.towers", 2, asked)
    share = found["independent"] / found["gpp"]
    equal = found["torch in a row"] / found["gpp in a row"]
    branches = found["torch in a row"] / found["gpp"]
    return Section(
        name="compute",
        what="real compute on two cores, a model of two towers: two independent processes over gpp; torch's "
        "pipelining over gpp on the same cut in a row, and over gpp along the branches",
        reach="at least 0.95; at least 1.0 on equal cuts, and the branches faster still",
        measured=f"{share:.3f}; {equal:.3f}, {branches:.3f}",
        reached=share >= 0.95 and equal >= 1.0 and branches > equal,
        columns=("side", "step (ms)"),
        rows=tuple((side, seconds * 1e3) for side, seconds in found.items()),
        note=f"Mini-batch {mini_batch}, micro-batch {micro_batch}, 1F1B, SGD, 2 ranks with a thread each; "
        "sides in "
        "turns in the same processes, medians. Independent: each process trains one tower alone in eager "
        "torch.",
    )
