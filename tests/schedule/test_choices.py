import dataclasses
import math
from itertools import cycle, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.pipeline.stage_graphs import GRAPHS, paced
from gpp.plan import Plan, Policy, StageSeconds
from gpp.schedule.check import check
from gpp.schedule.choices import candidates
from gpp.schedule.lower import lower
from gpp.schedule.order_bound import order_bound
from gpp.schedule.task import Reduce, Reduction
from gpp.schedule.template import pipeline
from gpp.simulate import reduce_seconds
from gpp.timing import step_seconds
from tests.strategies import chain, make_plan, plans


def makespan(plan: Plan) -> float:
    """Of a step that ends when all stages know the norm, which is then taken off."""
    ranks = tuple(plan.residents)
    norm = reduce_seconds(plan, Reduce(Reduction.NORM, ranks, -1, 8))
    return step_seconds(dataclasses.replace(plan, global_norm=True)) - norm


def geometric_mean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


@pytest.mark.parametrize("share, gap, ratio", [(1.0, 1.02, 0.875), (1.5, 1.01, 0.855)])
def test_the_best_order_is_close_to_the_bound_and_never_above_1f1b(share, gap, ratio):
    gaps, ratios = [], []
    settings = cycle(product((8, 16, 32, 64), (0.0, 0.1, 0.25)))
    for edges, spread in product(GRAPHS.values(), (0.0, 0.25)):
        rounds, latency = next(settings)
        plan = paced(edges, rounds, latency, spread)
        caps = [int(share * plan.stage_graph.depth)] * len(plan.stage_graph.stages)
        times = [makespan(found) for found in candidates(plan, caps)]
        gaps.append(min(times) / order_bound(pipeline(plan), caps))
        ratios.append(min(times) / makespan(plan))
    assert 1 - 1e-9 <= min(gaps) and max(ratios) <= 1 + 1e-9
    assert geometric_mean(gaps) <= gap
    assert geometric_mean(ratios) <= ratio


def names(found: list[Plan]) -> list[tuple[str, int, float]]:
    return [(plan.policy.name, plan.policy.extra_warm_up, plan.policy.patience) for plan in found]


def test_what_is_offered():
    plan = paced(chain(4), 16)
    assert names(candidates(plan, [4] * 4)) == [
        ("1f1b", 0, 0.0),
        ("zero-bubble", 0, 0.0),
        ("greedy", 0, 0.0),
        ("greedy", 0, 0.5),
    ]
    generous = candidates(plan, [9] * 4)
    assert names(generous)[:2] == [("1f1b", 0, 0.0), ("1f1b", 1, 0.0)]
    assert names(generous)[2:4] == [("zero-bubble", 0, 0.0)] * 2  # with 1F1B's warm-ups, and with more
    assert [s.in_flight for s in generous[1].stage_graph.stages] == [7, 5, 3, 1]
    assert max(s.in_flight for found in generous for s in found.stage_graph.stages) <= 8
    assert names(candidates(plan, [9] * 4, eager=False, split=False, greedy=False)) == [("1f1b", 0, 0.0)]
    assert candidates(plan, [0, 1, 1, 1]) == []


def test_light_branches_are_offered_with_less():
    seconds = [StageSeconds(0.2, 0.2, 0.2)] * 7 + [StageSeconds(1.0, 1.0, 1.0)]
    full, lean = candidates(make_plan(chain(8), [1] * 8, 32, seconds=seconds), [8] * 8)[:2]
    assert full.policy == lean.policy == Policy()
    assert lean.stage_graph.stages[0].in_flight < full.stage_graph.stages[0].in_flight == 8
    assert makespan(lean) == pytest.approx(makespan(full))


def test_where_1f1b_does_not_fit_there_is_something_slower():
    plan = paced(chain(8), 32)
    found = candidates(plan, [6] * 8)
    best = min(makespan(p) for p in found)
    assert best < makespan(plan) * 0.97  # the split does with three quarters of 1F1B's peak
    assert all(s.in_flight <= 6 for p in found for s in p.stage_graph.stages)


def test_what_recomputes_may_be_kept_from_trailing():
    plan = make_plan(chain(4), [1] * 4, 16, recompute=[1])
    for found in candidates(plan, [6] * 4, lags=[9, 1, 9, 9]):
        assert found.stage_graph.stages[1].weight_lag <= 1
        check(found, lower(found))


@settings(max_examples=60, deadline=None)
@given(plans(scheduled=True, max_stages=6), st.integers(1, 6))
def test_all_that_is_offered_runs_within_the_caps(plan: Plan, cap: int):
    caps = [min(cap, plan.mini_batch // stage.micro_batch) for stage in plan.stage_graph.stages]
    for found in candidates(plan, caps):
        for stage, most in zip(found.stage_graph.stages, caps, strict=True):
            assert stage.in_flight <= most * stage.micro_batch
        check(found, lower(found))
