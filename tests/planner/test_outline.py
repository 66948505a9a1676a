import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpp.planner import outline as module
from gpp.planner.outline import MANY, Block, Chain, Outline, outline
from gpp.planner.series_parallel import decompose, leaf_order
from tests.graphs import chain, graphs, make_graph, towers


def drawn(parents: dict[str, str], weights: list[float] | None = None, devices: int = 1) -> Outline:
    graph = make_graph(parents)
    return outline(decompose(graph), weights or [0.0] * len(graph.operators), devices)


def test_every_operator_is_a_run_of_its_own():
    found = drawn(towers(3, 4))
    assert found.boundaries == tuple(range(14))
    block, join = found.chain.elements
    assert isinstance(block, Block)
    assert [(b.start, b.stop) for b in block.branches] == [(0, 4), (4, 8), (8, 12)]
    assert (join.start, join.stop) == (12, 13)
    assert found.operators(4, 6) == found.order[4:6]
    assert (found.chain.depth, found.chain.width) == (5, 3)
    assert (found.flat().depth, found.flat().width, found.flat().stop) == (13, 1, 13)


def test_a_single_operator_and_loose_ones():
    assert drawn({"a": ""}).chain.elements[0].stop == 1
    found = drawn({"a": "", "b": ""}).chain
    assert (found.depth, found.width) == (1, 2)


def test_equal_branches_have_equal_shapes():
    left, middle, right = drawn(towers(3, 4)).chain.elements[0].branches
    assert left.shape == middle.shape == right.shape
    assert drawn(towers(2, 3)).chain.elements[0].branches[0].shape != left.shape


@pytest.mark.parametrize("count", [MANY, MANY + 1, 1000])
def test_only_many_operators_are_merged(count):
    found = drawn(chain(count), [1 / count] * count, devices=4)
    runs = len(found.boundaries) - 1
    assert runs == count if count <= MANY else runs <= MANY
    assert found.boundaries[-1] == count
    sizes = [b - a for a, b in itertools.pairwise(found.boundaries)]
    assert max(sizes) / count <= 0.5 / 4  # an eighth of a model's work at most, for four devices


def test_heavy_operators_stay_alone():
    weights = [0.1 if i % 100 == 50 else 0.0001 for i in range(1000)]
    found = drawn(chain(1000), weights, devices=4)
    for heavy in range(50, 1000, 100):
        assert {heavy, heavy + 1} <= set(found.boundaries)


def check_nested(part: Chain, start: int) -> int:
    """Intervals follow each other without gaps, and shapes have the form of the parts."""
    for element, shape in zip(part.elements, part.shape, strict=True):
        assert element.start == start
        if isinstance(element, Block):
            assert shape == tuple(branch.shape for branch in element.branches)
            for branch in element.branches:
                start = check_nested(branch, start)
        else:
            start += 1
        assert element.stop == start
    return start


@settings(max_examples=150, deadline=None)
@given(graphs(max_operators=14), st.integers(1, 14), st.integers(1, 4))
def test_runs_partition_the_leaf_order(graph, many, devices):
    tree = decompose(graph)
    count = len(graph.operators)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "MANY", many)
        found = outline(tree, [1 / count] * count, devices)
    assert found.order == leaf_order(tree)
    assert check_nested(found.chain, 0) == len(found.boundaries) - 1
    assert sorted({0, count, *found.boundaries}) == list(found.boundaries)
    for start, stop in itertools.pairwise(found.boundaries):
        assert graph.is_convex(found.order[start:stop])
