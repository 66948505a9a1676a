"""What there is to compute on: devices, the links between them, and who sits in which host.

Seconds, bytes, and per second. Device i is the i-th rank when ranks are ordered by host and then by local
rank (GraphPipe §3, the device topology G_D).
"""

import hashlib
from dataclasses import asdict, dataclass


@dataclass(frozen=True, slots=True)
class Device:
    """One accelerator (or one CPU rank): achievable rates, not the data sheet's peak.

    `overhead` is the time one kernel costs whatever its size (launch, interpreter).
    """

    name: str
    memory: float
    flops: float
    bandwidth: float
    overhead: float = 0.0

    def __post_init__(self) -> None:
        if min(self.memory, self.flops, self.bandwidth) <= 0 or self.overhead < 0:
            raise ValueError(
                f"device {self.name}: memory, flops and bandwidth must be positive and overhead must not be "
                f"negative, they are {self.memory}, {self.flops}, {self.bandwidth}, {self.overhead}"
            )


@dataclass(frozen=True, slots=True)
class Link:
    """An affine link: a message of n bytes takes latency + n / bandwidth (GraphPipe §5)."""

    latency: float
    bandwidth: float

    def __post_init__(self) -> None:
        if self.latency < 0 or self.bandwidth <= 0:
            raise ValueError(
                f"a link needs latency >= 0 and bandwidth > 0, it has {self.latency} and {self.bandwidth}"
            )

    def seconds(self, size: float) -> float:
        """Time of one message of `size` bytes."""
        return self.latency + size / self.bandwidth


@dataclass(frozen=True, slots=True)
class DeviceTopology:
    """Equal or different devices, `per_host` of them in each host; two kinds of link."""

    name: str
    devices: tuple[Device, ...]
    per_host: int
    inside: Link  # between devices of one host
    between: Link  # between hosts

    def __post_init__(self) -> None:
        if not self.devices:
            raise ValueError(f"cluster {self.name} has no devices; cluster.devices must be at least 1")
        if self.per_host < 1:
            raise ValueError(f"cluster {self.name}: per_host must be at least 1, it is {self.per_host}")

    def host(self, device: int) -> int:
        """Which host a device sits in."""
        return device // self.per_host

    def link(self, a: int, b: int) -> Link:
        """The link between two devices."""
        return self.inside if self.host(a) == self.host(b) else self.between

    def fingerprint(self) -> str:
        """A digest of the whole topology."""
        return hashlib.sha256(repr(sorted(asdict(self).items())).encode()).hexdigest()[:16]
