"""A model in a pipeline of stages, to be trained in a loop of the user's own.

Every rank makes the pipeline and calls its methods, together with the others. Under mpirun a process is one
rank; without MPI the ranks are threads of the one process, and what is said of rank 0 holds for it.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch import Tensor

from gpp.checkpoint.folder import Kept
from gpp.checkpoint.manifest import Order
from gpp.checkpoint.shelf import Copy, Shelf
from gpp.plan import Plan
from gpp.program.build import Hooks
from gpp.program.stage import StageProgram
from gpp.runtime.communicator import Communicator
from gpp.runtime.data import Batches, Dataset, evaluation_batches
from gpp.runtime.memory import peak, start_of_peak
from gpp.runtime.out_of_memory import explained
from gpp.runtime.reduce import MakeSum
from gpp.runtime.results import Total, add_up
from gpp.runtime.staging import Staging
from gpp.runtime.state import StageState
from gpp.runtime.trainer import StepRecord, Trainer
from gpp.schedule.task import Schedule
from gpp.trace import Trace

from .batches import Batch, Checked, agreed, key_specs, misfit
from .checkpoints import Checkpoints, Subject, load, recall, subject_of
from .crew import Crew, RefusedError
from .job import Job, Training, Values, evaluation_schedule, holders_of, programs_of, state_of
from .saving import Saving
from .step_result import StepResult, reason_to_skip, step_result

T = TypeVar("T")


class Pipeline:
    """See the module; `gpp.api.start.pipeline` makes one.

    `values` gives initial weights. `names` are the keys of the module's state_dict with the names that
    parameters and buffers go by: of tied ones the first. `seed` is that of the data and of random numbers,
    kept in checkpoints.
    """

    def __init__(
        self,
        crew: Crew,
        job: Job,
        training: Training,
        values: Values,
        *,
        device: torch.device,
        names: Mapping[str, str] | None = None,
        hooks: Hooks | None = None,
        staging: Staging | None = None,
        make_sum: MakeSum | None = None,
        seed: int = 0,
    ) -> None:
        self.job = job
        self.steps = 0
        self._crew = crew
        self._device = device
        self._hooks = hooks
        self._specs = key_specs(job.captured)
        self._names = {} if names is None else names
        self._closed = False
        self._seed, self._training = seed, training
        self._saving: Saving | None = None
        self._order: Order | None = None  # of the data that `fit` trains on
        schedules = (job.lowered.train, *job.lowered.evaluate.values())
        programs = crew.together(lambda: {rank: self._programs(rank, schedules) for rank in crew.mine})
        self._base = start_of_peak()

        def state(rank: int) -> StageState | None:
            with explained(job.plan, rank):
                found = state_of(job, rank, programs[rank], values, training, device)
            if found is not None and make_sum is not None:
                found.make_sum = make_sum
            return found

        states = crew.together(lambda: {rank: state(rank) for rank in crew.mine})
        outside = sorted({*self._names.values()} - holders_of(job).keys()) if self._names else []
        self._outside = values(outside) if outside and crew.is_first else {}
        self._sizes = set(job.lowered.evaluate)

        def trainer(comm: Communicator) -> Trainer:
            comm.doing.stages = [_stage_names(job.plan, rank) for rank in range(comm.size)]
            comm.doing.compiles = hooks is not None
            with explained(job.plan, comm.rank):
                return Trainer(
                    comm,
                    job.plan,
                    job.evaluation,
                    job.lowered,
                    programs[comm.rank],
                    states[comm.rank],
                    job.captured.train,
                    job.captured.evaluate,
                    device,
                    staging,
                    training.policy,
                )

        self._trainers = dict(zip(crew.mine, crew.run(trainer), strict=True))

    @property
    def plan(self) -> Plan:
        """The plan of a training step."""
        return self.job.plan

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys of a training batch that this process reads; others may be left out."""
        return tuple(dict.fromkeys(key for t in self._trainers.values() for key in t.keys))

    @property
    def is_first(self) -> bool:
        """Whether this process is rank 0, which has the results."""
        return self._crew.is_first

    def step(self, batch: Batch) -> StepResult:
        """One training step on a whole mini-batch: tensors of shape (mini_batch, ...) by key, from which the
        ranks take their rows. A rank may leave out what it does not read (`keys`).

        Raises RefusedError, on all ranks, for a batch that does not fit, and with `on_nonfinite="stop"`
        NonFiniteError if loss or gradients are not finite; the pipeline is as it was.
        """
        self._agreed(misfit(batch, self._specs, self.keys, self.plan.mini_batch))
        number = self.steps
        records = self._run("trains", lambda trainer: trainer.step(number, batch))
        reason = reason_to_skip(self._one_trainer.verdict)
        self.steps += 1
        if reason is not None and self.is_first:
            warnings.warn(f"{reason}. Nothing has moved in this step", RuntimeWarning, stacklevel=2)
        norm = next((t.norm for t in self._trainers.values() if t.norm is not None), None)
        return step_result(records[0], norm, reason)

    def evaluate(self, batches: Iterable[Batch], *, averaged: bool = False) -> dict[str, float]:
        """Loss and metrics of the model in evaluation over all samples of the batches, of any sizes, each
        counted once; on rank 0 (elsewhere empty). All ranks give as many batches; one that reads none of the
        keys may give empty ones. `averaged`: of the weights' moving averages.

        Raises RefusedError, on all ranks, for a batch that does not fit.
        """
        totals: dict[str, Total] = {}
        for size, part in self._parts(batches):

            def work(trainer: Trainer, size: int = size, part: Batch = part) -> dict[str, Total]:
                return trainer.evaluate_batch(size, part, averaged=averaged)

            add_up(totals, self._run("evaluates", work)[0])
        return {name: total.mean for name, total in totals.items()}

    def predict(self, batches: Iterable[Batch], *, averaged: bool = False) -> dict[str, Tensor]:
        """What the model in evaluation predicts for each sample of the batches, in their order, by name:
        tensors of shape (samples, ...) on the host of rank 0 (elsewhere empty). See `evaluate`.

        These are the tensors of the third dictionary that `forward` returns, (loss, metrics, predictions).
        Raises RefusedError where it returns none.
        """
        if not self.job.captured.traced.evaluate.predictions:
            raise RefusedError(
                "the model's forward returns no predictions: return (loss, {name: metric}, {name: tensor}), "
                "with the samples in dimension 0 of each tensor"
            )
        found: dict[str, list[Tensor]] = {}
        for size, part in self._parts(batches):

            def work(trainer: Trainer, size: int = size, part: Batch = part) -> dict[str, Tensor]:
                return trainer.predict_batch(size, part, averaged=averaged)

            for name, value in self._run("predicts", work)[0].items():
                found.setdefault(name, []).append(value)
        order = self.job.captured.traced.evaluate.predictions
        return {name: torch.cat(found[name]) for name in order if name in found}

    def fit(
        self,
        dataset: Dataset,
        batches: Batches,
        steps: int,
        on_step: Callable[[StepRecord], None] = lambda _: None,
        *,
        prefetch: int = 2,
        checkpoints: Checkpoints | None = None,
    ) -> None:
        """So many more training steps on the batches of a data set, of which each rank reads its own rows and
        keys, `prefetch` steps ahead. `on_step` is called on rank 0. With `checkpoints` they are written in
        the background, after the last step too; on return that one is on disk.

        Raises RefusedError for batches of another size than the plan's, CheckpointError if one cannot be
        written, and on all ranks NonFiniteError for a step that is not finite and is not to be skipped;
        `steps` is then its number."""
        if batches.mini_batch != self.plan.mini_batch:
            raise RefusedError(
                f"a step takes {self.plan.mini_batch} samples, the batches have {batches.mini_batch}: make "
                "them of the pipeline's mini_batch"
            )
        checked = Checked(dataset, self._specs)
        start, stop = self.steps, self.steps + steps
        self._order = Order(batches.length, batches.seed)
        saving = self._saver(checkpoints) if checkpoints is not None and steps else None
        if saving is not None:
            saving.begin_copies()

        def work(trainer: Trainer) -> int:
            def fit(**options: Any) -> int:
                return trainer.fit(checked, batches, start, stop, on_step, prefetch=prefetch, **options)

            if saving is None:
                return fit()
            return saving.around(trainer.comm.rank, start, stop, lambda between: fit(between=between))

        self.steps = self._run("trains", work)[0]
        reason_to_skip(self._one_trainer.verdict)

    def evaluate_dataset(self, dataset: Dataset, *, averaged: bool = False) -> dict[str, float]:
        """`evaluate` over a data set; each rank reads its own rows and keys."""
        for batch in evaluation_batches(len(dataset), self.plan.mini_batch):
            self._prepare(len(batch))
        checked = Checked(dataset, self._specs)
        return self._run("evaluates", lambda trainer: trainer.evaluate(checked, averaged=averaged))[0]

    def state_dict(self, *, averaged: bool = False) -> dict[str, Tensor]:
        """Parameters and buffers under the module's own names, for `load_state_dict`, on the host of rank 0
        (elsewhere empty). `averaged`: the weights' moving averages."""
        found = self._run("gathers weights", lambda trainer: trainer.weights(averaged=averaged))[0]
        if not self.is_first:
            return {}
        found |= self._outside
        return {key: found[name] for key, name in self._names.items()} if self._names else found

    def save(self, checkpoints: Checkpoints) -> None:
        """Write a checkpoint of the steps made so far; on return it is on disk. Called by all ranks.

        Raises CheckpointError on a rank that fails, and RefusedError with its words on the others; a folder
        that has a checkpoint of a later step is refused too."""
        self._saver(checkpoints).save(self.steps)

    def load(self, path: Path, batches: Batches | None = None) -> list[str]:
        """Go on from a checkpoint, or from the newest whole one of a folder, whatever the plan that wrote it:
        weights, averages, optimizer, scheduler and the number of steps are its. Called by all ranks. Returns
        what is wrong with newer ones that were passed over. Give the `batches` with which `fit` goes on, and
        one of a run on data of another length or order is refused.

        Raises CheckpointError where there is none, it is damaged, or it does not fit; RefusedError with the
        same words on other ranks.
        """
        order = None if batches is None else Order(batches.length, batches.seed)
        kept, self._outside, wrong = load(path, self._subject(), self._crew, self._states(), order)
        self._went_back(kept)
        return wrong

    def recall(self, shelf: Shelf, copy: Copy, batches: Batches) -> None:
        """Go on from a copy in memory, as `load`. Raises CheckpointError, on all ranks, where it is of no
        use; nothing has changed then."""
        order = Order(batches.length, batches.seed)
        kept, self._outside = recall(shelf, copy, self._subject(), self._crew, self._states(), order)
        self._went_back(kept)

    def _went_back(self, kept: Kept) -> None:
        self._saving = None  # it has the values from outside of all stages
        self.steps, self._order = kept.manifest.step, kept.manifest.order
        for trainer in self._trainers.values():
            trainer.guard.skipped = kept.manifest.skipped

    def trace(self) -> Trace:
        """Who did what when in the last steps, complete on rank 0; comparable with `gpp.simulate`'s."""
        return self._run("gathers its trace", lambda trainer: trainer.trace())[0]

    @property
    def stopped(self) -> str | None:
        """Why `fit` stopped before its last step, or will: a rank was asked to, see `ask_to_stop`."""
        return self._crew.comm.halt.reason

    def ask_to_stop(self, reason: str) -> None:
        """All ranks' `fit` returns after the step that they are in, a checkpoint written if it writes any; on
        one rank, as in a handler of a signal. In a loop of your own steps ask `is_asked_to_stop`."""
        self._crew.comm.halt.ask(reason)

    def is_asked_to_stop(self) -> bool:
        """Whether any rank has been asked to stop, the same answer on all ranks; called by all of them
        between two steps."""
        return self._crew.first_error(self.stopped) is not None

    @property
    def step_seconds(self) -> Sequence[float]:
        """The time of each step so far, on rank 0."""
        return self._one_trainer.measured.step_seconds

    @property
    def typical_seconds(self) -> float:
        """The median time of a step, on rank 0; not a number before the first."""
        return self._one_trainer.measured.typical

    def peak_memory(self) -> list[int]:
        """Bytes that each rank's device has held at most: CUDA's allocator, or the process's resident memory
        above what it had before there were weights (threads of one process each report the whole)."""

        def work(trainer: Trainer) -> list[int]:
            device = self._device
            cuda = device.type == "cuda"
            own = int(torch.cuda.max_memory_allocated(device)) if cuda else peak() - self._base
            return trainer.comm.all_gather_object(own)

        return self._run("compares memory", work)[0]

    @property
    def skipped(self) -> int:
        """How many of the steps were skipped because they were not finite."""
        return self._one_trainer.guard.skipped

    def close(self) -> None:
        """The end; called by all ranks."""
        if not self._closed:
            self._closed = True
            self._crew.close()

    def __enter__(self) -> "Pipeline":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:  # else others may not come
            self.close()

    @property
    def _one_trainer(self) -> Trainer:
        """That of the first rank here."""
        return self._trainers[self._crew.mine[0]]

    def _programs(self, rank: int, schedules: Sequence[Schedule]) -> list[StageProgram]:
        with explained(self.plan, rank):
            return programs_of(self.job, rank, schedules, self._device, self._hooks)

    def _subject(self) -> Subject:
        return subject_of(self.job, self._names, self._outside, self._training, self._seed)

    def _states(self) -> dict[int, StageState | None]:
        found = {rank: trainer.state for rank, trainer in self._trainers.items()}
        return {rank: state if isinstance(state, StageState) else None for rank, state in found.items()}

    def _saver(self, checkpoints: Checkpoints) -> Saving:
        """The writers into a folder, ready: the same as long as it is asked for in the same way."""
        if self._saving is None or self._saving.checkpoints != checkpoints:

            def skipped(rank: int) -> int:
                return self._trainers[rank].guard.skipped

            self._saving = Saving(checkpoints, self._subject(), self._crew, self._states(), skipped)
        self._saving.begin(self.steps, self._order)
        return self._saving

    def _run(self, what: str, work: Callable[[Trainer], T]) -> list[T]:
        """`work` for each rank of this process, by rank; `what` it does, for who watches."""

        def of_rank(comm: Communicator) -> T:
            with explained(self.plan, comm.rank), comm.doing.inside(what):
                return work(self._trainers[comm.rank])

        return self._crew.run(of_rank)

    def _agreed(self, error: str | None) -> None:
        """Raise RefusedError on all ranks if any has an error."""
        first = self._crew.first_error(error)
        if first is not None:
            raise RefusedError(first)

    def _parts(self, batches: Iterable[Batch]) -> Iterator[tuple[int, Batch]]:
        """The batches in pieces of at most a mini-batch, with their sizes, on which all ranks agree."""
        for batch, total in agreed(batches, self._specs, self._crew):
            pieces = evaluation_batches(total, self.plan.mini_batch)
            for piece in pieces:
                self._prepare(len(piece))
            needed = {k for t in self._trainers.values() for p in pieces for k in t.evaluation_keys(len(p))}
            self._agreed(misfit(batch, self._specs, sorted(needed), total))
            for piece in pieces:
                rows = slice(piece.start, piece.stop)
                yield len(piece), {key: v[rows] for key, v in batch.items() if key in self._specs}

    def _prepare(self, size: int) -> None:
        """Schedules and programs for the evaluation of so many samples at once, kept for the next time."""
        if size in self._sizes:
            return
        schedule = evaluation_schedule(self.job.evaluation, size)
        mine = self._crew.mine
        programs = self._crew.together(lambda: {rank: self._programs(rank, [schedule]) for rank in mine})

        def prepare(trainer: Trainer) -> None:
            trainer.prepare(size, schedule, programs[trainer.comm.rank])

        self._run("prepares an evaluation", prepare)
        self._sizes.add(size)


def _stage_names(plan: Plan, rank: int) -> str:
    return ", ".join(plan.stage_graph.stages[stage].name for stage in plan.residents.get(rank, ()))
