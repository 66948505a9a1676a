"""Fewest devices for a threshold, given what each interval needs as a stage (GraphPipe §5, Alg. 1).

Levels 1..H count the stages on the longest path to a sink, which is what 1F1B has in flight. With L positions
in a chain, B branches in a block and H levels the programme takes O(L^2 H^2) for a chain and O((L + B^2) H^3)
for a block; the outermost chain one factor H less. Equal branches are solved once. The number of devices is
no dimension of it.

The space: a stage is an interval of the leaf order. Inside a block it belongs to one branch, or is a run of
whole branches. One stage may leave the block: it holds the end of a branch and all later branches, and may go
on after the block. One stage may enter it: it may begin before the block and holds the head of a branch
and all branches before, where the branch it enters comes before the one that is left. So neither a join nor
a fork needs a device of its own.
"""

from collections.abc import Callable, Iterator
from typing import TypeVar, cast

import numpy as np

from .outline import Block, Chain
from .sides import INF, Ahead, Behind, Found, Table

Part = TypeVar("Part")


class Groups:
    """Fewest devices for the branches [j, q) of a block: each by itself, or neighbours whole in one stage."""

    def __init__(self, fewest: "Fewest", block: Block) -> None:
        self.fewest = fewest
        self.whole = [ahead.rows[ahead.count - 1] for ahead in map(fewest.ahead, block.branches)]
        levels, count = fewest.top + 1, len(block.branches)
        starts = _starts(block)
        single = {(g, q): self._single(starts[g], starts[q]) for q in range(count + 1) for g in range(q - 1)}
        self.best: dict[tuple[int, int], Table] = {}
        for j in range(count + 1):
            self.best[j, j] = np.zeros((levels, levels), dtype=np.int32)
            for q in range(j + 1, count + 1):
                found = self.best[j, q - 1] + self.whole[q - 1]
                for g in range(j, q - 1):
                    found = np.minimum(found, self.best[j, g] + single[g, q])
                self.best[j, q] = np.minimum(found, INF)

    def _single(self, start: int, stop: int) -> Table:
        above = self.fewest.above
        degree = self.fewest.degrees[start, stop, above][:, None]
        return np.asarray(np.minimum(degree + self.fewest.nothing[above], INF))

    def trace(self, block: Block, j: int, q: int, x: int, y: int) -> Iterator[Found]:
        """The stages behind best[j, q][x, y]."""
        if j == q:
            return
        value = self.best[j, q][x, y]
        if self.best[j, q - 1][x, y] + self.whole[q - 1][x, y] == value:
            yield from self.trace(block, j, q - 1, x, y)
            branch = block.branches[q - 1]
            ahead = self.fewest.ahead(branch)
            yield from ahead.trace(branch, ahead.count - 1, x, y)
            return
        starts, level = _starts(block), int(self.fewest.above[x])
        degrees = [int(self.fewest.degrees[starts[g], starts[q], level]) for g in range(j, q - 1)]
        best = int(np.argmin([self.best[j, j + i][x, y] + degree for i, degree in enumerate(degrees)]))
        yield from self.trace(block, j, j + best, x, y)
        yield Found(starts[j + best], starts[q], degrees[best], level)


def _starts(block: Block) -> list[int]:
    return [*(branch.start for branch in block.branches), block.stop]


class Fewest:
    """All tables for one choice of what may be a stage, made as they are asked for.

    `degrees[a, b, h]`: devices of the stage [a, b) at level h (INF: it may not be one); h = 0 is INF. The
    highest level stands for itself and everything above.
    """

    def __init__(self, degrees: Table) -> None:
        self.degrees = degrees
        self.top = degrees.shape[2] - 1
        levels = np.arange(self.top + 1)
        self.above = np.minimum(levels + 1, self.top)  # level of a stage whose next is at level x
        self.below = np.where(levels == self.top, levels, np.maximum(levels - 1, 0))  # and the other way
        self.nothing: Table = np.where(levels >= levels[:, None], 0, INF).astype(np.int32)
        self._memo: dict[object, object] = {}

    def whole(self, chain: Chain) -> tuple[Ahead, Table]:
        """The outermost chain; the fewest devices for it by the level of its first stages."""
        ahead = Ahead(self, chain, alone=True)
        return ahead, ahead.rows[ahead.count - 1, 0]

    def ahead(self, chain: Chain) -> Ahead:
        """What a branch needs from each of its positions on."""
        return self._once(("ahead", chain.shape, self._inside(chain)), lambda: Ahead(self, chain))

    def behind(self, chain: Chain) -> Behind:
        """What a branch needs up to each of its positions."""
        return self._once(("behind", chain.shape, self._inside(chain)), lambda: Behind(self, chain))

    def groups(self, block: Block) -> Groups:
        """What runs of a block's branches need."""
        shapes = tuple(branch.shape for branch in block.branches)
        return self._once(("groups", shapes, self._inside(block)), lambda: Groups(self, block))

    def _inside(self, part: Chain | Block) -> bytes:
        inside = slice(part.start, part.stop + 1)
        return self.degrees[inside, inside].tobytes()

    def _once(self, key: object, make: Callable[[], Part]) -> Part:
        if key not in self._memo:
            self._memo[key] = make()
        return cast(Part, self._memo[key])
