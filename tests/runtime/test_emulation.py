from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis.strategies import sampled_from

from benchmarks.pipeline.stage_graphs import chain, fan_in, paced
from gpp.plan import Plan, Policy
from gpp.runtime.emulation import emulated, run_steps, slower, with_links, with_messages
from gpp.runtime.loopback import LoopbackWorld, run
from gpp.runtime.trainer import Trainer
from gpp.schedule.check import check
from gpp.schedule.lower import lower
from gpp.schedule.task import ScheduleError
from gpp.timing import step_seconds
from gpp.topology import Link
from tests.strategies import FREE, make_plan, plans


def measured(plan: Plan, steps: int = 5, transport: str = "host") -> Trainer:
    """Rank 0's trainer after so many steps."""
    found: dict[int, Trainer] = {}

    def work(comm) -> None:
        trainer = emulated(comm, plan, transport=transport)
        run_steps(trainer, steps, trace=True)
        found[comm.rank] = trainer

    run(LoopbackWorld(len(plan.topology.devices)), work, 1)
    return found[0]


@pytest.mark.parametrize("transport", ["host", "device"])
@pytest.mark.parametrize("edges", [chain(3), fan_in([2, 2], 1)])
def test_the_measured_step_is_the_simulated_one(edges, transport):
    plan = with_messages(paced(edges, 6, unit=0.02), 64)
    steps = measured(plan, transport=transport).measured.step_seconds
    assert step_seconds(plan) * 0.99 <= min(steps[1:]) <= step_seconds(plan) * 1.25  # others may be busy


def test_a_split_backward_waits_twice_and_recomputing_once_more():
    plan = paced(chain(2), 4, unit=0.01)
    stages = plan.stage_graph.stages
    lagging = replace(stages[1], weight_lag=1, in_flight=2)
    split = replace(
        plan, policy=Policy("zero-bubble"), stage_graph=replace(plan.stage_graph, stages=(stages[0], lagging))
    )
    slow = replace(stages[0], recompute=True, seconds=replace(stages[0].seconds, recompute=0.01))
    again = replace(plan, stage_graph=replace(plan.stage_graph, stages=(slow, stages[1])))
    for other in (split, again):
        assert step_seconds(other) != step_seconds(plan)
        assert step_seconds(other) * 0.99 <= measured(other).measured.typical <= step_seconds(other) * 1.25


def test_replicas_meet_and_take_the_time_of_their_reduction():
    plan = make_plan(chain(2), [2, 2], 4, replicas=[1, 2], link=Link(0.02, 1e9))
    plan = slower(plan, 1e-3)
    assert step_seconds(plan) > 0.04  # nearly all of it latencies
    assert measured(plan).measured.typical > 0.03


def test_knobs():
    plan = paced(chain(2), 4)
    double = slower(plan, 2.0)
    assert [s.seconds.forward for s in double.stage_graph.stages] == [2.0, 2.0]
    assert [(e.bytes, e.gradient_bytes) for e in with_messages(plan, 100).stage_graph.edges] == [(100, 100)]
    assert with_links(plan, Link(1.0, 2.0)).topology.between == Link(1.0, 2.0)


@settings(max_examples=25, deadline=None)
@given(plans(scheduled=True, max_stages=5), sampled_from(["host", "device"]))
def test_every_plan_runs(plan: Plan, transport: str):
    try:
        check(plan, lower(plan))
    except ScheduleError:
        return
    trainer = measured(slower(with_links(plan, FREE), 1e-7), steps=2, transport=transport)
    assert len(trainer.measured.step_seconds) == 2
