"""Errors of any rank end all ranks, with one readable message.

Hydra turns an exception into an exit of its own rank, and MPI then waits for the others for ever: so tasks
catch their errors inside.
"""

import os
import sys
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, NoReturn, TypeVar

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from .start import refuse

if TYPE_CHECKING:
    from gpp.runtime.communicator import Communicator

T = TypeVar("T")

# What a user can mend; anything else is a fault of this program and shows its traceback.
_EXPECTED = (ValueError, OSError, ImportError, HydraException, OmegaConfBaseException)


def together(comm: "Communicator", make: Callable[[], T]) -> T:
    """`make()` on every rank; if it fails on any, all ranks end and rank 0 says why.

    For what comes before training: no rank waits for messages of another inside `make`.
    """
    from gpp.runtime.agreement import agree

    value: T | None = None
    error: str | None = None
    try:
        value = make()
    except Exception as problem:
        error = explain(problem)
    first = agree(comm, error)
    if first is not None:
        _leave(comm.rank, first.removeprefix("rank 0: "))
    return value  # type: ignore[return-value]


def alone(comm: "Communicator", run: Callable[[], T]) -> T:
    """`run()` on every rank; ranks may wait for each other in it. A failing one says why and ends the job."""
    try:
        return run()
    except SystemExit:
        raise
    except BaseException as problem:
        print(f"error: rank {comm.rank}: {explain(problem)}", file=sys.__stderr__, flush=True)
        comm.abort(1)


def explain(problem: BaseException) -> str:
    """The message of an error that a user can mend, and the traceback of any other."""
    from gpp.runtime.agreement import DisagreementError
    from gpp.runtime.communicator import CommunicationError

    expected = isinstance(problem, (*_EXPECTED, DisagreementError, CommunicationError))
    if expected and not os.environ.get("GPP_TRACEBACK"):
        return str(problem) or type(problem).__name__
    return "".join(traceback.format_exception(problem)).rstrip()


def _leave(rank: int, text: str) -> NoReturn:
    if rank == 0:
        refuse(text)
    raise SystemExit(1)
