import pytest

from gpp.plan import Policy, StageSeconds
from gpp.schedule.order import orders
from gpp.schedule.task import ScheduleError
from gpp.simulate import simulate
from gpp.topology import Link
from tests.strategies import chain, make_plan


def lists(plan) -> list[str]:
    return [" ".join(f"{t.kind.value}{t.samples.start}" for t in tasks) for tasks in orders(plan).values()]


def test_lock_step_pays_every_input_half_back_with_a_forward():
    plan = make_plan(chain(2), [1, 1], 4, policy=Policy("greedy"), held=[2, 2], lags=[1, 1])
    # at 3 the first gradient comes back; the first stage may hold two, so a weight half makes room for the
    # forward that pays the input half back
    assert lists(plan) == ["F0 F1 I0 W0 F2 I1 W1 F3 I2 W2 I3 W3", "F0 I0 F1 I1 W0 F2 I2 W1 F3 I3 W2 W3"]
    assert simulate(plan, steps=1).step_seconds == 13.0  # the sink waits for nothing


def test_no_more_weight_halves_wait_than_the_lag_says():
    plan = make_plan(chain(2), [1, 1], 6, policy=Policy("greedy"), held=[6, 6], lags=[1, 1])
    for tasks in lists(plan):
        waiting = most = 0
        for task in tasks.split():
            waiting += {"I": 1, "W": -1}.get(task[0], 0)
            most = max(most, waiting)
        assert most == 2


@pytest.mark.parametrize("patience, sink", [(0.0, "F0 I0 W0 F1 I1 W1"), (1.0, "F0 I0 F1 I1 W0 W1")])
def test_a_weight_half_waits_for_a_message_that_is_known_to_come(patience, sink):
    # after its first input half, at 4.5, the sink knows that the next activations are there at 5
    seconds = [StageSeconds(2.0, 1.0, 1.0), StageSeconds(0.5, 1.0, 1.0)]
    plan = make_plan(
        chain(2),
        [1, 1],
        2,
        seconds=seconds,
        policy=Policy("greedy", patience=patience),
        held=[2, 2],
        lags=[1, 1],
        link=Link(1.0, float("inf")),
    )
    assert lists(plan)[1] == sink


def test_backwards_in_one_go_where_nothing_may_wait():
    plan = make_plan(chain(3), [1] * 3, 4, policy=Policy("greedy"))
    assert lists(plan) == lists(make_plan(chain(3), [1] * 3, 4))


def test_other_devices_keep_their_static_order():
    shared = make_plan(chain(4), [1] * 4, 6, slots=[0, 1, 2, 0])
    alone = make_plan(chain(4), [1] * 4, 6)
    assert lists(shared)[1:] == lists(alone)[1:3]


def test_gpipe_on_shared_devices_has_all_forwards_of_a_stage_first():
    plan = make_plan(chain(3), [1] * 3, 3, policy=Policy("gpipe"), slots=[0, 1, 0])
    for tasks in orders(plan).values():
        for s in {task.stage for task in tasks}:
            kinds = "".join(task.kind.value for task in tasks if task.stage == s)
            assert kinds == "FFFBBB"


def test_a_clock_that_stands_still_names_the_stages():
    # the middle stage wants three forwards before its first backward, and the first holds only one
    plan = make_plan(chain(3), [1] * 3, 4, held=[1, 3, 1], slots=[0, 1, 0])
    with pytest.raises(ScheduleError, match=r"stages stage0 \(1\), stage1 \(3\), stage2 \(1\) wait"):
        orders(plan)
