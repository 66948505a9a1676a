"""The series-parallel tree as intervals of its leaf order, with subtrees too small to matter merged.

Positions are boundaries of the leaf order: a run is [start, start + 1), whatever number of operators that is.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from .series_parallel import Leaf, Parallel, Series, Tree, leaf_order

MANY = 160  # runs from which on small ones are merged


@dataclass(frozen=True, slots=True)
class Run:
    """Operators that stay together."""

    start: int

    @property
    def stop(self) -> int:
        """The next boundary."""
        return self.start + 1


@dataclass(frozen=True, slots=True)
class Block:
    """Branches side by side, one after the other in the leaf order."""

    branches: tuple["Chain", ...]

    @property
    def start(self) -> int:
        """Boundary before the first branch."""
        return self.branches[0].start

    @property
    def stop(self) -> int:
        """Boundary after the last branch."""
        return self.branches[-1].stop


@dataclass(frozen=True, slots=True)
class Chain:
    """Runs and blocks that follow each other. `shape` is the same for chains of the same form anywhere."""

    elements: tuple[Run | Block, ...]
    shape: tuple[object, ...]

    @property
    def start(self) -> int:
        """Boundary before the first element."""
        return self.elements[0].start

    @property
    def stop(self) -> int:
        """Boundary after the last element."""
        return self.elements[-1].stop

    @property
    def depth(self) -> int:
        """Runs on the longest path: no plan has a longer chain of stages."""
        return sum(
            max(branch.depth for branch in e.branches) if isinstance(e, Block) else 1 for e in self.elements
        )

    @property
    def width(self) -> int:
        """Most branches that can run at once."""
        return max(
            sum(branch.width for branch in e.branches) if isinstance(e, Block) else 1 for e in self.elements
        )


@dataclass(frozen=True, slots=True)
class Outline:
    """A chain over `boundaries`, positions in the leaf order `order`."""

    order: tuple[int, ...]
    boundaries: tuple[int, ...]
    chain: Chain

    def operators(self, start: int, stop: int) -> tuple[int, ...]:
        """The operators between two boundaries."""
        return self.order[self.boundaries[start] : self.boundaries[stop]]

    def flat(self) -> Chain:
        """The same runs as one chain: stages may then hold the end of a branch and the start of the next."""
        return _chain([Run(i) for i in range(self.chain.stop)])


def outline(
    tree: Tree,
    weights: Sequence[float],
    devices: int,
    members: Sequence[Sequence[int]] | None = None,
) -> Outline:
    """Draw the tree. `weights` of its leaves sum to about 1; where there are more than MANY leaves, subtrees
    and runs are merged as long as they weigh less than a small part of a device's share. `members` are the
    operators of every leaf where that is not one: they are never parted."""
    part = 1 / 16
    leaves = members or [(i,) for i in range(len(weights))]
    drawn = _Outliner(leaves, weights, -1.0).draw(tree)
    while drawn.chain.stop > MANY and part <= 0.5:
        drawn = _Outliner(leaves, weights, part / devices).draw(tree)
        part *= 2
    return drawn


def _chain(elements: Sequence[Run | Block]) -> Chain:
    shape = tuple(tuple(b.shape for b in e.branches) if isinstance(e, Block) else 1 for e in elements)
    return Chain(tuple(elements), shape)


class _Outliner:
    """Walks the tree once, numbering boundaries as it goes; groups weigh at most `limit`."""

    def __init__(self, members: Sequence[Sequence[int]], weights: Sequence[float], limit: float) -> None:
        self.members = members
        self.weights = weights
        self.limit = limit
        self.boundaries = [0]
        self.known: dict[int, tuple[float, int]] = {}  # by the tree's identity: its weight and its operators

    def draw(self, tree: Tree) -> Outline:
        chain = self.chain([tree] if not isinstance(tree, Series) else list(tree.children))
        order = tuple(i for leaf in leaf_order(tree) for i in self.members[leaf])
        return Outline(order, tuple(self.boundaries), chain)

    def chain(self, children: Sequence[Tree]) -> Chain:
        elements: list[Run | Block] = []
        for group in self.grouped(children):
            if len(group) == 1 and isinstance(group[0], Parallel) and self.weigh(group[0]) > self.limit:
                elements.append(self.block(group[0]))
            else:
                elements.append(self.run(group))
        return _chain(elements)

    def block(self, tree: Parallel) -> Block:
        branches = []
        for group in self.grouped(tree.children):
            if len(group) == 1 and self.weigh(group[0]) > self.limit:
                child = group[0]
                branches.append(self.chain(child.children if isinstance(child, Series) else [child]))
            else:
                branches.append(_chain([self.run(group)]))
        return Block(tuple(branches))

    def grouped(self, children: Sequence[Tree]) -> list[list[Tree]]:
        """Neighbours together as long as the group stays within the limit."""
        groups: list[list[Tree]] = []
        total = 0.0
        for child in children:
            weight = self.weigh(child)
            if groups and total + weight <= self.limit:
                groups[-1].append(child)
                total += weight
            else:
                groups.append([child])
                total = weight
        return groups

    def run(self, group: Sequence[Tree]) -> Run:
        start = len(self.boundaries) - 1
        self.boundaries.append(self.boundaries[-1] + sum(self.measure(tree)[1] for tree in group))
        return Run(start)

    def weigh(self, tree: Tree) -> float:
        return self.measure(tree)[0]

    def measure(self, tree: Tree) -> tuple[float, int]:
        if isinstance(tree, Leaf):
            return self.weights[tree.operator], len(self.members[tree.operator])
        if id(tree) not in self.known:
            parts = [self.measure(child) for child in tree.children]
            self.known[id(tree)] = sum(w for w, _ in parts), sum(n for _, n in parts)
        return self.known[id(tree)]
