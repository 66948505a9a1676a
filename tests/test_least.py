import dataclasses

import pytest
from hypothesis import assume, given, settings

from gpp.cost import all_reduce_seconds
from gpp.least import least_seconds
from gpp.plan import Plan, Policy, StageSeconds
from gpp.schedule.task import ScheduleError
from gpp.simulate import simulate
from gpp.timing import step_seconds
from gpp.topology import Link
from tests.strategies import chain, make_plan
from tests.test_timing import any_plans


@settings(max_examples=300, deadline=None)
@given(any_plans())
def test_no_plan_takes_less(plan: Plan):
    try:
        seconds = step_seconds(plan)
    except ScheduleError:
        assume(False)
    assert least_seconds(plan) <= seconds * (1 + 1e-9) + 1e-12


@pytest.mark.parametrize("policy", [Policy(), Policy("gpipe")])
@pytest.mark.parametrize("depth, m", [(1, 5), (4, 4), (8, 24)])
def test_tight_for_balanced_chains(depth, m, policy):
    plan = make_plan(chain(depth), [2] * depth, 2 * m, policy=policy)
    assert least_seconds(plan) == simulate(plan).step_seconds == (m + depth - 1) * 3


def test_what_counts_is_the_way_the_work_the_messages_and_the_end():
    seconds = [StageSeconds(1.0, 1.0, 1.0, update=0.5), StageSeconds(2.0, 2.0, 2.0)]
    link = Link(0.25, 32.0)
    plan = make_plan(chain(2), [4, 4], 16, replicas=[2, 1], seconds=seconds, link=link)
    # each replica sends 2 samples of 8 bytes and gets 2 of 4 back
    ways = (0.25 + 16 / 32) + (0.25 + 8 / 32)
    end = all_reduce_seconds(100, 2, link) + 0.5
    assert least_seconds(plan) == pytest.approx(3 + ways + 4 * 6 + end)
    apart = dataclasses.replace(plan.topology, per_host=2, between=Link(1.0, 32.0))
    further = dataclasses.replace(plan, topology=apart)
    assert least_seconds(further) == pytest.approx(least_seconds(plan) + 2 * 0.75)


def test_with_a_meeting_at_the_end_another_way_back_counts():
    # 0 is slow forward, 1 is slow backward; neither is before the other, both are before 2
    seconds = [StageSeconds(9.0, 0.0, 0.0), StageSeconds(0.0, 0.0, 9.0), StageSeconds(1.0, 1.0, 0.0)]
    plan = make_plan([(0, 2), (1, 2)], [1] * 3, 1, seconds=seconds)
    assert least_seconds(plan) == 9 + 2
    together = dataclasses.replace(plan, global_norm=True)
    assert least_seconds(together) == simulate(together).step_seconds == 9 + 2 + 9


def test_weight_halves_that_trail_do_not_delay_the_way_back():
    plan = make_plan(chain(2), [1, 1], 4)
    source, sink = plan.stage_graph.stages
    stages = (
        dataclasses.replace(source, in_flight=3, weight_lag=1),
        dataclasses.replace(sink, in_flight=2, weight_lag=1),
    )
    graph = dataclasses.replace(plan.stage_graph, stages=stages)
    split = dataclasses.replace(plan, stage_graph=graph, policy=Policy("zero-bubble"))
    assert least_seconds(split) <= step_seconds(split) < least_seconds(plan)
