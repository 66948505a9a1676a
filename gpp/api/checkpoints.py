"""When a pipeline's checkpoints are written, by whom, and how one is read."""

import os
import secrets
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor

from gpp.checkpoint.folder import Kept, check_place, check_space, mark_of, newest, opened, settle
from gpp.checkpoint.manifest import MANIFEST, Manifest, Part, check_name
from gpp.checkpoint.owners import owners
from gpp.checkpoint.reader import check_files, weights
from gpp.checkpoint.tensors import CheckpointError
from gpp.checkpoint.writer import CheckpointWriter
from gpp.runtime.saving import Shares, contents, restore
from gpp.runtime.state import StageState

from .crew import Crew
from .job import Job, holders_of, sizes_of

SEEN_WITHIN = 10.0  # seconds for a file to be seen by all hosts: network file systems remember what was not

States = Mapping[int, StageState | None]  # of the ranks of this process; None: an idle rank


@dataclass(frozen=True, kw_only=True)
class Checkpoints:
    """Where checkpoints go: `folder`, which all ranks see. The newest `keep` stay; in `fit` one is written
    every `every` steps (None: only by `save`). `texts` are small files to be kept with each."""

    folder: Path
    every: int | None = None
    keep: int = 2
    texts: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, value in (("every", 1 if self.every is None else self.every), ("keep", self.keep)):
            if value < 1:
                raise CheckpointError(f"{name} of Checkpoints must be at least 1, it is {value}")
        for name in self.texts:
            check_name(name, "texts of Checkpoints")


@dataclass(frozen=True)
class Subject:
    """What a checkpoint is of: the job, the keys of the module's state_dict with the names behind them, the
    values of those that are in no stage (on rank 0), seed, decay of the moving average, and the bytes that
    the optimizer keeps for each byte of parameters."""

    job: Job
    keys: Mapping[str, str]
    outside: Mapping[str, Tensor]
    seed: int
    ema: float | None
    optimizer_factor: float

    @property
    def bytes(self) -> float:
        """About the size of a checkpoint."""
        sizes = sizes_of(self.job)
        trained = sum(sizes[name] for name in self.job.captured.traced.trainable if name in sizes)
        saved = sum(sizes[name] for name in self.keys.values() if name in sizes)
        return saved + trained * (self.optimizer_factor + (self.ema is not None))


class Saving:
    """The writers of the ranks of this process; made by all ranks together."""

    def __init__(self, checkpoints: Checkpoints, subject: Subject, crew: Crew, states: States) -> None:
        self.checkpoints = checkpoints
        self._subject = subject
        self._states = states
        self._crew = crew
        job = subject.job
        shares = owners(holders_of(job), sizes_of(job), crew.size)
        self._shares = Shares(shares, subject.keys, subject.outside)
        self._base = Manifest(0, job.plan.mini_batch, subject.seed, subject.ema, Part({}, {}, {}, {}))
        self._writers = {
            rank: CheckpointWriter(checkpoints.folder, rank, crew.size, checkpoints.keep) for rank in states
        }
        self._begun = 0

    def begin(self, steps: int) -> None:
        """Be ready to write, after so many steps; called by all ranks together. Raises CheckpointError where
        the folder cannot be written to, is not the same on all hosts, or has not enough space."""
        folder, token = self.checkpoints.folder, ""
        self._begun = steps

        def rest() -> None:
            for writer in self._writers.values():
                writer.begin_anew()
                writer.wait()

        def ready() -> str:
            settle(folder)
            check_place(folder, steps)
            check_space(folder, self._subject.bytes, self.checkpoints.keep)
            made = secrets.token_hex(8)
            try:
                mark_of(folder, made).touch(exist_ok=False)
            except OSError as error:
                raise CheckpointError(f"{folder} cannot be written to: {error.strerror or error}") from error
            return made

        self._crew.together(rest)
        token = self._crew.of_first(ready)
        try:
            self._crew.together(lambda: _look(folder, token))
        finally:
            if self._crew.is_first:
                mark_of(folder, token).unlink(missing_ok=True)

    def between(self, rank: int, stop: int) -> Callable[[int], None]:
        """What a rank does between steps, of which there will be `stop`."""
        every = self.checkpoints.every

        def between(steps: int) -> None:
            if every is not None and (steps % every == 0 or steps == stop):
                self._write(rank, steps)
            else:
                self._writers[rank].check()

        return between

    def at_stop(self, rank: int, steps: int) -> None:
        """What a rank does if all stopped earlier than they were to; without steps there is nothing new."""
        if self._begun < steps and (self.checkpoints.every is None or steps % self.checkpoints.every):
            self._write(rank, steps)

    def finish(self, rank: int) -> None:
        """Until a rank's part is on disk; on rank 0 until the whole checkpoint is."""
        self._writers[rank].wait(self._crew.comm.check)

    def give_up(self) -> None:
        """The ranks are failing: wait for none of them."""
        for writer in self._writers.values():
            writer.give_up()

    def abandon(self) -> None:
        """Others may write here from now on: what these writers have begun is over, and not whole."""
        self.give_up()
        for writer in self._writers.values():
            writer.begin_anew()

    def save(self, steps: int) -> None:
        """Write a checkpoint, and wait until it is on disk; called by all ranks together, after `begin`."""

        def parts() -> None:
            for rank in self._states:
                self._write(rank, steps)
            for writer in self._writers.values():
                writer.wait_for_part()

        def whole() -> None:
            for writer in self._writers.values():
                writer.wait()

        try:
            self._crew.together(parts)
        except BaseException:
            self.give_up()
            raise
        self._crew.together(whole)

    def _write(self, rank: int, steps: int) -> None:
        writer = self._writers[rank]
        writer.wait(self._crew.comm.check)  # before another copy of the weights is made
        texts = self.checkpoints.texts if rank == 0 else {}
        writer.write(contents(self._states[rank], self._shares, rank, texts), replace(self._base, step=steps))


