"""When a pipeline's checkpoints are written, by whom, and how one is read."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor

from gpp.checkpoint.folder import Kept, clear, newest, opened
from gpp.checkpoint.manifest import MANIFEST, Manifest, Part
from gpp.checkpoint.owners import owners
from gpp.checkpoint.reader import check_files, weights
from gpp.checkpoint.tensors import CheckpointError
from gpp.checkpoint.writer import CheckpointWriter
from gpp.runtime.saving import Shares, contents, restore
from gpp.runtime.state import StageState

from .crew import Crew
from .job import Job, holders_of, sizes_of

States = Mapping[int, StageState | None]  # of the ranks of this process; None: an idle rank


@dataclass(frozen=True, kw_only=True)
class Checkpoints:
    """Where checkpoints go: `folder`, which all ranks see. The newest `keep` stay; in `fit` one is written
    every `every` steps (None: only by `save`). `texts` are small files to be kept with each."""

    folder: Path
    every: int | None = None
    keep: int = 2
    texts: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Subject:
    """What a checkpoint is of: the job, the keys of the module's state_dict with the names behind them, the
    values of those that are in no stage (on rank 0), seed, and decay of the moving average."""

    job: Job
    keys: Mapping[str, str]
    outside: Mapping[str, Tensor]
    seed: int
    ema: float | None


class Saving:
    """The writers of the ranks of this process; made by all ranks together."""

    def __init__(self, checkpoints: Checkpoints, subject: Subject, crew: Crew, states: States) -> None:
        self.checkpoints = checkpoints
        self._states = states
        self._crew = crew
        job = subject.job
        shares = owners(holders_of(job), sizes_of(job), crew.size)
        self._shares = Shares(shares, subject.keys, subject.outside)
        self._base = Manifest(0, job.plan.mini_batch, subject.seed, subject.ema, Part({}, {}, {}, {}))
        crew.together(lambda: clear(checkpoints.folder) if crew.is_first else None)
        self._writers = {
            rank: CheckpointWriter(checkpoints.folder, rank, crew.size, checkpoints.keep) for rank in states
        }

    def between(self, rank: int, stop: int) -> Callable[[int], None]:
        """What a rank does between steps, of which there will be `stop`."""
        every = self.checkpoints.every

        def between(steps: int) -> None:
            if every is not None and (steps % every == 0 or steps == stop):
                self._begin(rank, steps)
            else:
                self._writers[rank].check()

        return between

    def finish(self, rank: int) -> None:
        """Until a rank's part is on disk; on rank 0 until the whole checkpoint is."""
        self._writers[rank].wait()

    def give_up(self) -> None:
        """The ranks are failing: wait for none of them."""
        for writer in self._writers.values():
            writer.give_up()

    def save(self, steps: int) -> None:
        """Write a checkpoint, and wait until it is on disk; called by all ranks together."""

        def parts() -> None:
            for rank in self._states:
                self._begin(rank, steps)
            for writer in self._writers.values():
                writer.wait_for_part()

        try:
            self._crew.together(parts)
        except Exception:
            self.give_up()
            raise

        def whole() -> None:
            for writer in self._writers.values():
                writer.wait()

        self._crew.together(whole)

    def _begin(self, rank: int, steps: int) -> None:
        writer = self._writers[rank]
        writer.wait()  # before another copy of the weights is made
        texts = self.checkpoints.texts if rank == 0 else {}
        writer.write(contents(self._states[rank], self._shares, rank, texts), replace(self._base, step=steps))


def load(
    path: Path, subject: Subject, crew: Crew, states: States
) -> tuple[Kept, dict[str, Tensor], list[str]]:
    """Give the ranks' states what a checkpoint has, or the newest whole one of a folder; called by all ranks.

    Returns it, the values outside of all stages (on rank 0), and what is wrong with newer ones.
    """
    kept, wrong = crew.broadcast(lambda: _found(path))
    crew.together(lambda: _check_fits(kept, subject))

    def check() -> None:
        for rank in states:
            check_files(kept, rank, crew.size)

    crew.together(check)
    keys = {name: key for key, name in subject.keys.items() if name in subject.outside}

    def work() -> dict[str, Tensor]:
        for state in states.values():
            if state is not None:
                restore(state, kept, subject.keys, steps=kept.manifest.step)
        values = weights(kept, keys.values())
        return {name: values[key] for name, key in keys.items()}

    return kept, crew.together(work), wrong


def _found(path: Path) -> tuple[Kept, list[str]]:
    if (path / MANIFEST).exists() or not path.is_dir():
        return opened(path), []
    kept, wrong = newest(path)
    if kept is None:
        detail = f": {wrong[0]}" if wrong else ""
        raise CheckpointError(f"there is no whole checkpoint in {path}{detail}")
    return kept, wrong


def _check_fits(kept: Kept, subject: Subject) -> None:
    """Raise CheckpointError where the run is not the one that the checkpoint is of."""
    manifest, samples = kept.manifest, subject.job.plan.mini_batch
    if manifest.mini_batch != samples:
        raise CheckpointError(
            f"{kept.path} was made with {manifest.mini_batch} samples a step, this run has {samples}: its "
            "place in the data would be another. Use the same mini-batch, or take the weights alone"
        )
    if manifest.seed != subject.seed:
        raise CheckpointError(
            f"{kept.path} was made with seed {manifest.seed}, this run has {subject.seed}: data and dropout "
            "would go another way. Use the same seed, or take the weights alone"
        )
    there, here = set(manifest.part.weights), set(subject.keys)
    for names, what in ((here - there, "lacks"), (there - here, "has, and the model lacks,")):
        if names:
            raise CheckpointError(
                f"{kept.path} is of another model: it {what} {min(names)} ({len(names)} names in all)"
            )
