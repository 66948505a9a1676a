from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from gpp.plan import device_memory
from gpp.planner.estimate import fits
from gpp.planner.options import Options
from gpp.planner.schedules import rescheduled, room
from gpp.schedule.check import check
from gpp.schedule.lower import lower
from gpp.simulate import simulate
from tests.strategies import chain, make_plan, plans

ALL = Options(mini_batch=16, eager=True, split_backward=True, greedy=True)


def test_nothing_else_is_allowed():
    assert rescheduled(make_plan(chain(3), [2] * 3, 16), Options(mini_batch=16)) == []


def test_only_what_the_options_allow():
    plan = make_plan(chain(4), [2] * 4, 32)
    names = {
        key: {found.policy.name for found in rescheduled(plan, Options(mini_batch=32, **{key: True}))}
        for key in ("eager", "split_backward", "greedy")
    }
    assert names == {
        "eager": {"1f1b"},
        "split_backward": {"1f1b", "zero-bubble"},
        "greedy": {"1f1b", "greedy"},
    }


@settings(max_examples=60, deadline=None)
@given(plans(), st.sampled_from([1.0, 1.2, 2.0]))
def test_each_fits_runs_and_takes_what_is_said(plan, part):
    assume(len({stage.micro_batch for stage in plan.stage_graph.stages}) == 1)  # as all of gpp's
    need = max(device_memory(plan)) * part + 1
    devices = tuple(replace(device, memory=need) for device in plan.topology.devices)
    plan = replace(plan, topology=replace(plan.topology, devices=devices))
    for found in rescheduled(plan, ALL):
        assert fits(found)
        check(found, lower(found))
        assert found.estimate == pytest.approx(simulate(found).step_seconds, rel=1e-9)


def test_room_is_what_memory_is_left():
    plan = make_plan(chain(3), [2] * 3, 64)
    assert room(plan) == [32, 32, 32]  # no memory is too small for devices without a limit
    need = device_memory(plan)[2]
    devices = tuple(replace(device, memory=need) for device in plan.topology.devices)
    assert room(replace(plan, topology=replace(plan.topology, devices=devices)))[2] == 1