def find(path: Path) -> tuple[Kept, list[str]]:
    """A checkpoint, or the newest whole one of a folder, and what is wrong with newer ones. Raises
    CheckpointError where there is none."""
    if (path / MANIFEST).exists() or not path.is_dir():
        return opened(path), []
    kept, wrong = newest(path)
    if kept is None:
        detail = f": {wrong[0]}" if wrong else ""
        raise CheckpointError(f"there is no whole checkpoint in {path}{detail}")
    return kept, wrong


def load(
    path: Path, subject: Subject, crew: Crew, states: States
) -> tuple[Kept, dict[str, Tensor], list[str]]:
    """Give the ranks' states what a checkpoint has, or the newest whole one of a folder; called by all ranks.

    Returns it, the values outside of all stages (on rank 0), and what is wrong with newer ones.
    """
    kept, wrong = crew.of_first(lambda: find(path))
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


def _look(folder: Path, token: str) -> None:
    """Raise CheckpointError unless the mark that rank 0 has made is seen here."""
    end = time.monotonic() + SEEN_WITHIN
    while not mark_of(folder, token).exists():
        if time.monotonic() > end:
            raise CheckpointError(
                f"{folder} on host {socket.gethostname()} is not the folder that rank 0 sees: all ranks "
                "write checkpoints, give them a folder that all hosts share (train.checkpoint_folder)"
            )
        time.sleep(0.05)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise CheckpointError(f"{folder} cannot be written to on host {socket.gethostname()}")


def _check_fits(kept: Kept, subject: Subject) -> None:
    """Raise CheckpointError where the run is not the one that the checkpoint is of."""
    manifest, samples = kept.manifest, subject.job.plan.mini_batch
    if manifest.mini_batch != samples:
        raise CheckpointError(
            f"{kept.path} was made with {manifest.mini_batch} samples a step, this run has {samples}: its "
            "place in the data would be another. Use the same mini-batch, or take the weights alone "
            "(launch.export and train.init_from)"
        )
    if manifest.seed != subject.seed:
        raise CheckpointError(
            f"{kept.path} was made with seed {manifest.seed}, this run has {subject.seed}: data and dropout "
            "would go another way. Use the same seed, or take the weights alone (launch.export and "
            "train.init_from)"
        )
    there, here = set(manifest.part.weights), set(subject.keys)
    for names, what in ((here - there, "lacks"), (there - here, "has, and the model lacks,")):
        if names:
            raise CheckpointError(
                f"{kept.path} is of another model: it {what} {min(names)} ({len(names)} names in all)"
            )
