"""When a pipeline's checkpoints are written, by whom, and how one is read."""

import os
import secrets
import socket
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor

from gpp.checkpoint.folder import (
    Kept,
    check_bytes,
    check_place,
    check_space,
    mark_of,
    newest,
    opened,
    settle,
)
from gpp.checkpoint.manifest import MANIFEST, Manifest, Order, Part, check_name
from gpp.checkpoint.owners import owners
from gpp.checkpoint.reader import weights
from gpp.checkpoint.shelf import Copy, Shelf
from gpp.checkpoint.tensors import CheckpointError
from gpp.checkpoint.writer import CheckpointWriter
from gpp.runtime.copies import Copies
from gpp.runtime.saving import Shares, contents, files_of, restore
from gpp.runtime.state import StageState

from .crew import Crew
from .job import Job, holders_of, sizes_of
from .memory import InMemory, brought, why_not

SEEN_WITHIN = 10.0  # seconds for a file to be seen by all hosts: network file systems remember what was not

_OR_WEIGHTS = ", or take the weights alone (launch.export and train.init_from)"

States = Mapping[int, StageState | None]  # of the ranks of this process; None: an idle rank


@dataclass(frozen=True, kw_only=True)
class Checkpoints:
    """Where checkpoints go: `folder`, which all ranks see. The newest `keep` stay; in `fit` one is written
    every `every` steps (None: only by `save`). `texts` are small files to be kept with each. `memory`: `fit`
    makes copies in memory beside them, for those who go on if ranks are lost."""

    folder: Path
    every: int | None = None
    keep: int = 2
    texts: Mapping[str, str] = field(default_factory=dict)
    memory: InMemory | None = None

    def __post_init__(self) -> None:
        for name, value in (("every", 1 if self.every is None else self.every), ("keep", self.keep)):
            if value < 1:
                raise CheckpointError(f"{name} of Checkpoints must be at least 1, it is {value}")
        for name in self.texts:
            check_name(name, "texts of Checkpoints")


@dataclass(frozen=True)
class Subject:
    """What a checkpoint is of: the job, the keys of the module's state_dict with the names behind them, the
    values of those that are in no stage (on rank 0), buffers without a key that training changes, seed, decay
    of the moving average, and the bytes that the optimizer keeps for each byte of parameters."""

    job: Job
    keys: Mapping[str, str]
    outside: Mapping[str, Tensor]
    hidden: tuple[str, ...]
    seed: int
    ema: float | None
    optimizer_factor: float

    @property
    def bytes(self) -> float:
        """About the size of a checkpoint."""
        return self.bytes_of((*self.keys.values(), *self.hidden))

    def bytes_of(self, names: Iterable[str]) -> float:
        """About what these parameters and buffers take of it."""
        sizes = sizes_of(self.job)
        found = [name for name in names if name in sizes]
        trained = sum(sizes[name] for name in {*found}.intersection(self.job.captured.traced.trainable))
        return sum(sizes[name] for name in found) + trained * (self.optimizer_factor + (self.ema is not None))


