import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpp.cost import Roofline
from gpp.planner.draft import Draft, Drafts, Part
from gpp.planner.estimate import Problem
from gpp.planner.options import Options
from gpp.planner.rhythm import Kind, delayed, fits, limits, rhythm, timed
from tests.graphs import chain, make_cluster, make_graph

ROUNDS = 16


def make_draft(graph, sets, *, memory: float = 1e15) -> Draft:
    options = Options(mini_batch=2 * ROUNDS, micro_batch=2)
    problem = Problem(graph, make_cluster(len(sets), memory=memory), Roofline(), options)
    found = Drafts(problem, 2).draft([Part(frozenset(units), 1) for units in sets])
    assert found is not None
    return found


def row(count: int, **given) -> Draft:
    graph = make_graph(chain(count), flops=1e10, parameters=1 << 10, stash=1e6, width=1, **given)
    return make_draft(graph, [[i] for i in range(count)])


INF = (math.inf,) * 8


def test_the_families_on_a_chain():
    draft = row(4)
    plain = rhythm(draft, Kind(), ROUNDS, INF[:4])
    eager = rhythm(draft, Kind(extra=1), ROUNDS, INF[:4])
    everything = rhythm(draft, Kind(gpipe=True), ROUNDS, INF[:4])
    split = rhythm(draft, Kind(reach=1.0), ROUNDS, INF[:4])
    assert plain is not None and (plain.warms, plain.lags) == ((4, 3, 2, 1), (0, 0, 0, 0))
    assert eager is not None and eager.warms == (7, 5, 3, 1)
    assert everything is not None and everything.warms == (ROUNDS,) * 4
    assert split is not None and split.policy.name == "zero-bubble" and split.warms == plain.warms
    assert split.lags[0] == 0  # a source has nobody waiting for its input half
    assert all(w + lag <= 4 for w, lag in zip(split.warms, split.lags, strict=True)) and any(split.lags)
    seconds = [timed(draft, found, ROUNDS, None).seconds for found in (split, plain)]
    assert seconds[0] < seconds[1]


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([Kind(), Kind(extra=2), Kind(reach=1.0), Kind(reach=2.0)]),
    st.lists(st.floats(0.2, 3.0), min_size=4, max_size=4),
)
def test_memory_is_kept_and_warm_ups_never_rise_along_an_edge(kind, parts):
    draft = row(4)
    need = draft.memory((4, 3, 2, 1), (0, 0, 0, 0))
    most = [n * part for n, part in zip(need, parts, strict=True)]
    found = rhythm(draft, kind, ROUNDS, most)
    least = draft.memory((1, 1, 1, 1), (0, 0, 0, 0))
    if found is None:
        assert any(n > m for n, m in zip(least, most, strict=True))
        return
    assert fits(draft, found, most)
    assert all(found.warms[hop.source] >= found.warms[hop.target] for hop in draft.hops)


def test_one_micro_batch_that_does_not_fit_has_no_rhythm():
    draft = row(3)
    assert rhythm(draft, Kind(), ROUNDS, (1.0,) * 3) is None


def test_a_light_branch_holds_less():
    """A heavy chain of four beside a light one: time, not depth, says how far ahead it must be."""
    parents = {f"{b}{i}": f"{b}{i - 1}" if i else "" for b in "hl" for i in range(4)} | {"end": "h3 l3"}
    flops = {name: 1e10 if name[0] == "h" else 1e9 for name in parents}
    graph = make_graph(parents, flops=flops, parameters=1 << 10, stash=1e6, width=1)
    draft = make_draft(graph, [[i] for i in range(9)])
    light = [i for i, part in enumerate(draft.parts) if min(part.units) in range(4, 8)]
    found, full = delayed(draft, ROUNDS), rhythm(draft, Kind(), ROUNDS, (math.inf,) * 9)
    assert full is not None
    assert sum(found.warms[i] for i in light) < sum(full.warms[i] for i in light)
    times = [timed(draft, it, ROUNDS, None).seconds for it in (found, full)]
    assert times[0] == pytest.approx(times[1], rel=0.01)


def test_limits_are_of_the_smallest_device():
    graph = make_graph(chain(2))
    problem = Problem(graph, make_cluster(4, memory=5.0), Roofline(), Options(mini_batch=8, micro_batch=2))
    draft = Drafts(problem, 2).draft([Part(frozenset({0}), 2), Part(frozenset({1}), 1)])
    assert draft is not None
    assert limits(draft, problem.topology) == (5.0, 5.0)
