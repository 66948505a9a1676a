"""What a rank is at: written by its own thread with every instruction, read by whoever watches.

Two assignments an instruction, no text: that is made when somebody asks. A reader may see the step of one
instruction with the name of the next; it only tells people.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from typing import Any

FIRST = 10.0  # times as long as usual


class Place(StrEnum):
    """Where a rank is in its program."""

    SETUP = "setup"  # capture, planning, compilation: nobody can say how long that takes
    INSIDE = "inside"  # in a call in which ranks wait for each other
    OUTSIDE = "outside"  # in the user's own program, between two such calls
    LEFT = "left"  # it waits for the others to end, and sends nothing more


class Doing:
    """See the module. `what` is an instruction or a text, `count` grows with each; `waits` are the messages
    that it waits for."""

    __slots__ = ("compiles", "count", "describe", "patience", "place", "stages", "step", "waits", "what")

    def __init__(self) -> None:
        self.what: Any = "starts"
        self.count = 0
        self.step: int | None = None
        self.describe: Callable[[Any], str] = str
        self.place = Place.SETUP
        self.stages: Sequence[str] = ()  # the names of each rank's stages, if they are known
        self.compiles = False  # the first run of a schedule takes long
        self.patience = 1.0
        self.waits: Sequence[Any] = ()

    @contextmanager
    def slow_start(self) -> Iterator[None]:
        """What runs for the first time, and may be compiled in there: who watches has more patience."""
        self.patience = FIRST if self.compiles else 1.0
        yield
        self.patience = 1.0

    def now(self, what: Any) -> None:
        """From now on it is at this."""
        self.what = what
        self.count += 1

    @contextmanager
    def inside(self, what: str) -> Iterator[None]:
        """A call in which ranks wait for each other; a failure stays at what it was when it came."""
        before = self.place
        self.place = Place.INSIDE
        self.now(what)
        yield
        self.place = Place.OUTSIDE if before is Place.SETUP else before
        self.step = None
        self.now("in the program that calls the pipeline")

    def text(self) -> str:
        """What the rank is at, as a clause without its subject."""
        what, step = self.what, self.step
        said = what if isinstance(what, str) else self.describe(what)
        if isinstance(what, str) and (waits := self.waits):
            more = f" and {len(waits) - 1} more" if len(waits) > 1 else ""
            said = f"{said}, waits for {waits[0]}{more}"
        return said if step is None else f"step {step}: {said}"
