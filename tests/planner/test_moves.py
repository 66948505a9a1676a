import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpp.cost import Roofline
from gpp.planner.draft import Drafts, Part
from gpp.planner.estimate import Problem
from gpp.planner.moves import Moves, Parts
from gpp.planner.options import Options
from tests.graphs import graphs, make_cluster, make_graph, towers


def make_drafts(graph, devices: int) -> Drafts:
    return Drafts(Problem(graph, make_cluster(devices), Roofline(), Options(mini_batch=16, micro_batch=4)), 4)


def halves(count: int) -> Parts:
    cut = (count + 1) // 2
    sets = [frozenset(range(cut)), frozenset(range(cut, count))]
    return tuple(Part(units, 1, recompute=i == 0) for i, units in enumerate(sets) if units)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_no_unit_is_lost_and_no_device_is_made(data):
    graph = data.draw(graphs(max_operators=9, all_train=True))
    count, devices = len(graph.operators), data.draw(st.integers(2, 6))
    moves = Moves(make_drafts(graph, devices), data.draw(st.integers(0, 9)))
    parts = halves(count)
    for _ in range(20):
        found = moves.propose(parts, [1.0] * len(parts))
        if found is None:
            continue
        assert sorted(u for part in found for u in part.units) == list(range(count))
        assert all(part.units and part.devices >= 1 for part in found)
        assert sum(part.devices for part in found) <= devices
        if moves.drafts.draft(found) is not None:
            parts = found


def test_every_kind_of_move_happens_and_is_a_change():
    moves = Moves(make_drafts(make_graph(towers(3, 3)), 8), 0)
    start = halves(10)
    seen = set()
    for kind in moves.kinds:
        for s in (0, 1):
            found = kind(start, s)
            if found is not None:
                assert found != start
                seen.add(kind.__name__)
    assert seen == {"shift", "grow", "merge", "split", "balance"}  # nothing has replicas to lose
    grown = moves.grow(start, 0)
    assert grown is not None and moves.shrink(grown, 0) == start


def test_the_same_seed_proposes_the_same():
    drafts = make_drafts(make_graph(towers(3, 3)), 8)
    one, other, third = Moves(drafts, 1), Moves(drafts, 1), Moves(drafts, 2)
    start = halves(10)
    several = [[moves.propose(start, [1.0, 2.0]) for _ in range(30)] for moves in (one, other, third)]
    assert several[0] == several[1] != several[2]


@pytest.mark.parametrize("devices, several", [(4, False), (16, True)])
def test_places_are_swapped_only_where_that_matters(devices, several):
    moves = Moves(make_drafts(make_graph(towers(2, 2)), devices), 0)
    assert (moves.swap in moves.kinds) == several


def test_only_what_the_options_allow_is_toggled():
    options = Options(mini_batch=16, micro_batch=4, recompute=True)
    problem = Problem(make_graph(towers(3, 3)), make_cluster(8), Roofline(), options)
    moves = Moves(Drafts(problem, 4), 0, spare=True)
    for _ in range(20):
        found = moves.toggle(halves(10), 1)
        assert found is not None and found[1].recompute
        assert not any(part.shard_optimizer for part in found)
