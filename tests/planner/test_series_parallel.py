import itertools

import pytest
from hypothesis import given, settings

from gpp.graph import ComputationGraph
from gpp.planner.series_parallel import Leaf, Parallel, Series, Tree, decompose, leaf_order
from tests.graphs import graphs, make_graph, series_parallel_parents


def shown(tree: Tree, graph: ComputationGraph) -> str:
    """S(a, P(b, c)) for Series and Parallel."""
    if isinstance(tree, Leaf):
        return graph.operators[tree.operator].name
    letter = "S" if isinstance(tree, Series) else "P"
    return f"{letter}({', '.join(shown(child, graph) for child in tree.children)})"


@pytest.mark.parametrize(
    "parents, expected",
    [
        ({"a": ""}, "a"),
        ({"a": "", "b": "a", "c": "b"}, "S(a, b, c)"),
        ({"a": "", "b": "a", "c": "a", "d": "b c"}, "S(a, P(b, c), d)"),
        ({"a": "", "b": "a", "x": "", "y": "x", "j": "b y"}, "S(P(S(a, b), S(x, y)), j)"),
        # several sources, several sinks, no edge at all
        ({"a": "", "b": "", "c": "a b", "d": "c", "e": "c"}, "S(P(a, b), c, P(d, e))"),
        ({"a": "", "b": "", "c": "b"}, "P(a, S(b, c))"),
        # nested, with branches of different form
        ({"a": "", "b": "a", "c": "a", "d": "b c", "e": "a", "f": "d e"}, "S(a, P(S(P(b, c), d), e), f)"),
        # skip edges that other paths imply
        ({"a": "", "b": "a", "c": "a b", "d": "a b c"}, "S(a, b, c, d)"),
        ({"a": "", "b": "a", "c": "a", "d": "a b c"}, "S(a, P(b, c), d)"),
        # every reader of a fork joins with every other: a complete bipartite graph is series-parallel
        ({"a": "", "b": "", "c": "a b", "d": "a b"}, "S(P(a, b), P(c, d))"),
    ],
)
def test_known_graphs(parents, expected):
    graph = make_graph(parents)
    assert shown(decompose(graph), graph) == expected


N = {"a": "", "b": "", "c": "a", "d": "a b"}


@pytest.mark.parametrize(
    "work, expected",
    [
        # whoever is light waits, and what is heavy stays side by side
        ({"a": 9, "b": 1, "c": 9, "d": 9}, "S(a, P(S(b, d), c))"),
        ({"a": 9, "b": 9, "c": 9, "d": 1}, "S(P(S(a, c), b), d)"),
        ({"a": 9, "b": 9, "c": 1, "d": 9}, "S(P(a, b), d, c)"),
    ],
)
def test_dependencies_are_added_where_they_cost_little(work, expected):
    graph = make_graph(N)
    tree = decompose(graph, [work[name] for name in "abcd"])
    assert shown(tree, graph) == expected


def test_work_is_that_of_the_graph_unless_given():
    graph = make_graph(N, flops={"a": 9, "b": 9, "c": 1, "d": 9})
    assert decompose(graph) == decompose(graph, [27, 27, 3, 27])
    assert isinstance(decompose(make_graph(N, flops=0)), Series)


def check_form(tree: Tree) -> None:
    if not isinstance(tree, Leaf):
        assert len(tree.children) > 1
        for child in tree.children:
            assert type(child) is not type(tree)
            check_form(child)


def tree_order(tree: Tree) -> set[tuple[int, int]]:
    """Pairs of operators of which the tree has one before the other."""
    if isinstance(tree, Leaf):
        return set()
    found = set().union(*(tree_order(child) for child in tree.children))
    if isinstance(tree, Series):
        for first, second in itertools.combinations(tree.children, 2):
            found |= set(itertools.product(leaf_order(first), leaf_order(second)))
    return found


def closure(graph: ComputationGraph) -> set[tuple[int, int]]:
    count = range(len(graph.operators))
    return {(u, v) for u in count for v in count if graph.ancestors[v] >> u & 1}


@settings(max_examples=200, deadline=None)
@given(graphs(max_operators=14))
def test_any_graph_becomes_a_tree_that_keeps_its_order(graph):
    tree = decompose(graph)
    order = leaf_order(tree)
    assert sorted(order) == list(range(len(graph.operators)))
    place = {operator: i for i, operator in enumerate(order)}
    assert all(place[u] < place[v] for u, v in graph.edges)
    assert closure(graph) <= tree_order(tree)
    check_form(tree)


@settings(max_examples=200, deadline=None)
@given(graphs(parents=lambda: series_parallel_parents(depth=4)))
def test_series_parallel_graphs_get_no_dependencies(graph):
    assert tree_order(decompose(graph)) == closure(graph)


def test_parallel_children_have_nothing_between_them():
    tree = decompose(make_graph({"a": "", "b": "", "c": "a", "d": "b"}))
    assert tree == Parallel((Series((Leaf(0), Leaf(2))), Series((Leaf(1), Leaf(3)))))
