"""The planner's space, enumerated: every partition of a leaf order into intervals, and who may be in it."""

import itertools
from collections.abc import Iterator, Sequence

from gpp.planner.intervals import Intervals
from gpp.planner.series_parallel import Leaf, Parallel, Series, Tree, leaf_order

Interval = tuple[int, int]
Stages = tuple[frozenset[int], ...]


def partitions(count: int) -> Iterator[tuple[Interval, ...]]:
    """All partitions of [0, count) into intervals."""
    for chosen in itertools.product((False, True), repeat=count - 1):
        cuts = [0, *(i + 1 for i, cut in enumerate(chosen) if cut), count]
        yield tuple(itertools.pairwise(cuts))


def in_space(tree: Tree, stages: Sequence[Interval]) -> bool:
    """The rule of `gpp.planner.fewest`, block by block."""
    return levels(tree, stages) is not None


def levels(tree: Tree, stages: Sequence[Interval]) -> list[int] | None:
    """Stages on the longest path from each stage to a sink of the tree; None if it is not in the space.

    A stage that enters a block counts as before all others in it, one that leaves it as after them.
    """
    before = {(i, j) for i, j in _ordered(tree, 0)}
    follows = {
        (x, y)
        for x, (a, b) in enumerate(stages)
        for y, (c, d) in enumerate(stages)
        if x != y and any((i, j) in before for i in range(a, b) for j in range(c, d))
    }
    for start, stop, branches in _blocks(tree, 0):
        extra = _crossings(start, stop, branches, stages)
        if extra is None:
            return None
        follows |= extra
    found = [0] * len(stages)
    for x in reversed(range(len(stages))):  # the leaf order is a topological order
        found[x] = 1 + max((found[y] for y in range(x + 1, len(stages)) if (x, y) in follows), default=0)
    return found


def least_bottleneck(tree: Tree | None, table: Intervals, count: int, devices: int) -> float:
    """Over all partitions (in the tree's space, if one is given) and numbers of devices."""
    best = float("inf")
    for stages in partitions(count):
        if len(stages) <= devices and (tree is None or in_space(tree, stages)):
            for degrees in itertools.product(sorted(table.seconds), repeat=len(stages)):
                if sum(degrees) <= devices:
                    times = [table.seconds[d][a, b] for d, (a, b) in zip(degrees, stages, strict=True)]
                    best = min(best, float(max(times)))
    return best


def _ordered(tree: Tree, start: int) -> Iterator[tuple[int, int]]:
    """Pairs of positions of which the first comes before the second in the tree's order."""
    if isinstance(tree, Leaf):
        return
    spans = _spans(tree, start)
    for child, (a, _) in zip(tree.children, spans, strict=True):
        yield from _ordered(child, a)
    if isinstance(tree, Series):
        for (a, b), (c, d) in itertools.combinations(spans, 2):
            yield from itertools.product(range(a, b), range(c, d))


def _spans(tree: Series | Parallel, start: int) -> list[Interval]:
    sizes = [len(leaf_order(child)) for child in tree.children]
    ends = list(itertools.accumulate(sizes, initial=start))
    return list(itertools.pairwise(ends))


def _blocks(tree: Tree, start: int) -> Iterator[tuple[int, int, list[Interval]]]:
    """Every parallel part as an interval, with those of its branches."""
    if isinstance(tree, Leaf):
        return
    spans = _spans(tree, start)
    for child, (a, _) in zip(tree.children, spans, strict=True):
        yield from _blocks(child, a)
    if isinstance(tree, Parallel):
        yield spans[0][0], spans[-1][1], spans


def _crossings(
    start: int, stop: int, branches: list[Interval], stages: Sequence[Interval]
) -> set[tuple[int, int]] | None:
    """Which stage counts as before which because one enters or leaves a block; None if not allowed."""
    entered, left = -1, len(branches)
    entering = leaving = -1
    inside = []
    for x, (a, b) in enumerate(stages):
        if b <= start or stop <= a or (a <= start and stop <= b):
            continue
        inside.append(x)
        if any(s <= a and b <= e for s, e in branches):
            continue
        if a in [s for s, _ in branches] and b in [e for _, e in branches]:
            continue  # whole branches
        if a <= start:
            entering, entered = x, next(q for q, (s, e) in enumerate(branches) if s < b <= e)
        elif b >= stop:
            leaving, left = x, next(q for q, (s, e) in enumerate(branches) if s <= a < e)
        else:
            return None
    if entered >= left:
        return None
    pairs = {(entering, y) for y in inside if entering >= 0 and y != entering}
    return pairs | {(x, leaving) for x in inside if leaving >= 0 and x != leaving}


def pipelines(after: Sequence[Sequence[int]], left: frozenset[int]) -> Iterator[Stages]:
    """Every order of convex stages of `left`, last stage first: each closed under what comes after."""
    if not left:
        yield ()
    for size in range(1, len(left) + 1):
        for found in itertools.combinations(sorted(left), size):
            stage = frozenset(found)
            if all(v in stage for u in stage for v in after[u] if v in left):
                for rest in pipelines(after, left - stage):
                    yield (stage, *rest)
