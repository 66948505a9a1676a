"""When a pipeline's checkpoints are written, and by whom."""

import os
import secrets
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from gpp.checkpoint.folder import check_place, check_space, mark_of, settle
from gpp.checkpoint.manifest import Manifest, Order, Part
from gpp.checkpoint.owners import owners
from gpp.checkpoint.tensors import CheckpointError
from gpp.checkpoint.writer import CheckpointWriter
from gpp.runtime.communicator import RanksLostError
from gpp.runtime.copies import Copies
from gpp.runtime.saving import Shares, contents

from .checkpoints import Checkpoints, States, Subject
from .crew import Crew
from .job import holders_of, sizes_of
from .memory import why_not

SEEN_WITHIN = 10.0  # seconds for a file to be seen by all hosts: network file systems remember what was not


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

    def around(self, rank: int, start: int, stop: int, fit: Callable[[Callable[[int], None]], int]) -> int:
        """`fit(between)` trains the steps [start, stop) on a rank and returns how many there are by then; its
        checkpoints are written beside it, and on return the last one is on disk. Returns what it returns."""
        try:
            self._at_start(rank, start)
            made = fit(self._between(rank, stop))
            self._crew.comm.doing.now("writes a checkpoint")
            if made < stop:
                self._at_stop(rank, made)
            self._finish(rank)
        except RanksLostError:
            self._abandon()  # those who are left go on in the same folder
            raise
        except BaseException:
            self._give_up()  # threads of this process must not wait for this rank's part
            raise
        return made

    def _at_start(self, rank: int, steps: int) -> None:
        """What a rank does before its first step: after ranks are lost, what is left of older copies lies
        on one host alone."""
        if self._copies is not None and steps:
            self._write(rank, steps, on_disk=False, in_memory=True)

    def _between(self, rank: int, stop: int) -> Callable[[int], None]:
        """What a rank does between steps, of which there will be `stop`."""
        every, memory = self.checkpoints.every, self.checkpoints.memory

        def between(steps: int) -> None:
            last = steps == stop
            on_disk = every is not None and (steps % every == 0 or last)
            in_memory = memory is not None and steps % memory.every == 0 and not last
            self._write(rank, steps, on_disk=on_disk, in_memory=in_memory)

        return between

    def _at_stop(self, rank: int, steps: int) -> None:
        """What a rank does if all stopped earlier than they were to; without steps there is nothing new."""
        if self._begun < steps and (self.checkpoints.every is None or steps % self.checkpoints.every):
            self._write(rank, steps, on_disk=True)

    def _finish(self, rank: int) -> None:
        """Until a rank's part is on disk; on rank 0 until the whole checkpoint is."""
        self._writers[rank].wait(self._crew.comm.check)
        if self._copies is not None:
            self._copies.wait()

    def _give_up(self) -> None:
        """The ranks are failing: wait for none of them."""
        for writer in self._writers.values():
            writer.give_up()

    def _abandon(self) -> None:
        """Others may write here from now on: what these writers have begun is over, and not whole."""
        self._give_up()
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
            self._give_up()
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
