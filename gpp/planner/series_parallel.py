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

CANDIDATES = 8  # operators tried as the place of added dependencies


@dataclass(frozen=True, slots=True)
class Leaf:
    """One operator, by its position in the graph."""

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
    """The operators in the order in which the tree's leaves are met: a topological order, in which every
    subtree, and every run of children, is an interval."""
    return tuple(_leaves(tree))


def _leaves(tree: Tree) -> Iterator[int]:
    match tree:
        case Leaf(operator):
            yield operator
        case Series(children) | Parallel(children):
            for child in children:
                yield from _leaves(child)


def decompose(graph: ComputationGraph, work: Sequence[float] | None = None) -> Tree:
    """The tree of `graph`.

    `work` (any unit, one number an operator; by default FLOPs) decides where dependencies are added to a
    graph that is not series-parallel. n operators: O(n) operations on n-bit sets a level of the tree where
    the graph is series-parallel, O(n^2) where it is not.
    """
    if work is None:
        works = [(op.forward, op.backward_input, op.backward_weight) for op in graph.operators]
        work = [sum(part.flops for part in parts) for parts in works]
    weights = np.asarray(work, dtype=np.float64)
    if not weights.any():
        weights = np.ones(len(graph.operators))
    return _Builder(graph, weights).build(tuple(range(len(graph.operators))))


class _Builder:
    """The closure of a graph, shared by the recursion. Members are in topological order."""

    def __init__(self, graph: ComputationGraph, work: NDArray[np.float64]) -> None:
        self.work = work
        self.before = graph.ancestors
        self.edges = graph.successors

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
        root = {v: v for v in members}

        def find(v: int) -> int:
            while root[v] != v:
                root[v] = root[root[v]]
                v = root[v]
            return v

        for u in members:
            for v in self.edges[u]:
                if v in root:
                    a, b = sorted((find(u), find(v)))
                    root[b] = a
        found: dict[int, list[int]] = {}
        for v in members:
            found.setdefault(find(v), []).append(v)
        return [tuple(group) for group in found.values()]

    def added_cut(self, members: tuple[int, ...]) -> list[tuple[int, ...]]:
        """Add dependencies at one operator so that a connected piece without series cut gets one.

        Either everything that is not before v waits for v, or v waits for everything that is not after it; v
        is one of the operators with the least work beside it, and of those cuts the one that takes the least
        work out of parallel is taken.
        """
        inside = np.array(members)
        before = self.order[np.ix_(inside, inside)]  # [u, v]: u before v
        work = self.work[inside]
        same = np.eye(len(inside), dtype=bool)
        beside = ~(before | before.T | same) @ work
        cuts = []
        for v in np.argsort(beside, kind="stable")[:CANDIDATES]:
            cuts += [before[:, v] | same[v], ~(before[v] | same[v])]

        def serialised(first: NDArray[np.bool_]) -> float:
            """Work that could have overlapped and no longer can: that of the smaller side."""
            across = before[np.ix_(first, ~first)]
            return float(min(work[first][~across.all(1)].sum(), work[~first][~across.all(0)].sum()))

        first = min(cuts, key=serialised)
        return [tuple(inside[first].tolist()), tuple(inside[~first].tolist())]

    @cached_property
    def order(self) -> NDArray[np.bool_]:
        """[u, v]: u comes before v."""
        count = len(self.before)
        masks = b"".join(mask.to_bytes((count + 7) // 8, "little") for mask in self.before)
        rows = np.frombuffer(masks, dtype=np.uint8).reshape(count, -1)
        return np.unpackbits(rows, axis=1, count=count, bitorder="little").T.astype(bool)
