"""The series-parallel tree of a computation graph (GraphPipe §5).

Vertex-series-parallel: leaves are operators, so no operator belongs to two subgraphs and every stage made of
subtrees is convex. Everything works on the transitive closure, where a skip edge that other paths imply
costs nothing: the tree is that of the transitive reduction. A graph that is not series-parallel gets
dependencies added, operators are never duplicated; they only restrict which plans are looked at.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from gpp.graph import ComputationGraph

from .units import Units

CANDIDATES = 8  # operators tried as the place of added dependencies


@dataclass(frozen=True, slots=True)
class Leaf:
    """One operator, by its position in the graph, or one unit by its number."""

    operator: int


@dataclass(frozen=True, slots=True)
class Series:
    """Children that each wait for the whole one before; none of them is a Series."""

    children: tuple["Tree", ...]


@dataclass(frozen=True, slots=True)
class Parallel:
    """Children without any path between them; none of them is a Parallel."""

    children: tuple["Tree", ...]


Tree = Leaf | Series | Parallel


def leaf_order(tree: Tree) -> tuple[int, ...]:
    """The operators (or units) in the order in which the tree's leaves are met: a topological order, in which
    every subtree, and every run of children, is an interval."""
    return tuple(_leaves(tree))


def _leaves(tree: Tree) -> Iterator[int]:
    match tree:
        case Leaf(operator):
            yield operator
        case Series(children) | Parallel(children):
            for child in children:
                yield from _leaves(child)


def decompose(
    graph: ComputationGraph, work: Sequence[float] | None = None, units: Units | None = None
) -> Tree:
    """The tree of `graph`, or of the graph of its `units`.

    `work` (any unit, one number an operator or unit; by default FLOPs) decides where dependencies are added
    to a graph that is not series-parallel. n operators: O(n) operations on n-bit sets a level of the tree
    where the graph is series-parallel, O(n^2) where it is not.
    """
    if work is None:
        works = [(op.forward, op.backward_input, op.backward_weight) for op in graph.operators]
        flops = [sum(part.flops for part in parts) for parts in works]
        work = [sum(flops[i] for i in found) for found in units.members] if units else flops
    nodes = units or graph
    weights = np.asarray(work, dtype=np.float64)
    if not weights.any():
        weights = np.ones(len(nodes.ancestors))
    return _Builder(nodes.ancestors, nodes.successors, weights).build(tuple(range(len(weights))))


class _Builder:
    """The closure of a graph, shared by the recursion. Members are in topological order."""

    def __init__(
        self, before: Sequence[int], edges: Sequence[Sequence[int]], work: NDArray[np.float64]
    ) -> None:
        self.work = work
        self.before = before
        self.edges = edges

    def build(self, members: tuple[int, ...]) -> Tree:
        parts: list[Tree] = []
        pending = [members]  # pieces of a series, the first on top
        while pending:
            piece = pending.pop()
            if len(piece) == 1:
                parts.append(Leaf(piece[0]))
                continue
            pieces = self.series_cuts(piece)
            if len(pieces) == 1:
                branches = self.components(piece)
                if len(branches) > 1:
                    parts.append(Parallel(tuple(self.build(branch) for branch in branches)))
                    continue
                pieces = self.added_cut(piece)
            pending.extend(reversed(pieces))
        return parts[0] if len(parts) == 1 else Series(tuple(parts))

    def series_cuts(self, members: tuple[int, ...]) -> list[tuple[int, ...]]:
        """Split where all before are ancestors of all after; one topological order shows every such cut."""
        common = [-1] * (len(members) + 1)
        for i in reversed(range(len(members))):
            common[i] = common[i + 1] & self.before[members[i]]
        pieces, start, earlier = [], 0, 0
        for i, v in enumerate(members):
            if i > start and earlier & ~common[i] == 0:
                pieces.append(members[start:i])
                start = i
            earlier |= 1 << v
        return [*pieces, members[start:]]

    def components(self, members: tuple[int, ...]) -> list[tuple[int, ...]]:
        """Connected components, by their first member."""
        left = sum(1 << v for v in members)
        found = []
        while left:
            edge = left & -left  # reached, and not yet looked at
            component = edge
            left ^= edge
            while edge:
                v = edge.bit_length() - 1
                reached = self.beside[v] & left
                left ^= reached
                component |= reached
                edge = edge ^ (1 << v) | reached
            found.append(component)
        return [tuple(v for v in members if mask >> v & 1) for mask in found]

    def added_cut(self, members: tuple[int, ...]) -> list[tuple[int, ...]]:
        """Add dependencies so that a connected piece without series cut gets one.

        Of the cuts looked at the one is taken that takes the least work out of parallel. Some let everything
        that is not before an operator v wait for v, or v wait for everything that is not after it; v is one
        of the operators with the least work beside it. The others part the piece after a stratum, those with
        paths of equal length to them.
        """
        inside = np.array(members)
        order = self.order[inside].take(inside, axis=1)  # [u, v]: 1 where u is before v
        work = self.work[inside].astype(np.float32)
        alone = (work.sum() - work - order @ work - work @ order) / (work.sum() or 1.0)
        chosen = np.argsort(alone.round(5), kind="stable")[:CANDIDATES]
        each = np.arange(len(inside)) == chosen[:, None]
        strata = self.strata(members)
        levels = np.unique(np.linspace(0, strata.max() - 1, CANDIDATES).astype(int))
        cuts = np.concatenate(
            [
                (order[:, chosen].T > 0) | each,
                ~((order[chosen] > 0) | each),
                strata <= levels[:, None],
            ]
        )
        first = cuts[int(_serialised(order, work, cuts).argmin())]
        return [tuple(inside[first].tolist()), tuple(inside[~first].tolist())]

    def strata(self, members: tuple[int, ...]) -> NDArray[np.intp]:
        """For each member the edges on the longest path to it."""
        found: dict[int, int] = dict.fromkeys(members, 0)
        for u in members:
            for v in self.edges[u]:
                if v in found:
                    found[v] = max(found[v], found[u] + 1)
        return np.array(list(found.values()))

    @cached_property
    def beside(self) -> list[int]:
        """For each operator the bit set of those that it has an edge with."""
        found = [0] * len(self.edges)
        for u, vs in enumerate(self.edges):
            for v in vs:
                found[u] |= 1 << v
                found[v] |= 1 << u
        return found

    @cached_property
    def order(self) -> NDArray[np.float32]:
        """[u, v]: 1 where u comes before v."""
        count = len(self.before)
        masks = b"".join(mask.to_bytes((count + 7) // 8, "little") for mask in self.before)
        rows = np.frombuffer(masks, dtype=np.uint8).reshape(count, -1)
        after = np.unpackbits(rows, axis=1, count=count, bitorder="little")
        return np.ascontiguousarray(after.T, dtype=np.float32)


def _serialised(
    order: NDArray[np.float32], work: NDArray[np.float32], cuts: NDArray[np.bool_]
) -> NDArray[np.float32]:
    """For each cut, given as the members before it, the work that could have overlapped and no longer can:
    that of the side where it is less; inf where a side is empty."""
    first = cuts.astype(np.float32)
    last = 1 - first
    # who of the first comes before all of the last anyway, and the other way round
    ahead = last @ order.T == last.sum(1, keepdims=True)
    behind = first @ order == first.sum(1, keepdims=True)
    lost = np.minimum((first * ~ahead) @ work, (last * ~behind) @ work)
    lost[cuts.all(1) | ~cuts.any(1)] = np.inf
    return np.asarray(lost)
