"""Verdicts of many cases as the benchmark's sections."""

from collections.abc import Callable, Mapping, Sequence
from statistics import median

from benchmarks.section import Cell, Section

from .cases import GO_ON, SILENCE, WITHIN, Case
from .verdict import Verdict

COLUMNS = ("faults", "wrong", "hangs", "orphans", "lost checkpoints", "median (s)", "worst (s)")
NOTE = (
    "Seconds from the fault until the last rank is gone; of a silent rank (a hang, SIGSTOP) those over its "
    f"silence of {SILENCE:g} s. Wrong: a hang, an orphan, a lost checkpoint, exit code 0, not exactly one "
    "report that names the rank, or for elastic jobs another end or other losses than without the fault."
)

Judged = Mapping[Case, Verdict]


def by_fault(judged: Judged) -> Section:
    """A row for each fault."""
    return _section("fault", "what happened", judged, lambda case: str(case.fault))


def by_place(judged: Judged) -> Section:
    """A row for each place."""
    return _section("place", "where it happened", judged, lambda case: str(case.place))


def by_job(judged: Judged) -> Section:
    """A row for each kind of job."""

    def kind(case: Case) -> str:
        more = ", elastic" if case.elastic else "" if case.second is None else ", two ranks"
        return f"{case.shape}{more}"

    return _section("job", "the job that it happened to", judged, kind)


def _section(name: str, what: str, judged: Judged, key: Callable[[Case], str]) -> Section:
    groups: dict[str, dict[Case, Verdict]] = {}
    for case, verdict in judged.items():
        groups.setdefault(key(case), {})[case] = verdict
    total = _row("all", judged)
    return Section(
        name=name,
        what=f"{len(judged)} faults by {what}",
        reach=f"0 hangs, 0 orphans, 0 lost checkpoints; all ranks gone within {WITHIN:g} s",
        measured=f"{total[3]} hangs, {total[4]} orphans, {total[5]} lost checkpoints, {total[2]} wrong; "
        f"median {_seconds(total[6])}, worst {_seconds(total[7])}",
        reached=not total[2],
        columns=(name, *COLUMNS),
        rows=(*(_row(label, group) for label, group in sorted(groups.items())), total),
        note=NOTE + f" Survivors of elastic jobs have {GO_ON:g} s to end the training, and count in no time.",
    )


def _row(label: str, group: Judged) -> tuple[Cell, ...]:
    verdicts: Sequence[Verdict] = list(group.values())
    times = [
        verdict.seconds - verdict.silence
        for case, verdict in group.items()
        if verdict.seconds is not None and not case.elastic
    ]
    return (
        label,
        len(verdicts),
        sum(bool(v.wrong) for v in verdicts),
        sum(bool(v.hang) for v in verdicts),
        sum(bool(v.orphans) for v in verdicts),
        sum(bool(v.lost) for v in verdicts),
        median(times) if times else None,
        max(times, default=None),
    )


def _seconds(cell: Cell) -> str:
    return f"{cell:.2f} s" if isinstance(cell, float) else "-"
