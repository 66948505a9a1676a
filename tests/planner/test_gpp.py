from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpp.cost import Roofline
from gpp.graph import ComputationGraph
from gpp.plan import Plan, PlanError, Policy, check_plan, plan_from_json, plan_to_json
from gpp.planner import gpp, graphpipe, pipedream, piper, sequential
from gpp.planner.estimate import Group, Problem, assemble, estimated, fits, peak_memory
from gpp.planner.options import Constraints, Options
from gpp.planner.schedules import rescheduled
from gpp.planner.units import check_constraints
from gpp.schedule.check import check
from gpp.schedule.lower import lower
from gpp.simulate import simulate
from gpp.topology import DeviceTopology, Link
from tests import thorough
from tests.graphs import chain, graphs, make_cluster, make_graph, towers
from tests.strategies import constraints

MANY = 4 if thorough.ALL else 3  # some graphs of 4 have so many plans that trying them takes minutes
ALL = dict.fromkeys(("eager", "split_backward", "greedy", "recompute", "shard_optimizer", "colocate"), True)
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
    graph = data.draw(graphs(max_operators=7, all_train=data.draw(st.booleans())))
    cluster = make_cluster(data.draw(st.integers(1, 4)), per_host=2, between=SLOW)
    given = data.draw(st.sampled_from([{}, ALL]))
    options = Options(mini_batch=8, **given)
    found = planned(graph, cluster, mini_batch=8, **given)
    for rival in (graphpipe, pipedream, sequential):
        other = rival.plan(graph, cluster, Roofline(), options)
        assert found.estimate <= other.estimate * (1 + 2e-6)


@settings(max_examples=15, deadline=None)
@given(st.data(), graphs(max_operators=8), st.integers(1, 5), st.sampled_from([{}, ALL]))
def test_constraints_are_kept_on_any_graph(data, graph, devices, given):
    """Or refused, by every planner alike."""
    decided = data.draw(constraints(len(graph.operators)))
    cluster, given = make_cluster(devices, inside=SLOW), {**given, "mini_batch": 8, "constraints": decided}
    options = Options(**given)
    try:
        other = graphpipe.plan(graph, cluster, Roofline(), options)
    except PlanError as error:
        assert "constraints" in str(error)
        with pytest.raises(PlanError, match="constraints"):
            gpp.plan(graph, cluster, Roofline(), options)
        return
    found = planned(graph, cluster, **given)
    groups = [
        Group(tuple(graph.index[name] for name in stage.operators), len(stage.devices))
        for stage in found.stage_graph.stages
    ]
    check_constraints(Problem(graph, cluster, Roofline(), options), groups)
    assert found.estimate <= other.estimate * (1 + 2e-6)


def every_plan(graph: ComputationGraph, cluster: DeviceTopology, options: Options) -> Iterator[Plan]:
    """All partitions into stages that are a plan, with all numbers of replicas."""
    count = len(graph.operators)
    problem = Problem(graph, cluster, Roofline(), options)
    sizes = options.micro_batches
    for size, *labels in product(sizes, *[range(min(count, len(cluster.devices)))] * count):
        used = list(dict.fromkeys(labels))
        if used != sorted(used):
            continue  # the same with other names
        stages = [tuple(i for i in range(count) if labels[i] == s) for s in used]
        for degrees in product(options.degrees(size, len(cluster.devices)), repeat=len(stages)):
            coupled = [any(graph.operators[i].batch_coupled for i in stage) for stage in stages]
            if sum(degrees) > len(cluster.devices) or any(
                c and d > 1 for c, d in zip(coupled, degrees, strict=True)
            ):
                continue
            groups = [Group(stage, d) for stage, d in zip(stages, degrees, strict=True)]
            try:
                yield estimated(assemble(problem, groups, size, "brute"))
            except PlanError:
                break  # stages that wait for each other


@settings(max_examples=20, deadline=None)
@given(graphs(max_operators=5, all_train=True), st.integers(1, 4), st.sampled_from([1, 2, 4, "auto"]))
def test_the_best_of_all_plans_of_a_small_model(graph, devices, size):
    cluster = make_cluster(devices, inside=SLOW)
    given = {"mini_batch": 8 if size == "auto" else 4 * size, "micro_batch": size}
    options = Options(**given)
    found = planned(graph, cluster, **given)
    others = [rival.plan(graph, cluster, Roofline(), options) for rival in (pipedream, sequential, piper)]
    best = min(plan.estimate for plan in (*every_plan(graph, cluster, options), *others))
    assert found.estimate == pytest.approx(best, rel=2e-6)


def test_seven_operators_on_four_devices():
    parents = {"a": "", "b": "a", "c": "a", "d": "b", "e": "c b", "f": "c", "g": "d e f"}
    flops = {"a": 1e9, "b": 5e9, "c": 2e9, "d": 4e9, "e": 3e9, "f": 6e9, "g": 2e9}
    graph = make_graph(parents, flops=flops, parameters=1 << 10)
    options = Options(mini_batch=16, micro_batch=2)
    found = planned(graph, make_cluster(4), mini_batch=16, micro_batch=2)
    best = min(plan.estimate for plan in every_plan(graph, make_cluster(4), options))
    assert found.estimate == pytest.approx(best, rel=2e-6)


