"""The `cluster` group: how many devices there are, what they are, and who sits in which host."""

from collections.abc import Sequence

from omegaconf import DictConfig, OmegaConf

from gpp.topology import Device, DeviceTopology, Link

from .problems import Collected, SettingsError
from .settings import check_group, number, precision_name, whole

ALONE = 4  # devices of cluster.devices=auto without MPI
DEVICES = 1 << 20  # at most: each is a record


def device_count(config: DictConfig, world: int | None) -> int:
    """cluster.devices: `auto` is the world's size under MPI, else ALONE. Raises if the world is too small."""
    value = OmegaConf.select(config, "cluster.devices")
    if value == "auto":
        return ALONE if world is None else world
    count = whole(config, "cluster.devices", 1, DEVICES)
    if world is not None and count > world:
        raise SettingsError(
            f"cluster.devices is {count}, but there are {world} MPI ranks, one a device: start {count} ranks "
            "or leave cluster.devices=auto"
        )
    return count


def topology(config: DictConfig, count: int, hosts: Sequence[str] | None) -> DeviceTopology:
    """The `cluster` group for `count` devices; `hosts` names each rank's host under MPI."""
    name = str(config.cluster.name)
    with Collected() as read:
        memory = read(number, config, "cluster.memory", above=0)
        flops = read(_rate, config)
        bandwidth = read(number, config, "cluster.bandwidth", above=0)
        overhead = read(number, config, "cluster.overhead", least=0)
        inside, between = read(_link, config, "cluster.inside"), read(_link, config, "cluster.between")
        per_host = read(_per_host, config, count, hosts)
    device = Device(name, memory, flops, bandwidth, overhead)
    return DeviceTopology(name, (device,) * count, per_host, inside, between)


def _rate(config: DictConfig) -> float:
    """FLOPs per second of matrix products in the precision that is asked for; what else is computed is bound
    by memory."""
    with Collected() as read:
        plain = read(number, config, "cluster.flops", above=0)
        given = OmegaConf.select(config, "cluster.flops_bf16") is not None
        low = read(number, config, "cluster.flops_bf16", above=0) if given else plain
    return low if precision_name(config) == "bfloat16" else plain


def _link(config: DictConfig, key: str) -> Link:
    check_group(config, key)
    with Collected() as read:
        latency = read(number, config, f"{key}.latency", least=0)
        bandwidth = read(number, config, f"{key}.bandwidth", above=0)
    return Link(latency, bandwidth)


def _per_host(config: DictConfig, count: int, hosts: Sequence[str] | None) -> int:
    """Devices of one host, checked against where the ranks are."""
    wanted = OmegaConf.select(config, "cluster.per_host")
    found = None
    if hosts is not None:
        counts = {host: list(hosts).count(host) for host in hosts}
        found = max(counts.values())
    if wanted == "auto":
        return min(count, found or count)
    given = whole(config, "cluster.per_host", 1)
    if found is not None and len(set(hosts or ())) > 1 and found != given:
        raise SettingsError(
            f"cluster.per_host is {given}, but the fullest host has {found} ranks: start {given} ranks a "
            "host or set cluster.per_host=auto"
        )
    return given
