"""Whether a plan of a file still fits the cluster that it is to run on, and if not, what differs."""

from collections.abc import Sequence
from dataclasses import replace

from gpp.plan import Plan, PlanError, device_memory
from gpp.plan_table import device_ranges, readable_bytes
from gpp.topology import DeviceTopology

SHOWN = 4  # devices in a message


def with_optimizer(plan: Plan, factor: float) -> Plan:
    """The plan with the state of an optimizer that keeps `factor` bytes for each byte that is trained, where
    that is more than it was made with."""
    stages = tuple(
        replace(
            stage,
            optimizer_bytes=max(
                stage.optimizer_bytes,
                int(factor * stage.trainable_bytes) // (len(stage.devices) if stage.shard_optimizer else 1),
            ),
        )
        for stage in plan.stage_graph.stages
    )
    return replace(plan, stage_graph=replace(plan.stage_graph, stages=stages))


def check_cluster(plan: Plan, name: str, cluster: DeviceTopology, hosts: Sequence[str] | None) -> None:
    """Raise PlanError, calling the plan `name`, where a device needs more memory than the cluster's have, or
    devices that were to share a host do not (`hosts` of the ranks, under MPI)."""
    _check_memory(plan, name, cluster)
    if hosts is not None:
        _check_hosts(plan, name, hosts)


def _check_memory(plan: Plan, name: str, cluster: DeviceTopology) -> None:
    pairs = list(zip(device_memory(plan), cluster.devices, strict=False))
    over = [number for number, (need, device) in enumerate(pairs) if need > device.memory]
    if not over:
        return
    said = []
    for number in over[:SHOWN]:
        need, have = pairs[number][0], pairs[number][1].memory
        stages = " and ".join(plan.stage_graph.stages[s].name for s in plan.residents[number])
        said.append(
            f"device {number} (stage {stages}) needs {readable_bytes(need)}, {readable_bytes(need - have)} "
            f"more than its {readable_bytes(have)}"
        )
    more = f", and so do {len(over) - SHOWN} more devices" if len(over) > SHOWN else ""
    then = plan.topology
    memory = readable_bytes(then.devices[over[0]].memory)
    raise PlanError(
        f"{name} does not fit the memory of cluster {cluster.name}: {'; '.join(said)}{more}. It was made for "
        f"{then.name} with {memory} a device: if that is what there is, say so by cluster=, or "
        "cluster.memory=; else plan anew"
    )


def _check_hosts(plan: Plan, name: str, hosts: Sequence[str]) -> None:
    used = [device for device in plan.residents if device < len(hosts)]
    for first in used:
        group = [device for device in used if plan.topology.host(device) == plan.topology.host(first)]
        others = [device for device in group if hosts[device] != hosts[group[0]]]
        if others:
            raise PlanError(
                f"{name} has devices {device_ranges(group)} on one host, here ranks {device_ranges(others)} "
                f"are on {hosts[others[0]]} and rank {group[0]} is on {hosts[group[0]]}: start "
                f"{plan.topology.per_host} ranks a host, or plan anew"
            )
