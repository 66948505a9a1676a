import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpp.plan import Plan, Policy
from gpp.schedule.order import forward_orders, orders, round_trips, sharing
from gpp.schedule.pieces import micro_batches
from gpp.schedule.task import INPUT_HALF, WEIGHT_HALF, Pass, ScheduleError
from tests.strategies import chain, make_plan, plans


def text(tasks) -> str:
    return " ".join(f"{task.kind.value}{task.stage}.{task.samples.start}" for task in tasks)


def test_every_set_of_devices_has_its_list():
    plan = make_plan([(0, 2), (1, 2)], [2, 2, 1], 4, replicas=[2, 1, 1])
    assert {devices: text(tasks) for devices, tasks in orders(plan).items()} == {
        (0, 1): "F0.0 F0.2 B0.0 B0.2",
        (2,): "F1.0 F1.2 B1.0 B1.2",
        (3,): "F2.0 B2.0 F2.1 B2.1 F2.2 B2.2 F2.3 B2.3",
    }


def test_a_stage_without_backward_only_goes_forward():
    plan = make_plan(chain(2), [2, 2], 6, frozen=[0])
    assert text(orders(plan)[0,]) == "F0.0 F0.2 F0.4"
    assert text(round_trips(plan)[0,]) == "F0.0 F0.2 B0.0 F0.4 B0.2 B0.4"


def test_stages_on_the_same_devices_in_any_order_share_a_list():
    plan = make_plan(chain(3), [2, 2, 2], 4, replicas=[2, 2, 2], slots=[0, 1, 0])
    assert sharing(plan) == {(0, 1): (0, 2), (2, 3): (1,)}
    assert text(orders(plan)[0, 1]) == "F0.0 F0.2 F2.0 B2.0 F2.2 B2.2 B0.0 B0.2"


def test_shared_devices_take_backwards_first_and_then_the_oldest_samples():
    # the join begins at 4 and its gradient is there at 7, when three of the second forwards are done
    edges = [(0, 4), (1, 4), (2, 4), (3, 4)]
    plan = make_plan(edges, [1] * 5, 3, slots=[0, 0, 0, 0, 4])
    assert text(orders(plan)[0,]) == (
        "F0.0 F1.0 F2.0 F3.0 F0.1 F1.1 F2.1 B0.0 B1.0 B2.0 B3.0 F3.1 F0.2 F1.2 F2.2 "
        "B0.1 B1.1 B2.1 B3.1 F3.2 B0.2 B1.2 B2.2 B3.2"
    )


@pytest.mark.parametrize("policy", [Policy(), Policy("zero-bubble"), Policy("greedy")])
def test_less_than_a_micro_batch_in_flight_is_refused(policy):
    with pytest.raises(ScheduleError, match="stage1 may hold 2 samples in flight, less than its micro-batch"):
        orders(make_plan(chain(2), [4, 4], 8, policy=policy, held=[4, 2]))


def test_evaluation_of_stages_that_share_a_device():
    plan = make_plan(chain(3), [2, 4, 1], 8, slots=[0, 1, 0])
    assert text(forward_orders(plan, 5)[0,]) == "F0.0 F0.2 F2.0 F2.1 F2.2 F2.3 F0.4 F2.4"
    assert text(forward_orders(plan, 5)[1,]) == "F1.0 F1.4"


@settings(max_examples=150, deadline=None)
@given(plans(scheduled=True))
def test_any_plan_every_pass_once_in_order_within_what_a_stage_holds(plan: Plan):
    found = orders(plan)
    assert found == orders(plan)
    assert {d: tuple(sorted({t.stage for t in tasks})) for d, tasks in found.items()} == sharing(plan)
    for tasks in found.values():
        held, halves = [0] * len(plan.stage_graph.stages), [0] * len(plan.stage_graph.stages)
        for task in tasks:
            stage = plan.stage_graph.stages[task.stage]
            held[task.stage] += task.kind is Pass.FORWARD
            halves[task.stage] += task.kind in INPUT_HALF
            if stage.has_backward:
                assert held[task.stage] * stage.micro_batch <= stage.in_flight
                assert halves[task.stage] <= stage.weight_lag + 1
            held[task.stage] -= task.kind in WEIGHT_HALF
            halves[task.stage] -= task.kind in WEIGHT_HALF
    for s, stage in enumerate(plan.stage_graph.stages):
        mine = [task for tasks in found.values() for task in tasks if task.stage == s]
        wholes = micro_batches(stage, plan.mini_batch)
        for kinds in ((Pass.FORWARD,), INPUT_HALF, WEIGHT_HALF):
            expected = wholes if stage.has_backward or kinds == (Pass.FORWARD,) else ()
            assert tuple(t.samples for t in mine if t.kind in kinds) == expected


@settings(max_examples=60, deadline=None)
@given(plans(scheduled=True), st.data())
def test_evaluations_are_one_order_in_which_all_come_after_what_they_need(plan: Plan, data: st.DataObject):
    samples = data.draw(st.integers(1, plan.mini_batch))
    left = {devices: list(tasks) for devices, tasks in forward_orders(plan, samples).items()}
    seen = [0] * len(plan.stage_graph.stages)
    moved = True
    while moved:
        moved = False
        for tasks in left.values():
            while tasks:
                s, stop = tasks[0].stage, tasks[0].samples.stop
                if any(seen[u] < stop for u in plan.stage_graph.predecessors[s]):
                    break
                assert seen[s] == tasks.pop(0).samples.start
                seen[s], moved = stop, True
    assert seen == [samples] * len(seen)
