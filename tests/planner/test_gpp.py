from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpp.cost import Roofline
from gpp.graph import ComputationGraph
from gpp.plan import Plan, PlanError, check_plan, plan_from_json, plan_to_json
from gpp.planner import gpp, graphpipe, pipedream, sequential
from gpp.planner.estimate import peak_memory
from gpp.planner.options import Constraints, Options
from gpp.schedule.check import check
from gpp.schedule.lower import lower
from gpp.simulate import simulate
from gpp.topology import DeviceTopology, Link
from tests.graphs import graphs, make_cluster, make_graph, towers

ALL = {"eager": True, "split_backward": True, "greedy": True, "recompute": True, "shard_optimizer": True}
SLOW = Link(1e-5, 1e9)


@pytest.fixture(autouse=True)
def little_polish(monkeypatch):
    monkeypatch.setattr(gpp, "TASKS", 30_000)


def planned(graph: ComputationGraph, cluster: DeviceTopology, **given) -> Plan:
    """A plan that has passed every check there is."""
    found = gpp.plan(graph, cluster, Roofline(), Options(**{"mini_batch": 16} | given))
    check_plan(found, graph)
    check(found, lower(found))
    assert plan_from_json(plan_to_json(found)) == found
    assert found.estimate == pytest.approx(simulate(found).step_seconds, rel=1e-9)
    seconds = [choice.seconds for choice in found.choices]
    assert seconds[-1] == found.estimate
    assert all(after <= before * (1 + 2e-6) for before, after in pairwise(seconds))
    return found


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_never_worse_than_any_rival(data):
    graph = data.draw(graphs(max_operators=7, all_train=True))
    cluster = make_cluster(data.draw(st.integers(1, 4)), per_host=2, between=SLOW)
    given = data.draw(st.sampled_from([{}, ALL]))
    options = Options(mini_batch=8, **given)
    found = planned(graph, cluster, mini_batch=8, **given)
    for rival in (graphpipe, pipedream, sequential):
        other = rival.plan(graph, cluster, Roofline(), options)
        assert found.estimate <= other.estimate * (1 + 2e-6)


def test_the_same_plan_twice():
    graph = make_graph(towers(3, 3), parameters=4 << 20, flops=1e10)
    assert planned(graph, make_cluster(4), **ALL) == planned(graph, make_cluster(4), **ALL)


def test_split_backwards_fill_the_drain():
    graph = make_graph(towers(4, 4), flops=1e10, parameters=1 << 10)
    given = {"mini_batch": 16, "micro_batch": 2, "max_replicas": 1}
    fused, split = (planned(graph, make_cluster(8), **given, split_backward=s) for s in (False, True))
    assert split.estimate < 0.95 * fused.estimate
    assert any(stage.weight_lag for stage in split.stage_graph.stages)


@pytest.mark.parametrize("part", [0.9, 0.6, 0.4, 0.3])
def test_memory_is_a_hard_limit(part):
    graph = make_graph(towers(4, 2), flops=1e10, parameters=1 << 10, stash=1e6, width=1)
    roomy = planned(graph, make_cluster(4), micro_batch=4, max_replicas=1)
    memory = part * peak_memory(roomy)
    tight = planned(graph, make_cluster(4, memory=memory), max_replicas=1, **ALL)
    assert peak_memory(tight) <= memory


def test_a_branch_runs_less_far_ahead_where_memory_is_short():
    graph = make_graph(towers(4, 2), flops=1e10, parameters=1 << 10, stash=1e6, width=1)
    given = {"micro_batch": 2, "max_replicas": 1}
    need = peak_memory(graphpipe.plan(graph, make_cluster(4), Roofline(), Options(mini_batch=16, **given)))
    short = make_cluster(4, memory=0.8 * need)
    with pytest.raises(PlanError):
        graphpipe.plan(graph, short, Roofline(), Options(mini_batch=16, **given))
    found = planned(graph, short, **given)
    assert peak_memory(found) <= 0.8 * need


def test_recompute_makes_room_for_what_hides_the_bubble():
    graph = make_graph(towers(4, 2), flops=1e10, parameters=1 << 10, stash=1e6, width=1)
    given = {"micro_batch": 2, "max_replicas": 1, "mini_batch": 16}
    cluster = make_cluster(4, memory=7e6)
    without = planned(graph, cluster, **given)
    found = planned(graph, cluster, **given, recompute=True)
    assert found.estimate <= without.estimate


def test_constraints_are_kept():
    graph = make_graph(towers(2, 4), flops=1e10, parameters=1 << 10)
    constraints = Constraints(together=(("t0.l0", "t0.l3"),), pins=(("t1.l0", "x"), ("t1.l1", "y")))
    found = planned(graph, make_cluster(4), **ALL, constraints=constraints)
    stages = {name: s for s, stage in enumerate(found.stage_graph.stages) for name in stage.operators}
    assert len({stages[f"t0.l{i}"] for i in range(4)}) == 1
    assert stages["t1.l0"] != stages["t1.l1"]
