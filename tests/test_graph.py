import dataclasses

import networkx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpp.graph import (
    ComputationGraph,
    GraphError,
    Operator,
    Parameter,
    Tensor,
    Work,
    graph_from_json,
    graph_to_json,
)
from tests.strategies import computation_graphs


def tensor(name: str, needs_grad: bool = True) -> Tensor:
    return Tensor(name, (2, 3), "float32", needs_grad)


def operator(name: str, inputs: tuple[str, ...], outputs: tuple[str, ...]) -> Operator:
    return Operator(name, "linear", inputs, tuple(map(tensor, outputs)))


# a diamond with a skip over it
DIAMOND = ComputationGraph(
    (
        operator("stem", (), ("s", "skip")),
        operator("left", ("s",), ("l",)),
        operator("right", ("s",), ("r",)),
        operator("join", ("l", "r", "skip"), ("j",)),
        operator("aside", (), ()),
    )
)


def test_edges_and_neighbours():
    assert DIAMOND.index == {"stem": 0, "left": 1, "right": 2, "join": 3, "aside": 4}
    assert DIAMOND.edges == {
        (0, 1): (tensor("s"),),
        (0, 2): (tensor("s"),),
        (0, 3): (tensor("skip"),),
        (1, 3): (tensor("l"),),
        (2, 3): (tensor("r"),),
    }
    assert DIAMOND.successors == ((1, 2, 3), (3,), (3,), (), ())
    assert DIAMOND.predecessors == ((), (0,), (0,), (0, 1, 2), ())
    assert DIAMOND.ancestors == (0, 0b1, 0b1, 0b111, 0)


@pytest.mark.parametrize(
    "positions, convex",
    [([0], True), ([1, 2], True), ([0, 1], True), ([0, 3], False), ([0, 1, 3], False), ([0, 1, 2, 3], True)],
)
def test_a_convex_set_is_never_left_and_entered_again(positions, convex):
    assert DIAMOND.is_convex(positions) is convex


@pytest.mark.parametrize(
    "shape, dtype, size",
    [((2, 3), "float32", 24), ((), "int64", 8), ((5, 0), "bool", 0), ((7,), "bfloat16", 14)],
)
def test_bytes_of_one_sample(shape, dtype, size):
    assert Tensor("t", shape, dtype, False).bytes == size


def test_a_backward_comes_from_a_trainable_parameter_or_an_output_that_needs_one():
    plain = Operator("o", "k", (), (tensor("t", needs_grad=False),), parameters=(Parameter("w", 4, False),))
    assert not plain.has_backward
    assert dataclasses.replace(plain, parameters=(Parameter("w", 4, True),)).has_backward
    assert dataclasses.replace(plain, outputs=(tensor("t"),)).has_backward


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: ComputationGraph(()), "needs at least one operator"),
        (lambda: ComputationGraph((operator("a", (), ()),) * 2), "operator a appears twice"),
        (
            lambda: ComputationGraph((operator("a", ("t",), ()), operator("b", (), ("t",)))),
            "operator a reads t, which no earlier operator produces",
        ),
        (lambda: ComputationGraph((operator("a", ("t",), ("t",)),)), "topological order and acyclic"),
        (
            lambda: ComputationGraph((operator("a", (), ("t",)), operator("b", (), ("t",)))),
            "tensor t is produced twice",
        ),
        (lambda: Tensor("t", (1,), "float12", True), "tensor t has dtype 'float12', known are bfloat16"),
        (lambda: Tensor("t", (2, -1), "int8", False), "tensor t has a negative size"),
        (lambda: Work(flops=-1.0), "work must not be negative"),
        (lambda: dataclasses.replace(operator("a", (), ()), stash=-1.0), "negative number of bytes"),
        (lambda: graph_from_json("{}"), 'not a computation graph: the key "format"'),
        (
            lambda: graph_from_json(graph_to_json(DIAMOND).replace('"linear"', "7")),
            r"ComputationGraph\.operators\[0\] \(stem\)\.kind must be of type str",
        ),
    ],
)
def test_what_is_no_graph_is_refused(make, message):
    with pytest.raises(GraphError, match=message):
        make()


def test_a_file_with_a_cycle_is_refused():
    text = graph_to_json(ComputationGraph((operator("a", (), ("t",)),)))
    with pytest.raises(GraphError, match="acyclic"):
        graph_from_json(text.replace('"inputs": []', '"inputs": ["t"]'))


def as_networkx(graph: ComputationGraph) -> networkx.DiGraph:
    oracle = networkx.DiGraph(list(graph.edges))
    oracle.add_nodes_from(range(len(graph.operators)))
    return oracle


@given(computation_graphs())
def test_ancestors_are_those_of_networkx(graph: ComputationGraph):
    oracle = as_networkx(graph)
    for i, mask in enumerate(graph.ancestors):
        assert {j for j in range(i) if mask >> j & 1} == networkx.ancestors(oracle, i)
        assert sorted(oracle.successors(i)) == list(graph.successors[i])
        assert sorted(oracle.predecessors(i)) == list(graph.predecessors[i])


@given(computation_graphs(), st.data())
def test_convexity_by_all_paths(graph: ComputationGraph, data: st.DataObject):
    chosen = data.draw(st.sets(st.integers(0, len(graph.operators) - 1)))
    oracle = as_networkx(graph)
    between = {
        k
        for k in set(oracle) - chosen
        if networkx.ancestors(oracle, k) & chosen and networkx.descendants(oracle, k) & chosen
    }
    assert graph.is_convex(chosen) is (not between)


@given(computation_graphs(), computation_graphs())
def test_json_there_and_back_and_fingerprints(graph: ComputationGraph, other: ComputationGraph):
    assert graph_from_json(graph_to_json(graph)) == graph
    assert (graph.fingerprint() == other.fingerprint()) is (graph == other)
