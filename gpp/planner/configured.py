"""Every stage its own micro-batch size and its own k of kFkB (GraphPipe §5, boundary configurations).

A configuration is (i, b, k): samples in flight, micro-batch size, k. For a threshold the programme finds the
fewest devices. Its tables are [x, y]: x is the configuration of the stage after a part, y that of the stage
before it, so that what a stage must hold for those after it, `gpp.schedule.inflight`'s rule, is a question
about pairs: with i samples and (b, k) it can stand before x or not. Configuration 0 is nobody: no stage.

The space: stages are runs of neighbours of one chain, runs of whole branches, or the end of a block's last
branch with what follows the block. Two blocks in a row are parted by a stage or share one. In-flight counts
up to MOST times the smallest size.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .estimate import Group
from .intervals import Intervals
from .outline import Block, Chain, Run
from .sides import INF
from .space import Space
from .threshold import TOLERANCE, at_least

MOST = 128  # samples in flight, by the smallest micro-batch size
SIZES = 4  # micro-batch sizes of one search
NONE = 0

Table = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Configuration:
    """Samples in flight, the micro-batch size and k; all 0: no stage."""

    in_flight: int
    micro_batch: int
    k: int

    def before(self, after: "Configuration") -> bool:
        """Whether a stage with this may send to one with `after`."""
        if not self.micro_batch or not after.micro_batch:
            return True
        ahead = max(self.k * self.micro_batch, after.micro_batch)
        wait = max(0, self.micro_batch - after.k * after.micro_batch)
        return self.in_flight >= after.in_flight + ahead + wait


def configurations(sizes: Sequence[int], bursts: Sequence[int], mini_batch: int) -> list[Configuration]:
    """All that a stage may have, nobody first; no number in flight exceeds the mini-batch."""
    most = min(MOST * min(sizes), mini_batch)
    found = [Configuration(0, 0, 0)]
    for size in sizes:
        for k in bursts:
            found += [Configuration(i, size, k) for i in range(k * size, most + 1, size)]
    return found


def configured(space: Space, sizes: Sequence[int], memory: float) -> tuple[float, list[Group]] | None:
    """The least seconds of a sample on the slowest stage, each stage with one of the sizes and of the
    options' bursts, and its stages; None if nothing fits. C configurations, n runs: O(n^2 C^2) for each of
    about a dozen thresholds, and O(C^3) more for a block that stages precede."""
    options = space.problem.options
    choices = configurations(sizes, options.bursts, options.mini_batch)
    tables = {size: space.table(size) for size in sizes}
    searches = _Search(space, choices, tables, memory)
    return searches.least()


@dataclass(frozen=True, slots=True)
class _Stage:
    start: int
    stop: int
    configuration: int


class _Search:
    """What is the same for every threshold."""

    def __init__(
        self, space: Space, choices: list[Configuration], tables: dict[int, Intervals], memory: float
    ) -> None:
        self.space, self.choices, self.tables, self.memory = space, choices, tables, memory
        self.before = np.array([[c.before(x) for c in choices] for x in choices])  # [x, c]

    def least(self) -> tuple[float, list[Group]] | None:
        """Bisection over the distinct times of a sample."""
        parts = [t / size for size, table in self.tables.items() for t in table.seconds.values()]
        times = np.unique(np.concatenate([t[np.isfinite(t)] for t in parts]))
        times = times[times >= at_least(parts) * (1 - TOLERANCE)]
        if not len(times):
            return None
        best = self.solve(float(times[-1]))
        low, high = -1, len(times) - 1
        while best is not None and high - low > 1:
            middle = (low + high) // 2
            found = self.solve(float(times[middle]))
            if found is None:
                low = middle
            else:
                high, best = middle, found
        return None if best is None else (float(times[high]), best)

    def solve(self, threshold: float) -> list[Group] | None:
        """Stages within a threshold."""
        degrees = self.degrees(threshold * (1 + TOLERANCE))
        chain = _Chain(_Tables(degrees, self.before), self.space.tree)
        if chain.whole[NONE, NONE] > self.space.devices:
            return None
        groups = []
        for stage in chain.trace(len(chain.places) - 1, NONE, NONE):
            choice = self.choices[stage.configuration]
            operators = self.space.outline.operators(stage.start, stage.stop)
            devices = int(degrees[stage.start, stage.stop, stage.configuration])
            groups.append(Group(operators, devices, choice.micro_batch, choice.k))
        return groups

    def degrees(self, limit: float) -> Table:
        """[a, b, c]: fewest devices of [a, b) as a stage of configuration c; INF where it cannot be."""
        n = self.space.tree.stop + 1
        found: Table = np.full((n, n, len(self.choices)), INF, dtype=np.int32)
        for c, choice in enumerate(self.choices[1:], 1):
            table = self.tables[choice.micro_batch]
            own = choice.in_flight / choice.micro_batch
            for degree in sorted(table.seconds, reverse=True):
                fits = table.memory(degree, own, own + 1) <= self.memory
                seconds = table.seconds[degree]
                found[fits & (seconds <= limit * choice.micro_batch) & np.isfinite(seconds), c] = degree
        return found


class _Tables:
    """Degrees and the rule."""

    def __init__(self, degrees: Table, before: NDArray[np.bool_]) -> None:
        self.degrees = degrees
        self.before = before  # [x, c]: a stage c may stand before x
        self.penalty: Table = np.where(before, 0, INF).astype(np.int32)

    def followed(self, last: Table) -> Table:
        """From [c, y], c the last stage's, to [x, y]: the best last stage that may stand before x."""
        return minplus(self.penalty, last)


