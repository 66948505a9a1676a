"""SIGTERM and SIGUSR1: the step is finished, a checkpoint written, and the job leaves with a code that a
scheduler can act on.

mpirun hands SIGUSR1 on to every rank and ends the job at once on SIGTERM; `launch.mpirun` and Slurm's srun
hand on both. One rank that gets one is enough.
"""

import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
REQUEUE = 75  # EX_TEMPFAIL of sysexits.h: try again later

Ask = Callable[[str], None]


class Listener:
    """Remembers a signal that comes before there is anybody to tell."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self._ask: Ask | None = None
        self._reason: str | None = None

    def heard(self, number: int, frame: FrameType | None) -> None:
        """A handler of signals."""
        reason = f"{signal.Signals(number).name} on rank {self.rank}"
        if self._ask is not None:
            self._ask(reason)
        elif self._reason is None:
            self._reason = reason

    def tell(self, ask: Ask) -> None:
        """Who is told from now on; at once, if a signal has come."""
        self._ask = ask
        if self._reason is not None:
            ask(self._reason)


@contextmanager
def listening(rank: int) -> Iterator[Listener]:
    """Inside, the signals ask for a stop instead of ending the process; in a main thread, others get none."""
    listener = Listener(rank)
    if threading.current_thread() is not threading.main_thread():
        yield listener
        return
    before = {number: signal.signal(number, listener.heard) for number in SIGNALS}
    try:
        yield listener
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def exit_code(wanted: int | None, environment: Mapping[str, str] = os.environ) -> int:
    """The code of a job that was asked to stop and has kept what it did: as said, else 75 in a batch job,
    which a scheduler can be told to start again, and 0 elsewhere."""
    if wanted is not None:
        return wanted
    return REQUEUE if any(name in environment for name in ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID")) else 0
