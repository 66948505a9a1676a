import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpp.cost import Roofline, all_reduce_seconds
from gpp.graph import ComputationGraph, Work
from gpp.plan import stage_memory
from gpp.planner.estimate import Group, Problem, assemble
from gpp.planner.intervals import IntervalCosts, Intervals, operator_seconds, takes_part_in_backward
from gpp.planner.options import Options
from gpp.planner.series_parallel import decompose, leaf_order
from gpp.topology import Device, DeviceTopology, Link
from tests.graphs import graphs, make_cluster, make_graph

CLUSTER = make_cluster(
    4, per_host=2, inside=Link(1e-5, 1e9), between=Link(1e-4, 1e8), flops=1e12, bandwidth=1e10
)
OPTIONS = Options(mini_batch=16, micro_batch=8)


def intervals(graph: ComputationGraph, boundaries: list[int] | None = None) -> Intervals:
    order = leaf_order(decompose(graph))
    boundaries = boundaries or list(range(len(order) + 1))
    return IntervalCosts(graph, order, boundaries, CLUSTER, Roofline(), OPTIONS).table(8)


@settings(max_examples=60, deadline=None)
@given(graphs(max_operators=7), st.integers(0, 10**6), st.booleans())
def test_an_interval_costs_what_its_stage_would(graph, seed, tie):
    """Against the plan of stages before, in and after every interval."""
    order = leaf_order(decompose(graph))
    if tie and len(order) > 2:  # all parameters of one size are one parameter
        names = [op.name for op in graph.operators if op.parameters]
        graph = make_graph(
            [list(graph.predecessors[i]) for i in range(len(order))],
            parameters={name: 64 for name in names},
            tied=dict.fromkeys(names, "w"),
            flops=1e8 * (1 + seed % 7),
            width=16,
        )
        order = leaf_order(decompose(graph))
    table = intervals(graph)
    problem = Problem(graph, CLUSTER, Roofline(), OPTIONS)
    for a, b in itertools.combinations(range(len(order) + 1), 2):
        parts = [order[:a], order[a:b], order[b:]]
        plan = assemble(problem, [Group(part, 1) for part in parts if part], 8, "test")
        found = [{graph.index[n] for n in stage.operators} for stage in plan.stage_graph.stages]
        index = found.index(set(order[a:b]))
        stage = plan.stage_graph.stages[index]
        sent = [e for e in plan.stage_graph.edges if e.source == index]
        received = [e for e in plan.stage_graph.edges if e.target == index]
        memory = stage_memory(plan.stage_graph, index)
        static = memory.parameters + memory.gradients + memory.optimizer + memory.buffers
        assert np.isclose(table.static[a, b], static)
        assert np.isclose(table.stash[a, b], stage.stash)
        assert table.sent[a, b] == sum(e.bytes + e.gradient_bytes for e in sent)
        # what is before the interval is one stage here: every tensor comes once
        assert table.received[a, b] == sum(e.bytes + e.gradient_bytes for e in received)
        assert table.copied[a, b] >= table.sent[a, b]
        upstream = plan.stage_graph.stages[0].in_flight if a else 0
        charged = table.memory(1, stage.in_flight / 8, upstream / 8)[a, b]
        assert np.isclose(charged, memory.total)
        ends = [sent, [e for e in sent if e.needs_grad], received, [e for e in received if e.needs_grad]]
        moved = 8 * (table.sent[a, b] + table.received[a, b])
        work = stage.seconds.forward + stage.seconds.backward + stage.seconds.update / 2
        expected = work + sum(map(bool, ends)) * 1e-4 + moved / 1e8
        assert np.isclose(table.seconds[1][a, b], expected)