class Saving:
    """The writers of the ranks of this process; made by all ranks together. `skipped` says how many steps a
    rank has skipped so far: learning rates did not move in them."""

    def __init__(
        self,
        checkpoints: Checkpoints,
        subject: Subject,
        crew: Crew,
        states: States,
        skipped: Callable[[int], int],
    ) -> None:
        self.checkpoints = checkpoints
        self._skipped = skipped
        self._subject = subject
        self._states = states
        self._crew = crew
        job = subject.job
        shares = owners(holders_of(job), sizes_of(job), crew.size)
        self._shares = Shares(shares, subject.keys, subject.outside, subject.hidden)
        self._base = Manifest(0, job.plan.mini_batch, subject.seed, subject.ema, Part({}, {}, {}, {}))
        self._writers = {
            rank: CheckpointWriter(checkpoints.folder, rank, crew.size, checkpoints.keep) for rank in states
        }
        self._copies: Copies | None = None
        self._begun = 0

    def begin(self, steps: int, order: Order | None) -> None:
        """Be ready to write, after so many steps on data of that order; called by all ranks together. Raises
        CheckpointError where the folder cannot be written to, is not the same on all hosts, or has not enough
        space."""
        folder, token = self.checkpoints.folder, ""
        self._begun = steps
        self._base = replace(self._base, order=order)

        def rest() -> None:
            for writer in self._writers.values():
                writer.begin_anew()
                writer.wait()

        def ready() -> str:
            settle(folder, steps)
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

    def begin_copies(self) -> None:
        """Be ready for copies in memory, if there are to be any and they have room; called by all ranks."""
        memory, crew = self.checkpoints.memory, self._crew
        if memory is None or self._copies is not None or crew.alone or crew.size == 1:
            return
        sizes = [self._subject.bytes_of(self._shares.owners.names_of(rank)) for rank in range(crew.size)]
        reason = why_not(memory.shelf, sizes, crew)
        if reason is None:
            self._copies = Copies(crew.comm, memory.shelf, crew.comm.hosts, memory.say)
            return
        if crew.is_first:
            memory.say(f"no copies in memory, only checkpoints on disk: {reason}")

    def at_start(self, rank: int, steps: int) -> None:
        """What a rank does before its first step: after ranks are lost, what is left of older copies lies
        on one host alone."""
        if self._copies is not None and steps:
            self._write(rank, steps, on_disk=False, in_memory=True)

    def between(self, rank: int, stop: int) -> Callable[[int], None]:
        """What a rank does between steps, of which there will be `stop`."""
        every, memory = self.checkpoints.every, self.checkpoints.memory

        def between(steps: int) -> None:
            last = steps == stop
            on_disk = every is not None and (steps % every == 0 or last)
            in_memory = memory is not None and steps % memory.every == 0 and not last
            self._write(rank, steps, on_disk=on_disk, in_memory=in_memory)

        return between

    def at_stop(self, rank: int, steps: int) -> None:
        """What a rank does if all stopped earlier than they were to; without steps there is nothing new."""
        if self._begun < steps and (self.checkpoints.every is None or steps % self.checkpoints.every):
            self._write(rank, steps, on_disk=True)

    def finish(self, rank: int) -> None:
        """Until a rank's part is on disk; on rank 0 until the whole checkpoint is."""
        self._writers[rank].wait(self._crew.comm.check)
        if self._copies is not None:
            self._copies.wait()

    def give_up(self) -> None:
        """The ranks are failing: wait for none of them."""
        for writer in self._writers.values():
            writer.give_up()

    def abandon(self) -> None:
        """Others may write here from now on: what these writers have begun is over, and not whole."""
        self.give_up()
        for writer in self._writers.values():
            writer.begin_anew()
        if self._copies is not None:
            self._copies.abandon()

    def save(self, steps: int) -> None:
        """Write a checkpoint, and wait until it is on disk; called by all ranks together, after `begin`."""

        def parts() -> None:
            for rank in self._states:
                self._write(rank, steps, on_disk=True)
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

    def _write(self, rank: int, steps: int, *, on_disk: bool, in_memory: bool = False) -> None:
        """Begin what is due; what is under way goes on."""
        writer, copies = self._writers[rank], self._copies if in_memory else None
        if on_disk:
            writer.wait(self._crew.comm.check)  # before another copy of the weights is made
        else:
            writer.check()
        if copies is not None:
            copies.wait()
        elif self._copies is not None:
            self._copies.poll()
        if on_disk or copies is not None:
            made = contents(
                self._states[rank], self._shares, rank, self.checkpoints.texts if rank == 0 else {}
            )
            manifest = replace(self._base, step=steps, skipped=self._skipped(rank))
            if on_disk:
                writer.write(made, manifest)
            if copies is not None:
                copies.take(made, manifest)


def find(path: Path, damaged: Mapping[Path, str]) -> tuple[Kept, list[str]]:
    """A checkpoint, or the newest whole one of a folder, and what is wrong with newer ones; `damaged` says
    what is known to be wrong. Raises CheckpointError where there is none."""
    if (path / MANIFEST).exists() or not path.is_dir():
        if path in damaged:
            raise CheckpointError(damaged[path])
        return opened(path), []
    kept, wrong = newest(path, damaged)
    if kept is None:
        detail = f": {wrong[0]}" if wrong else ""
        raise CheckpointError(f"there is no whole checkpoint in {path}{detail}")
    return kept, wrong


