"""The ranks that live in this process: one of an MPI job, or all of them as threads."""

import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from gpp.runtime.agreement import agree
from gpp.runtime.communicator import Communicator
from gpp.runtime.environment import lonely, under_mpi
from gpp.runtime.loopback import LoopbackWorld, run
from gpp.runtime.nonfinite import NonFiniteError
from gpp.runtime.reduce import Slots

if TYPE_CHECKING:
    from gpp.runtime.mpi import MpiCommunicator

T = TypeVar("T")


class RefusedError(ValueError):
    """Something that no rank goes on with; every rank raises it with the same words."""


class Crew:
    """The ranks of this process. `comm` is the MPI job's; None: `ranks` threads are all there is. `job` is
    what is to be closed at the end, if that is the crew's to do."""

    def __init__(
        self, comm: Communicator | None, ranks: int = 1, job: "MpiCommunicator | None" = None
    ) -> None:
        self.job = job
        self.alone = comm is None
        self.world = LoopbackWorld(ranks if comm is None else 1)
        self.comm: Communicator = self.world.communicators[0] if comm is None else comm
        self.size = ranks if comm is None else comm.size
        self.mine = range(ranks) if comm is None else range(comm.rank, comm.rank + 1)
        self._flags = Slots()
        if not self.alone:
            torch.set_num_threads(self.threads)

    @property
    def is_first(self) -> bool:
        """Whether rank 0 is here."""
        return 0 in self.mine

    @property
    def threads(self) -> int:
        """torch threads of each rank: what OMP_NUM_THREADS says, else a fair share of the host's cores."""
        here = self.size if self.alone else self.comm.hosts.count(self.comm.hosts[self.comm.rank])
        return threads_of_a_rank(here)

    def run(self, work: Callable[[Communicator], T]) -> list[T]:
        """`work` for each rank of this process, in which ranks may wait for one another. By rank. A rank that
        leaves from in there would let the others wait for ever: that is an error like others."""
        if self.alone:
            return run(self.world, work, self.threads)
        try:
            return [work(self.comm)]
        except SystemExit as problem:
            raise _left(problem) from problem

    def broadcast(self, make: Callable[[], T]) -> T:
        """`make()` on rank 0 alone, whose value or exception every process gets."""
        return make() if self.alone else self.comm.broadcast_object(make)

    def of_first(self, make: Callable[[], T]) -> T:
        """`make()` on rank 0 alone, whose value every process gets. If it fails, see `together`."""
        made = self.together(lambda: [make()] if self.is_first else [])
        return self.broadcast(lambda: made[0])

    def all_gather(self, value: T) -> list[T]:
        """Every process's value."""
        return [value] if self.alone else self.comm.all_gather_object(value)

    def first_error(self, error: str | None) -> str | None:
        """The error of the first rank that has one, on all ranks: one number a rank where none has."""
        if self.alone:
            return error
        everyone = tuple(range(self.comm.size))
        flags = self._flags.gather(self.comm, everyone, [float(error is not None)])
        return agree(self.comm, error) if any(flag for (flag,) in flags) else None

    def close(self) -> None:
        """The end of a job that `connected` found; called by all ranks."""
        if self.job is not None:
            self.job.close()
            if isinstance(sys.excepthook, _EndsJob) and sys.excepthook.comm is self.job:
                sys.excepthook = sys.excepthook.before

    def together(self, make: Callable[[], T]) -> T:
        """`make()` in every process, in which none waits for another. If it fails in one, that one raises
        its own exception, and the others RefusedError with its words."""
        if self.alone:
            return make()
        error: Exception | None = None
        try:
            value = make()
        except SystemExit as problem:
            error = _left(problem)
        except Exception as problem:
            error = problem
        first = agree(self.comm, None if error is None else f"{error}" or type(error).__name__)
        if error is not None:
            raise error
        if first is not None:
            raise RefusedError(first)
        return value


def _left(problem: SystemExit) -> RuntimeError:
    """The error that it is to leave where other ranks wait."""
    return RuntimeError(
        f"something called sys.exit({problem.code!r}) while other ranks wait for this one: an exception "
        "would say why"
    )


def threads_of_a_rank(ranks_here: int) -> int:
    """torch threads of each rank: what OMP_NUM_THREADS says, else a fair share of the cores."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    if given.isdigit() and int(given) > 0:
        return int(given)
    return max(1, len(os.sched_getaffinity(0)) // ranks_here)


def connected() -> "MpiCommunicator | None":
    """The MPI job that a launcher started this process in, None without one.

    From then on an exception that nobody handles ends the whole job: a process that only left would let the
    others wait for ever. Raises RefusedError for processes that do not find each other.
    """
    if not under_mpi():
        if (reason := lonely()) is not None:
            raise RefusedError(reason)
        return None
    from gpp.runtime.mpi import connect

    comm = connect()
    sys.excepthook = _EndsJob(comm, sys.excepthook)
    return comm


@dataclass(frozen=True)
class _EndsJob:
    """What an exception that nobody handles goes to while there is a job."""

    comm: "MpiCommunicator"
    before: Callable[..., Any]

    def __call__(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if issubclass(kind, RefusedError) or self.comm.size == 1:  # every rank has it, and leaves
            self.before(kind, error, trace)
            return
        if issubclass(kind, NonFiniteError):  # so has it here, and one says it
            if self.comm.rank == 0:
                self.before(kind, error, trace)
            return
        text = "".join(traceback.format_exception_only(kind, error)).rstrip()
        self.comm.fail(text, "".join(traceback.format_exception(kind, error, trace)), 1, shown=True)
