"""What is to be reached on an H200, as sections with a verdict each. Pure functions of measurements."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

from benchmarks.section import Section, geometric_mean, unmeasured

from .measure import Measurement
from .rivals import OURS

LARGE = 64e6  # bytes of traffic from which a share of the copy's bandwidth is to be reached
SHARE = 0.85
ROWS = 1024  # of a fused linear layer
FLOOR = 0.8  # of the fastest rival's speed, at least
OVER_EAGER, OVER_INDUCTOR = 1.3, 1.0
NOTHING = "not measured"
PART = " (not all cases were measured)"


def targets(found: Sequence[Measurement], complete: bool) -> list[Section]:
    """All four. Of a run that left cases out (not `complete`) none is reached, though it may be missed."""
    made = [bandwidth(found), fused_linear(found), against_the_fastest(found), stages(found)]
    if complete:
        return made
    return [
        replace(
            section, reached=False if section.reached is False else None, measured=f"{section.measured}{PART}"
        )
        if section.rows
        else section
        for section in made
    ]


def bandwidth(found: Sequence[Measurement]) -> Section:
    """Our memory-bound operators above LARGE bytes."""
    what = (
        f"memory-bound operators above {LARGE / 1e6:.0f} MB of traffic: share of the measured copy bandwidth"
    )
    reach = f"at least {SHARE:.0%}"
    rows = [
        (*m.case, m.bytes / 1e6, m.share, m.share is not None and m.share >= SHARE)
        for m in found
        if m.provider == OURS and m.kernel != "stage" and m.by == "bytes" and m.bytes > LARGE
    ]
    if not rows:
        return unmeasured("bandwidth", what, reach, NOTHING)
    shares = [row[-2] or 0.0 for row in rows]
    return Section(
        name="bandwidth",
        what=what,
        reach=reach,
        measured=f"{min(shares):.1%} to {max(shares):.1%}, {sum(bool(r[-1]) for r in rows)} of {len(rows)}",
        reached=all(row[-1] for row in rows),
        columns=("operator", "model", "size", "dtype", "pass", "MB", "share", "reached"),
        rows=tuple(rows),
        note="Bytes are those that each operator reads and writes at least once; the gradients of inputs and "
        "of weights are operators of their own, and both read what they share.",
    )


def fused_linear(found: Sequence[Measurement]) -> Section:
    """Products with an epilogue against cuBLAS and separate pointwise kernels."""
    what = f"fused linear layers of at least {ROWS} rows: speed over cuBLAS plus separate pointwise kernels"
    reach = "above 1 at every size"
    ratios = _ratios([m for m in found if m.fused and m.rows >= ROWS], lambda rivals: rivals.get("eager"))
    if not ratios:
        return unmeasured("fused-linear", what, reach, NOTHING)
    faster = {case: ratio is not None and ratio > 1 for case, ratio in ratios.items()}
    return Section(
        name="fused-linear",
        what=what,
        reach=reach,
        measured=f"{_range(ratios.values())}, {sum(faster.values())} of {len(ratios)}",
        reached=all(faster.values()),
        columns=("operator", "model", "size", "dtype", "pass", "speed", "reached"),
        rows=tuple((*case, ratio, faster[case]) for case, ratio in ratios.items()),
        note="GPU time, each launch of a CUDA graph; torch's eager layer is cuBLAS and a pointwise kernel.",
    )


def against_the_fastest(found: Sequence[Measurement]) -> Section:
    """Forward and backward together against the fastest rival of each case."""
    what = "every operator against its fastest rival, forward and backward (forward where there is no other)"
    reach = f"geometric mean at least 1.0, none below {FLOOR}"
    both = {m.case[:-1] for m in found if m.which == "both"}
    own = [m for m in found if m.kernel != "stage" and (m.which == "both" or m.case[:-1] not in both)]
    ratios = _ratios(own, lambda rivals: min(rivals.values(), default=None))
    known = [ratio for ratio in ratios.values() if ratio is not None]
    if not known:
        return unmeasured("fastest", what, reach, NOTHING)
    rivals = _times(m for m in own if m.provider != OURS)
    fastest = {case: min(times, key=times.__getitem__) for case, times in rivals.items()}
    enough = {case: ratio is not None and ratio >= FLOOR for case, ratio in ratios.items()}
    mean = geometric_mean(known)
    return Section(
        name="fastest",
        what=what,
        reach=reach,
        measured=f"mean {mean:.3f}, {_range(known)}",
        reached=mean >= 1.0 and all(enough.values()),
        columns=("operator", "model", "size", "dtype", "pass", "fastest rival", "speed", "reached"),
        rows=tuple((*case, fastest.get(case), ratio, enough[case]) for case, ratio in ratios.items()),
        note="GPU time; a rival that is not installed or failed counts for nothing.",
    )


def stages(found: Sequence[Measurement]) -> Section:
    """Whole stages against torch's kernels and compiled ones."""
    what = "whole stages, the three passes: speed of kernels=triton over eager and over inductor"
    reach = f"at least {OVER_EAGER} and {OVER_INDUCTOR}"
    own = [m for m in found if m.kernel == "stage"]
    eager = _ratios(own, lambda rivals: rivals.get("eager"))
    inductor = _ratios(own, lambda rivals: rivals.get("inductor"))
    if not eager:
        return unmeasured("stages", what, reach, NOTHING)
    enough = {
        case: (eager[case] or 0.0) >= OVER_EAGER and (inductor.get(case) or 0.0) >= OVER_INDUCTOR
        for case in eager
    }
    return Section(
        name="stages",
        what=what,
        reach=reach,
        measured=f"over eager {_range(eager.values())}, over inductor {_range(inductor.values())}",
        reached=all(enough.values()),
        columns=("stage", "size", "dtype", "over eager", "over inductor", "reached"),
        rows=tuple((*case[1:4], eager[case], inductor.get(case), enough[case]) for case in eager),
        note="All sides run as one CUDA graph of forward, input half and weight half.",
    )


def _times(found: Iterable[Measurement]) -> dict[tuple[str, ...], dict[str, float]]:
    """GPU seconds of each provider by case."""
    times: dict[tuple[str, ...], dict[str, float]] = {}
    for m in found:
        if m.gpu is not None:
            times.setdefault(m.case, {})[m.provider] = m.gpu.median
    return times


def _ratios(
    found: Sequence[Measurement], rival: Callable[[Mapping[str, float]], float | None]
) -> dict[tuple[str, ...], float | None]:
    """The rival's time over ours by case; None where ours has none, which reaches nothing. Cases without the
    rival are left out."""
    times = _times(found)
    ratios: dict[tuple[str, ...], float | None] = {}
    for m in found:
        own = times.get(m.case, {})
        other = rival({name: seconds for name, seconds in own.items() if name != OURS})
        if m.provider != OURS or (other is None and OURS in own):
            continue
        ratios[m.case] = other / own[OURS] if other is not None and OURS in own else None
    return ratios


def _range(values: Iterable[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{min(known):.3f} to {max(known):.3f}" if known else "none"
