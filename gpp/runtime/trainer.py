"""Training and evaluation on one rank: schedules, data and reports around the executor."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import mean, median

import torch
from torch import Tensor

from gpp.plan import Plan
from gpp.program.stage import Results, StageProgram
from gpp.schedule.task import Schedule
from gpp.trace import Span, Trace

from .communicator import Communicator
from .data import Batches, Dataset, evaluation_batches
from .executor import Batch, Executor, StepOutcome
from .gathering import gathered
from .neighbors import check_neighbors
from .nonfinite import Guard, Policy, Verdict
from .prefetch import Prefetcher
from .rank_state import RankState
from .reports import COLLECTOR, Reports
from .results import Terms, Total, add_up, check_labels, combine
from .schedules import Schedules
from .staging import Staging

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
    learning_rate: float | None
    verdict: Verdict | None = None  # of a step that is not finite, in which nothing has moved


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

    `programs` are those of the rank's stages; on an idle rank there are none, and `state` is None. `policy`
    is for steps that are not finite (None: `state` does not look); `verdict` is that of the last step.
    """

    def __init__(
        self,
        comm: Communicator,
        plan: Plan,
        evaluation: Plan,
        lowered: Schedules,
        programs: Sequence[StageProgram],
        state: RankState | None,
        train: Results,
        evaluate: Results,
        device: torch.device,
        staging: Staging | None = None,
        policy: Policy | None = None,
    ) -> None:
        self.comm = comm
        self.plan = plan
        self.state = state
        self.train_results = train
        self.evaluate_results = evaluate
        self.device = device
        self.staging = staging
        self.programs = programs
        self.measured = Measured()
        self.guard = Guard(comm, plan, programs, train.loss, policy)
        self.verdict: Verdict | None = None
        self._spans: list[Span] = []
        self._zero = 0.0
        check_neighbors(comm, plan.stage_graph, lowered.train, [p.train for p in programs])
        self._evaluation = evaluation
        self._train = self._runner(plan, lowered.train, train, 0, programs)
        self._evaluate: dict[int, _Runner] = {}
        for size, schedule in lowered.evaluate.items():
            self.prepare(size, schedule, programs)

    def prepare(self, size: int, schedule: Schedule, programs: Sequence[StageProgram]) -> None:
        """Be ready to evaluate `size` samples at once; `programs` are those of the rank's stages, with
        evaluation functions of the schedule's sizes."""
        number = 1 + len(self._evaluate)
        self._evaluate[size] = self._runner(
            self._evaluation, schedule, self.evaluate_results, number, programs
        )

    def _runner(
        self,
        plan: Plan,
        schedule: Schedule,
        results: Results,
        number: int,
        programs: Sequence[StageProgram],
    ) -> "_Runner":
        loss, device = results.loss, self.device
        executor = Executor(self.comm, plan, schedule, programs, self.state, loss, device, self.staging)
        tag = self._tag + 1 + number
        return _Runner(executor, Reports(self.comm, schedule, programs, tag))

    def fit(
        self,
        dataset: Dataset,
        batches: Batches,
        start: int,
        stop: int,
        on_step: Callable[[StepRecord], None],
        *,
        trace: bool = True,
        prefetch: int = 2,
        between: Callable[[int], None] = lambda _: None,
    ) -> int:
        """Train steps [start, stop); `on_step` is called on rank 0 after each. Returns `stop`, or the step
        before which all ranks stopped because one was asked to, or that was not finite and ended training.
        The last TRACED_STEPS steps are recorded if `trace`. Data are read up to `prefetch` steps ahead.
        `between` is called on every rank when a step is over, with the number of steps made so far."""
        self.verdict = None
        doing, halt, planned = self.comm.doing, self.comm.halt, stop
        if start >= stop:
            return start
        runner = self._train
        rows, keys = runner.executor.rows, runner.executor.keys
        self.comm.barrier()
        self._zero = time.perf_counter()
        runner.executor.channels.open(stop - start)
        with Prefetcher(dataset, keys, lambda step: batches.at(step)[rows], start, stop, prefetch) as reader:
            before = time.perf_counter()
            for step in range(start, stop):
                if not halt.may_begin(step):
                    doing.now("waits until all have said where they can stop")
                    stop = min(stop, halt.last(step, self.comm.rest))
                    if stop <= step:
                        break
                doing.step = step
                doing.now("reads its samples")
                batch = {key: packed(value, self.device) for key, value in reader.next().items()}
                outcome = runner.executor.run(step, batch, record=trace and step >= stop - TRACED_STEPS)
                doing.now("brings losses together")
                terms = runner.reports.exchange(outcome)
                verdict = self._judge(step, batch, outcome, terms, stop - step - 1)
                if self.comm.rank == COLLECTOR:
                    now = time.perf_counter()
                    seconds, before = now - before, now
                    self.measured.step_seconds.append(seconds)
                    on_step(self._record(step, terms, seconds))
                if verdict is not None and verdict.ends:
                    stop = step
                    break
                self._advance()
                doing.now("between two steps")
                between(step + 1)
        doing.now("waits until its last messages have left")
        runner.close()
        if stop < planned:
            self.comm.barrier()  # receives that were posted for steps to come have been taken back by now
        self._spans = runner.executor.spans
        return stop

    def step(self, number: int, batch: Batch) -> StepRecord | None:
        """One training step, on this rank's rows and keys of a whole mini-batch; its record on rank 0.
        `number` keys random numbers. The last TRACED_STEPS steps are recorded."""
        runner = self._train
        own = self._own(runner, batch)
        if not self.measured.step_seconds:
            self._zero = time.perf_counter()
        before = time.perf_counter()
        runner.executor.channels.open(1)
        outcome = runner.executor.run(number, own, record=True)
        self.comm.doing.now("brings losses together")
        terms = runner.reports.exchange(outcome)
        self._judge(number, own, outcome, terms, 0)
        runner.close()
        self._advance()
        spans = runner.executor.spans
        spans[:] = [span for span in spans if span.step > number - TRACED_STEPS]
        self._spans = spans
        if self.comm.rank != COLLECTOR:
            return None
        seconds = time.perf_counter() - before
        self.measured.step_seconds.append(seconds)
        return self._record(number, terms, seconds)

    def _judge(
        self, step: int, batch: Batch, outcome: StepOutcome, terms: Terms, left: int
    ) -> Verdict | None:
        """The verdict on a step, of a stretch with so many left."""
        results, samples = self.train_results.loss, self.plan.mini_batch
        self.verdict = self.guard.judge(
            self._train.executor, step, batch, outcome, lambda: combine(results, terms, samples), left
        )
        return self.verdict

    def _advance(self) -> None:
        """The learning rates of the next step; a step in which nothing moved leaves them too."""
        if self.state is not None and self.verdict is None:
            self.state.advance()

    def _own(self, runner: "_Runner", batch: Batch) -> Batch:
        """The rank's rows and keys of a batch, on its device."""
        rows, keys = runner.executor.rows, runner.executor.keys
        whole = slice(rows[0], rows[-1] + 1) if rows and rows[-1] - rows[0] == len(rows) - 1 else rows
        return {key: packed(batch[key][whole], self.device) for key in keys}

    @property
    def keys(self) -> tuple[str, ...]:
        """What this rank reads of a training batch."""
        return self._train.executor.keys

    def evaluation_keys(self, size: int) -> tuple[str, ...]:
        """What this rank reads of an evaluation batch of `size` samples."""
        return self._evaluate[size].executor.keys

    def evaluate_batch(self, size: int, batch: Batch, *, averaged: bool = False) -> dict[str, Total]:
        """Loss and metrics of a batch of `size` samples; on rank 0 (elsewhere empty)."""
        runner = self._evaluate[size]
        with self._averaged(averaged):
            runner.executor.channels.open(1)
            found = self._totals(runner, self._own(runner, batch), size)
            runner.close()
        return found

    def predict_batch(self, size: int, batch: Batch, *, averaged: bool = False) -> dict[str, Tensor]:
        """Predictions for the `size` samples of a batch, in their order; on rank 0 (elsewhere empty)."""
        runner = self._evaluate[size]
        with self._averaged(averaged):
            runner.executor.channels.open(1)
            outcome = runner.executor.run(0, self._own(runner, batch), predict=True)
            runner.reports.exchange(outcome)
            runner.close()
        parts = [((p.name, p.start), p.value) for p in outcome.predictions]
        found: dict[str, dict[int, Tensor]] = {}
        for (name, start), value in gathered(self.comm, self._tag, parts):
            found.setdefault(name, {})[start] = value
        return {name: torch.cat([pieces[at] for at in sorted(pieces)]) for name, pieces in found.items()}

    def weights(self, *, averaged: bool = False) -> dict[str, Tensor]:
        """Parameters and buffers of all stages by full name, on the host; on rank 0 (elsewhere empty)."""
        state = self.state
        with self._averaged(averaged):
            mine = {} if state is None else {**state.parameters, **state.buffers}
            parts = [(name, value.detach().cpu().contiguous()) for name, value in mine.items()]
            found: dict[str, Tensor] = {}
            for name, value in gathered(self.comm, self._tag, parts):
                if name not in found:  # a replica's, or a tied parameter's, are the same
                    found[name] = value.clone() if name in mine else value
            return found

    @property
    def _tag(self) -> int:
        """The first that no edge has: of messages that are over before the next ones begin."""
        return 2 * max(len(plan.stage_graph.edges) for plan in (self.plan, self._evaluation))

    def _record(
        self,
        step: int,
        terms: Mapping[str, Sequence[tuple[int, int, float]]],
        seconds: float,
    ) -> StepRecord:
        samples = self.plan.mini_batch
        state = self.state
        check_labels(self.train_results, terms)
        return StepRecord(
            step=step,
            loss=combine(self.train_results.loss, terms, samples).mean,
            seconds=seconds,
            samples_per_second=samples / seconds,
            metrics={m.name: combine(m, terms, samples).mean for m in self.train_results.metrics},
            norm=None if state is None else state.norm,
            learning_rate=None if state is None else state.learning_rate,
            verdict=self.verdict,
        )

    def evaluate(self, dataset: Dataset, *, averaged: bool = False) -> dict[str, float]:
        """Loss and metrics over all samples, each counted once; on rank 0 (elsewhere empty).

        With `averaged` of the weights' moving averages, and the buffers as they are."""
        with self._averaged(averaged):
            return self._evaluated(dataset)

    def _averaged(self, averaged: bool) -> AbstractContextManager[None]:
        return self.state.averaged() if averaged and self.state is not None else nullcontext()

    @property
    def norm(self) -> float | None:
        """The global norm of the last step's gradients, if it was asked for and the rank has a stage."""
        return None if self.state is None else self.state.norm

    def _evaluated(self, dataset: Dataset) -> dict[str, float]:
        totals: dict[str, Total] = {}
        batches = evaluation_batches(len(dataset), self.plan.mini_batch)
        for size in sorted({len(b) for b in batches}, reverse=True):
            group = [b for b in batches if len(b) == size]
            runner = self._evaluate[size]
            rows = runner.executor.rows
            runner.executor.channels.open(len(group))
            part = partial(_samples, group, rows)
            with Prefetcher(dataset, runner.executor.keys, part, 0, len(group)) as reader:
                for _ in group:
                    batch = {key: packed(value, self.device) for key, value in reader.next().items()}
                    add_up(totals, self._totals(runner, batch, size))
            runner.close()
        return {name: total.mean for name, total in totals.items()}

    def _totals(self, runner: "_Runner", batch: Batch, size: int) -> dict[str, Total]:
        terms = runner.reports.exchange(runner.executor.run(0, batch))
        if self.comm.rank != COLLECTOR:
            return {}
        check_labels(self.evaluate_results, terms)
        results = (self.evaluate_results.loss, *self.evaluate_results.metrics)
        return {result.name: combine(result, terms, size) for result in results}

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


def packed(value: Tensor, device: torch.device) -> Tensor:
    """On the device, one row after the other, as programs are made for."""
    return value.to(device).contiguous()


def _samples(batches: Sequence[range], rows: Sequence[int], number: int) -> list[int]:
    """The samples at `rows` of a batch."""
    return [batches[number][row] for row in rows]


@dataclass(frozen=True)
class _Runner:
    executor: Executor
    reports: Reports

    def close(self) -> None:
        self.executor.channels.close()
        self.reports.flush()


def _shifted(span: Span, zero: float) -> Span:
    return replace(span, start=span.start - zero, stop=span.stop - zero)
