from gpp.cost import Roofline
from gpp.planner.draft import Drafts, Part
from gpp.planner.estimate import Problem
from gpp.planner.options import Options
from gpp.planner.polish import clipped, polish, shaped, shares
from gpp.planner.rhythm import Kind
from tests.graphs import chain, make_cluster, make_graph, towers


def make_drafts(graph, devices: int, **given) -> Drafts:
    memory = given.pop("memory", 1e15)
    options = Options(**{"mini_batch": 32, "micro_batch": 2, "max_replicas": 1} | given)
    return Drafts(Problem(graph, make_cluster(devices, memory=memory), Roofline(), options), 2)


def test_a_lopsided_start_becomes_balanced():
    drafts = make_drafts(make_graph(chain(12), flops=1e10, parameters=1 << 10), 4)
    start = shaped(drafts, (Part(frozenset(range(9)), 1), Part(frozenset(range(9, 12)), 1)), Kind())
    assert start is not None
    better = polish(drafts, start, Kind(), 400)
    assert sorted(len(part.units) for part in better.parts) == [3, 3, 3, 3]
    assert better.seconds < 0.45 * start.seconds


def test_it_can_be_repeated_and_is_never_worse():
    drafts = make_drafts(make_graph(towers(3, 4), flops=1e10, parameters=1 << 10), 5)
    start = shaped(drafts, (Part(frozenset(range(13)), 1),), Kind())
    assert start is not None
    several = [polish(drafts, start, Kind(reach=1.0), tries, seed=3) for tries in (0, 50, 50, 200)]
    assert several[0] is start
    assert several[1].parts == several[2].parts
    assert several[3].seconds <= start.seconds


def test_shares_follow_the_parts():
    """In the order of the devices, whatever the order of the stages."""
    graph = make_graph(chain(2), flops={"o0": 1e10, "o1": 4e10}, parameters=1 << 10)
    drafts = make_drafts(graph, 2)
    shape = shaped(drafts, (Part(frozenset({1}), 1), Part(frozenset({0}), 1)), Kind())
    assert shape is not None
    assert shares(shape)[0] > shares(shape)[1]


def test_state_shared_out_makes_room():
    graph = make_graph(chain(4), flops=1e10, parameters=4 << 20, stash=4)
    parts = (Part(frozenset({0, 1}), 2), Part(frozenset({2, 3}), 2))
    given = {"max_replicas": 2, "shard_optimizer": True}
    free = make_drafts(graph, 4, **given).draft(parts)
    assert free is not None
    tight = make_drafts(graph, 4, memory=max(free.memory((1, 1), (0, 0))) - (1 << 20), **given)
    assert shaped(tight, parts, Kind()) is None
    found = shaped(tight, parts, Kind(), spare=True)
    assert found is not None and all(part.shard_optimizer for part in found.parts)


def test_what_has_less_in_flight_than_it_wants_is_clipped():
    graph = make_graph(chain(8), flops=1e10, parameters=4, stash=1e6, width=1)
    parts = (Part(frozenset(range(4)), 1), Part(frozenset(range(4, 8)), 1))
    free = make_drafts(graph, 2)
    draft = free.draft(parts)
    assert draft is not None
    full, least = max(draft.memory((2, 1), (0, 0))), max(draft.memory((1, 1), (0, 0)))
    for memory, expected in ((full, False), ((full + least) / 2, True)):
        drafts = make_drafts(graph, 2, memory=memory)
        shape = shaped(drafts, parts, Kind())
        assert shape is not None and clipped(drafts, shape) == expected
