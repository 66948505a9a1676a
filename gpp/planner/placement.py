"""Which devices a stage gets: consecutive ones, replicas together in a host."""

from collections.abc import Sequence

from gpp.plan import PlanError
from gpp.topology import DeviceTopology


def place(counts: Sequence[int], topology: DeviceTopology) -> list[tuple[int, ...]]:
    """Consecutive devices for every stage, in order; replicas share a host where they fit in one.

    A stage takes the first free devices that span the fewest hosts; if holes leave one that fits in a host
    without such a place, the largest stages choose first.
    """
    total = len(topology.devices)
    if sum(counts) > total:
        raise PlanError(f"the stages need {sum(counts)} devices, the cluster has {total}")
    by_size = sorted(range(len(counts)), key=lambda s: -counts[s])
    return _place(counts, range(len(counts)), topology) or _place(counts, by_size, topology, force=True)


def _place(
    counts: Sequence[int], turn: Sequence[int], topology: DeviceTopology, *, force: bool = False
) -> list[tuple[int, ...]]:
    free = [True] * len(topology.devices)
    places: list[tuple[int, ...]] = [()] * len(counts)
    for s in turn:
        count = counts[s]
        start, spans = _first(free, count, topology)
        if not force and count <= topology.per_host and (start is None or spans > 0):
            return []
        if start is None:
            places[s] = tuple(d for d in range(len(free)) if free[d])[:count]
        else:
            places[s] = tuple(range(start, start + count))
        for device in places[s]:
            free[device] = False
    return places


def _first(free: Sequence[bool], count: int, topology: DeviceTopology) -> tuple[int | None, int]:
    """The first of the runs of free devices that span the fewest hosts, and how many more than one."""
    best, least, run = None, len(free), 0
    for device, is_free in enumerate(free):
        run = run + 1 if is_free else 0
        if run >= count:
            start = device - count + 1
            spans = topology.host(device) - topology.host(start)
            if spans < least:
                best, least = start, spans
                if spans == (count - 1) // topology.per_host:
                    break
    return best, least
