"""Who keeps whose copies: memory outlives a rank, but not its host, so a part lies on two hosts."""

from collections.abc import Mapping, Sequence


def guardians(hosts: Sequence[str]) -> tuple[int | None, ...]:
    """For each rank, by the hosts' names of all ranks, the one on the next host that keeps its part too; None
    where there is one host."""
    names = list(dict.fromkeys(hosts))
    if len(names) == 1:
        return (None,) * len(hosts)
    ranks = {name: [rank for rank, host in enumerate(hosts) if host == name] for name in names}
    found: list[int | None] = []
    for rank, host in enumerate(hosts):
        there = ranks[names[(names.index(host) + 1) % len(names)]]
        found.append(there[ranks[host].index(rank) % len(there)])
    return tuple(found)


def wards(hosts: Sequence[str], rank: int) -> tuple[int, ...]:
    """The ranks whose parts a rank keeps."""
    return tuple(other for other, guardian in enumerate(guardians(hosts)) if guardian == rank)


def first_of_host(hosts: Sequence[str], rank: int) -> int:
    """The rank that speaks for a rank's host."""
    return list(hosts).index(hosts[rank])


def kept_on(hosts: Sequence[str], rank: int) -> tuple[int, ...]:
    """The ranks whose parts lie on a rank's host: its own, and those that they keep for others."""
    here = [other for other, host in enumerate(hosts) if host == hosts[rank]]
    return (*here, *(ward for other in here for ward in wards(hosts, other)))


def transfers(
    missing: Sequence[Sequence[str]], holders: Mapping[str, Sequence[int]], hosts: Sequence[str]
) -> list[tuple[str, int, int]]:
    """(file, sender, receiver): how each file that ranks lack comes to their hosts once. `missing`: by rank;
    `holders`: for each file a rank of every host that has it. Ranks of such a host take turns."""
    wanted: dict[tuple[str, str], int] = {}
    for rank, files in enumerate(missing):
        for file in files:
            wanted.setdefault((file, hosts[rank]), rank)
    found = []
    for turn, ((file, _), receiver) in enumerate(sorted(wanted.items())):
        source = hosts[holders[file][turn % len(holders[file])]]
        able = [rank for rank, host in enumerate(hosts) if host == source]
        found.append((file, able[turn % len(able)], receiver))
    return found
