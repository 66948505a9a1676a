"""Times what there is to time, what is worth most first, until there is no time left."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from .ceilings import Ceilings
from .clock import Call, Clock, Spread
from .rivals import BACKEND, OURS, NotInstalled, providers
from .work import (
    DTYPES,
    PASSES,
    Cost,
    Inputs,
    Kernel,
    Maker,
    NotBackward,
    Size,
    bytes_of,
    distance,
    prepared,
    results,
)

APART = {"bf16": 2e-2, "fp16": 3e-3, "fp32": 1e-3}  # relative distance of results that are the same


@dataclass(frozen=True, slots=True)
class Measurement:
    """One pass of one operator by one provider. `gpu` and `wall` are None where `note` says why.

    `ceiling` are the seconds that the device needs at least, by the ceilings of the same run: for the bytes,
    or for the FLOPs if those take longer (`by` says which). None for whole stages.
    """

    kernel: str
    model: str
    size: str
    dtype: str
    which: str
    provider: str
    gpu: Spread | None = None
    wall: Spread | None = None
    bytes: float = 0.0
    flops: float = 0.0
    ceiling: float | None = None
    by: str = "bytes"
    fused: bool = False
    rows: int = 0
    note: str = ""

    @property
    def key(self) -> tuple[str, ...]:
        """What a second run measures anew."""
        return (*self.case, self.provider)

    @property
    def case(self) -> tuple[str, ...]:
        """What providers are compared at."""
        return self.kernel, self.model, self.size, self.dtype, self.which

    @property
    def share(self) -> float | None:
        """Of what the device can do at most."""
        return self.ceiling / self.gpu.median if self.ceiling is not None and self.gpu is not None else None


class Task(Protocol):
    """Something to measure."""

    @property
    def rank(self) -> int:
        """What has less is measured first."""
        ...

    def run(self, clock: Clock, ceilings: Ceilings) -> Iterable[Measurement]:
        """Measurements as they are made."""
        ...


@dataclass(frozen=True)
class Work:
    """A kernel at one size and dtype, by these rivals and in these passes."""

    kernel: Kernel
    size: Size
    dtype: str
    rivals: tuple[str, ...]
    passes: tuple[str, ...] = PASSES
    backend: str = BACKEND

    @property
    def rank(self) -> int:
        """That of its size."""
        return self.size.rank

    def __str__(self) -> str:
        return f"{self.kernel.name} {self.size} {self.dtype}"

    def inputs(self, clock: Clock) -> list[Inputs]:
        """As many sets as it takes for the cache to be cold."""
        one = self.fresh(clock)
        return [one, *(self.fresh(clock, seed) for seed in range(1, clock.sets(bytes_of(one))))]

    def fresh(self, clock: Clock, seed: int = 0) -> Inputs:
        """Inputs that nobody has written to."""
        return self.kernel.inputs(self.size.numbers, Maker(DTYPES[self.dtype], clock.device, seed))

    def run(self, clock: Clock, ceilings: Ceilings) -> Iterator[Measurement]:
        """Every provider in every pass."""
        with clock.scope():
            sets = self.inputs(clock)
        expected: list[torch.Tensor] | None = None
        for name, function in providers(self.kernel, self.rivals, self.backend):
            try:
                with clock.scope():
                    found = results(function, self.fresh(clock))
                    expected = found if expected is None else expected
                    note = self._judge(found, expected)
            except Exception as error:
                yield from (self._made(which, name, _reason(error), ceilings) for which in self._passes())
                continue
            for which in self._passes():
                yield from self._timed(clock, ceilings, sets, which, name, function, note)
        clock.forget()

    def _timed(
        self,
        clock: Clock,
        ceilings: Ceilings,
        sets: Sequence[Inputs],
        which: str,
        name: str,
        function: Callable[..., Any],
        note: str,
    ) -> Iterator[Measurement]:
        calls: list[Call] = []
        try:
            with clock.scope():
                calls += [prepared(function, inputs, which) for inputs in sets]
            gpu, wall = clock.gpu(calls), clock.wall(calls)
        except NotBackward:
            return
        except Exception as error:  # a rival that fails is a cell of the table, not the end of the run
            yield self._made(which, name, _reason(error), ceilings)
            return
        yield self._made(which, name, note, ceilings, gpu, wall)

    def _passes(self) -> tuple[str, ...]:
        return tuple(which for which in self.kernel.passes if which in self.passes)

    def _judge(self, found: list[torch.Tensor], expected: list[torch.Tensor]) -> str:
        """Whether a rival computes what ours does."""
        if self.kernel.random:
            return ""
        apart = distance(found, expected)
        return "" if apart <= APART[self.dtype] else f"differs by {apart:.1e}"

    def _made(
        self,
        which: str,
        name: str,
        note: str,
        ceilings: Ceilings,
        gpu: Spread | None = None,
        wall: Spread | None = None,
    ) -> Measurement:
        cost = self.kernel.cost(which, self.size.numbers, DTYPES[self.dtype].itemsize)
        seconds, by = least_seconds(cost, self.dtype, ceilings)
        return Measurement(
            *(self.kernel.name, self.size.model, str(self.size), self.dtype, which, name, gpu, wall),
            *(cost.bytes, cost.flops, seconds, by, self.kernel.fused),
            rows=self.size.numbers.get("rows", 0),
            note=note,
        )


def least_seconds(cost: Cost, dtype: str, ceilings: Ceilings) -> tuple[float, str]:
    """What the device needs at least, and for what."""
    moved = cost.bytes / ceilings.copy
    computed = cost.flops / ceilings.product[dtype]
    return (computed, "FLOPs") if computed > moved else (moved, "bytes")


def works(
    kernels: Sequence[Kernel],
    dtypes: Sequence[str],
    rivals: Sequence[str],
    passes: Sequence[str] = PASSES,
    backend: str = BACKEND,
) -> list[Work]:
    """Every kernel at each of its sizes, in those of the dtypes that the size has."""
    return [
        Work(kernel, size, dtype, tuple(rivals), tuple(passes), backend)
        for kernel in kernels
        for size in kernel.sizes
        for dtype in size.dtypes
        if dtype in dtypes
    ]


@dataclass(frozen=True, slots=True)
class Run:
    """What was measured, and the tasks for which there was no time."""

    measurements: tuple[Measurement, ...]
    skipped: tuple[str, ...]


def run(
    tasks: Iterable[Task],
    clock: Clock,
    ceilings: Ceilings,
    left: Callable[[], float],
    say: Callable[[str], None],
    keep: Callable[[Run], None] = lambda _: None,
) -> Run:
    """Run tasks by rank while seconds are `left`; `say` a line of each, and `keep` what there is after it."""
    found: list[Measurement] = []
    skipped: list[str] = []
    for task in sorted(tasks, key=lambda task: task.rank):
        if left() <= 0:
            skipped.append(str(task))
            continue
        new = list(task.run(clock, ceilings))
        found += new
        say(f"{task}: {_summary(new)}")
        keep(Run(tuple(found), tuple(skipped)))
    return Run(tuple(found), tuple(skipped))


def _summary(new: Sequence[Measurement]) -> str:
    """Ours and the fastest rival's microseconds of the last pass."""
    last = [m for m in new if m.which == new[-1].which and m.gpu is not None]
    times = ", ".join(f"{m.provider} {1e6 * m.gpu.median:.1f}" for m in last if m.gpu is not None)
    wrong = [m for m in new if m.provider == OURS and m.note]
    return f"{times} us" + (f" (ours: {wrong[0].note})" if wrong else "") if times else "nothing"


def _reason(error: Exception) -> str:
    """The first line of an error, short enough for a cell."""
    if isinstance(error, NotInstalled):
        return str(error)
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:80] if text else ''}"
