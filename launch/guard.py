"""Errors of any rank end all ranks, with one readable message.

Hydra turns an exception into an exit of its own rank, and MPI then waits for the others for ever: so tasks
run inside `guarded`, and what all ranks do before training inside `together`.
"""

import os
import sys
import time
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, NoReturn, TypeVar

from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from gpp.runtime.environment import TRACEBACK

if TYPE_CHECKING:
    from gpp.runtime.communicator import Communicator
    from gpp.runtime.mpi import MpiCommunicator

T = TypeVar("T")

# What a user can mend; anything else is a fault of this program and shows its traceback.
_EXPECTED = (ValueError, OSError, ImportError, HydraException, OmegaConfBaseException)
# By name, since importing them would import torch.
_EXPECTED_NAMES = (
    *("DisagreementError", "CommunicationError", "StalledError", "DeviceMemoryError", "NonFiniteError"),
)

# Lines of Hydra's messages that say nothing about the mistake.
_NOISE = ("Config search path", "provider=", "full_key:", "object_type=", "See https://hydra.cc")


GRACE = 1.0  # seconds


class Leaving(SystemExit):
    """Every rank ends now, and what is to be said has been said."""


def refuse(text: str) -> NoReturn:
    """One readable message, and the end of this process."""
    print(f"error: {text}", file=sys.stderr, flush=True)
    raise Leaving(1)


def together(comm: "Communicator", make: Callable[[], T]) -> T:
    """`make()` on every rank; if it fails on any, all ranks end and rank 0 says why.

    For what comes before training: no rank waits for messages of another inside `make`.
    """
    value: T | None = None
    error: str | None = None
    try:
        value = make()
    except Exception as problem:
        error = explain(problem)
    leave_if(comm, error)
    return value  # type: ignore[return-value]


def leave_if(comm: "Communicator", error: str | None) -> None:
    """End every rank if any has an error; rank 0 prints the first. Called by all ranks."""
    from gpp.runtime.agreement import agree

    first = agree(comm, error)
    if first is None:
        return
    if comm.rank == 0:
        refuse(first.removeprefix("rank 0: "))
    raise Leaving(1)


def first_rank(comm: "Communicator | None", work: Callable[[], None]) -> None:
    """`work()` once, on rank 0 if there are several; the others wait, and end with it if it fails."""
    if comm is None:
        work()
    else:
        together(comm, lambda: comm.broadcast_object(work))


def guarded(comm: "MpiCommunicator | None", run: Callable[[], T]) -> T:
    """`run()`, in which ranks may wait for each other. A rank that fails says why and ends the job; it must
    not just exit, since leaving MPI waits for the others.
    """
    try:
        return run()
    except Leaving:
        raise
    except BaseException as problem:
        if type(problem).__name__ == "NonFiniteError":  # every rank has it, none waits for another
            if comm is None or comm.rank == 0:
                print(f"error: {explain(problem)}", file=sys.stderr, flush=True)
            raise Leaving(1) from None
        several = comm is not None and comm.size > 1
        code = 130 if isinstance(problem, KeyboardInterrupt) else 1
        if comm is not None and several:
            if comm.rank > 0 and comm.watch is None:
                time.sleep(
                    GRACE
                )  # what fails on several ranks is said by the first alone: it ends the others
            error, details = explain(problem), "".join(traceback.format_exception(problem))
            unexpected = "\nTraceback" in f"\n{error}"
            said = "".join(traceback.format_exception_only(problem)).rstrip() if unexpected else error
            comm.fail(said, details, code, shown=unexpected)
        print(f"error: {explain(problem)}", file=sys.stderr, flush=True)
        raise Leaving(code) from None


def explain(problem: BaseException) -> str:
    """The message of an error that a user can mend, and the traceback of any other."""
    if os.environ.get(TRACEBACK):
        return "".join(traceback.format_exception(problem)).rstrip()
    if isinstance(problem, KeyboardInterrupt):
        return "interrupted"
    if isinstance(problem, SystemExit):
        return f"something called sys.exit({problem.code!r}); an exception would say why"
    if isinstance(problem, _EXPECTED) or type(problem).__name__ in _EXPECTED_NAMES:
        return "\n".join([str(problem) or type(problem).__name__, *getattr(problem, "__notes__", ())])
    return "".join(traceback.format_exception(problem)).rstrip()


def explain_composition(problem: Exception) -> str:
    """What Hydra says of a command line or a file that it cannot compose, in one paragraph."""
    if os.environ.get(TRACEBACK) or not isinstance(problem, _EXPECTED):
        return explain(problem)
    cause = problem.__cause__
    known = isinstance(cause, OmegaConfBaseException)
    text = f"{problem}\n{cause}" if known and str(cause) not in str(problem) else str(problem)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    kept = dict.fromkeys(line.rstrip(".") for line in lines if not line.startswith(_NOISE))
    siblings = getattr(cause, "parent_node", None)
    if isinstance(siblings, DictConfig):
        kept[f"there are {', '.join(map(str, siblings))}"] = None
    return "; ".join(kept).replace(":; ", ": ")
