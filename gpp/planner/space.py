"""The stages that GraphPipe's planner may choose from, made once for a problem (GraphPipe §5).

A space is a leaf order of the series-parallel tree with the costs of its intervals, and the two forms in
which it is searched: as a tree, whose stages keep the branches apart, and as one chain, whose stages may hold
the end of a branch and the start of the next.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from .estimate import Group, Problem
from .intervals import IntervalCosts, Intervals
from .outline import Block, Chain, Outline, outline
from .series_parallel import decompose
from .threshold import Answer, Charge, ThresholdSearch


@dataclass(frozen=True, slots=True)
class Wariness:
    """How memory is charged, see `Charge`, and what part of a device's memory may be charged."""

    margin: int
    wary: bool
    part: float


# first as most plans come out, then so that none comes out larger than charged
CHARGES = (Wariness(0, False, 1.0), Wariness(1, False, 1 - 1e-9), Wariness(1 << 20, True, 1 - 1e-9))
# what the tree puts in a row may be side by side, and hold less than charged: these plans may fit after all
HOPES = (Wariness(0, False, 1.5), Wariness(0, False, float("inf")))


MERGED = 1e-3  # relative


@dataclass(frozen=True)
class Space:
    """One leaf order, what its intervals cost, and both forms of it."""

    problem: Problem
    outline: Outline

    @cached_property
    def costs(self) -> IntervalCosts:
        """Costs of the intervals."""
        problem = self.problem
        return IntervalCosts(
            problem.graph,
            self.outline.order,
            self.outline.boundaries,
            problem.topology,
            problem.costs,
            problem.options,
            problem.units,
            problem.operator_seconds,
        )

    @cached_property
    def _tables(self) -> dict[int, Intervals]:
        return {}

    def table(self, micro_batch: int) -> Intervals:
        """The intervals at one micro-batch size, made once."""
        if micro_batch not in self._tables:
            self._tables[micro_batch] = self.costs.table(micro_batch)
        return self._tables[micro_batch]

    @property
    def tree(self) -> Chain:
        """The tree's form."""
        return self.outline.chain

    @cached_property
    def leaves(self) -> Chain:
        """The leaf order as one chain."""
        return self.outline.flat()

    @property
    def precision(self) -> float:
        """How exact a least bottleneck is worth being: where runs were merged it is not exact anyway."""
        return MERGED if self.tree.stop < len(self.problem.units.members) else 0.0

    @property
    def devices(self) -> int:
        """How many there are."""
        return len(self.problem.topology.devices)

    @cached_property
    def memory(self) -> float:
        """Bytes of the smallest device."""
        return min(device.memory for device in self.problem.topology.devices)

    @property
    def forms(self) -> Iterator[Chain]:
        """The tree, and the leaf order where it cannot tell branches apart: more of them than devices."""
        yield self.tree
        if self.tree.width > self.devices:
            yield self.leaves

    def search(
        self,
        chain: Chain,
        micro_batch: int,
        wariness: Wariness = CHARGES[0],
        seconds: dict[int, NDArray[np.float64]] | None = None,
    ) -> ThresholdSearch:
        """A search over one form at one micro-batch size; of other `seconds` than the table's if given."""
        options = self.problem.options
        charge = Charge(options.policy, options.mini_batch // micro_batch, wariness.margin, wariness.wary)
        return ThresholdSearch(chain, self.table(micro_batch), self.devices, charge, seconds)

    def least(
        self,
        chain: Chain,
        micro_batch: int,
        wariness: Wariness = CHARGES[0],
        above: float = 0.0,
    ) -> Answer | None:
        """The least bottleneck of one of the two forms, `above` seconds at least, within the devices' memory
        as it is charged; found once."""
        key = (chain is self.leaves, micro_batch, wariness, above)
        if key not in self._answers:
            self._answers[key] = self.search(chain, micro_batch, wariness).answer(
                self.memory * wariness.part, within=(above, float("inf")), precision=self.precision
            )
        return self._answers[key]

    @cached_property
    def _answers(self) -> dict[tuple[bool, int, Wariness, float], Answer | None]:
        return {}

    def groups(self, answer: Answer) -> list[Group]:
        """The stages of an answer, in the leaf order."""
        stages = sorted(answer.stages, key=lambda stage: stage.start)
        return [Group(self.outline.operators(s.start, s.stop), s.devices) for s in stages]

    @cached_property
    def deferred(self) -> tuple["Space", ...]:
        """Other leaf orders: the ends of the branches of the widest block one after the other, behind the
        starts of all. One stage can then hold what is left over of several branches."""
        blocks = [element for element in self.tree.elements if isinstance(element, Block)]
        if not blocks:
            return ()
        found = []
        block = max(blocks, key=lambda b: (len(b.branches), b.stop - b.start))
        longest = max(branch.stop - branch.start for branch in block.branches)
        for tail in sorted({1, 2, longest // 4, longest // 2} - {0}):
            heads: list[int] = []
            tails: list[int] = []
            for branch in block.branches:
                cut = max(branch.start, branch.stop - tail)
                heads += range(branch.start, cut)
                tails += range(cut, branch.stop)
            if heads:
                runs = [*range(block.start), *heads, *tails, *range(block.stop, self.tree.stop)]
                found.append(Space(self.problem, self._reordered(runs)))
        return tuple(found)

    def _reordered(self, runs: Iterable[int]) -> Outline:
        order: list[int] = []
        boundaries = [0]
        for run in runs:
            order += self.outline.operators(run, run + 1)
            boundaries.append(len(order))
        return replace(
            self.outline, order=tuple(order), boundaries=tuple(boundaries), chain=self.outline.flat()
        )


def make_space(problem: Problem) -> Space:
    """The space of a problem's units. Where there are many, those too light to matter are merged."""
    graph, units = problem.graph, problem.units
    work = problem.operator_seconds(problem.options.micro_batches[-1]).sum(0)
    static = np.array([sum(p.bytes for p in op.parameters) for op in graph.operators], dtype=float)
    weights = np.maximum(work / (work.sum() or 1.0), static / (static.sum() or 1.0))
    by_unit = [float(sum(weights[i] for i in members)) for members in units.members]
    # who has a label or a number of replicas of its own is never merged with another
    own = [label or number for label, number in zip(units.labels, units.replicas, strict=True)]
    heavy = [float("inf") if mark else weight for mark, weight in zip(own, by_unit, strict=True)]
    tree = decompose(graph, [float(sum(work[i] for i in members)) for members in units.members], units)
    return Space(problem, outline(tree, heavy, len(problem.topology.devices), units.members))
