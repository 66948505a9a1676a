"""Seconds of an operator, a transfer, an all-reduce.

`CostModel` is what planners ask. `Roofline` answers from FLOPs and bytes: a pass takes the larger of its
arithmetic and its memory time, plus the overhead of its kernels. Seconds, bytes, samples.
"""

from dataclasses import dataclass
from typing import Protocol

from gpp.graph import Operator, Work
from gpp.topology import Device, Link


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
        if work == Work():
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


def all_reduce_seconds(size: float, ranks: int, link: Link) -> float:
    """A ring (reduce-scatter, all-gather) over `ranks` devices: 2 (d-1)/d of the bytes, 2 (d-1) hops."""
    if ranks < 2:
        return 0.0
    return 2 * (ranks - 1) * (link.latency + size / ranks / link.bandwidth)
