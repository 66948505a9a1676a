"""Who did what when: the result of a simulated and of a measured step alike.

Seconds from the start of the trace; samples as (start, stop).
"""

from dataclasses import dataclass
from enum import Enum


class Activity(Enum):
    """What a rank spends time on."""

    COMPUTE = "compute"
    SEND = "send"
    WAIT = "wait"
    REDUCE = "reduce"
    UPDATE = "update"


@dataclass(frozen=True, slots=True)
class Span:
    """One rank busy (or waiting) from `start` to `stop`.

    `label` is short and the same in simulated and measured traces: "F", "B", "I", "W", "R" for passes, "recv"
    and "send" for messages, "reduce gradients" and so on. `step` counts optimizer steps in the trace.
    """

    rank: int
    activity: Activity
    label: str
    start: float
    stop: float
    stage: int = -1
    samples: tuple[int, int] | None = None
    edge: int = -1
    step: int = 0


@dataclass(frozen=True, slots=True)
class Trace:
    """Spans of one or several steps. `step_seconds` is the period between updates in the steady state."""

    name: str
    ranks: int
    spans: tuple[Span, ...]
    step_seconds: float
    mini_batch: int
    stage_names: tuple[str, ...] = ()
