import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpp.cost import Roofline
from gpp.plan import stage_memory
from gpp.planner.draft import Drafts, Part
from gpp.planner.estimate import Problem
from gpp.planner.gpp import realised
from gpp.planner.options import Constraints, Options
from gpp.planner.polish import shaped
from gpp.planner.rhythm import Kind
from gpp.schedule.check import check
from gpp.schedule.lower import lower
from gpp.simulate import simulate
from gpp.topology import Link
from tests.graphs import graphs, make_cluster, make_graph, towers

KINDS = (Kind(), Kind(extra=1), Kind(reach=1.0), Kind(reach=2.0))


@st.composite
def cuts(draw: st.DrawFn, count: int, devices: int) -> list[Part]:
    """Any assignment of units to stages, with replicas: many of them are no plan."""
    stages = draw(st.integers(1, min(count, 4)))
    # intervals of a topological order with a few units moved elsewhere
    owner = [i * stages // count for i in range(count)]
    for _ in range(draw(st.integers(0, 2))):
        owner[draw(st.integers(0, count - 1))] = draw(st.integers(0, stages - 1))
    sets = [frozenset(i for i in range(count) if owner[i] == s) for s in range(stages)]
    flags = st.booleans()
    return [
        Part(units, draw(st.sampled_from([1, 1, 2])), recompute=draw(flags), shard_optimizer=draw(flags))
        for units in sets
        if units
    ]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_draft_is_the_plan_that_it_becomes(data):
    graph = data.draw(graphs(max_operators=8, all_train=data.draw(st.booleans())))
    slow = Link(1e-4, 1e9)
    cluster = make_cluster(6, per_host=2, between=slow, memory=1e15)
    problem = Problem(graph, cluster, Roofline(), Options(mini_batch=12, micro_batch=2))
    drafts = Drafts(problem, 2)
    parts = tuple(data.draw(cuts(len(graph.operators), 6)))
    shape = shaped(drafts, parts, data.draw(st.sampled_from(KINDS)))
    if shape is None:
        return
    plan = realised(drafts, shape)
    stages = plan.stage_graph.stages
    # both are numbered topologically, perhaps not alike
    at = {stage.operators: s for s, stage in enumerate(stages)}
    names = [op.name for op in graph.operators]
    order = [at[tuple(names[u] for u in sorted(part.units))] for part in shape.draft.parts]
    memory = shape.draft.memory(shape.rhythm.warms, shape.rhythm.lags)
    for here, beat, need, place in zip(order, shape.draft.beats, memory, shape.draft.places, strict=True):
        stage = stages[here]
        assert stage.devices == place
        assert beat.forward == pytest.approx(stage.seconds.forward)
        assert beat.input == pytest.approx(stage.seconds.backward_input + stage.seconds.recompute)
        assert beat.weight == pytest.approx(stage.seconds.backward_weight)
        assert beat.update == pytest.approx(stage.seconds.update)
        assert beat.trains == stage.has_backward
        assert need == pytest.approx(stage_memory(plan.stage_graph, here).total)
    if all(beat.trains for beat in shape.draft.beats) and not plan.stage_graph.shared:
        # replicas that take turns on a link may differ a little, all else is the same recurrence
        assert shape.seconds == pytest.approx(simulate(plan).step_seconds, rel=0.01)
    check(plan, lower(plan))


def test_without_replicas_the_step_is_the_simulators():
    graph = make_graph(towers(3, 3), flops=1e10, parameters=1 << 20)
    problem = Problem(graph, make_cluster(8, per_host=4), Roofline(), Options(mini_batch=32, micro_batch=4))
    drafts = Drafts(problem, 4)
    parts = (*tuple(Part(frozenset(range(3 * b, 3 * b + 3)), 1) for b in range(3)), Part(frozenset({9}), 1))
    for kind in KINDS:
        shape = shaped(drafts, parts, kind)
        assert shape is not None
        exact = simulate(realised(drafts, shape)).step_seconds
        assert shape.seconds == pytest.approx(exact, rel=1e-9)


def test_what_is_no_plan_is_refused():
    graph = make_graph({"a": "", "b": "a", "c": "b", "d": ""}, coupled=["d"])
    options = Options(mini_batch=4, constraints=Constraints(pins=(("b", "one"), ("d", "two"))))
    drafts = Drafts(Problem(graph, make_cluster(3), Roofline(), options), 4)

    def refused(*parts: tuple[str, int]) -> bool:
        return drafts.draft([Part(frozenset("abcd".index(u) for u in us), d) for us, d in parts]) is None

    assert not refused(("ab", 1), ("c", 1), ("d", 1))
    assert refused(("ac", 1), ("b", 1), ("d", 1))  # a circle
    assert refused(("ab", 2), ("c", 1), ("d", 1))  # too many devices
    assert refused(("abc", 1), ("d", 2))  # replicas of what mixes samples
    assert refused(("abcd", 1))  # two labels in a stage
