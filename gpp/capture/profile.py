"""Measured costs of a captured model: every operator as a stage of its own, corrected by stages of many.

Planners add operators up (GraphPipe §5 profiles each operator), but a stage of ten is called once, and reads
from caches what it just wrote. So a few stages are measured whole, and all times are scaled by what those
take over what their operators add up to. Operators that compute the same are measured once, and each
measurement is kept in a folder: a second profile of the model, or of one with the same layers, is quick.
"""

import hashlib
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from gpp.cost import CostTable, Timing
from gpp.graph import Operator
from gpp.program.build import Hooks, Roots
from gpp.program.signature import signature
from gpp.program.stopwatch import Times, time_passes
from gpp.records import RecordError, from_json, to_json

from .capture import Captured

FORMAT = "gpp.times/1"
_SHORTEST, _LONGEST = 0.02, 0.5  # seconds of one measurement


@dataclass(frozen=True, slots=True)
class Correction:
    """What whole stages take over the sum of their operators, at one size."""

    samples: int
    forward: float
    backward: float


@dataclass(frozen=True)
class Profile:
    """The corrected `table`, how it was corrected, and how many of the times it needed were `measured` now;
    the others, of `needed`, were found. `alike` groups the operators that compute the same."""

    table: CostTable
    corrections: tuple[Correction, ...]
    alike: tuple[tuple[str, ...], ...]
    measured: int
    needed: int


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """How to measure: calls of which `sizes`, in samples and ascending; on what; for about `seconds` in all;
    how many whole `stages` the correction takes; and the folder of earlier times, if any.

    `where` says in words what the times depend on besides the work: the device, torch, threads, kernels.
    """

    sizes: tuple[int, ...]
    device: torch.device
    where: str
    hooks: Hooks
    seconds: float = 60.0
    stages: int = 3
    cache: Path | None = None


def profile(captured: Captured, batch: Mapping[str, Tensor], how: Measurement) -> Profile:
    """Measure every operator of a model, and stages of it. `batch` holds as many samples as the largest size.

    Distinct operators x sizes times are measured, each after it is traced, which takes tenths of a second.
    """
    clock = _Clock(captured, batch, how)
    operators = captured.graph.operators
    wanted = [((op.name,), size) for op in operators for size in how.sizes]
    clock.plan(wanted, extra=len(how.sizes) * how.stages)
    found = {(names[0], size): clock.times(names, size) for names, size in wanted}
    timings: dict[str, list[Times]] = {op.name: [] for op in operators}
    corrections = []
    for size in how.sizes:
        alone = {op.name: _needed(op, found[op.name, size]) for op in operators}
        correction = _correction(clock, operators, alone, size, how.stages)
        corrections.append(correction)
        for name, times in alone.items():
            timings[name].append(_scaled(times, correction))
    table = CostTable(
        timings=tuple(
            Timing(
                operator=name,
                samples=tuple(map(float, how.sizes)),
                forward=tuple(t.forward for t in times),
                backward_input=tuple(t.backward_input for t in times),
                backward_weight=tuple(t.backward_weight for t in times),
            )
            for name, times in timings.items()
        ),
        graph=captured.graph.fingerprint(),
        measured_on=how.where,
    )
    return Profile(table, tuple(corrections), clock.alike(how.sizes[-1]), clock.measured, len(clock.known))


