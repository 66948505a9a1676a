import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.pipeline.stage_graphs import GRAPHS, fan_in, paced
from gpp.plan import Plan, Policy, StageSeconds
from gpp.schedule.check import check
from gpp.schedule.lower import lower
from gpp.schedule.template import (
    Counts,
    by_time,
    fits,
    most_extra,
    pipeline,
    template,
    warm_ups,
    with_schedule,
)
from gpp.simulate import simulate
from tests.strategies import chain, make_plan, plans

ZERO_BUBBLE = Policy("zero-bubble")


def makespan(plan: Plan) -> float:
    return simulate(plan, steps=1).step_seconds


def scheduled(plan: Plan, caps: list[int], extra: int = 0) -> Plan:
    p = pipeline(plan)
    return with_schedule(plan, ZERO_BUBBLE, template(p, caps, warm_ups(p, extra)))


def test_warm_ups_are_scaled_not_clipped():
    p = pipeline(make_plan(chain(5), [2] * 5, 64))
    assert warm_ups(p) == (10, 8, 6, 4, 2)
    assert warm_ups(p, 4) == (18, 14, 10, 6, 2)  # one more on every hop
    assert warm_ups(p, 2) == (14, 10, 8, 4, 2)
    assert warm_ups(p, -2) == (6, 4, 4, 2, 2)
    assert warm_ups(p, -9) == (2,) * 5
    assert warm_ups(p, 99) == (64, 64, 64, 52, 2)


def test_the_most_that_fits():
    p = pipeline(make_plan(chain(5), [2] * 5, 64))
    assert most_extra(p, [5, 4, 3, 2, 1]) == 0
    assert most_extra(p, [9, 8, 7, 6, 5]) == 4
    assert most_extra(p, [9, 8, 7, 2, 1]) == 3  # the fourth stage takes no more
    assert most_extra(p, [2] * 5) == -3
    assert most_extra(p, [1, 1, 1, 1, 0]) is None
    assert most_extra(pipeline(make_plan(chain(2), [1, 2], 8)), [3, 1]) is None


def test_lags_take_what_is_left_of_each_cap():
    p = pipeline(paced(chain(4), 16))
    assert template(p, [4] * 4, warm_ups(p)) == Counts((4, 4, 4, 4), (0, 1, 2, 3))
    assert template(p, [9] * 4, warm_ups(p), [0, 1, 1, 0]) == Counts((4, 4, 3, 1), (0, 1, 1, 0))
    assert template(p, [99] * 4, warm_ups(p)) == Counts((16,) * 4, (12, 13, 14, 15))


@pytest.mark.parametrize("depth", [4, 8, 16])
@pytest.mark.parametrize("times", [(1.0, 1.0, 1.0), (1.0, 1.25, 0.75), (1.0, 0.75, 1.25), (2.0, 3.0, 1.0)])
@pytest.mark.parametrize("factor", [1, 3])
def test_the_bubble_of_zb_h1_at_1f1bs_peak(depth, times, factor):
    # (D - 1) max(F, F + I - W), on chains
    forward, backward, weight = times
    rounds = factor * depth
    plan = make_plan(chain(depth), [1] * depth, rounds, seconds=[StageSeconds(*times)] * depth)
    found = scheduled(plan, [depth] * depth)
    assert max(stage.in_flight for stage in found.stage_graph.stages) <= depth
    assert makespan(found) == rounds * sum(times) + (depth - 1) * max(forward, forward + backward - weight)


@pytest.mark.parametrize("name", ["4 x 2 + 1", "7 x 1 + 2", "1, 2, 3, 4 + 2", "diamond 4 x 2"])
def test_of_a_balanced_graph_only_the_depth_counts(name):
    plan = paced(GRAPHS[name], 24)
    depth = plan.stage_graph.depth
    assert makespan(scheduled(plan, [depth] * 40)) == 24 * 3 + depth - 1


@settings(max_examples=60, deadline=None)
@given(plans(all_gradients=True), st.integers(0, 3))
def test_the_template_loses_no_more_than_what_trails_at_the_end(plan: Plan, spare: int):
    stages = tuple(dataclasses.replace(s, k=1) for s in plan.stage_graph.stages)
    plan = dataclasses.replace(plan, stage_graph=dataclasses.replace(plan.stage_graph, stages=stages))
    p = pipeline(plan)
    least = warm_ups(p)
    caps = [held // b + spare for held, b in zip(least, p.micro_batches, strict=True)]
    found = scheduled(plan, caps)
    check(found, lower(found))
    assert fits(p, [s.in_flight for s in found.stage_graph.stages], caps)
    one = with_schedule(plan, Policy(), Counts(least, (0,) * len(least)))
    trailing = max(s.weight_lag * s.seconds.backward_weight for s in found.stage_graph.stages)
    assert makespan(found) <= makespan(one) + trailing


@pytest.mark.parametrize("latency", [0.0, 0.25])
def test_light_branches_need_fewer_samples_in_flight(latency):
    edges = fan_in([8, 2], 2)
    light = [StageSeconds(0.25, 0.25, 0.25)] * 8 + [StageSeconds(1.0, 1.0, 1.0)] * 4
    plan = make_plan(edges, [1] * 12, 32, seconds=light)
    plan = dataclasses.replace(paced(edges, 32, latency), stage_graph=plan.stage_graph)
    p = pipeline(plan)
    full, lean = warm_ups(p), by_time(p)
    none = (0,) * 12
    times = [makespan(with_schedule(plan, Policy(), Counts(held, none))) for held in (full, lean)]
    assert times[1] <= times[0] * (1 + 1e-9)
    assert sum(lean) < 0.8 * sum(full)
    assert all(a <= b for a, b in zip(lean, full, strict=True))


def test_by_time_falls_along_every_edge_and_leaves_mixed_sizes_alone():
    for edges in GRAPHS.values():
        p = pipeline(paced(edges, 64, 0.1, 0.25))
        for split, spare in ((False, 0), (True, 0), (True, 1)):
            held = by_time(p, split=split, spare=spare)
            assert all(held[u] >= held[v] for u, v in edges)
    mixed = pipeline(make_plan(chain(3), [1, 2, 4], 16))
    assert by_time(mixed) == warm_ups(mixed)


def test_what_recomputes_does_so_in_the_input_half_and_what_is_frozen_takes_no_time():
    seconds = [StageSeconds(1.0, 2.0, 3.0, recompute=4.0)] * 3
    p = pipeline(make_plan(chain(3), [1] * 3, 4, seconds=seconds, recompute=[1], frozen=[0], orders=[(1, 2)]))
    assert p.input == (0.0, 6.0, 2.0) and p.weight == (0.0, 3.0, 3.0)
    assert p.frozen == {0} and p.silent == {(0, 1)}


def test_a_stage_without_work_holds_a_micro_batch_too():
    seconds = [StageSeconds(0.0, 0.0, 0.0), StageSeconds(1.0, 1.0, 1.0)]
    plan = make_plan([], [2, 2], 8, seconds=seconds)
    assert min(by_time(pipeline(plan))) == 2
