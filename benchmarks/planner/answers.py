"""planner=piper beside Piper's own answers, under Piper's formulas."""

from collections.abc import Sequence
from dataclasses import replace
from math import isinf
from pathlib import Path

from benchmarks.section import Cell, Section
from gpp.formats.piper import RECOMPUTED, PiperInstance, read_piper
from gpp.planner.piper import solve

from .references import LONG, Reference, references
from .runs import best_of

LIMIT = 10.0  # seconds


def piper_answers(folder: Path) -> Section:
    """The published answers and those of the runs of minutes."""
    return against(folder, [*references(folder), *(r for r in LONG if r.tps is not None)])


def against(folder: Path, cases: Sequence[Reference]) -> Section:
    """Seconds of a micro-batch on the slowest stage, ours and Piper's, and how long finding them takes."""
    rows: list[tuple[Cell, ...]] = []
    plain: list[bool] = []
    others: list[bool] = []
    errors, took = [0.0], [0.0]
    for case in cases:
        instance = read_piper((folder / case.file).read_text(), case.file)
        seconds, found, sets = _solved(instance, case)
        allowed = _allowed(instance, case)
        error = None if found is None or case.tps is None else abs(found / case.tps - 1)
        equal = found == case.tps if error is None else error <= 10.0**-case.digits
        (others if allowed else plain).append(equal)
        errors.append(error or 0.0)
        took.append(seconds)
        answer = "infeasible" if case.tps is None else case.tps
        rows.append(
            (
                *(case.name, case.devices, case.memory / 2**30, " + ".join(allowed) or "neither", sets),
                *(answer, error, equal, case.seconds, seconds),
            )
        )
    return Section(
        name="piper",
        what="Piper's answers, under Piper's formulas",
        reach="equal to 1e-6 on rows without tensor parallelism and recompute, infeasible where it is; "
        f"at most {LIMIT:g} s up to 18,000 downsets",
        measured=f"{sum(plain)} of {len(plain)} such rows equal and {sum(others)} of {len(others)} others, "
        f"largest difference {max(errors):.1e}; slowest {max(took):.2f} s",
        reached=all(plain) and max(took) <= LIMIT,
        columns=(
            *("instance", "devices", "GiB", "allowed", "downsets", "Piper's answer, s", "difference"),
            *("equal", "Piper C++, s", "ours, s"),
        ),
        rows=tuple(rows),
        note="Best of three after a first, once where it takes more than 5 s. Of gnmt and "
        "mmt4x8_layers, runs of minutes, five digits are known.",
    )


def _allowed(instance: PiperInstance, case: Reference) -> list[str]:
    """Which of an instance's variants Piper could choose from: tensor-parallel ones, recomputing ones."""
    variants = [node.variants for node in instance.nodes]
    degrees = any(set(found) - {1} for found in variants)
    again = any(one.name == RECOMPUTED for found in variants for each in found.values() for one in each)
    return [
        *(["tensor parallelism"] if case.tensor_parallel and degrees else []),
        *(["recompute"] if case.recompute and again else []),
    ]


def _solved(instance: PiperInstance, case: Reference) -> tuple[float, float | None, int]:
    """Seconds of the search, and its answer (None: nothing fits), and how many downsets there are."""
    instance = replace(instance, micro_batches=case.micro_batches)
    seconds, found = best_of(
        lambda: solve(
            instance,
            case.devices,
            memory=case.memory,
            bandwidth=case.bandwidth,
            tensor_parallelism=case.tensor_parallel,
            recompute=case.recompute,
        )
    )
    return seconds, None if isinf(found.seconds) else found.seconds, found.downsets