def where(device: torch.device, kernels: str) -> str:
    """What times on this machine depend on besides the work, in words."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{_processor()}, {torch.get_num_threads()} threads"
    return f"{name}, torch {torch.__version__}, kernels {kernels}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "CPU")


def _needed(op: Operator, times: Times) -> Times:
    """What a stage runs of it: without a gradient no backward."""
    return times if op.has_backward else replace(times, backward_input=0.0, backward_weight=0.0)


def _scaled(times: Times, by: Correction) -> Times:
    return Times(
        times.forward * by.forward, times.backward_input * by.backward, times.backward_weight * by.backward
    )


def _correction(
    clock: "_Clock", operators: Sequence[Operator], alone: Mapping[str, Times], size: int, stages: int
) -> Correction:
    """Sums over contiguous stages of about equal time against the same stages measured whole.

    Backward is compared whole: a stage that reads no gradient's value does all of it in the weight half.
    """
    runs = _runs([op.name for op in operators], [_total(alone[op.name]) for op in operators], stages)
    whole = [clock.times(run, size) for run in runs]
    apart = [times for run in runs for times in (alone[name] for name in run)]
    back, parts = sum(map(_backward, whole)), sum(map(_backward, apart))
    return Correction(
        size,
        forward=sum(t.forward for t in whole) / sum(t.forward for t in apart),
        backward=back / parts if parts else 1.0,
    )


def _backward(times: Times) -> float:
    return times.backward_input + times.backward_weight


def _total(times: Times) -> float:
    return times.forward + _backward(times)


def _runs(names: Sequence[str], seconds: Sequence[float], count: int) -> list[tuple[str, ...]]:
    """The names cut into at most `count` runs, where the time before a name passes an equal share."""
    total, done = sum(seconds), 0.0
    runs: list[list[str]] = []
    for name, cost in zip(names, seconds, strict=True):
        if not runs or (done + cost / 2 > total * len(runs) / count and len(runs) < count):
            runs.append([])
        runs[-1].append(name)
        done += cost
    return [tuple(run) for run in runs]


class _Clock:
    """Times of sets of operators: known from the same work, found in the folder, or measured."""

    def __init__(self, captured: Captured, batch: Mapping[str, Tensor], how: Measurement) -> None:
        self.captured, self.batch, self.how = captured, batch, how
        self.roots = Roots(captured.roots, captured.train.loss.weight is None)
        self.known: dict[str, Times] = {}
        self.measured = 0
        self._keys: dict[tuple[tuple[str, ...], int], str] = {}
        self._seconds = _LONGEST

    def plan(self, wanted: Sequence[tuple[tuple[str, ...], int]], extra: int) -> None:
        """Share the seconds out among what is wanted and not in the folder, and `extra` more."""
        keys = {self.key(names, size) for names, size in wanted}
        missing = sum(self._read(key) is None for key in keys) + extra
        self._seconds = min(max(self.how.seconds / max(missing, 1), _SHORTEST), _LONGEST)

    def key(self, names: tuple[str, ...], size: int) -> str:
        """A digest of the work and of where it runs."""
        if (names, size) not in self._keys:
            work = signature(self.captured.traced, names, size, self.roots)
            text = f"{FORMAT} {self.how.where} {work}"
            self._keys[names, size] = hashlib.sha256(text.encode()).hexdigest()[:24]
        return self._keys[names, size]

    def times(self, names: tuple[str, ...], size: int) -> Times:
        """Of these operators as one stage."""
        key = self.key(names, size)
        if key not in self.known:
            found = self._read(key)
            if found is None:
                found = time_passes(
                    self.captured.traced,
                    names,
                    size,
                    self.roots,
                    self.batch,
                    self.how.device,
                    hooks=self.how.hooks,
                    seconds=self._seconds,
                )
                self.measured += 1
                self._write(key, found)
            self.known[key] = found
        return self.known[key]

    def alike(self, size: int) -> tuple[tuple[str, ...], ...]:
        """Operators by the work they do, in the order of the model."""
        groups: dict[str, list[str]] = {}
        for op in self.captured.graph.operators:
            groups.setdefault(self.key((op.name,), size), []).append(op.name)
        return tuple(map(tuple, groups.values()))

    def _read(self, key: str) -> Times | None:
        if self.how.cache is None:
            return None
        try:
            return from_json(Times, (self.how.cache / f"{key}.json").read_text(), FORMAT)
        except (OSError, RecordError, UnicodeDecodeError):
            return None  # absent or damaged: measure again

    def _write(self, key: str, times: Times) -> None:
        """Written aside and renamed; a folder that cannot be written costs time, nothing else."""
        folder = self.how.cache
        if folder is None:
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
            handle, aside = tempfile.mkstemp(dir=folder, suffix=".tmp")
            with os.fdopen(handle, "w") as file:
                file.write(to_json(times, FORMAT))
            os.replace(aside, folder / f"{key}.json")
        except OSError:
            pass
