from gpp.cost import Roofline
from gpp.planner.draft import Drafts, Part
from gpp.planner.estimate import Problem
from gpp.planner.memory_choices import spared
from gpp.planner.options import Options
from tests.graphs import chain, make_cluster, make_graph

LITTLE, MUCH = 0.0, 1e15


def choose(parts: tuple[Part, ...], most: list[float], **given: bool) -> tuple[Part, ...]:
    options = Options(mini_batch=8, micro_batch=2, **given)
    drafts = Drafts(Problem(make_graph(chain(2)), make_cluster(4), Roofline(), options), 2)
    draft = drafts.draft(parts)
    assert draft is not None
    return spared(draft, parts, most, options)


PARTS = (Part(frozenset({0}), 2), Part(frozenset({1}), 1))


def test_only_who_does_not_fit():
    first, second = choose(PARTS, [MUCH, LITTLE], recompute=True)
    assert (first.recompute, second.recompute) == (False, True)


def test_state_is_shared_out_before_anything_is_computed_again():
    both = {"recompute": True, "shard_optimizer": True}
    once = choose(PARTS, [LITTLE, LITTLE], **both)
    assert [(p.shard_optimizer, p.recompute) for p in once] == [(True, False), (False, True)]
    twice = choose(once, [LITTLE, LITTLE], **both)
    assert [(p.shard_optimizer, p.recompute) for p in twice] == [(True, True), (False, True)]
    assert choose(twice, [LITTLE, LITTLE], **both) == twice


def test_if_each_fits_alone_all_need_less():
    """Then it is what is in flight that is too much."""
    assert all(part.recompute for part in choose(PARTS, [MUCH, MUCH], recompute=True))


def test_nothing_is_done_that_is_not_allowed():
    assert choose(PARTS, [LITTLE, LITTLE]) == PARTS
