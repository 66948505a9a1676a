import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from gpp.cost import Roofline
from gpp.graph import ComputationGraph
from gpp.plan import Policy
from gpp.planner.intervals import IntervalCosts, Intervals
from gpp.planner.options import Options
from gpp.planner.outline import outline
from gpp.planner.series_parallel import decompose, leaf_order
from gpp.planner.threshold import Answer, Charge, ThresholdSearch
from tests.graphs import graphs, make_cluster, series_parallel_parents
from tests.planner.brute import in_space, least_bottleneck


def searched(
    graph: ComputationGraph, devices: int, micro_batch: int = 4, *, flat: bool = False
) -> tuple[ThresholdSearch, Intervals]:
    tree = decompose(graph)
    drawn = outline(tree, [0.0] * len(graph.operators), devices)
    options = Options(mini_batch=16, micro_batch=micro_batch)
    costs = IntervalCosts(
        graph, drawn.order, drawn.boundaries, make_cluster(devices), Roofline(), options
    )
    table = costs.table(micro_batch)
    chain = drawn.flat() if flat else drawn.chain
    return ThresholdSearch(chain, table, devices, Charge(Policy(), 16 // micro_batch)), table


def check_answer(answer: Answer, table: Intervals, devices: int, count: int) -> None:
    """What was traced is what the numbers promised."""
    stages = sorted(answer.stages, key=lambda s: s.start)
    assert [s.start for s in stages] == [0, *(s.stop for s in stages[:-1])]
    assert stages[-1].stop == count
    assert sum(s.devices for s in stages) <= devices
    slowest = max(table.seconds[s.devices][s.start, s.stop] for s in stages)
    assert np.isclose(slowest, answer.seconds, rtol=1e-8)


small = st.one_of(
    graphs(max_operators=6),
    graphs(parents=lambda: series_parallel_parents(depth=3)).filter(lambda g: len(g.operators) <= 8),
)


@settings(max_examples=150, deadline=None)
@given(small, st.integers(1, 4))
def test_the_tree_finds_the_least_bottleneck_of_its_space(graph, devices):
    search, table = searched(graph, devices)
    tree, count = decompose(graph), len(graph.operators)
    answer = search.answer(float("inf"))
    check_answer(answer, table, devices, count)
    assert in_space(tree, sorted((s.start, s.stop) for s in answer.stages))
    assert np.isclose(answer.seconds, least_bottleneck(tree, table, count, devices), rtol=1e-8)
