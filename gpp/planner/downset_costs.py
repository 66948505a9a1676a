"""What the difference of two nested downsets costs as one stage.

Sets here are grown from the sinks: a set holds every reader of its members, the smaller of two nested ones is
what comes later in the pipeline, and their difference is a stage. Everything is a sum over units, and so a
difference of two sums, except the bytes that cross its border. Those are c(D) + c(D') - 2 X(D, D'): c what
enters a set from outside, X what goes from outside the larger set into the smaller one. X is a product of two
vectors. A tensor with several readers crosses a border once; one that passes a stage and is read there and
later is charged to its source and to the last stage that reads it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .downsets import Branches, Link, equal_branches

Array = NDArray[np.float64]
Index = NDArray[np.int64]

NEVER = 1e300  # seconds, finite: none of it is nothing


@dataclass(frozen=True)
class Memory:
    """Bytes that a stage may need: static + held(level) x stash.

    With `by_stages` the level is the stage's place from the end and a micro-batch is split over its replicas
    (GraphPipe §5): `share[degree]` of it each, messages included, `held[level]` micro-batches in flight.
    Without, replicas take turns on whole micro-batches: it is ceil(devices up to here / replicas) (Piper).
    """

    limit: float
    by_stages: bool
    share: Array
    held: Array


@dataclass(frozen=True)
class UnitCosts:
    """Sums of a stage, by unit [n] or by degree and unit [degrees, n]; seconds of one micro-batch.

    A stage that `trains` anything pays `fixed[degree]`, each byte over its border `per_byte[degree]`, and
    being sent or received at all `latency`. `barred` counts what forbids a degree, `wanted` (where
    `only_wanted`) what allows it, and a stage may hold one unit with a label.
    """

    degrees: tuple[int, ...]
    seconds: Array
    trains: Array
    fixed: Array
    per_byte: Array
    latency: float
    links: tuple[Link, ...]
    static: Array
    stash: Array
    barred: Array
    wanted: Array
    only_wanted: tuple[bool, ...]
    labelled: Array

    @property
    def equal_branches(self) -> Branches:
        """Groups of branches that may change places."""
        table = np.vstack(
            [self.seconds, self.trains, self.static, self.stash, self.barred, self.wanted, self.labelled]
        )
        return equal_branches(self.links, [column.tobytes() for column in table.T])

    @property
    def device_seconds(self) -> Array:
        """The least that each unit takes of all devices together."""
        degrees = np.array(self.degrees, dtype=np.float64)[:, None]
        return np.asarray(np.where(self.barred > 0, NEVER, degrees * self.seconds).min(0))


@dataclass(frozen=True, slots=True)
class Border:
    """Bytes into and out of some stages."""

    received: Array
    sent: Array


class SetCosts:
    """The sums of many sets, `members` [sets, n]. Where equal `branches` are collapsed, the larger set of a
    pair is permuted so that the fewest of them cross the stage."""

    def __init__(self, costs: UnitCosts, members: NDArray[np.bool_], branches: Branches = ()) -> None:
        self.costs = costs
        inside = members.astype(np.float64)
        self.seconds = costs.seconds @ inside.T
        self.trains, self.static = inside @ costs.trains, inside @ costs.static
        self.stash = inside @ costs.stash
        self.barred, self.wanted = costs.barred @ inside.T, costs.wanted @ inside.T
        self.labelled = inside @ costs.labelled
        self.restricted = costs.barred.any(1) | costs.labelled.any() | np.array(costs.only_wanted)
        self.device_seconds = inside @ costs.device_seconds
        self.outside, self.entering = _crossings(costs.links, members, branches)
        self.entered = np.einsum("sf,sf->s", self.outside, self.entering)

    def crossing(self, larger: Index, smaller: Index) -> Array:
        """X of each pair."""
        found = np.empty(len(larger))
        for start in range(0, len(larger), 1 << 14):  # what fits a cache
            part = slice(start, start + (1 << 14))
            found[part] = np.einsum("pf,pf->p", self.outside[larger[part]], self.entering[smaller[part]])
        return found

    def border(self, larger: Index, smaller: Index, crossing: Array) -> Border:
        """Bytes over the border, of pairs or (broadcast) of all combinations."""
        received, sent = self.entered[larger] - crossing, self.entered[smaller] - crossing
        slack = 1e-12 * (self.entered[larger] + self.entered[smaller])
        return Border(np.where(received > slack, received, 0.0), np.where(sent > slack, sent, 0.0))

    def allowed(self, degree: int, larger: Index, smaller: Index) -> NDArray[np.bool_]:
        """Whether a stage may have the degree of this number."""
        if not self.restricted[degree]:
            return np.ones(np.broadcast(larger, smaller).shape, dtype=bool)
        ok = self.barred[degree, larger] - self.barred[degree, smaller] == 0
        ok &= self.labelled[larger] - self.labelled[smaller] <= 1
        if self.costs.only_wanted[degree]:
            ok &= self.wanted[degree, larger] - self.wanted[degree, smaller] > 0
        return np.asarray(ok)

    def time(self, degree: int, larger: Index, smaller: Index, border: Border) -> Array:
        """Seconds of a micro-batch at the degree of this number."""
        costs = self.costs
        time = self.seconds[degree, larger] - self.seconds[degree, smaller]
        time += (border.received + border.sent) * costs.per_byte[degree]
        if costs.fixed[degree]:
            time += np.where(self.trains[larger] > self.trains[smaller], costs.fixed[degree], 0.0)
        if costs.latency:
            time += costs.latency * ((border.received > 0).astype(np.float64) + (border.sent > 0))
        return np.asarray(time)

    def memory(
        self, rule: Memory, degree: int, larger: Index, smaller: Index, border: Border | None, level: Index
    ) -> Array:
        """Bytes on each device of a stage; `level` is its place from the end, or the devices up to it.
        Without a `border` what its messages take is left out."""
        static = self.static[larger] - self.static[smaller]
        stash = self.stash[larger] - self.stash[smaller]
        if not rule.by_stages:
            return np.asarray(static + stash * -(-level // self.costs.degrees[degree]))
        held, upstream = rule.held[level], rule.held[level + 1]
        if border is None:
            return np.asarray(static + rule.share[degree] * stash * held)
        return np.asarray(
            static + rule.share[degree] * ((stash + border.sent) * held + border.received * upstream)
        )

    def bytes_left(self, rule: Memory, sets: Index, devices: NDArray[np.int32]) -> Array:
        """[sets, places]: the bytes, of all devices together, that the units outside need at least, of sets
        on `devices` [sets, places], the place that from the end if memory counts by stages."""
        static = (self.static[-1] - self.static[sets])[:, None]
        stash = (self.stash[-1] - self.stash[sets])[:, None]
        if not rule.by_stages:
            return np.asarray(static + stash * (devices + 1.0))
        whole = (rule.share * np.array(self.costs.degrees)).min()
        return np.asarray(static + stash * whole * rule.held[1 : devices.shape[1] + 1])


def _crossings(links: Sequence[Link], members: NDArray[np.bool_], branches: Branches) -> tuple[Array, Array]:
    """Features [sets, features] of larger and smaller sets whose products add up to X.

    A unit that sends: whether it is outside, and the bytes of its tensors that are read inside. Inside equal
    branches, a set only says how many of them end at a place, and as many as both sets have are matched.
    """
    place = {u: (g, p) for g, group in enumerate(branches) for branch in group for p, u in enumerate(branch)}
    outside: list[NDArray[np.bool_]] = []
    entering: list[Array] = []
    by_source: dict[int, list[Link]] = {}
    ends: dict[tuple[int, int], list[Link]] = {}
    for link in links:
        if link.source in place and place[link.source][1] + 1 < len(branches[place[link.source][0]][0]):
            ends.setdefault(place[link.source], []).append(link)
        else:
            by_source.setdefault(link.source, []).append(link)
    for source, sent in by_source.items():
        outside.append(~members[:, source])
        read = [members[:, sorted(link.readers)].any(1) * link.bytes for link in sent]
        entering.append(np.sum(read, axis=0))
    for (group, _), sent in ends.items():
        hops = {(link.source, next(iter(link.readers))) for link in sent}
        cut = np.sum([~members[:, u] & members[:, v] for u, v in sorted(hops)], axis=0)
        size = sum(link.bytes for link in sent) / len(hops)
        for count in range(1, len(branches[group]) + 1):
            outside.append(np.asarray(cut >= count))
            entering.append((cut >= count) * size)
    none = np.zeros((len(members), 0))
    if not outside:
        return none, none
    return np.stack(outside, 1).astype(np.float64), np.stack(entering, 1).astype(np.float64)
