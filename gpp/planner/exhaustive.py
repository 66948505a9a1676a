"""All partitions of a small model: where there are few, nothing has to be searched for.

A model whose constraints leave a handful of units, or a cluster of a few devices, has so few partitions into
convex stages that each can be timed. What `gpp.planner.gpp` answers then is the best of all partitions,
replicas, memory choices and ways for stages without replicas to share devices, each with every schedule that
`rhythm` and `schedules` make for it. Stages are on devices in their own order: where hosts or devices differ,
other places are searched, not counted.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product

from .colocate import Shared, shared
from .draft import Drafts, Part
from .moves import Parts
from .options import Options
from .units import Units

UNITS = 7
DEVICES = 4
MOST = 4000  # partitions and replicas
SHARING = 1000  # ways to share devices


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


def every_memory_choice(parts: Parts, options: Options) -> Iterator[Parts]:
    """The parts with every other set of stages that recompute or share out their optimizer's state."""

    def choices(part: Part) -> list[Part]:
        recompute = (False, True) if options.recompute else (False,)
        shard = (False, True) if options.shard_optimizer and part.devices > 1 else (False,)
        return [replace(part, recompute=r, shard_optimizer=s) for s, r in product(shard, recompute)]

    return (found for found in product(*map(choices, parts)) if found != parts)


def every_sharing(drafts: Drafts) -> list[Shared]:
    """All partitions into stages of one device each, some of which share it; none if there are too many
    units, devices, or more than SHARING.

    O(Bell(units)^2).
    """
    units, devices = drafts.problem.units, len(drafts.problem.topology.devices)
    if len(units.members) > UNITS or devices > DEVICES:
        return []
    found: list[Shared] = []
    for stages in _partitions(len(units.members), len(units.members)):
        if _circular(units, stages) or any(1 not in drafts.degrees(stage) for stage in stages):
            continue
        parts = [Part(stage, 1) for stage in stages]
        for residents in _partitions(len(stages), devices):
            if len(residents) < len(stages):
                place = {s: (device,) for device, held in enumerate(residents) for s in held}
                found.append(shared(drafts, parts, [place[s] for s in range(len(stages))]))
        if len(found) > SHARING:
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
