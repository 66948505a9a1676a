from gpp.cost import Roofline
from gpp.planner.draft import Drafts
from gpp.planner.estimate import Problem
from gpp.planner.exhaustive import DEVICES, UNITS, every_memory_choice, every_partition, every_sharing
from gpp.planner.options import Constraints, Options
from tests.graphs import chain, make_cluster, make_graph, towers


def partitions(graph, devices: int, **given) -> list:
    options = Options(**{"mini_batch": 8, "micro_batch": 4} | given)
    return every_partition(Drafts(Problem(graph, make_cluster(devices), Roofline(), options), 4))


def test_a_chain_is_cut_at_any_places():
    """Compositions of n into at most k parts."""
    assert len(partitions(make_graph(chain(5)), 3, max_replicas=1)) == 1 + 4 + 6
    assert len(set(partitions(make_graph(chain(5)), 3, max_replicas=1))) == 11


def test_independent_operators_go_together_in_any_way():
    graph = make_graph([[], [], [], []])
    assert len(partitions(graph, 4, max_replicas=1)) == 15  # Bell(4)


def test_replicas_are_those_that_the_options_allow():
    found = partitions(make_graph(chain(2)), 4)
    assert sorted(tuple(part.devices for part in parts) for parts in found) == [
        (1,), (1, 1), (1, 2), (2,), (2, 1), (2, 2), (4,),
    ]  # fmt: skip


def test_only_where_there_are_few():
    assert partitions(make_graph(chain(UNITS + 1)), 2) == []
    assert partitions(make_graph(chain(2)), DEVICES + 1) == []
    kept = Constraints(together=(("t0.*",), ("t1.*",)))
    assert partitions(make_graph(towers(2, 5)), 2, constraints=kept)


def test_stages_share_devices_in_every_way():
    """A chain of 3 on 2 devices: three stages in all ways onto two devices, two stages onto one."""
    options = Options(mini_batch=8, micro_batch=4)
    drafts = Drafts(Problem(make_graph(chain(3)), make_cluster(2), Roofline(), options), 4)
    found = [[group.at for group in shared.groups] for shared in every_sharing(drafts)]
    assert [len(places) for places in found] == [2, 2, 3, 3, 3, 3]
    assert len({tuple(places) for places in found if len(places) == 3}) == 4


def test_every_set_of_stages_recomputes():
    parts = partitions(make_graph(chain(2)), 4)[-1]
    assert [part.devices for part in parts] == [2, 2]
    allowed = Options(mini_batch=8, recompute=True, shard_optimizer=True)
    found = list(every_memory_choice(parts, allowed))
    assert len(set(found)) == 4 * 4 - 1 and parts not in found
    assert list(every_memory_choice(parts, Options(mini_batch=8))) == []
