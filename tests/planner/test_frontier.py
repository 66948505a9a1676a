import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpp.cost import Roofline
from gpp.plan import check_plan
from gpp.planner.estimate import Problem, assemble, estimated
from gpp.planner.graphpipe import bottleneck, candidates, plan
from gpp.planner.options import Options
from gpp.topology import Link
from tests.graphs import graphs, make_cluster, make_graph, series_parallel_parents, towers


@settings(max_examples=60, deadline=None)
@given(
    st.one_of(graphs(max_operators=10), graphs(parents=lambda: series_parallel_parents(depth=3))),
    st.integers(1, 6),
    st.integers(1, 5),
)
def test_candidates_are_partitions_that_fit(graph, devices, limit):
    options = Options(mini_batch=16, micro_batch=4)
    memory = 1.5 * max(sum(p.bytes for p in op.parameters) for op in graph.operators) + 4e7
    problem = Problem(graph, make_cluster(devices, memory=memory), Roofline(), options)
    found = candidates(problem, 4, limit=limit)
    assert len(found) <= limit
    assert len({frozenset(groups) for groups in found}) == len(found)
    for groups in found:
        check_plan(assemble(problem, groups, 4, "test"), graph)
    assert found == candidates(Problem(graph, problem.topology, Roofline(), options), 4, limit=limit)


def test_memory_can_be_ignored():
    graph = make_graph(towers(2, 3), parameters=1 << 20)
    problem = Problem(graph, make_cluster(4, memory=1e3), Roofline(), Options(mini_batch=8, micro_batch=2))
    assert candidates(problem, 2) == []
    assert candidates(problem, 2, ignore_memory=True)


def test_a_long_all_reduce_is_worth_a_larger_bottleneck():
    """With few micro-batches the all-reduce is in no bottleneck's shadow."""
    graph = make_graph(towers(2, 4), parameters=20 << 20, flops=1e10, width=64)
    cluster = make_cluster(8, inside=Link(1e-5, 1e10))
    options = Options(mini_batch=32, micro_batch=8)
    problem = Problem(graph, cluster, Roofline(), options)
    steps = [estimated(assemble(problem, groups, 8, "test")).estimate for groups in candidates(problem, 8)]
    assert min(steps) < plan(graph, cluster, Roofline(), options).estimate * 0.97


@settings(max_examples=40, deadline=None)
@given(graphs(max_operators=8), st.integers(1, 5))
def test_the_bottleneck_is_the_first_candidates(graph, devices):
    problem = Problem(graph, make_cluster(devices), Roofline(), Options(mini_batch=16, micro_batch=4))
    first = candidates(problem, 4)[0]
    space = problem.space
    answers = [space.search(chain, 4).answer(space.memory) for chain in space.forms]
    assert bottleneck(problem, 4) == min(answer.seconds for answer in answers)
    assert set(first) == set(space.groups(answers[0]))


def test_nothing_fits():
    problem = Problem(
        make_graph({"a": ""}), make_cluster(1, memory=10.0), Roofline(), Options(mini_batch=2, micro_batch=1)
    )
    assert bottleneck(problem, 1) == pytest.approx(float("inf"))
