from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpp.cost import Roofline
from gpp.plan import Plan, PlanError, Policy, check_plan
from gpp.planner import graphpipe, sequential
from gpp.planner.estimate import Problem, peak_memory
from gpp.planner.imposed import imposed, thought_of
from gpp.planner.options import Options
from gpp.schedule.check import check
from gpp.schedule.lower import lower
from gpp.simulate import simulate
from gpp.topology import DeviceTopology
from tests.graphs import chain, graphs, make_cluster, make_graph, towers

DEEP = Options(mini_batch=32, micro_batch=2, max_replicas=1)


TOWERS = make_graph(towers(2, 3), flops=1e10, parameters=1 << 10, stash=1e6)


def planned() -> Plan:
    return graphpipe.plan(TOWERS, make_cluster(4), Roofline(), DEEP)


def wanting(policy: Policy, cluster: DeviceTopology | None = None) -> Problem:
    return Problem(TOWERS, cluster or make_cluster(4), Roofline(), replace(DEEP, policy=policy))


def test_what_planners_think_of():
    assert thought_of(Policy("zero-bubble", 2)) == thought_of(Policy("greedy", 2)) == Policy("1f1b", 2)
    assert thought_of(Policy("gpipe")) == Policy("gpipe")


@pytest.mark.parametrize("name", ["zero-bubble", "greedy"])
def test_split_backwards_are_faster(name):
    plan = planned()
    found = imposed(wanting(Policy(name)), plan)
    assert found.policy.name == name
    assert [s.operators for s in found.stage_graph.stages] == [s.operators for s in plan.stage_graph.stages]
    assert found.estimate == pytest.approx(simulate(found).step_seconds)
    assert found.lower_bound <= found.estimate < 0.98 * plan.estimate
    check(found, lower(found))


def test_where_nothing_more_fits():
    plan = planned()
    small = make_cluster(4, memory=0.3 * peak_memory(plan))
    with pytest.raises(PlanError, match="schedule=zero-bubble does not fit the devices' memory"):
        imposed(wanting(Policy("zero-bubble"), small), replace(plan, topology=small))


def test_bursts():
    plan = planned()
    found = imposed(wanting(Policy()), plan, 2)
    assert {stage.k for stage in found.stage_graph.stages} == {2}
    assert max(s.in_flight for s in found.stage_graph.stages) > max(
        s.in_flight for s in plan.stage_graph.stages
    )
    assert found.estimate == pytest.approx(simulate(found).step_seconds)
    for policy, k, words in (
        (Policy("gpipe"), 2, "for schedule 1f1b alone"),
        (Policy(), 17, "must not exceed the 16 micro-batches"),
    ):
        with pytest.raises(PlanError, match=words):
            imposed(wanting(policy), plan, k)


def test_bursts_that_do_not_fit():
    graph = make_graph(chain(4), flops=1e10, parameters=1 << 10, stash=1e6)
    need = peak_memory(sequential.plan(graph, make_cluster(4), Roofline(), DEEP))
    problem = Problem(graph, make_cluster(4, memory=1.1 * need), Roofline(), DEEP)
    with pytest.raises(PlanError, match=r"needs .* MiB on device"):
        imposed(problem, sequential.answer(problem), 4)


@settings(max_examples=25, deadline=None)
@given(graphs(max_operators=7), st.integers(1, 5), st.sampled_from(["zero-bubble", "greedy"]), st.booleans())
def test_any_plan_runs_under_any_schedule(graph, devices, name, burst):
    options = Options(mini_batch=8, micro_batch=2)
    plan = graphpipe.plan(graph, make_cluster(devices), Roofline(), options)
    asked = options if burst else replace(options, policy=Policy(name))
    found = imposed(Problem(graph, make_cluster(devices), Roofline(), asked), plan, 2 if burst else 1)
    check_plan(found, graph)
    check(found, lower(found))