def minplus(one: Table, other: Table) -> Table:
    """[x, y] = the least one[x, c] + other[c, y]."""
    found = np.full((one.shape[0], other.shape[1]), INF, dtype=np.int32)
    for c in range(other.shape[0]):
        if (other[c] < INF).any():
            np.minimum(found, one[:, c, None] + other[c], out=found)
    return found


class _Chain:
    """A chain from its start to each of its places: `upto[p]` [x, y] whatever ends there, `last[p]` [c, y]
    with a stage of configuration c that ends there."""

    def __init__(self, tables: _Tables, chain: Chain) -> None:
        self.tables, self.chain = tables, chain
        size = len(tables.before)
        nothing: Table = tables.penalty.copy()  # what is after stands behind what is before
        nobody = np.full((size, size), INF, dtype=np.int32)
        self.places = [chain.start]
        self.upto, self.last = [nothing], [nobody]
        self.blocks: dict[int, _Branches] = {}
        for number, element in enumerate(chain.elements):
            if isinstance(element, Block):
                self.blocks[number] = _Branches(tables, element)
            self._place(number, element)

    @property
    def whole(self) -> Table:
        """The whole chain, [x, y]."""
        return self.upto[-1]

    def _place(self, number: int, element: Run | Block) -> None:
        last = np.full_like(self.last[0], INF)
        for _, table in self._stages(number, element.stop):
            np.minimum(last, table, out=last)
        upto = self.tables.followed(last)
        if number in self.blocks:
            np.minimum(upto, self._parallel(number), out=upto)
        self.places.append(element.stop)
        self.last.append(np.minimum(last, INF))
        self.upto.append(np.minimum(upto, INF))

    def _stages(self, number: int, stop: int) -> Iterator[tuple[tuple[int, int | None, int], Table]]:
        """Every stage that ends at `stop`, with all before it: (its start, the block that it leaves, the
        place in the block's last branch), and [c, y]."""
        for p in range(number + 1):
            degree = self.tables.degrees[self.places[p], stop][:, None]
            yield (self.places[p], None, p), np.minimum(degree + self._own(self.upto[p]), INF)
        for i, branches in self.blocks.items():
            if i >= number:
                continue
            ending = branches.chains[-1]
            for q, start in enumerate(ending.places[:-1]):
                if q or len(branches.chains) > 1:
                    inside = np.minimum(ending.upto[q] + branches.others, INF)
                    degree = self.tables.degrees[start, stop][:, None]
                    yield (start, i, q), np.minimum(degree + self._preceded(i, self._own(inside)), INF)

    def _own(self, upto: Table) -> Table:
        """Rows are stages: the row of nobody is none."""
        found = upto.copy()
        found[NONE] = INF
        return found

    def _preceded(self, number: int, inside: Table) -> Table:
        """A block's table with what comes before the block."""
        return inside if number == 0 else minplus(inside, self.last[number])

    def _parallel(self, number: int) -> Table:
        return self._preceded(number, self.blocks[number].whole)

    def trace(self, place: int, x: int, y: int) -> Iterator[_Stage]:
        """The stages behind upto[place][x, y]."""
        if place == 0:
            return
        number, value = place - 1, self.upto[place][x, y]
        if number in self.blocks and self._parallel(number)[x, y] == value:
            before = y
            if number:
                before = int((self.blocks[number].whole[x] + self.last[number][:, y]).argmin())
                yield from self.trace_last(number, before, y)
            yield from self.blocks[number].trace(x, before)
            return
        c = int((self.tables.penalty[x] + self.last[place][:, y]).argmin())
        yield from self.trace_last(place, c, y)

    def trace_last(self, place: int, c: int, y: int) -> Iterator[_Stage]:
        """The stages behind last[place][c, y]."""
        stop, value = self.places[place], self.last[place][c, y]
        for (start, block, q), table in self._stages(place - 1, stop):
            if table[c, y] != value:
                continue
            yield _Stage(start, stop, c)
            if block is None:
                yield from self.trace(q, c, y)
                return
            branches = self.blocks[block]
            ending, before = branches.chains[-1], y
            if block:
                inside = ending.upto[q][c] + branches.others[c]
                before = int((inside + self.last[block][:, y]).argmin())
                yield from self.trace_last(block, before, y)
            yield from ending.trace(q, c, before)
            yield from branches.trace_upto(len(branches.chains) - 1, c, before)
            return