def test_replicas_split_work_and_pay_an_all_reduce():
    graph = make_graph({"a": ""}, flops=1e9, parameters=4000)
    table = intervals(graph)
    update = Roofline().update(4000, CLUSTER.devices[0]) / 2
    for degree in (1, 2, 4):
        link = CLUSTER.inside if degree <= 2 else CLUSTER.between
        work = Roofline().forward(graph.operators[0], 8 / degree, CLUSTER.devices[0])
        work += Roofline().backward_weight(graph.operators[0], 8 / degree, CLUSTER.devices[0])
        expected = work + update + all_reduce_seconds(4000, degree, link) / 2
        assert table.seconds[degree][0, 1] == pytest.approx(expected)
    assert set(table.seconds) == {1, 2, 4}


def test_coupled_operators_allow_no_replicas_and_nothing_is_no_stage():
    table = intervals(make_graph({"a": "", "b": "a", "c": "b"}, coupled=["b"]))
    assert np.isfinite(table.seconds[2]).tolist() == [
        [False, True, False, False],
        [False, False, False, False],
        [False, False, False, True],
        [False, False, False, False],
    ]
    assert np.isfinite(table.seconds[1]).tolist() == np.triu(np.ones((4, 4)), 1).astype(bool).tolist()


def test_boundaries_pick_rows():
    graph = make_graph({"a": "", "b": "a", "c": "a b", "d": "c"})
    every, some = intervals(graph), intervals(graph, [0, 1, 3, 4])
    pick = np.ix_([0, 1, 3, 4], [0, 1, 3, 4])
    for field in ("static", "stash", "sent", "received", "copied"):
        assert np.array_equal(getattr(some, field), getattr(every, field)[pick])
    assert np.allclose(some.seconds[2], every.seconds[2][pick])


def test_a_tensor_with_many_readers_is_sent_once_and_copied_to_each():
    table = intervals(make_graph({"a": "", "b": "a", "c": "a", "d": "a", "e": "b c d"}, width=4))
    assert table.sent[0, 1] == 32  # 16 bytes forward, 16 back
    assert table.copied[0, 1] == 96
    assert table.received[1, 3] == 32  # two readers in one stage
    assert (table.sent[1, 3], table.copied[1, 3]) == (64, 64)


def test_of_unequal_devices_the_slowest_counts():
    fast, slow = Device("fast", 1e9, 4e12, 1e12), Device("slow", 1e9, 1e12, 1e12)
    graph = make_graph({"a": ""}, flops=1e9)
    both = operator_seconds(graph, Roofline(), (fast, slow), 2)
    assert np.array_equal(both, operator_seconds(graph, Roofline(), (slow,), 2))
    assert np.array_equal(
        operator_seconds(graph, Roofline(), (fast, slow), 2, min),
        operator_seconds(graph, Roofline(), (fast,), 2),
    )
    mixed = DeviceTopology("mixed", (fast, slow), 2, Link(0, 1e9), Link(0, 1e9))
    costs = IntervalCosts(graph, (0,), (0, 1), mixed, Roofline(), OPTIONS)
    alone = IntervalCosts(graph, (0,), (0, 1), make_cluster(2, flops=1e12), Roofline(), OPTIONS)
    assert costs.table(8).seconds[1][0, 1] == pytest.approx(alone.table(8).seconds[1][0, 1])


def test_who_takes_part_in_the_backward():
    graph = make_graph({"frozen": "", "body": "frozen", "loss": "body", "metric": "body"},
                       parameters={"frozen": 4, "body": 4}, frozen=["frozen"])  # fmt: skip
    found = {op.name: takes_part_in_backward(graph, op) for op in graph.operators}
    # a loss has nothing to learn and no output, but work in its input half
    assert found == {"frozen": False, "body": True, "loss": True, "metric": True}
    operators = tuple(
        op if op.name != "metric" else type(op)(op.name, op.kind, op.inputs, (), backward_input=Work())
        for op in graph.operators
    )
    plain = ComputationGraph(operators)
    assert not takes_part_in_backward(plain, plain.operators[3])
    assert operator_seconds(plain, Roofline(), CLUSTER.devices[:1], 4)[1:, 3].tolist() == [0, 0]