def find_sound(
    path: Path, crew: Crew, check: Callable[[Kept], None] = lambda _: None
) -> tuple[Kept, list[str]]:
    """A checkpoint, or the newest of a folder of which all bytes are what was written, and what is wrong with
    newer ones; called by all ranks, each of which reads a share of the files. `check` refuses one that does
    not fit before they are read. Raises CheckpointError where there is none."""
    damaged: dict[Path, str] = {}
    while True:
        kept, wrong = crew.of_first(lambda: find(path, damaged))
        error = _damage(kept, crew, check)
        if error is None:
            return kept, wrong
        damaged[kept.path] = error.removeprefix("rank 0: ")


def _damage(kept: Kept, crew: Crew, check: Callable[[Kept], None]) -> str | None:
    """What is wrong with the bytes of a checkpoint: the same on all ranks, whichever has found it."""
    crew.together(lambda: check(kept))

    def look() -> str | None:
        try:
            for rank in crew.mine:
                check_bytes(kept, rank, crew.size)
        except CheckpointError as error:
            return str(error)
        return None

    return crew.first_error(crew.together(look))


def load(
    path: Path, subject: Subject, crew: Crew, states: States, order: Order | None
) -> tuple[Kept, dict[str, Tensor], list[str]]:
    """Give the ranks' states what a checkpoint has, or the newest whole one of a folder; called by all ranks.
    `order` is that of the data with which training goes on, if it is known.

    Returns it, the values outside of all stages (on rank 0), and what is wrong with newer ones.
    """
    kept, wrong = find_sound(path, crew, lambda kept: _check_fits(kept, subject, order))
    return kept, crew.together(lambda: _taken(kept, subject, states)), wrong


def recall(
    shelf: Shelf, copy: Copy, subject: Subject, crew: Crew, states: States, order: Order | None
) -> tuple[Kept, dict[str, Tensor]]:
    """As `load`, from a copy in memory. Raises CheckpointError, on all ranks, where it is of no use; the
    states are then as they were."""
    part = copy.manifest.part
    crew.together(lambda: _check_fits(Kept(shelf.path / copy.name, copy.manifest), subject, order))
    needed = {
        file for state in states.values() for file in files_of(state, part, subject.keys, subject.hidden)
    }
    needed |= {part.weights[key] for key in _outside(subject).values()}
    kept = brought(shelf, copy, needed, crew)
    return kept, crew.together(lambda: _taken(kept, subject, states))


def _outside(subject: Subject) -> dict[str, str]:
    """The keys of the values in no stage by name, on rank 0."""
    return {name: key for key, name in subject.keys.items() if name in subject.outside}


def _taken(kept: Kept, subject: Subject, states: States) -> dict[str, Tensor]:
    for state in states.values():
        if state is not None:
            updates = kept.manifest.step - kept.manifest.skipped
            restore(state, kept, subject.keys, subject.hidden, steps=updates)
    keys = _outside(subject)
    values = weights(kept, keys.values())
    return {name: values[key].clone() for name, key in keys.items()}


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


def _check_fits(kept: Kept, subject: Subject, order: Order | None) -> None:
    """Raise CheckpointError where the run is not the one that the checkpoint is of."""
    manifest, samples = kept.manifest, subject.job.plan.mini_batch
    if manifest.mini_batch != samples:
        raise CheckpointError(
            f"{kept.path} was made with {manifest.mini_batch} samples a step, this run has {samples}: its "
            f"place in the data would be another. Use the same mini-batch{_OR_WEIGHTS}"
        )
    if manifest.seed != subject.seed:
        raise CheckpointError(
            f"{kept.path} was made with seed {manifest.seed}, this run has {subject.seed}: data and dropout "
            f"would go another way. Use the same seed{_OR_WEIGHTS}"
        )
    if manifest.order is not None and order is not None and manifest.order != order:
        there, here = manifest.order, order
        raise CheckpointError(
            f"{kept.path} was made on {there.samples} training samples in the order of seed {there.seed}, "
            f"this run has {here.samples} in the order of seed {here.seed}: the rest of an epoch would be of "
            f"other samples. Use the same data, of which as many are held out{_OR_WEIGHTS}"
        )
    part = manifest.part
    for there_are, here_are in ((part.weights, subject.keys), (part.buffers, subject.hidden)):
        lacks, has = set(here_are) - set(there_are), set(there_are) - set(here_are)
        for names, what in ((lacks, "lacks"), (has, "has, and the model lacks,")):
            if names:
                raise CheckpointError(
                    f"{kept.path} is of another model: it {what} {min(names)} ({len(names)} names in all)"
                )