class _Branches:
    """The branches of a block: each by itself, or neighbours whole in one stage."""

    def __init__(self, tables: _Tables, block: Block) -> None:
        self.tables = tables
        self.chains = [_Chain(tables, branch) for branch in block.branches]
        self.starts = [*(branch.start for branch in block.branches), block.stop]
        zero = np.zeros_like(tables.penalty)
        self.best = [zero]
        for q in range(1, len(self.starts)):
            found = self.best[q - 1] + self.chains[q - 1].whole
            for g in range(q - 1):
                found = np.minimum(found, self.best[g] + self._single(g, q))
            self.best.append(np.minimum(found, INF))

    @property
    def whole(self) -> Table:
        """All branches."""
        return self.best[-1]

    @property
    def others(self) -> Table:
        """All but the last."""
        return self.best[-2]

    def _single(self, g: int, q: int) -> Table:
        degree = self.tables.degrees[self.starts[g], self.starts[q]][:, None]
        return self.tables.followed(np.minimum(degree + self.tables.penalty, INF))

    def trace(self, x: int, y: int) -> Iterator[_Stage]:
        """The stages behind whole[x, y]."""
        return self.trace_upto(len(self.chains), x, y)

    def trace_upto(self, q: int, x: int, y: int) -> Iterator[_Stage]:
        """The stages of the first q branches."""
        if q == 0:
            return
        value, chain = self.best[q][x, y], self.chains[q - 1]
        if self.best[q - 1][x, y] + chain.whole[x, y] == value:
            yield from self.trace_upto(q - 1, x, y)
            yield from chain.trace(len(chain.places) - 1, x, y)
            return
        g = next(g for g in range(q - 1) if self.best[g][x, y] + self._single(g, q)[x, y] == value)
        degree = self.tables.degrees[self.starts[g], self.starts[q]]
        c = int((self.tables.penalty[x] + degree + self.tables.penalty[:, y]).argmin())
        yield from self.trace_upto(g, x, y)
        yield _Stage(self.starts[g], self.starts[q], c)
