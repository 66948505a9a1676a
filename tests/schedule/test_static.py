import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpp.plan import Policy, Stage, StageSeconds
from gpp.schedule.pieces import micro_batches
from gpp.schedule.static import static_order, warm_up
from gpp.schedule.task import INPUT_HALF, WEIGHT_HALF, Pass, ScheduleError

SECONDS = StageSeconds(1.0, 1.0, 1.0)
ZERO_BUBBLE = Policy("zero-bubble")


def stage(micro_batch=2, held=4, k=1, lag=0) -> Stage:
    return Stage("s", ("op",), (0,), micro_batch, held, SECONDS, k=k, weight_lag=lag)


def text(tasks) -> str:
    return " ".join(f"{task.kind.value}{task.samples.start}" for task in tasks)


@pytest.mark.parametrize(
    "held, k, lag, policy, expected",
    [
        (2, 1, 0, Policy(), "F0 B0 F2 B2 F4 B4 F6 B6"),
        (4, 1, 0, Policy(), "F0 F2 B0 F4 B2 F6 B4 B6"),
        (6, 1, 0, Policy(), "F0 F2 F4 B0 F6 B2 B4 B6"),
        (99, 1, 0, Policy(), "F0 F2 F4 F6 B0 B2 B4 B6"),
        (4, 2, 0, Policy(), "F0 F2 B0 B2 F4 F6 B4 B6"),
        (6, 2, 0, Policy(), "F0 F2 F4 B0 B2 F6 B4 B6"),
        (2, 4, 0, Policy(), "F0 B0 F2 B2 F4 B4 F6 B6"),
        (2, 1, 0, Policy("gpipe"), "F0 F2 F4 F6 B0 B2 B4 B6"),
        (4, 1, 0, ZERO_BUBBLE, "F0 F2 B0 F4 B2 F6 B4 B6"),
        (4, 1, 1, ZERO_BUBBLE, "F0 I0 F2 I2 W0 F4 I4 W2 F6 I6 W4 W6"),
        (6, 1, 1, ZERO_BUBBLE, "F0 F2 I0 F4 I2 W0 F6 I4 W2 I6 W4 W6"),
        (6, 1, 2, ZERO_BUBBLE, "F0 I0 F2 I2 F4 I4 W0 F6 I6 W2 W4 W6"),
        (8, 2, 2, ZERO_BUBBLE, "F0 F2 I0 I2 F4 F6 I4 W0 I6 W2 W4 W6"),
        (16, 1, 6, ZERO_BUBBLE, "F0 F2 I0 F4 I2 F6 I4 I6 W0 W2 W4 W6"),
        # only zero-bubble has weight halves that trail
        (6, 1, 2, Policy(), "F0 F2 F4 B0 F6 B2 B4 B6"),
        (6, 1, 2, Policy("gpipe"), "F0 F2 F4 F6 B0 B2 B4 B6"),
    ],
)
def test_orders(held, k, lag, policy, expected):
    tasks = static_order(3, stage(held=held, k=k, lag=lag), policy, 8)
    assert text(tasks) == expected
    assert {task.stage for task in tasks} == {3}


def test_less_than_a_micro_batch_in_flight_is_refused():
    with pytest.raises(ScheduleError, match="may hold 4 samples in flight, less than its micro-batch 8"):
        warm_up(stage(micro_batch=8, held=4))


@given(
    st.integers(1, 4),
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(1, 4),
    st.integers(0, 4),
    st.sampled_from(["1f1b", "gpipe", "zero-bubble"]),
)
def test_each_micro_batch_once_each_way_first_in_first_out_within_the_bound(b, count, warm, k, lag, policy):
    lag = lag if policy == "zero-bubble" else 0
    s = stage(micro_batch=b, held=(warm + lag) * b, k=k, lag=lag)
    tasks = static_order(0, s, Policy(policy), count * b)
    for kinds in ((Pass.FORWARD,), INPUT_HALF, WEIGHT_HALF):
        assert tuple(t.samples for t in tasks if t.kind in kinds) == micro_batches(s, count * b)
    held = halves = peak = pending = 0
    for task in tasks:
        held += task.kind is Pass.FORWARD
        halves += task.kind in INPUT_HALF
        peak, pending = max(peak, held), max(pending, halves)
        held -= task.kind in WEIGHT_HALF
        halves -= task.kind in WEIGHT_HALF
    assert held == halves == 0
    bound = count if policy == "gpipe" else min(warm + lag, count)
    assert peak <= bound and pending <= lag + 1
    if k == 1:
        assert peak == bound and pending == min(lag + 1, count)
