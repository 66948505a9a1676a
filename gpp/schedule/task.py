"""What a schedule is made of: sample ranges, tasks, transfers, and the instructions of a rank.

The sample range [start, stop) within a mini-batch is the common currency: stages may differ in micro-batch
size and in replicas, so re-chunking and splitting are intersections of ranges. A transfer names an edge of
the stage graph, never a next or a previous rank. Ranks here are device numbers of the plan.
"""

from dataclasses import dataclass
from enum import Enum


class ScheduleError(ValueError):
    """A schedule that cannot run; the message shows the grid with the failing cell marked."""


@dataclass(frozen=True, slots=True, order=True)
class Samples:
    """The samples [start, stop) of a mini-batch."""

    start: int
    stop: int

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.stop:
            raise ScheduleError(f"samples need 0 <= start < stop, they are [{self.start}, {self.stop})")

    def __len__(self) -> int:
        return self.stop - self.start

    def __str__(self) -> str:
        return f"[{self.start},{self.stop})"

    def intersection(self, other: "Samples") -> "Samples | None":
        """The samples in both, or None."""
        start, stop = max(self.start, other.start), min(self.stop, other.stop)
        return Samples(start, stop) if start < stop else None


class Pass(Enum):
    """What a stage computes on some samples. BACKWARD is both halves in one go."""

    FORWARD = "F"
    BACKWARD = "B"
    BACKWARD_INPUT = "I"
    BACKWARD_WEIGHT = "W"
    RECOMPUTE = "R"


INPUT_HALF = (Pass.BACKWARD, Pass.BACKWARD_INPUT)  # a gradient comes in and goes out
WEIGHT_HALF = (Pass.BACKWARD, Pass.BACKWARD_WEIGHT)  # the last pass that reads what the forward left


class Direction(Enum):
    """Activations go along an edge, gradients against it."""

    ACTIVATION = "activation"
    GRADIENT = "gradient"


@dataclass(frozen=True, slots=True)
class Task:
    """One pass of one stage on the samples of one replica."""

    kind: Pass
    stage: int
    samples: Samples


@dataclass(frozen=True, slots=True)
class Transfer:
    """One message: all tensors of an edge for some samples, from one rank to another.

    Messages of one (source, target, tag) are received in the order they were sent in.
    """

    edge: int
    direction: Direction
    samples: Samples
    source: int
    target: int
    tag: int
    bytes: int

    @property
    def is_local(self) -> bool:
        """Whether it stays on its rank: between two stages of one device."""
        return self.source == self.target


class Reduction(Enum):
    """What is summed over a group of ranks."""

    GRADIENTS = "gradients"  # of a stage's replicas, and of tied parameters over their stages
    LOSS_WEIGHT = "loss weight"  # the divisor of a (sum, weight) loss
    NORM = "norm"  # the global norm of the gradients


@dataclass(frozen=True, slots=True)
class Compute:
    """Run a task."""

    task: Task


@dataclass(frozen=True, slots=True)
class Send:
    """Start sending; never waits for the receiver."""

    transfer: Transfer


@dataclass(frozen=True, slots=True)
class Receive:
    """Wait until the message is here."""

    transfer: Transfer


@dataclass(frozen=True, slots=True)
class Reduce:
    """Sum over the ranks of `group`, in that order, the same bits on all of them.

    GRADIENTS with shared = -1: the untied parameters of `stage` over its replicas; with shared >= 0: the tied
    parameters `plan.stage_graph.shared[shared]` over all replicas of all stages that hold them.
    """

    what: Reduction
    group: tuple[int, ...]
    stage: int
    bytes: int
    shared: int = -1


@dataclass(frozen=True, slots=True)
class Update:
    """The optimizer's step over a stage's parameters."""

    stage: int


@dataclass(frozen=True, slots=True)
class Report:
    """Send the step's scalar terms of a stage to rank 0 (on rank 0: keep them)."""

    stage: int


Instruction = Compute | Send | Receive | Reduce | Update | Report


@dataclass(frozen=True, slots=True)
class Channel:
    """One FIFO of messages with `slots` buffers at each end."""

    source: int
    target: int
    tag: int
    edge: int
    direction: Direction
    slots: int
    bytes: int  # of the largest message


@dataclass(frozen=True, slots=True)
class Schedule:
    """One step (or one forward-only pass) as a program per rank; programs[r] may be empty (an idle rank).

    `samples` is the number of samples of the pass: the mini-batch, or what is left of the data in evaluation.
    """

    programs: tuple[tuple[Instruction, ...], ...]
    channels: tuple[Channel, ...]
    samples: int
    forward_only: bool = False
