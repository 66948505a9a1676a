"""Measurements as sections: ceilings, a section an operator, whole stages, and what was to be reached."""

from collections.abc import Mapping, Sequence

from benchmarks.section import Cell, Section

from .ceilings import Ceilings
from .clock import Spread
from .measure import Measurement
from .rivals import OURS, RIVALS
from .stages import PROVIDERS
from .targets import targets

TIMES = (
    "GPU time as the median and, in brackets, what a tenth is below and above. No graph: time of plain "
    "calls, of what waits for the device and cannot be in a CUDA graph."
)


def sections(
    found: Sequence[Measurement],
    ceilings: Ceilings,
    skipped: Sequence[str],
    notes: Mapping[str, str],
    complete: bool,
) -> list[Section]:
    """In the order of the page, targets at its end. `notes` by operator; `complete`: nothing is missing."""
    kernels = dict.fromkeys(m.kernel for m in found if m.kernel != "stage")
    made = [_ceilings(ceilings)]
    made += [_operator(name, [m for m in found if m.kernel == name], notes.get(name, "")) for name in kernels]
    stages = [m for m in found if m.kernel == "stage"]
    if stages:
        made.append(_stages(stages))
    if skipped:
        made.append(_skipped(skipped))
    return made + targets(found, complete)


def _ceilings(ceilings: Ceilings) -> Section:
    rows = [("copy", f"{ceilings.copy / 1e9:.0f} GB/s")]
    rows += [(f"product, {name}", f"{rate / 1e12:.1f} TFLOP/s") for name, rate in ceilings.product.items()]
    return Section(
        name="ceilings",
        what="what the device can do at most, in the same run",
        reach="",
        measured=", ".join(f"{what} {rate}" for what, rate in rows),
        reached=None,
        columns=("what", "rate"),
        rows=tuple(rows),
        note="A copy of 1 GiB on the device, read and written; products of square matrices of 8192 by torch.",
    )


def _operator(name: str, found: Sequence[Measurement], note: str) -> Section:
    rivals = [rival for rival in RIVALS if any(m.provider == rival for m in found)]
    rows = [_row(case, of, rivals) for case, of in _by_case(found).items()]
    shares = [m.share for m in found if m.provider == OURS and m.share is not None]
    return Section(
        name=name,
        what=f"{name}: microseconds of a call",
        reach="",
        measured=f"{min(shares):.0%} to {max(shares):.0%} of the ceiling" if shares else "none",
        reached=None,
        columns=(
            *("model", "size", "dtype", "pass", f"{OURS} us", "wall us", "rate", "of the ceiling"),
            *(f"{rival} us" for rival in rivals),
            *(f"{rival} wall us" for rival in rivals),
            "fastest rival / ours",
        ),
        rows=tuple(rows),
        note=f"{TIMES} {note}".strip(),
    )


def _row(case: tuple[str, ...], of: dict[str, Measurement], rivals: Sequence[str]) -> tuple[Cell, ...]:
    ours = of.get(OURS)
    share = None if ours is None or ours.share is None else f"{ours.share:.0%}"
    times = [m.gpu.median for name, m in of.items() if name != OURS and m.gpu is not None]
    faster = min(times) / ours.gpu.median if times and ours is not None and ours.gpu is not None else None
    return (
        *case[1:],
        _gpu(ours),
        _wall(ours),
        None if ours is None else _rate(ours),
        share,
        *(_gpu(of.get(rival)) for rival in rivals),
        *(_wall(of.get(rival)) for rival in rivals),
        faster,
    )


def _stages(found: Sequence[Measurement]) -> Section:
    rows = []
    for case, of in _by_case(found).items():
        gpu = [_gpu(of.get(name)) for name in PROVIDERS]
        rows.append((*case[1:4], *gpu, *(_wall(of.get(name)) for name in PROVIDERS)))
    return Section(
        name="stage",
        what="whole stages: microseconds of forward, input half and weight half",
        reach="",
        measured=f"{len(rows)} stages",
        reached=None,
        columns=(
            *("stage", "samples", "dtype"),
            *(f"{name} us" for name in PROVIDERS),
            *(f"{name} wall us" for name in PROVIDERS),
        ),
        rows=tuple(rows),
        note="GPU time of a CUDA graph on every side; wall time is that of plain calls without a graph.",
    )


def _skipped(skipped: Sequence[str]) -> Section:
    return Section(
        name="skipped",
        what="left out, because the time that was allowed (limit_seconds) was over",
        reach="",
        measured=f"{len(skipped)} cases",
        reached=None,
        columns=("case",),
        rows=tuple((name,) for name in skipped),
    )


def _by_case(found: Sequence[Measurement]) -> dict[tuple[str, ...], dict[str, Measurement]]:
    cases: dict[tuple[str, ...], dict[str, Measurement]] = {}
    for m in found:
        cases.setdefault(m.case, {})[m.provider] = m
    return cases


def _gpu(m: Measurement | None) -> Cell:
    if m is None:
        return None
    if m.gpu is None:
        return m.note
    remarks = [m.note] if m.note else []
    remarks += [] if m.gpu.graph else ["no graph"]
    return _microseconds(m.gpu) + "".join(f" ({remark})" for remark in remarks)


def _wall(m: Measurement | None) -> Cell:
    return None if m is None or m.wall is None else _number(m.wall.median)


def _rate(m: Measurement) -> Cell:
    if m.gpu is None:
        return None
    if m.by == "FLOPs":
        return f"{m.flops / m.gpu.median / 1e12:.1f} TFLOP/s"
    return f"{m.bytes / m.gpu.median / 1e9:.0f} GB/s"


def _microseconds(of: Spread) -> str:
    return f"{_number(of.median)} ({_number(of.low)}-{_number(of.high)})"


def _number(seconds: float) -> str:
    return f"{1e6 * seconds:.4g}"
