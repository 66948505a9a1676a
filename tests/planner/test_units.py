import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpp.cost import Roofline
from gpp.graph import ComputationGraph
from gpp.plan import Plan, PlanError, check_plan
from gpp.planner.estimate import Group, Problem
from gpp.planner.graphpipe import candidates, plan
from gpp.planner.options import Constraints, Options
from gpp.planner.units import Units, check_constraints, stage_degrees, units
from tests.graphs import chain, graphs, make_cluster, make_graph, towers
from tests.strategies import constraints


def found(graph: ComputationGraph, devices: int = 4, **constraints) -> Units:
    return units(graph, Options(mini_batch=8, constraints=Constraints(**constraints)), devices)


def names(graph: ComputationGraph, result: Units) -> list[str]:
    return [" ".join(graph.operators[i].name for i in members) for members in result.members]


def test_without_constraints_every_operator_is_a_unit():
    graph = make_graph({"a": "", "b": "a", "c": "a", "d": "b c"})
    result = found(graph)
    assert names(graph, result) == ["a", "b", "c", "d"]
    assert result.predecessors == graph.predecessors
    assert result.ancestors == graph.ancestors
    assert not result.constrained


@pytest.mark.parametrize(
    "parents, constraints, expected",
    [
        # what lies on a path between two members joins them
        (chain(4), {"together": (("o0", "o2"),)}, ["o0 o1 o2", "o3"]),
        # what is beside them does not
        ({"a": "", "b": "a", "c": "a", "d": "b"}, {"together": (("a", "d"),)}, ["a b d", "c"]),
        # two sets that wait for each other are one
        (
            {"a": "", "b": "a", "c": "", "d": "c"},
            {"together": (("a", "d"), ("b", "c"))},
            ["a b c d"],
        ),
        # overlapping sets are one
        (chain(4), {"together": (("o0", "o1"), ("o1", "o2"))}, ["o0 o1 o2", "o3"]),
        # one label is one stage, wherever its operators are
        (towers(2, 2), {"pins": (("t?.l0", "first"),)}, ["t0.l0 t1.l0", "t0.l1", "t1.l1", "join"]),
        # only edges are uncut, not all pairs
        (towers(2, 2), {"uncut": (("t0*", "t0*"),)}, ["t0.l0 t0.l1", "t1.l0", "t1.l1", "join"]),
    ],
)
def test_what_stays_together(parents, constraints, expected):
    graph = make_graph(parents)
    assert names(graph, found(graph, **constraints)) == expected


def test_labels_and_replicas_belong_to_units():
    graph = make_graph(chain(4))
    result = found(graph, pins=(("o0", "A"), ("o3", "B")), replicas=(("o[12]", 2),))
    assert result.labels == ("A", None, None, "B")
    assert result.replicas == (None, 2, 2, None)
    options = Options(
        mini_batch=8, constraints=Constraints(pins=(("o0", "A"), ("o3", "B")), replicas=(("o1", 2),))
    )
    problem = Problem(graph, make_cluster(4), Roofline(), options)
    assert stage_degrees(problem, (0, 1), 8) == (2,)
    assert stage_degrees(problem, (0, 1), 1) == ()
    assert stage_degrees(problem, (2, 3), 8) == (1, 2, 4)
    assert stage_degrees(problem, (0, 1, 2, 3), 8) == ()


@pytest.mark.parametrize(
    "constraints, words",
    [
        ({"together": (("o1", "p*"),)}, ["together", "'p*' matches no operator", "the nearest are"]),
        ({"pins": (("o0", "A"), ("o2", "A"), ("o1", "B"))}, ["pins", "o0 is given A and o1 B"]),
        ({"pins": (("o0", "A"), ("o0", "B"))}, ["o0 is given A and o0 B", "the same one"]),
        ({"uncut": (("o2", "o0"),)}, ["uncut", "nothing that matches 'o2' feeds", "'o0'"]),
        (
            {"together": (("o0", "o1"),), "replicas": (("o0", 1), ("o1", 2))},
            ["replicas", "o0", "o1", "drop one"],
        ),
        ({"replicas": (("o0", 0),)}, ["0 replicas", "at least 1"]),
        ({"replicas": (("o0", 8),)}, ["8 replicas", "the cluster has 4 devices"]),
        ({"replicas": (("o0", 3),)}, ["3 replicas", "divides no micro-batch size (1, 2, 4, 8)"]),
        ({"replicas": (("o3", 2),)}, ["o3 mixes the samples", "use 1"]),
        ({"pins": tuple((f"o{i}", str(i)) for i in range(5))}, ["pins names 5 stages", "4 devices"]),
    ],
)
def test_what_cannot_be_says_the_rule_the_value_and_the_remedy(constraints, words):
    graph = make_graph(chain(5), coupled=["o3"])
    with pytest.raises(PlanError) as error:
        found(graph, **constraints)
    for word in ["planner.constraints.", *words]:
        assert word in str(error.value)


def test_more_replicas_than_the_options_allow():
    options = Options(mini_batch=8, max_replicas=2, constraints=Constraints(replicas=(("o0", 4),)))
    with pytest.raises(PlanError, match=r"4 replicas, planner\.max_replicas is 2"):
        units(make_graph(chain(2)), options, 4)


def test_stages_that_break_constraints_are_named():
    constraints = Constraints(
        together=(("o0", "o1"),), pins=(("o2", "A"), ("o3", "B")), replicas=(("o3", 2),)
    )
    problem = Problem(
        make_graph(chain(4)), make_cluster(4), Roofline(), Options(mini_batch=8, constraints=constraints)
    )
    check_constraints(problem, [Group((0, 1), 1), Group((2,), 1), Group((3,), 2)])
    for groups, words in (
        ([Group((0,), 1), Group((1, 2), 1), Group((3,), 2)], "o0 and o1 must be in one stage"),
        ([Group((0, 1), 1), Group((2, 3), 2)], "pinned to A and B"),
        ([Group((0, 1), 1), Group((2,), 1), Group((3,), 1)], "o3 must have 2 replicas, it has 1"),
    ):
        with pytest.raises(PlanError, match=words):
            check_constraints(problem, groups)


def groups_of(graph: ComputationGraph, found: Plan) -> list[Group]:
    return [
        Group(tuple(graph.index[name] for name in stage.operators), len(stage.devices))
        for stage in found.stage_graph.stages
    ]


@settings(max_examples=100, deadline=None)
@given(st.data(), graphs(max_operators=9), st.integers(1, 6), st.booleans())
def test_every_plan_keeps_the_constraints(data, graph, devices, own_sizes):
    options = Options(
        mini_batch=12,
        constraints=data.draw(constraints(len(graph.operators))),
        stage_micro_batches=own_sizes,
        bursts=(1, 2) if own_sizes else (1,),
    )
    problem = Problem(graph, make_cluster(devices), Roofline(), options)
    try:
        result = problem.units
        chosen = plan(graph, problem.topology, Roofline(), options)
    except PlanError as error:
        assert "constraints" in str(error)
        return
    for members in result.members:
        assert graph.is_convex(members)
    assert all(p < u for u, found in enumerate(result.predecessors) for p in found)
    check_plan(chosen, graph)
    check_constraints(problem, groups_of(graph, chosen))
    for size in (4, 12):
        for groups in candidates(problem, size):
            check_constraints(problem, groups)
