"""Downsets: sets of operators that hold whatever their members need, by which Piper builds its pipelines.

Two nested ones differ by a convex set: a stage. A graph has as many as there are ways to stop on it, the
product over its branches (L_i + 1) and more: enumeration has a limit.
"""

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from gpp.plan import PlanError

Words = NDArray[np.uint64]
Branches = Sequence[Sequence[Sequence[int]]]  # groups of interchangeable chains of units


class TooManyDownsets(PlanError):
    """A graph with more downsets than a search may look at."""


@dataclass(frozen=True, slots=True)
class Link:
    """Bytes that unit `source` sends to each other stage with some of its `readers`."""

    source: int
    readers: frozenset[int]
    bytes: float


@dataclass(frozen=True)
class Downsets:
    """All downsets of a graph of `count` units, smallest first.

    `words` are [sets, count / 64], bit i of word w for unit 64 w + i; the sets of s units are
    [levels[s], levels[s + 1]), the first is empty and the last has every unit. Of equal `branches` the first
    is always ahead: a set stands for all that permuting them makes of it.
    """

    count: int
    words: Words
    levels: tuple[int, ...]
    branches: Branches = ()

    @cached_property
    def members(self) -> NDArray[np.bool_]:
        """Whether a set holds a unit: [sets, count]."""
        return _unpacked(self.words, self.count)


def downsets(needs: Sequence[Iterable[int]], limit: int, branches: Branches = ()) -> Downsets:
    """Every set that holds `needs[v]` of each of its members v, equal `branches` collapsed. `needs` must be
    acyclic.

    Each set is made once: from the one without its highest-numbered member that no other needs. O(sets x
    branches) words in O(units x most dependents) array operations. Raises TooManyDownsets above `limit` sets,
    at once when it is passed.
    """
    count = len(needs)
    wanted = _ahead(needs, branches)
    bit, need = _masks([(v,) for v in range(count)], count), _masks(wanted, count)
    above = _packed(~np.tri(count, dtype=bool))
    dependents: list[list[int]] = [[] for _ in range(count)]
    for dependent, us in enumerate(wanted):
        for u in us:
            dependents[u].append(dependent)
    rows = np.zeros((1, bit.shape[1]), dtype=np.uint64)
    ready = _masks([[v for v in range(count) if not wanted[v]]], count)
    tops = rows  # members that no other member needs
    found, levels = [rows], [0, 1]
    for size in range(1, count + 1):
        where, v = np.nonzero(_unpacked(ready, count))
        left = tops[where] & ~need[v]
        first = ~(left & above[v]).any(1)
        where, v = where[first], v[first]
        if levels[-1] + len(v) > limit:
            raise TooManyDownsets(
                f"the graph has more than {limit} downsets: {levels[-1] + len(v)} with up to {size} of its "
                f"{count} operators; this planner looks at all of them, use another one"
            )
        rows, tops = rows[where] | bit[v], left[first] | bit[v]
        ready = ready[where] & ~bit[v]
        for place in range(max((len(dependents[u]) for u in np.unique(v).tolist()), default=0)):
            nth = np.array([d[place] if place < len(d) else count for d in dependents])[v]
            some = np.flatnonzero(nth < count)
            some = some[~(need[nth[some]] & ~rows[some]).any(1)]
            ready[some] |= bit[nth[some]]
        found.append(rows)
        levels.append(levels[-1] + len(rows))
    return Downsets(count, np.concatenate(found), tuple(levels), branches)


def _ahead(needs: Sequence[Iterable[int]], branches: Branches) -> list[frozenset[int]]:
    """The needs, and of equal branches those of each to come after the one before it."""
    found = [set(us) for us in needs]
    for group in branches:
        for first, second in pairwise(group):
            for u, v in zip(first, second, strict=True):
                found[v].add(u)
    return [frozenset(us) for us in found]


def contained(small: Words, large: Words) -> NDArray[np.bool_]:
    """Whether each of the small sets lies in each of the large ones: [large, small]."""
    inside = (small[None, :, 0] & ~large[:, None, 0]) == 0
    for word in range(1, small.shape[1]):
        inside &= (small[None, :, word] & ~large[:, None, word]) == 0
    return np.asarray(inside)


def equal_branches(links: Sequence[Link], kinds: Sequence[Hashable]) -> Branches:
    """Groups of interchangeable branches: chains of units that read and feed the same units outside, those at
    each place of the same kind (whatever a caller takes as equal: all their costs). O(units + links)."""
    before: list[set[int]] = [set() for _ in kinds]
    after: list[set[int]] = [set() for _ in kinds]
    read: list[list[Hashable]] = [[] for _ in kinds]
    sent: list[list[tuple[float, tuple[int, ...]]]] = [[] for _ in kinds]
    for number, link in enumerate(links):
        sent[link.source].append((link.bytes, tuple(sorted(link.readers))))
        after[link.source] |= link.readers
        for v in link.readers:
            before[v].add(link.source)
            # one reader's own, or one of several that share it
            read[v].append((link.source, link.bytes, number if len(link.readers) > 1 else None))

    def follows(v: int) -> bool:
        return len(before[v]) == 1 and len(after[next(iter(before[v]))]) == 1

    groups: dict[Hashable, list[tuple[int, ...]]] = {}
    for v in range(len(kinds)):
        if follows(v):
            continue
        branch = [v]
        while len(after[branch[-1]]) == 1 and follows(next(iter(after[branch[-1]]))):
            branch += after[branch[-1]]
        inside = tuple(tuple(sorted(size for size, _ in sent[u])) for u in branch[:-1])
        outside = (frozenset(read[v]), tuple(sorted(sent[branch[-1]])))
        signature = (outside, inside, tuple(kinds[u] for u in branch))
        groups.setdefault(signature, []).append(tuple(branch))
    return tuple(tuple(found) for found in groups.values() if len(found) > 1)


def _masks(sets: Sequence[Iterable[int]], count: int) -> Words:
    """A row of words for every set of units."""
    members = np.zeros((len(sets), count), dtype=bool)
    for row, found in enumerate(sets):
        members[row, list(found)] = True
    return _packed(members)


def _packed(members: NDArray[np.bool_]) -> Words:
    """Columns as bits."""
    rows, count = members.shape
    padded = np.zeros((rows, 64 * max(-(-count // 64), 1)), dtype=bool)
    padded[:, :count] = members
    return np.packbits(padded, axis=1, bitorder="little").view(np.uint64)


def _unpacked(words: Words, count: int) -> NDArray[np.bool_]:
    """Bits as columns."""
    as_bytes = np.ascontiguousarray(words).view(np.uint8)
    return np.unpackbits(as_bytes, axis=1, count=count, bitorder="little").astype(bool)
