"""Training and evaluation on one rank: schedules, data and reports around the executor."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import mean, median

import torch

from gpp.plan import Plan
from gpp.program.stage import Results, StageProgram
from gpp.schedule.task import Schedule
from gpp.trace import Span, Trace

from .communicator import Communicator
from .data import Batches, Dataset, evaluation_batches
from .executor import Executor
from .neighbors import check_neighbors
from .prefetch import Prefetcher
from .reports import COLLECTOR, Reports
from .results import Total, check_labels, combine
from .schedules import Schedules
from .state import StageState

TRACED_STEPS = 3
WARM_UP_STEPS = 2  # not part of the measured step time: first touches, caches


@dataclass(frozen=True)
class StepRecord:
    """One training step as rank 0 saw it."""

    step: int
    loss: float
    seconds: float
    samples_per_second: float
    metrics: Mapping[str, float]
    norm: float | None


@dataclass
class Measured:
    """What a training run measured; complete on rank 0 after `Trainer.trace`."""

    step_seconds: list[float] = field(default_factory=list)

    @property
    def typical(self) -> float:
        """The median step time, the first steps left out where there are enough."""
        usable = self.step_seconds[WARM_UP_STEPS:] or self.step_seconds
        return median(usable) if usable else float("nan")

    @property
    def recent(self) -> float:
        """The mean time of the recorded steps, against which their spans are to be held."""
        last = self.step_seconds[-TRACED_STEPS:]
        return mean(last) if last else float("nan")


class Trainer:
    """One rank's part of a run. All ranks make it and call its methods together.

    `programs` are those of the rank's stages; on an idle rank there are none, and `state` is None.
    """

    def __init__(
        self,
        comm: Communicator,
        plan: Plan,
        evaluation: Plan,
        lowered: Schedules,
        programs: Sequence[StageProgram],
        state: StageState | None,
        train: Results,
        evaluate: Results,
        device: torch.device,
    ) -> None:
        self.comm = comm
        self.plan = plan
        self.state = state
        self.train_results = train
        self.evaluate_results = evaluate
        self.device = device
        self.programs = programs
        self.measured = Measured()
        self._spans: list[Span] = []
        self._zero = 0.0
        check_neighbors(comm, plan.stage_graph, lowered.train, [p.train for p in programs])
        self._train = self._runner(plan, lowered.train, train, 0)
        self._evaluate = {
            size: self._runner(evaluation, schedule, evaluate, 1 + i)
            for i, (size, schedule) in enumerate(lowered.evaluate.items())
        }

    def _runner(self, plan: Plan, schedule: Schedule, results: Results, number: int) -> "_Runner":
        executor = Executor(self.comm, plan, schedule, self.programs, self.state, results.loss, self.device)
        tag = 2 * (len(self.plan.stage_graph.edges) + len(plan.stage_graph.edges)) + number
        return _Runner(executor, Reports(self.comm, schedule, self.programs, tag))

    def fit(
        self,
        dataset: Dataset,
        batches: Batches,
        start: int,
        stop: int,
        on_step: Callable[[StepRecord], None],
        *,
        trace: bool = True,
    ) -> None:
        """Train steps [start, stop); `on_step` is called on rank 0 after each. The last TRACED_STEPS steps
        are recorded if `trace`."""
        if start >= stop:
            return
        runner = self._train
        rows, keys = runner.executor.rows, runner.executor.keys
        self.comm.barrier()
        self._zero = time.perf_counter()
        runner.executor.channels.open(stop - start)
        with Prefetcher(dataset, keys, lambda step: batches.at(step)[rows], start, stop) as reader:
            before = time.perf_counter()
            for step in range(start, stop):
                batch = {key: value.to(self.device) for key, value in reader.next().items()}
                outcome = runner.executor.run(step, batch, record=trace and step >= stop - TRACED_STEPS)
                terms = runner.reports.exchange(outcome)
                if self.comm.rank == COLLECTOR:
                    now = time.perf_counter()
                    seconds, before = now - before, now
                    self.measured.step_seconds.append(seconds)
                    on_step(self._record(step, terms, seconds, outcome.norm))
        runner.close()
        self._spans = runner.executor.spans

    def _record(
        self,
        step: int,
        terms: Mapping[str, Sequence[tuple[int, int, float]]],
        seconds: float,
        norm: float | None,
    ) -> StepRecord:
        samples = self.plan.mini_batch
        check_labels(self.train_results, terms)
        return StepRecord(
            step=step,
            loss=combine(self.train_results.loss, terms, samples).mean,
            seconds=seconds,
            samples_per_second=samples / seconds,
            metrics={m.name: combine(m, terms, samples).mean for m in self.train_results.metrics},
            norm=norm,
        )

    def evaluate(self, dataset: Dataset) -> dict[str, float]:
        """Loss and metrics over all samples, each counted once; on rank 0 (elsewhere empty)."""
        totals: dict[str, Total] = {}
        results = (self.evaluate_results.loss, *self.evaluate_results.metrics)
        batches = evaluation_batches(len(dataset), self.plan.mini_batch)
        for size in sorted({len(b) for b in batches}, reverse=True):
            group = [b for b in batches if len(b) == size]
            runner = self._evaluate[size]
            rows = runner.executor.rows
            runner.executor.channels.open(len(group))
            reads = [[batch[i] for i in rows] for batch in group]
            with Prefetcher(dataset, runner.executor.keys, reads.__getitem__, 0, len(group)) as reader:
                for _ in group:
                    batch = {key: value.to(self.device) for key, value in reader.next().items()}
                    terms = runner.reports.exchange(runner.executor.run(0, batch))
                    if self.comm.rank == COLLECTOR:
                        check_labels(self.evaluate_results, terms)
                        for result in results:
                            found = combine(result, terms, size)
                            totals[result.name] = totals.get(result.name, Total(0.0, 0.0)) + found
            runner.close()
        return {name: total.mean for name, total in totals.items()}

    def trace(self) -> Trace:
        """The measured trace of the last recorded steps, complete on rank 0. Called by all ranks."""
        mine = [_shifted(span, self._zero) for span in self._spans]
        spans = [span for part in self.comm.all_gather_object(mine) for span in part]
        first = min((span.start for span in spans), default=0.0)
        spans = [_shifted(span, first) for span in spans]
        return Trace(
            name="measured",
            ranks=self.comm.size,
            spans=tuple(sorted(spans, key=lambda s: (s.rank, s.start))),
            step_seconds=self.measured.recent,
            mini_batch=self.plan.mini_batch,
            stage_names=tuple(stage.name for stage in self.plan.stage_graph.stages),
        )


@dataclass(frozen=True)
class _Runner:
    executor: Executor
    reports: Reports

    def close(self) -> None:
        self.executor.channels.close()
        self.reports.flush()


def _shifted(span: Span, zero: float) -> Span:
    return replace(span, start=span.start - zero, stop=span.stop - zero)
