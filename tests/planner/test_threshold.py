import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpp.cost import Roofline
from gpp.graph import ComputationGraph
from gpp.plan import Policy
from gpp.planner import threshold
from gpp.planner.intervals import IntervalCosts, Intervals
from gpp.planner.options import Options
from gpp.planner.outline import outline
from gpp.planner.series_parallel import decompose
from gpp.planner.threshold import Answer, Charge, ThresholdSearch, interval_optimum
from gpp.schedule.inflight import in_flight
from tests.graphs import chain, graphs, make_cluster, make_graph, series_parallel_parents, towers
from tests.planner.brute import in_space, least_bottleneck


def searched(
    graph: ComputationGraph,
    devices: int,
    micro_batch: int = 4,
    *,
    flat: bool = False,
    policy: Policy | None = None,
) -> tuple[ThresholdSearch, Intervals]:
    """A search over the tree or over its leaf order, and the costs that it reads."""
    drawn = outline(decompose(graph), [0.0] * len(graph.operators), devices)
    options = Options(mini_batch=16, micro_batch=micro_batch)
    costs = IntervalCosts(graph, drawn.order, drawn.boundaries, make_cluster(devices), Roofline(), options)
    table = costs.table(micro_batch)
    chain = drawn.flat() if flat else drawn.chain
    return ThresholdSearch(chain, table, devices, Charge(policy or Policy(), 16 // micro_batch)), table


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


@settings(max_examples=80, deadline=None)
@given(graphs(max_operators=8), st.integers(1, 5))
def test_the_leaf_order_as_one_chain_is_never_worse(graph, devices):
    count = len(graph.operators)
    (tree, table), (flat, _) = (searched(graph, devices, flat=f) for f in (False, True))
    by_tree, by_leaves = tree.answer(float("inf")), flat.answer(float("inf"))
    check_answer(by_leaves, table, devices, count)
    assert by_leaves.seconds <= by_tree.seconds * (1 + 1e-8)
    least = interval_optimum(list(table.seconds.items()), devices)
    assert np.isclose(by_leaves.seconds, least, rtol=1e-8)
    if count <= 6:
        assert np.isclose(least, least_bottleneck(None, table, count, devices), rtol=1e-8)


@settings(max_examples=80, deadline=None)
@given(small, st.integers(1, 4), st.floats(0, 1), st.sampled_from([Policy(), Policy("gpipe")]))
def test_memory_is_charged_by_level(graph, devices, part, policy):
    search, table = searched(graph, devices, policy=policy)
    ample = search.answer(float("inf"))
    memory = part * search.peak(ample)
    found = search.answer(memory)
    if found is None:
        assert search.smallest() > memory * 0.99
        assert search.heaviest_run()[1] <= search.smallest() * (1 + 1e-9)
        return
    check_answer(found, table, devices, len(graph.operators))
    assert search.peak(found) <= memory
    assert found.seconds >= ample.seconds * (1 - 1e-8)
    leaner = search.leaner(ample)
    assert leaner.seconds == ample.seconds
    assert search.heaviest_run()[1] - 1e-6 <= search.peak(leaner) <= search.peak(ample)


def test_a_tight_memory_costs_time_or_depth():
    """Two operators a stage would be balanced; the first stage could not hold its samples."""
    graph = make_graph(chain(4), stash={"o0": 1e6, "o1": 1e6, "o2": 1e3, "o3": 1e3}, parameters=4, width=1)
    search, _ = searched(graph, 2, 1)
    found = search.answer(float("inf"))
    assert [(s.start, s.stop) for s in found.stages] == [(0, 2), (2, 4)]
    tight = search.answer(3e6)
    assert [(s.start, s.stop) for s in tight.stages] == [(0, 1), (1, 4)]
    assert tight.seconds > found.seconds
    assert search.answer(1.5e6) is None


def test_the_first_threshold_may_be_too_low():
    """Without memory the optimum is lower than any plan that fits: the search climbs."""
    graph = make_graph(chain(8), stash=1e6, parameters=4, width=1)
    search, table = searched(graph, 4, 1)
    memory = 4.1e6
    found = search.answer(memory)
    times = sorted({float(t) for t in table.seconds[1][np.isfinite(table.seconds[1])]})
    answers = [search._solve(t, search._fits(memory), search.top) for t in times]
    feasible = [t for t, answer in zip(times, answers, strict=True) if answer is not None]
    assert found.seconds == feasible[0]
    assert feasible == times[times.index(feasible[0]) :]
    assert found.seconds > search.answer(float("inf")).seconds


@pytest.mark.parametrize(
    "policy, levels, held",
    [
        (Policy(), [1, 2, 3, 9], [1, 2, 3, 8]),
        (Policy(extra_warm_up=1), [1, 2, 3, 9], [1, 3, 5, 8]),
        (Policy("gpipe"), [1, 9], [8, 8]),
    ],
)
def test_what_a_level_holds_is_the_schedules_rule(policy, levels, held):
    charge = Charge(policy, 8)
    assert [charge.held(level) for level in levels] == held
    depth = max(levels)
    chained = in_flight([[s + 1] if s + 1 < depth else [] for s in range(depth)], [2] * depth, policy, 16)
    assert [charge.held(level) * 2 for level in levels] == [chained[depth - level] for level in levels]


def test_equal_branches_whose_sums_differ_in_the_last_bits():
    """Twins are twins whatever their neighbours' costs do to the cumulative sums."""
    names = list(towers(4, 6))
    flops = {name: 1e9 / 3 + 0.1 for name in names} | {"join": 1e7}
    plain, _ = searched(make_graph(towers(4, 6), flops=flops, parameters=4), 8, 1)
    wobbly = {name: f * (1 + 1e-15 * i) for i, (name, f) in enumerate(flops.items())}
    moved, _ = searched(make_graph(towers(4, 6), flops=wobbly, parameters=4), 8, 1)
    one, other = plain.answer(float("inf")), moved.answer(float("inf"))
    assert np.isclose(one.seconds, other.seconds, rtol=1e-8)
    assert one.level == other.level


@settings(max_examples=30, deadline=None)
@given(st.permutations(range(4)), st.integers(1, 9))
def test_the_order_of_branches_does_not_matter_where_they_are_equal(order, devices):
    first, _ = searched(make_graph(towers(4, 3), parameters=4), devices, 1)
    parents = {}
    for b in order:
        parents |= {n: p for n, p in towers(4, 3).items() if n.startswith(f"t{b}")}
    second, _ = searched(make_graph(parents | {"join": towers(4, 3)["join"]}, parameters=4), devices, 1)
    one, other = first.answer(float("inf")), second.answer(float("inf"))
    assert np.isclose(one.seconds, other.seconds, rtol=1e-8)


@settings(max_examples=150, deadline=None)
@given(graphs(max_operators=9), st.integers(1, 6), st.booleans())
def test_both_ways_to_the_interval_optimum(graph, devices, some_forbidden):
    _, table = searched(graph, devices)
    seconds = dict(table.seconds)
    if some_forbidden:
        seconds[1] = np.where(
            seconds[1] > np.nanmedian(seconds[1][np.isfinite(seconds[1])]), np.inf, seconds[1]
        )
    direct = interval_optimum(list(seconds.items()), devices)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threshold, "DIRECT", 0)
        assert interval_optimum(list(seconds.items()), devices) == direct


@settings(max_examples=80, deadline=None)
@given(small, st.integers(1, 4), st.integers(1, 4))
def test_no_deeper_than_asked(graph, devices, level):
    search, table = searched(graph, devices)
    free, bound = search.answer(float("inf")), search.answer(float("inf"), level=level)
    assert bound is not None  # one stage is a plan of level 1
    check_answer(bound, table, devices, len(graph.operators))
    assert bound.level <= level
    assert bound.seconds >= free.seconds
    if free.level <= level:
        assert bound.seconds == free.seconds
    rough = search.answer(float("inf"), level=level, precision=0.05)
    assert bound.seconds <= rough.seconds <= bound.seconds * 1.05 * (1 + 1e-9)
