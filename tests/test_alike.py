from hypothesis import given, settings

from gpp.alike import alike, patterns
from gpp.plan import Plan
from gpp.schedule.lower import returns_gradient
from gpp.simulate import simulate
from gpp.topology import Link
from gpp.trace import Activity
from tests.strategies import chain, make_plan, plans

LINKS = {"link": Link(0.1, 1.0), "between": Link(0.2, 1.0)}


def classes(plan: Plan) -> int:
    return sum(len(found) for found in alike(plan, ()).on.values())


def test_replicas_of_equal_stages_are_one_class():
    assert classes(make_plan(chain(4), [8] * 4, 16, replicas=[8] * 4)) == 4
    assert classes(make_plan(chain(4), [8] * 4, 16, replicas=[8, 4, 2, 8])) == 4
    assert classes(make_plan(chain(64), [16] * 64, 16, replicas=[16] * 64, per_host=8, **LINKS)) == 64


def test_who_is_beside_another_host_is_different_and_so_is_who_talks_to_it():
    # replicas of 3 on hosts of 4: the first of stage 1 shares a host with stage 0, the others do not
    plan = make_plan(chain(2), [3, 3], 3, replicas=[3, 3], per_host=4, **LINKS)
    found = alike(plan, ())
    assert {devices: len(c) for devices, c in found.on.items()} == {(0, 1, 2): 2, (3, 4, 5): 2}
    # a third stage, one rank of which sits on another host than the others: all are different to the source
    longer = make_plan([(0, 1), (1, 2)], [3] * 3, 3, replicas=[3] * 3, per_host=4, **LINKS)
    assert [len(c) for c in alike(longer, ()).on.values()] == [3, 3, 3]


def test_pieces_that_straddle():
    # 3 replicas of 2 samples to 2 replicas of 3: the middle one sends to both
    found = {(a, b): p.messages for a, b, p in patterns(6, 3, 6, 2, False)}
    assert found == {
        (0, 0): ((0, 0, 2),),
        (1, 0): ((0, 0, 1),),
        (1, 1): ((0, 0, 1),),
        (2, 1): ((0, 0, 2),),
    }
    (a, b, pattern) = patterns(2, 1, 4, 2, False)[1]
    assert (a, b, pattern.upstream, pattern.downstream) == (0, 1, 2, 1)
    assert pattern.messages == ((1, 0, 2),)
    turns = {(a, b): p.turns for a, b, p in patterns(4, 1, 4, 4, True)}
    assert turns == {(0, 0): (0,), (0, 1): (1,), (0, 2): (2,), (0, 3): (3,)}


@settings(max_examples=60, deadline=None)
@given(plans())
def test_ranks_of_one_class_compute_at_the_same_times(plan: Plan):
    graph = plan.stage_graph
    guarded = {e.source for e in graph.edges if not returns_gradient(graph, e)}
    times: dict[int, list[tuple[str, float, float]]] = {rank: [] for rank in plan.residents}
    for span in simulate(plan).spans:
        if span.activity in (Activity.COMPUTE, Activity.UPDATE):
            times[span.rank].append((span.label, span.start, span.stop))
    seen: dict[int, list[tuple[str, float, float]]] = {}
    for rank, number in alike(plan, guarded).of.items():
        assert seen.setdefault(number, times[rank]) == times[rank]
