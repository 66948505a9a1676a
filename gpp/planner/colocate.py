"""Several stages on one device: what a heavy device has too much of goes to a light one, as another stage.

A stage must be convex, so no partition into one stage a device need be balanced: a light stage at the end of
the model cannot take operators from its beginning. A second stage on its device can. Loads alone decide here;
what it does to the step (more hops, stages that wait for each other's device) is for the simulator to say.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from .draft import Draft, Drafts, Part
from .estimate import Group

STEPS = 6  # stages that are lent at most
BALANCED = 1.01  # of the mean: no device is heavier
PER_DEVICE = 3  # stages


@dataclass(frozen=True, slots=True)
class Shared:
    """Stages some of which share devices (`at` says who does), and seconds of work on the heaviest in a step:
    no schedule takes less."""

    groups: tuple[Group, ...]
    load: float


def colocated(drafts: Drafts, draft: Draft) -> Iterator[Shared]:
    """Better and better balanced stages, each with one more that shares devices.

    In each step a run of operators at an end of a stage on the heaviest devices goes where the heaviest of
    all is then lightest. O(units of those stages x places) priced stages a step; at most STEPS.
    """
    parts, places = list(draft.parts), list(draft.places)
    for _ in range(STEPS):
        found = _lent(drafts, parts, places)
        if found is None:
            return
        parts, places = found
        yield shared(drafts, parts, places)


def shared(drafts: Drafts, parts: Sequence[Part], places: Sequence[tuple[int, ...]]) -> Shared:
    """These stages on these devices."""
    groups = tuple(drafts.group(part, place) for part, place in zip(parts, places, strict=True))
    return Shared(groups, max(_loads(drafts, parts, places).values()))


def _lent(
    drafts: Drafts, parts: Sequence[Part], places: Sequence[tuple[int, ...]]
) -> tuple[list[Part], list[tuple[int, ...]]] | None:
    """One stage more, and the heaviest devices lighter; None: nothing helps."""
    loads = _loads(drafts, parts, places)
    heaviest = max(loads, key=loads.__getitem__)
    mean = sum(load * len(place) for place, load in loads.items())
    if loads[heaviest] <= BALANCED * mean / len(drafts.problem.topology.devices):
        return None
    best, least = None, (loads[heaviest] * (1 - 1e-9), 0.0)
    others = [place for place in loads if place != heaviest and places.count(place) < PER_DEVICE]
    for number, (part, place) in enumerate(zip(parts, places, strict=True)):
        if place != heaviest:
            continue
        for lent, kept in _ends(part):
            if kept.devices not in drafts.degrees(kept.units):
                continue
            left = loads[heaviest] - _load(drafts, part, place) + _load(drafts, kept, place)
            for other in others:
                taken = replace(lent, devices=len(other))
                if taken.devices not in drafts.degrees(taken.units):
                    continue
                there = loads[other] + _load(drafts, taken, other)
                key = (max(left, there), min(left, there))
                if key < least:
                    best, least = (number, kept, taken, other), key
    if best is None:
        return None
    number, kept, taken, other = best
    changed = [*parts[:number], kept, *parts[number + 1 :], taken]
    return changed, [*places, other]


def _ends(part: Part) -> Iterator[tuple[Part, Part]]:
    """A run of units at the beginning or the end, and the rest: both convex, and neither waits for the other
    through a third."""
    units = sorted(part.units)
    for count in range(1, len(units)):
        first = replace(part, units=frozenset(units[:count]))
        last = replace(part, units=frozenset(units[count:]))
        yield first, last
        yield last, first


def _loads(
    drafts: Drafts, parts: Sequence[Part], places: Sequence[tuple[int, ...]]
) -> dict[tuple[int, ...], float]:
    """Seconds of a step on every set of devices, those without a stage left out."""
    found: dict[tuple[int, ...], float] = {}
    for part, place in zip(parts, places, strict=True):
        found[place] = found.get(place, 0.0) + _load(drafts, part, place)
    return found


def _load(drafts: Drafts, part: Part, place: tuple[int, ...]) -> float:
    beat, _ = drafts.stage(part, place)
    return drafts.rounds * beat.busy + beat.reduce + beat.update
