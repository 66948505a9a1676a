"""Fewest devices on either side of every position of a chain: the two directions of the tree's programme.

A table [x, y] is the fewest devices for a part whose next stage is at level x and whose first stages are at
level y at most; INF where there is no way. `Ahead` has the part from a position to the chain's end, which a
stage that ends at the position meets; `Behind` the part from the chain's start to a position, which a stage
that starts there follows. Rows are positions, by their distance from the chain's start, so that equal chains
share them; `trace` is given the real chain and finds the option that a number came from.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from .outline import Block, Chain

if TYPE_CHECKING:
    from .fewest import Fewest

INF = 1 << 20
CHUNK = 1 << 18  # numbers of a temporary array: it stays in the cache
Table = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Found:
    """A stage of a traced plan: the interval [start, stop) on `devices` replicas, charged as at `level`."""

    start: int
    stop: int
    devices: int
    level: int


@dataclass(frozen=True, slots=True)
class _Element:
    """A row before element number `index` (or after the last)."""

    index: int


@dataclass(frozen=True, slots=True)
class _Inner:
    """A row inside a block (element `element`): row `row` of its branch number `branch`."""

    element: int
    branch: int
    row: int


class _Side:
    """Rows as they are found; at most one for each boundary of the chain."""

    def __init__(self, fewest: "Fewest", chain: Chain, entries: int) -> None:
        self.fewest = fewest
        self.count = 0
        size = chain.stop - chain.start + 1
        self.rows = np.full((size, entries, fewest.top + 1), INF, dtype=np.int32)
        self.places = np.zeros(size, dtype=np.intp)
        self.origins: list[_Element | _Inner] = []
        self.row_of: dict[int, int] = {}  # element number to its row

    def add(self, place: int, table: Table, origin: _Element | _Inner) -> None:
        if isinstance(origin, _Element):
            self.row_of[origin.index] = self.count
        self.rows[self.count] = np.minimum(table, INF)
        self.places[self.count] = place
        self.origins.append(origin)
        self.count += 1


class Ahead(_Side):
    """From each position to the end, from the last to the first; the last row is the whole chain.

    `alone`: nothing follows the chain (only the entry x = 0).
    """

    def __init__(self, fewest: "Fewest", chain: Chain, *, alone: bool = False) -> None:
        super().__init__(fewest, chain, 1 if alone else fewest.top + 1)
        # by element, for a block: branches j.. and all after it, [j, x, level that follows the branches, y]
        self.rest: dict[int, Table] = {}
        # the head of branch q, and the stage that leaves the block from inside it with all that follows
        self.leaving: dict[int, list[Table]] = {}
        self.add(
            chain.stop - chain.start,
            fewest.nothing[: self.rows.shape[1]],
            _Element(len(chain.elements)),
        )
        for i in reversed(range(len(chain.elements))):
            element = chain.elements[i]
            if isinstance(element, Block):
                self._block(chain, i, element)
            self._element(chain, i, element.start)

    def _element(self, chain: Chain, i: int, start: int) -> None:
        n = self.count
        degree = self.fewest.degrees[start, self.places[:n] + chain.start]
        best = (degree[:, None, :] + self.rows[:n, :, self.fewest.below]).min(0)
        if i in self.rest:
            best = np.minimum(best, self.rest[i][0].min(1))
        self.add(start - chain.start, np.minimum.accumulate(best, axis=1), _Element(i))

    def _block(self, chain: Chain, i: int, block: Block) -> None:
        fewest, n = self.fewest, self.count
        groups = fewest.groups(block)
        branches = range(len(block.branches))
        following = self.rows[n - 1]
        later = self.rows[:n, :, fewest.below]
        leaving = []
        stops = self.places[:n] + chain.start
        for branch in block.branches:
            behind = fewest.behind(branch)
            starts = behind.places[: behind.count - 1] + branch.start
            best = np.full((*following.shape, following.shape[1]), INF, dtype=np.int32)
            for part in _parts(len(starts), max(n, best.shape[1]) * later[0].size):
                degrees = fewest.degrees[starts[part, None], stops]
                stage = (degrees[:, :, None, :] + later).min(1)
                whole = stage[:, :, :, None] + behind.rows[: len(starts)][part, None]
                best = np.minimum(best, whole.min(0))
            leaving.append(np.minimum(best, INF))
        rest = np.stack(
            [groups.best[j, len(branches)] + following[:, :, None] for j in (*branches, len(branches))]
        )
        for j in branches:
            for q in range(j, len(branches)):
                rest[j] = np.minimum(rest[j], groups.best[j, q] + leaving[q])
        self.rest[i], self.leaving[i] = np.minimum(rest, INF), leaving
        for q in reversed(branches):
            branch = block.branches[q]
            ahead = fewest.ahead(branch)
            inner = [r for r in range(ahead.count - 1) if ahead.places[r] + branch.start < block.stop]
            for part in _parts(len(inner), self.rest[i][q + 1].size):
                rows = inner[part]
                tables = (ahead.rows[rows][:, None] + self.rest[i][q + 1]).min(2)
                for row, table in zip(rows, tables, strict=True):
                    self.add(int(ahead.places[row]) + branch.start - chain.start, table, _Inner(i, q, row))

    def trace(self, chain: Chain, row: int, x: int, y: int) -> Iterator[Found]:
        """The stages behind rows[row][x, y]."""
        fewest = self.fewest
        match self.origins[row]:
            case _Inner(element, q, inner):
                branch = _block_of(chain, element).branches[q]
                ahead = fewest.ahead(branch)
                level = int((ahead.rows[inner][:, y] + self.rest[element][q + 1][x, :, y]).argmin())
                yield from ahead.trace(branch, inner, level, y)
                yield from self._trace_rest(chain, element, q + 1, x, level, y)
            case _Element(i) if i < len(chain.elements):
                value = self.rows[row][x, y]
                y = int((self.rows[row][x] == value).argmax())
                if i in self.rest and self.rest[i][0, x, :, y].min() == value:
                    level = int(self.rest[i][0, x, :, y].argmin())
                    yield from self._trace_rest(chain, i, 0, x, level, y)
                else:
                    yield from self._trace_stage(chain, chain.elements[i].start, row, x, y)

    def _trace_stage(self, chain: Chain, start: int, limit: int, x: int, y: int) -> Iterator[Found]:
        """The best stage from `start` at level y over the rows before `limit`; of equals the shortest,
        because early stages hold the most samples."""
        stops = self.places[:limit] + chain.start
        found = self.fewest.degrees[start, stops, y] + self.rows[:limit, x, self.fewest.below[y]]
        row = limit - 1 - int(found[::-1].argmin())
        stop = int(stops[row])
        yield Found(start, stop, int(self.fewest.degrees[start, stop, y]), y)
        yield from self.trace(chain, row, x, int(self.fewest.below[y]))

    def _trace_rest(self, chain: Chain, i: int, j: int, x: int, level: int, y: int) -> Iterator[Found]:
        block, fewest = _block_of(chain, i), self.fewest
        groups = fewest.groups(block)
        value, count, after = self.rest[i][j, x, level, y], len(block.branches), self.row_of[i + 1]
        if groups.best[j, count][level, y] + self.rows[after][x, level] == value:
            yield from groups.trace(block, j, count, level, y)
            yield from self.trace(chain, after, x, level)
            return
        options = [groups.best[j, q][level, y] + self.leaving[i][q][x, level, y] for q in range(j, count)]
        q = j + int(np.argmin(options))
        yield from groups.trace(block, j, q, level, y)
        branch = block.branches[q]
        behind = fewest.behind(branch)
        starts = behind.places[: behind.count - 1] + branch.start
        stops = self.places[: after + 1] + chain.start
        stage = fewest.degrees[starts[:, None], stops, level] + self.rows[: after + 1, x, fewest.below[level]]
        row = int((behind.rows[: len(starts), level, y] + stage.min(1)).argmin())
        yield from behind.trace(branch, row, level, y)
        yield from self._trace_stage(chain, int(starts[row]), after + 1, x, level)


class Behind(_Side):
    """From the start to each position, from the first to the last."""

    def __init__(self, fewest: "Fewest", chain: Chain) -> None:
        super().__init__(fewest, chain, fewest.top + 1)
        # by element, for a block: all before it and branches ..q - 1, [q, x, level of their first stages, y]
        self.rest: dict[int, Table] = {}
        # the tail of branch e, and the stage that enters the block up to inside it with all before
        self.entering: dict[int, list[Table]] = {}
        self.add(0, fewest.nothing, _Element(0))
        for i, element in enumerate(chain.elements):
            if isinstance(element, Block):
                self._block(chain, i, element)
            self._element(chain, i + 1, element.stop)

    def _element(self, chain: Chain, i: int, stop: int) -> None:
        n = self.count
        best = self._stages(chain, stop, n)
        if i - 1 in self.rest:
            best = np.minimum(best, self.rest[i - 1][-1].min(1))
        self.add(stop - chain.start, best, _Element(i))

    def _stages(self, chain: Chain, stop: int, limit: int) -> Table:
        """The best stage that ends at `stop`, with what comes before it, over the rows before `limit`."""
        above = self.fewest.above
        degree = self.fewest.degrees[self.places[:limit] + chain.start, stop][:, above]
        best = (degree[:, :, None] + self.rows[:limit, above]).min(0, initial=INF)
        return np.asarray(np.minimum(best, INF))

    def _block(self, chain: Chain, i: int, block: Block) -> None:
        fewest, n = self.fewest, self.count
        groups = fewest.groups(block)
        count = len(block.branches)
        entering = []
        for branch in block.branches:
            ahead = fewest.ahead(branch)
            best = np.full((fewest.top + 1,) * 3, INF, dtype=np.int32)
            inner = [r for r in range(ahead.count - 1) if ahead.places[r] + branch.start < block.stop]
            for part in _parts(len(inner), best.size):
                rows = inner[part]
                stages = np.stack([self._stages(chain, int(ahead.places[r]) + branch.start, n) for r in rows])
                best = np.minimum(best, (ahead.rows[rows][:, :, :, None] + stages[:, None]).min(0))
            entering.append(np.minimum(best, INF))
        rest = np.stack([groups.best[0, q][:, :, None] + self.rows[n - 1][None] for q in range(count + 1)])
        for q in range(count + 1):
            for e in range(q):
                rest[q] = np.minimum(rest[q], groups.best[e + 1, q][:, :, None] + entering[e])
        self.rest[i], self.entering[i] = np.minimum(rest, INF), entering
        for q, branch in enumerate(block.branches):
            behind = fewest.behind(branch)
            inner = [r for r in range(behind.count - 1) if behind.places[r] + branch.start > block.start]
            for part in _parts(len(inner), self.rest[i][q].size):
                rows = inner[part]
                tables = (behind.rows[rows][:, :, :, None] + self.rest[i][q]).min(2)
                for row, table in zip(rows, tables, strict=True):
                    self.add(int(behind.places[row]) + branch.start - chain.start, table, _Inner(i, q, row))

    def trace(self, chain: Chain, row: int, x: int, y: int) -> Iterator[Found]:
        """The stages behind rows[row][x, y]."""
        fewest = self.fewest
        match self.origins[row]:
            case _Inner(element, q, inner):
                branch = _block_of(chain, element).branches[q]
                behind = fewest.behind(branch)
                level = int((behind.rows[inner][x] + self.rest[element][q][x, :, y]).argmin())
                yield from behind.trace(branch, inner, x, level)
                yield from self._trace_rest(chain, element, q, x, level, y)
            case _Element(i) if i > 0:
                value = self.rows[row][x, y]
                if i - 1 in self.rest and self.rest[i - 1][-1, x, :, y].min() == value:
                    level = int(self.rest[i - 1][-1, x, :, y].argmin())
                    yield from self._trace_rest(chain, i - 1, -1, x, level, y)
                else:
                    yield from self._trace_stage(chain, chain.elements[i - 1].stop, row, x, y)

    def _trace_stage(self, chain: Chain, stop: int, limit: int, x: int, y: int) -> Iterator[Found]:
        """The best stage up to `stop` over the rows before `limit`; of equals the longest, see Ahead."""
        level = int(self.fewest.above[x])
        starts = self.places[:limit] + chain.start
        row = int((self.fewest.degrees[starts, stop, level] + self.rows[:limit, level, y]).argmin())
        start = int(starts[row])
        yield Found(start, stop, int(self.fewest.degrees[start, stop, level]), level)
        yield from self.trace(chain, row, level, y)

    def _trace_rest(self, chain: Chain, i: int, q: int, x: int, level: int, y: int) -> Iterator[Found]:
        block, fewest = _block_of(chain, i), self.fewest
        groups = fewest.groups(block)
        q = q % (len(block.branches) + 1)
        before = self.row_of[i]
        if groups.best[0, q][x, level] + self.rows[before][level, y] == self.rest[i][q, x, level, y]:
            yield from groups.trace(block, 0, q, x, level)
            yield from self.trace(chain, before, level, y)
            return
        options = [groups.best[e + 1, q][x, level] + self.entering[i][e][x, level, y] for e in range(q)]
        e = int(np.argmin(options))
        yield from groups.trace(block, e + 1, q, x, level)
        branch = block.branches[e]
        ahead = fewest.ahead(branch)
        inner = [r for r in range(ahead.count - 1) if ahead.places[r] + branch.start < block.stop]
        stops = [int(ahead.places[r]) + branch.start for r in inner]
        values = [
            ahead.rows[r][x, level] + self._stages(chain, stop, before + 1)[level, y]
            for r, stop in zip(inner, stops, strict=True)
        ]
        best = int(np.argmin(values))
        yield from ahead.trace(branch, inner[best], x, level)
        yield from self._trace_stage(chain, stops[best], before + 1, level, y)


def _parts(count: int, each: int) -> Iterator[slice]:
    """All of `count` rows, as many at once as make arrays of CHUNK numbers, at `each` a row."""
    step = max(1, CHUNK // max(each, 1))
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))


def _block_of(chain: Chain, i: int) -> Block:
    element = chain.elements[i]
    assert isinstance(element, Block)
    return element
