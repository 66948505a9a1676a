import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.pipeline.stage_graphs import GRAPHS, paced
from gpp.plan import Plan, Policy, StageSeconds
from gpp.schedule.order_bound import order_bound
from gpp.schedule.template import Counts, pipeline, template, warm_ups, with_schedule
from gpp.simulate import simulate
from tests.strategies import chain, make_plan, plans


def makespan(plan: Plan) -> float:
    """To the end of the last pass."""
    return max(s.stop for s in simulate(plan, steps=1).spans if s.label in "FBIW")


@pytest.mark.parametrize("name", sorted(GRAPHS))
def test_balanced_graphs_reach_it(name):
    rounds = 24
    plan = paced(GRAPHS[name], rounds)
    p = pipeline(plan)
    caps = [plan.stage_graph.depth] * len(p.below)
    found = with_schedule(plan, Policy("zero-bubble"), template(p, caps, warm_ups(p)))
    assert makespan(found) == order_bound(p, caps)


def test_by_hand():
    seconds = [StageSeconds(1.0, 2.0, 3.0), StageSeconds(4.0, 5.0, 6.0)]
    p = pipeline(make_plan(chain(2), [1, 1], 4, seconds=seconds))
    # one after the other: there and back 1 + 4 + 5, then 2 + 3; else the sink waits for its first forward
    assert order_bound(p, [1, 2]) == max(4 * 15.0, 1 + 4 * 15.0)
    seconds = [StageSeconds(10.0, 20.0, 30.0), StageSeconds(4.0, 5.0, 6.0)]
    p = pipeline(make_plan(chain(2), [1, 1], 4, seconds=seconds))
    assert order_bound(p, [1, 1]) == 4 * (10 + 4 + 5 + 20 + 30)
    assert order_bound(p, [2, 2]) == 4 * 60.0


@settings(max_examples=150, deadline=None)
@given(plans(scheduled=True, max_replicas=1, max_stages=6))
def test_no_order_is_faster(plan: Plan):
    caps = [stage.in_flight // stage.micro_batch for stage in plan.stage_graph.stages]
    assert makespan(plan) >= order_bound(pipeline(plan), caps) - 1e-9


@settings(max_examples=150, deadline=None)
@given(plans(uniform=True, max_replicas=1, max_stages=6), st.integers(1, 4), st.floats(0, 1))
def test_no_greedy_order_is_faster(plan: Plan, cap: int, patience: float):
    p = pipeline(plan)
    caps = [min(cap, m) for m in p.rounds]
    held = tuple(c * b for c, b in zip(caps, p.micro_batches, strict=True))
    found = with_schedule(plan, Policy("greedy", patience=patience), Counts(held, tuple(c - 1 for c in caps)))
    assert makespan(found) >= order_bound(p, caps) - 1e-9
