import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpp.cost import Roofline, all_reduce_seconds
from gpp.graph import ComputationGraph
from gpp.plan import PlanError, Policy
from gpp.planner.bound import bound
from gpp.planner.estimate import Group, Problem, assemble, estimated
from gpp.planner.options import Options
from gpp.topology import Device, DeviceTopology, Link
from tests.graphs import chain, graphs, make_cluster, make_graph, towers

FREE = Link(0, float("inf"))


def test_one_device_has_to_do_all_the_work():
    graph = make_graph(chain(3), parameters=1000)
    seconds, what = bound(graph, make_cluster(1), Roofline(), Options(mini_batch=8))
    # the first operator has no input half
    assert (seconds, what) == (pytest.approx(8 * (3 * 3 - 1) * 1e9 / 1e13 + 7 * 3000 / 1e12), "work")


def test_one_operator_binds_where_it_cannot_be_split_well():
    graph = make_graph(
        {"a": "", "big": "a", "b": "big"}, flops={"a": 1, "big": 3e9, "b": 1}, parameters=10**8
    )
    cluster = make_cluster(4, inside=Link(1e-4, 1e9))
    seconds, what = bound(graph, cluster, Roofline(), Options(mini_batch=8, micro_batch=4))
    update = 7e8 / 1e12
    work = 8 * 9e9 / 1e13
    alone = [work / d + all_reduce_seconds(10**8, d, cluster.inside) for d in (1, 2, 4)]
    assert (seconds, what) == (pytest.approx(min(alone) + update), "operator big")
    free = bound(graph, make_cluster(4, inside=FREE), Roofline(), Options(mini_batch=8, micro_batch=4))[0]
    assert free < seconds


def test_a_path_binds_where_there_are_few_micro_batches():
    graph = make_graph(chain(4), parameters=4, flops=1e9)
    options = Options(mini_batch=8, micro_batch=8, max_replicas=1)
    seconds, what = bound(graph, make_cluster(4), Roofline(), options)
    one = 8 * 1e9 / 1e13
    # the first operator has no input half
    assert seconds == pytest.approx(one * (2 + 3 + 3 + 3), rel=1e-4)
    assert what == "path through o3"


def test_batch_coupled_operators_are_never_split():
    plain, coupled = (make_graph({"a": ""}, parameters=4, coupled=c) for c in ([], ["a"]))
    options = Options(mini_batch=8, micro_batch=8)
    cluster = make_cluster(4, inside=FREE)
    assert bound(coupled, cluster, Roofline(), options)[0] == pytest.approx(
        4 * bound(plain, cluster, Roofline(), options)[0], rel=1e-3
    )


def test_fewer_replicas_and_fewer_devices_raise_it():
    graph = make_graph(towers(2, 3))
    options = [Options(mini_batch=8, max_replicas=limit) for limit in (None, 2, 1)]
    by_limit = [bound(graph, make_cluster(8), Roofline(), o)[0] for o in options]
    assert by_limit == sorted(by_limit)
    by_count = [bound(graph, make_cluster(k), Roofline(), options[0])[0] for k in (8, 4, 2, 1)]
    assert by_count == sorted(by_count)
    assert by_count[0] < by_count[-1]


def test_of_unequal_devices_the_fastest_counts():
    fast, slow = Device("fast", 1e9, 4e12, 1e12), Device("slow", 1e9, 1e12, 1e12)
    mixed = DeviceTopology("mixed", (slow, fast), 2, FREE, FREE)
    graph = make_graph(chain(2))
    options = Options(mini_batch=8)
    even = make_cluster(2, flops=4e12, inside=FREE)
    assert bound(graph, mixed, Roofline(), options) == bound(graph, even, Roofline(), options)


def every_plan(graph: ComputationGraph, devices: int, options: Options, micro_batch: int):
    """Plans for all partitions of the operators into at most `devices` stages and all replicas."""
    problem = Problem(graph, make_cluster(devices, inside=FREE, memory=1e12), Roofline(), options)
    count = len(graph.operators)
    seen = set()
    for owner in itertools.product(range(devices), repeat=count):
        parts = [tuple(i for i in range(count) if owner[i] == s) for s in sorted(set(owner))]
        if frozenset(parts) in seen or not all(graph.is_convex(part) for part in parts):
            continue
        seen.add(frozenset(parts))
        for degrees in itertools.product((1, 2), repeat=len(parts)):
            coupled = any(
                d > 1 and any(graph.operators[i].batch_coupled for i in part)
                for part, d in zip(parts, degrees, strict=True)
            )
            if sum(degrees) <= devices and not coupled and all(micro_batch % d == 0 for d in degrees):
                groups = [Group(part, d) for part, d in zip(parts, degrees, strict=True)]
                try:
                    yield assemble(problem, groups, micro_batch, "test")
                except PlanError:
                    continue  # two convex stages that point at each other


@settings(max_examples=100, deadline=None)
@given(
    graphs(max_operators=4, all_train=True),
    st.integers(1, 3),
    st.sampled_from([Policy(), Policy("gpipe"), Policy(extra_warm_up=1)]),
)
def test_no_plan_at_all_is_faster(graph, devices, policy):
    options = Options(mini_batch=4, policy=policy)
    least, what = bound(graph, make_cluster(devices, inside=FREE), Roofline(), options)
    assert what == "work" or what.split()[-1] in graph.index
    steps = [
        estimated(plan).estimate
        for micro_batch in options.micro_batches
        for plan in every_plan(graph, devices, options, micro_batch)
    ]
    assert min(steps) >= least * (1 - 1e-9)
    assert devices > 1 or min(steps) == pytest.approx(least)
