from gpp.cost import Roofline
from gpp.planner import graphpipe, pipedream, piper, sequential
from gpp.planner.estimate import Problem, assemble, estimated, fits
from gpp.planner.options import Options
from gpp.planner.rivals import partitions, rivals
from tests.graphs import make_cluster, make_graph, towers

GRAPH = make_graph(towers(3, 4), flops=1e10, parameters=1 << 10, stash=1e6)
OPTIONS = Options(mini_batch=16)


def test_their_own_answers():
    cluster = make_cluster(6)
    found = rivals(Problem(GRAPH, cluster, Roofline(), OPTIONS))
    expected = [
        p.plan(GRAPH, cluster, Roofline(), OPTIONS) for p in (graphpipe, pipedream, piper, sequential)
    ]
    assert [plan.planner for plan in found.plans] == [plan.planner for plan in expected]
    assert [plan.estimate for plan in found.plans] == [plan.estimate for plan in expected]
    assert found.refusals == ()


def test_no_line_without_replicas_where_it_cannot_win():
    """One heavy operator that four replicas share."""
    graph = make_graph({"a": "", "b": "a"}, flops={"a": 1e11, "b": 1e8}, parameters=4)
    found = rivals(Problem(graph, make_cluster(5), Roofline(), Options(mini_batch=16, micro_batch=4)))
    assert "sequential" not in [plan.planner for plan in found.plans]
    slow = sequential.plan(graph, make_cluster(5), Roofline(), Options(mini_batch=16, micro_batch=4))
    assert slow.estimate > min(plan.estimate for plan in found.plans)


def test_what_they_say_if_they_have_none():
    found = rivals(Problem(GRAPH, make_cluster(2, memory=1e3), Roofline(), OPTIONS))
    assert found.plans == () and len(found.refusals) == 4


def test_too_many_downsets_leave_the_others():
    names = {f"t{b}": 1e9 * (b + 1) for b in range(16)}  # no two alike
    wide = make_graph({**dict.fromkeys(names, ""), "join": " ".join(names)}, flops={**names, "join": 1e9})
    found = rivals(Problem(wide, make_cluster(4), Roofline(), OPTIONS))
    assert len(found.plans) == 3 and "downsets" in str(found.refusals[0])


def test_partitions_that_run_on_their_true_graph():
    problem = Problem(GRAPH, make_cluster(6), Roofline(), OPTIONS)
    found = partitions(problem, 2)
    plans = [estimated(assemble(problem, groups, 2, "x")) for groups in found]
    assert len(plans) >= 3 and all(fits(plan) for plan in plans)
    assert not any(edge.is_order for plan in plans for edge in plan.stage_graph.edges)


def test_where_nothing_fits_those_that_would_with_more_memory():
    problem = Problem(GRAPH, make_cluster(6, memory=1e4), Roofline(), OPTIONS)
    found = partitions(problem, 2)
    assert found and not any(fits(assemble(problem, groups, 2, "x")) for groups in found)
