"""Seconds of an operator, a transfer, an all-reduce.

`CostModel` is what planners ask. `Roofline` answers from FLOPs and bytes: a pass takes the larger of its
arithmetic and its memory time, plus the overhead of its kernels. `CostTable` answers from times that were
measured at several sizes. Seconds, bytes, samples.
"""

import hashlib
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from gpp.graph import ComputationGraph, Operator, Work
from gpp.records import RecordError, from_json, to_json
from gpp.topology import Device, Link

FORMAT = "gpp.costs/1"


class CostError(ValueError):
    """Measured costs that cannot be read, or that are those of another model."""


NOTHING = Work()


class CostModel(Protocol):
    """Times of one operator on one device for one call over `samples` samples."""

    def forward(self, op: Operator, samples: float, device: Device) -> float:
        """Seconds of the forward pass."""

    def backward_input(self, op: Operator, samples: float, device: Device) -> float:
        """Seconds of the half that makes the gradients of the inputs."""

    def backward_weight(self, op: Operator, samples: float, device: Device) -> float:
        """Seconds of the half that makes the gradients of the parameters."""

    def update(self, parameter_bytes: float, device: Device) -> float:
        """Seconds of the optimizer's step over that many bytes of parameters."""

    def fingerprint(self) -> str:
        """A digest of what the answers depend on."""


@dataclass(frozen=True, slots=True)
class Roofline:
    """max(FLOPs / rate, bytes / bandwidth) + kernels x overhead."""

    update_traffic: float = 7.0  # AdamW reads weight, gradient, two moments and writes three of them

    def _seconds(self, work: Work, samples: float, device: Device) -> float:
        if work == NOTHING:
            return 0.0
        moved = work.bytes * samples + work.bytes_per_call
        return (
            max(work.flops * samples / device.flops, moved / device.bandwidth)
            + work.kernels * device.overhead
        )

    def forward(self, op: Operator, samples: float, device: Device) -> float:
        """Seconds of the forward pass."""
        return self._seconds(op.forward, samples, device)

    def backward_input(self, op: Operator, samples: float, device: Device) -> float:
        """Seconds of the input half."""
        return self._seconds(op.backward_input, samples, device)

    def backward_weight(self, op: Operator, samples: float, device: Device) -> float:
        """Seconds of the weight half."""
        return self._seconds(op.backward_weight, samples, device)

    def update(self, parameter_bytes: float, device: Device) -> float:
        """Seconds of the optimizer's step."""
        return self.update_traffic * parameter_bytes / device.bandwidth

    def fingerprint(self) -> str:
        """The one number it depends on; devices are part of the topology's fingerprint."""
        return f"roofline-{self.update_traffic:g}"


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of the three passes of one operator at some sizes, in samples of one call, ascending."""

    operator: str
    samples: tuple[float, ...]
    forward: tuple[float, ...]
    backward_input: tuple[float, ...]
    backward_weight: tuple[float, ...]

    def __post_init__(self) -> None:
        columns = (self.forward, self.backward_input, self.backward_weight)
        if not self.samples or any(len(column) != len(self.samples) for column in columns):
            raise ValueError(
                f"timing of {self.operator}: every pass needs one time for each size, and one size"
            )
        if list(self.samples) != sorted({s for s in self.samples if 0 < s < float("inf")}):
            raise ValueError(
                f"timing of {self.operator}: sizes must be positive and ascending, they are {self.samples}"
            )
        wrong = [t for column in columns for t in column if not 0 <= t < float("inf")]
        if wrong:
            raise ValueError(
                f"timing of {self.operator}: a time must be finite and not negative, one is {wrong[0]}"
            )


@dataclass(frozen=True)
class CostTable:
    """Measured seconds: linear between the sizes measured; below the smallest and above the largest in
    proportion to the nearest interval, never negative. The same for every device (what it was measured on).

    `graph` is the fingerprint of the graph whose operators these are, `measured_on` says in words on what.
    """

    timings: tuple[Timing, ...]
    update_traffic: float = 7.0
    graph: str = ""
    measured_on: str = ""

    def __post_init__(self) -> None:
        if not 0 <= self.update_traffic < float("inf"):
            raise ValueError(f"update_traffic must be a number of at least 0, it is {self.update_traffic}")
        seen: set[str] = set()
        for timing in self.timings:
            if timing.operator in seen:
                raise ValueError(f"operator {timing.operator} has two timings")
            seen.add(timing.operator)

    @cached_property
    def by_name(self) -> dict[str, Timing]:
        """Operator name to its timing."""
        return {timing.operator: timing for timing in self.timings}

    def forward(self, op: Operator, samples: float, device: Device) -> float:
        """Seconds of the forward pass. Raises ValueError for an operator that is not in the table."""
        timing = self._timing(op)
        return _between(timing.samples, timing.forward, samples)

    def backward_input(self, op: Operator, samples: float, device: Device) -> float:
        """Seconds of the input half."""
        timing = self._timing(op)
        return _between(timing.samples, timing.backward_input, samples)

    def backward_weight(self, op: Operator, samples: float, device: Device) -> float:
        """Seconds of the weight half."""
        timing = self._timing(op)
        return _between(timing.samples, timing.backward_weight, samples)

    def update(self, parameter_bytes: float, device: Device) -> float:
        """Seconds of the optimizer's step."""
        return self.update_traffic * parameter_bytes / device.bandwidth

    def fingerprint(self) -> str:
        """A digest of the whole table."""
        return "table-" + hashlib.sha256(repr((self.timings, self.update_traffic)).encode()).hexdigest()[:16]

    def check(self, graph: ComputationGraph) -> None:
        """Raise CostError unless the table was measured for this graph."""
        if self.graph != graph.fingerprint():
            raise CostError(
                f"the costs were measured for another model: for the graph {self.graph or 'unknown'}, this "
                f"one is {graph.fingerprint()}; measure again with launch.profile"
            )

    def _timing(self, op: Operator) -> Timing:
        if op.name not in self.by_name:
            raise ValueError(f"the cost table has no times of operator {op.name}; measure the model again")
        return self.by_name[op.name]


def _between(sizes: Sequence[float], seconds: Sequence[float], samples: float) -> float:
    """Linear interpolation; one size alone: in proportion to it."""
    if len(sizes) == 1:
        return seconds[0] * samples / sizes[0]
    i = min(max(bisect_left(sizes, samples), 1), len(sizes) - 1)
    slope = (seconds[i] - seconds[i - 1]) / (sizes[i] - sizes[i - 1])
    return max(seconds[i - 1] + slope * (samples - sizes[i - 1]), 0.0)


def costs_to_json(table: CostTable) -> str:
    """The table as JSON, the same text for the same table."""
    return to_json(table, FORMAT)


def costs_from_json(text: str) -> CostTable:
    """Read `costs_to_json`'s text back. Raises CostError for malformed text, a wrong key or an impossible
    time."""
    try:
        return from_json(CostTable, text, FORMAT)
    except (RecordError, ValueError) as error:
        raise CostError(f"costs: {error}") from None


def all_reduce_seconds(size: float, ranks: int, link: Link) -> float:
    """A ring (reduce-scatter, all-gather) over `ranks` devices: 2 (d-1)/d of the bytes, 2 (d-1) hops."""
    if ranks < 2:
        return 0.0
    return 2 * (ranks - 1) * (link.latency + size / ranks / link.bandwidth)
