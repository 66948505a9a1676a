"""All partitions of a small model: where there are few, nothing has to be searched for.

A model whose constraints leave a handful of units, or a cluster of a few devices, has so few partitions into
convex stages that each can be timed. What `gpp.planner.gpp` answers then is the best of all partitions and
replicas under the schedule asked for; where other schedules, memory choices or shared devices are allowed,
these are searched for the best of them alone.
"""

from collections.abc import Iterator, Sequence
from itertools import product

from .draft import Drafts, Part
from .moves import Parts
from .units import Units

UNITS = 7
DEVICES = 4
MOST = 4000  # partitions and replicas


def every_partition(drafts: Drafts) -> list[Parts]:
    """Each partition into convex stages whose graph has no circle, with each number of replicas that the
    options allow; none if there are more than UNITS units, more than DEVICES devices or more than MOST.

    Order within a partition is by first unit. O(Bell(units) x degrees).
    """
    units, devices = drafts.problem.units, len(drafts.problem.topology.devices)
    if len(units.members) > UNITS or devices > DEVICES:
        return []
    found: list[Parts] = []
    for stages in _partitions(len(units.members), devices):
        if _circular(units, stages):
            continue
        each = [drafts.degrees(stage) for stage in stages]
        for counts in product(*each):
            if sum(counts) <= devices:
                found.append(tuple(Part(s, d) for s, d in zip(stages, counts, strict=True)))
        if len(found) > MOST:
            return []
    return found


def _partitions(count: int, most: int) -> Iterator[list[frozenset[int]]]:
    """Of range(count) into at most so many sets, by restricted growth."""

    def grow(number: int, sets: list[list[int]]) -> Iterator[list[frozenset[int]]]:
        if number == count:
            yield [frozenset(found) for found in sets]
            return
        for found in sets:
            found.append(number)
            yield from grow(number + 1, sets)
            found.pop()
        if len(sets) < most:
            yield from grow(number + 1, [*sets, [number]])

    return grow(0, [])


def _circular(units: Units, stages: Sequence[frozenset[int]]) -> bool:
    """Whether stages wait for each other; one that is not convex waits for itself through another."""
    owner = {u: s for s, stage in enumerate(stages) for u in stage}
    before = [
        {owner[p] for u in stage for p in units.predecessors[u]} - {s} for s, stage in enumerate(stages)
    ]
    done: set[int] = set()
    while len(done) < len(stages):
        ready = {s for s, waits in enumerate(before) if s not in done and waits <= done}
        if not ready:
            return True
        done |= ready
    return False
