import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from gpp.planner.fewest import Fewest
from gpp.planner.outline import outline
from gpp.planner.series_parallel import Leaf, Parallel, Series, Tree, decompose, leaf_order
from gpp.planner.sides import INF, Table
from tests.graphs import make_graph, parent_lists, series_parallel_parents
from tests.planner.brute import levels, partitions


@st.composite
def trees(draw: st.DrawFn, *, most: int = 7) -> Tree:
    parents = draw(
        st.one_of(series_parallel_parents(depth=3), parent_lists(max_operators=most)).filter(
            lambda found: len(found) <= most
        )
    )
    return decompose(make_graph(parents))


def random_degrees(seed: int, count: int, top: int) -> Table:
    """Any interval may need any number of devices, more at higher levels, or not be a stage at all."""
    random = np.random.default_rng(seed)
    more = random.integers(0, 2, (count + 1, count + 1, top + 1))
    degrees = random.integers(1, 4, (count + 1, count + 1, 1)) + more.cumsum(2)
    degrees[degrees > random.integers(2, 8)] = INF
    degrees[:, :, 0] = INF
    degrees[np.tril_indices(count + 1)] = INF
    return degrees.astype(np.int32)


def enumerated(tree: Tree, degrees: Table) -> list[int]:
    """Fewest devices by the most levels allowed."""
    count, top = len(leaf_order(tree)), degrees.shape[2] - 1
    best = [INF] * (top + 1)
    for stages in partitions(count):
        found = levels(tree, stages)
        if found is not None and max(found) <= top:
            total = sum(int(degrees[a, b, h]) for (a, b), h in zip(stages, found, strict=True))
            best[max(found)] = min(best[max(found)], total)
    return [min(INF, *best[: h + 1]) for h in range(top + 1)]


@settings(max_examples=300, deadline=None)
@given(trees(), st.integers(0, 2**32 - 1))
def test_the_fewest_devices_are_those_of_the_enumerated_space(tree, seed):
    count = len(leaf_order(tree))
    chain = outline(tree, [0.0] * count, 1).chain
    degrees = random_degrees(seed, count, count)
    ahead, counts = Fewest(degrees).whole(chain)
    assert counts.tolist() == enumerated(tree, degrees)
    for level in range(1, count + 1):
        if counts[level] < INF:
            stages = sorted(ahead.trace(chain, ahead.count - 1, 0, level), key=lambda s: s.start)
            spans = tuple((s.start, s.stop) for s in stages)
            assert [*spans] == [*next(p for p in partitions(count) if p == spans)]
            found = levels(tree, spans)
            assert found is not None
            assert sum(s.devices for s in stages) == counts[level]
            assert all(s.devices == degrees[s.start, s.stop, s.level] for s in stages)
            assert all(h <= s.level <= level for h, s in zip(found, stages, strict=True))


def one_device_each(count: int, top: int, *, longest: int | None = None) -> Table:
    degrees = np.ones((count + 1, count + 1, top + 1), dtype=np.int32)
    degrees[:, :, 0] = INF
    length = np.arange(count + 1)[None, :] - np.arange(count + 1)[:, None]
    degrees[(length < 1) | (length > (longest or count))] = INF
    return degrees


def test_the_highest_level_stands_for_all_above():
    chain = outline(Series(tuple(Leaf(i) for i in range(5))), [0.0] * 5, 1).chain
    degrees = one_device_each(5, 2, longest=1)
    assert Fewest(degrees).whole(chain)[1].tolist() == [INF, INF, 5]
    degrees[0, 1, 2] = 3  # the first operator is charged as at the highest level
    assert Fewest(degrees).whole(chain)[1].tolist() == [INF, INF, 7]


def test_equal_branches_are_solved_once():
    tree = Parallel(tuple(Series(tuple(Leaf(i + 4 * b) for i in range(4))) for b in range(3)))
    fewest = Fewest(one_device_each(12, 3))
    chain = outline(tree, [0.0] * 12, 1).chain
    fewest.whole(chain)
    first, second, third = chain.elements[0].branches
    assert fewest.ahead(first) is fewest.ahead(second) is fewest.ahead(third)
    assert fewest.behind(first) is fewest.behind(third)