def every_choice(graph: ComputationGraph, cluster: DeviceTopology, options: Options) -> Iterator[Plan]:
    """All partitions into stages of one device, or with a device for several, with all that may be chosen
    besides: what recomputes, and every schedule; those that fit memory."""
    count, devices = len(graph.operators), len(cluster.devices)
    problem = Problem(graph, cluster, Roofline(), options)
    policies = [Policy(extra_warm_up=extra) for extra in range(3)]
    for labels in product(range(count), repeat=count):
        used = list(dict.fromkeys(labels))
        if used != sorted(used):
            continue
        stages = [tuple(i for i in range(count) if labels[i] == s) for s in used]
        for places in product(range(devices), repeat=len(stages)):
            first = list(dict.fromkeys(places))
            if first != sorted(first) or (len(set(places)) < len(places) and not options.colocate):
                continue
            for again in product((False, True), repeat=len(stages)):
                pairs = zip(stages, places, again, strict=True)
                if len(set(places)) < len(places) and any(again):
                    continue
                groups = [Group(stage, 1, recompute=r, at=(place,)) for stage, place, r in pairs]
                try:
                    plans = [
                        assemble(problem, groups, options.micro_batch, "brute", policy=p) for p in policies
                    ]
                except PlanError:
                    break  # stages that wait for each other
                for plan in (*plans, *rescheduled(plans[0], options)):
                    if fits(plan):
                        yield estimated(plan)


@settings(max_examples=12, deadline=None)
@given(
    graphs(max_operators=4 if thorough.ALL else 3, all_train=True),
    st.integers(1, 3),
    st.sampled_from([0.5, 0.8, 2.0]),
)
def test_the_best_of_all_plans_with_every_choice(graph, devices, part):
    """Schedules, recomputing and shared devices too, where memory is short and where it is not."""
    given = ALL | {"mini_batch": 8, "micro_batch": 1, "max_replicas": 1}
    need = peak_memory(sequential.plan(graph, make_cluster(devices), Roofline(), Options(**given)))
    cluster = make_cluster(devices, inside=SLOW, memory=max(part * need, 1.0))
    best = min((p.estimate for p in every_choice(graph, cluster, Options(**given))), default=None)
    if best is None:
        with pytest.raises(PlanError):
            gpp.plan(graph, cluster, Roofline(), Options(**given))
    else:
        assert planned(graph, cluster, **given).estimate <= best * (1 + 2e-6)


def test_fast_devices_get_more():
    cluster = make_cluster(4)
    fast = replace(cluster.devices[0], name="fast", flops=4 * cluster.devices[0].flops)
    cluster = replace(cluster, devices=(*cluster.devices[:2], fast, fast))
    graph = make_graph(chain(20), flops=1e10, parameters=1 << 10)
    given = {"mini_batch": 64, "micro_batch": 2, "max_replicas": 1}
    found = planned(graph, cluster, **given)
    assert found.estimate < 0.55 * graphpipe.plan(graph, cluster, Roofline(), Options(**given)).estimate


def test_stages_share_a_device_where_that_balances():
    """What lies before, between and after two heavy operators is no stage, but fits one device."""
    flops = {f"o{i}": weight * 1e10 for i, weight in enumerate((1, 4, 2, 4, 1))}
    graph = make_graph(chain(5), flops=flops, parameters=1 << 10)
    given = {"mini_batch": 64, "micro_batch": 2, "max_replicas": 1, "split_backward": True, "greedy": True}
    apart, shared = (planned(graph, make_cluster(3), **given, colocate=c) for c in (False, True))
    assert shared.estimate < 0.9 * apart.estimate
    assert any(len(stages) > 1 for stages in shared.residents.values())


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
    """A deep chain whose first stages may hold one micro-batch's stash: without forwards again it hardly
    overlaps."""
    graph = make_graph(chain(16), flops=1e10, parameters=1 << 10, stash=1e6, width=1)
    given = {"micro_batch": 2, "max_replicas": 1, "mini_batch": 32}
    cluster = make_cluster(8, memory=6e6)
    without = planned(graph, cluster, **given)
    found = planned(graph, cluster, **given, recompute=True)
    assert found.estimate < 0.8 * without.estimate
    assert any(stage.recompute for stage in found.stage_graph.stages)


def test_constraints_are_kept():
    graph = make_graph(towers(2, 4), flops=1e10, parameters=1 << 10)
    constraints = Constraints(together=(("t0.l0", "t0.l3"),), pins=(("t1.l0", "x"), ("t1.l1", "y")))
    found = planned(graph, make_cluster(4), **ALL, constraints=constraints)
    stages = {name: s for s, stage in enumerate(found.stage_graph.stages) for name in stage.operators}
    assert len({stages[f"t0.l{i}"] for i in range(4)}) == 1
    assert stages["t1.l0"] != stages["t1.l1"]
