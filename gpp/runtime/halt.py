"""Ranks that are asked to stop agree on the step after which all of them do, at no cost while nobody asks.

Steps of a pipeline overlap, so ranks are not at the same one. Once asked, every rank says how many steps it
has begun, and begins no other before all have said so; the most that anyone has begun is where all stop.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from threading import RLock  # a handler of signals may interrupt who holds it

REST = 1e-3  # seconds between two looks


class Board:
    """What ranks have said: one for a job. `pause(reason)` and `until(step)` go to every rank."""

    def __init__(self, size: int, pause: Callable[[str], None], until: Callable[[int], None]) -> None:
        self._size, self._pause, self._until = size, pause, until
        self._reason: str | None = None
        self._begun: dict[int, int] = {}

    def ask(self, reason: str) -> None:
        """All are to stop; the first reason counts."""
        if self._reason is None:
            self._reason = reason
            self._pause(reason)

    def begun(self, rank: int, steps: int) -> None:
        """A rank has begun so many steps, and begins no other by itself."""
        if rank not in self._begun:
            self._begun[rank] = steps
            if len(self._begun) == self._size:
                self._until(max(self._begun.values()))


class Halt:
    """A rank's side of it. `ask(reason)` and `begun(steps)` bring a request and an answer to the board;
    `paused` and `until` bring its messages here, from any thread."""

    def __init__(
        self,
        ask: Callable[[str], None],
        begun: Callable[[int], None],
        lock: AbstractContextManager[bool] | None = None,
    ) -> None:
        self._ask, self._say_begun = ask, begun
        self._lock: AbstractContextManager[bool] = RLock() if lock is None else lock
        self._reason: str | None = None
        self._told = False
        self._begun: int | None = None  # steps that this rank has begun, the one that it is in with them
        self._until: int | None = None

    @property
    def reason(self) -> str | None:
        """Why all are to stop, if they are."""
        return self._reason

    def ask(self, reason: str) -> None:
        """All ranks are to stop after the step that they are in. Safe in a signal handler."""
        self._ask(reason)

    def may_begin(self, step: int) -> bool:
        """Whether a rank that has made `step` steps may begin the next; if not, `last` knows more."""
        with self._lock:
            if self._reason is None:
                self._begun = step + 1
            return self._reason is None

    def last(self, steps: int, rest: Callable[[float], None]) -> int:
        """The number of steps after which all stop, on a rank that has made `steps`; waits until all have
        said theirs. `rest(seconds)` lets messages get on."""
        with self._lock:
            self._tell(steps)
        while self._until is None:
            rest(REST)
        return self._until

    def paused(self, reason: str) -> None:
        """The board says that all are to stop. A rank within a step says that it has begun it: it may need
        others' messages to end it."""
        with self._lock:
            if self._reason is None:
                self._reason = reason
                if self._begun is not None:
                    self._tell(self._begun)

    def until(self, steps: int) -> None:
        """The board says after which step."""
        self._until = steps

    def _tell(self, steps: int) -> None:
        if not self._told:
            self._told = True
            self._say_begun(steps)


def halts(size: int) -> Sequence[Halt]:
    """Those of ranks that are threads of one process, by rank."""
    lock = RLock()
    found: list[Halt] = []

    def pause(reason: str) -> None:
        for halt in found:
            halt.paused(reason)

    def until(steps: int) -> None:
        for halt in found:
            halt.until(steps)

    board = Board(size, pause, until)

    def of(rank: int) -> Halt:
        def ask(reason: str) -> None:
            with lock:
                board.ask(reason)

        def begun(steps: int) -> None:
            with lock:
                board.begun(rank, steps)

        return Halt(ask, begun, lock)

    found += [of(rank) for rank in range(size)]
    return found
