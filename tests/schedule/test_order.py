import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpp.plan import Policy, Stage, StageSeconds
from gpp.schedule.order import forward_only, micro_batches, order, piece, warm_up
from gpp.schedule.task import Pass, Samples, ScheduleError

SECONDS = StageSeconds(1.0, 1.0, 1.0)


def stage(micro_batch=2, held=4, k=1, devices=(0,), has_backward=True) -> Stage:
    return Stage("s", ("op",), devices, micro_batch, held, SECONDS, k=k, has_backward=has_backward)


def text(tasks) -> str:
    return " ".join(f"{task.kind.value}{task.samples.start}" for task in tasks)


@pytest.mark.parametrize(
    "held, k, policy, expected",
    [
        (2, 1, Policy(), "F0 B0 F2 B2 F4 B4 F6 B6"),
        (4, 1, Policy(), "F0 F2 B0 F4 B2 F6 B4 B6"),
        (6, 1, Policy(), "F0 F2 F4 B0 F6 B2 B4 B6"),
        (99, 1, Policy(), "F0 F2 F4 F6 B0 B2 B4 B6"),
        (4, 2, Policy(), "F0 F2 B0 B2 F4 F6 B4 B6"),
        (6, 2, Policy(), "F0 F2 F4 B0 B2 F6 B4 B6"),
        (2, 4, Policy(), "F0 B0 F2 B2 F4 B4 F6 B6"),
        (2, 1, Policy("gpipe"), "F0 F2 F4 F6 B0 B2 B4 B6"),
    ],
)
def test_orders(held, k, policy, expected):
    tasks = order(3, stage(held=held, k=k), policy, 8)
    assert text(tasks) == expected
    assert {task.stage for task in tasks} == {3}


def test_a_stage_without_backward_only_goes_forward():
    assert text(order(0, stage(has_backward=False), Policy(), 8)) == "F0 F2 F4 F6"


def test_evaluation_ends_with_a_ragged_micro_batch():
    tasks = forward_only(0, stage(micro_batch=4), 10)
    assert [task.samples for task in tasks] == [Samples(0, 4), Samples(4, 8), Samples(8, 10)]
    assert {task.kind for task in tasks} == {Pass.FORWARD}


def test_replicas_take_equal_shares_and_the_first_ones_what_is_left():
    s = stage(micro_batch=8, held=8, devices=(5, 6, 7, 9))
    assert [piece(s, Samples(8, 16), j) for j in range(4)] == [Samples(a, a + 2) for a in (8, 10, 12, 14)]
    assert [piece(s, Samples(8, 11), j) for j in range(4)] == [Samples(8, 10), Samples(10, 11), None, None]


def test_less_than_a_micro_batch_in_flight_is_refused():
    with pytest.raises(ScheduleError, match="may hold 4 samples in flight, less than its micro-batch 8"):
        warm_up(stage(micro_batch=8, held=4))


@given(
    st.integers(1, 4),
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(1, 4),
    st.sampled_from(["1f1b", "gpipe"]),
)
def test_each_micro_batch_once_each_way_first_in_first_out_within_the_bound(b, count, warm, k, policy):
    s = stage(micro_batch=b, held=warm * b, k=k)
    tasks = order(0, s, Policy(policy), count * b)
    for kind in (Pass.FORWARD, Pass.BACKWARD):
        assert tuple(t.samples for t in tasks if t.kind is kind) == micro_batches(s, count * b)
    held = peak = 0
    for task in tasks:
        held += len(task.samples) if task.kind is Pass.FORWARD else -len(task.samples)
        peak = max(peak, held)
    assert held == 0
    assert peak == (min(warm, count) if policy == "1f1b" else count) * b


@given(st.integers(1, 40), st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 3]))
def test_pieces_partition_any_number_of_samples(samples, replicas, share):
    s = dataclasses.replace(stage(micro_batch=replicas * share), devices=tuple(range(replicas)))
    parts = [p for whole in micro_batches(s, samples) for j in range(replicas) if (p := piece(s, whole, j))]
    assert [i for p in parts for i in range(p.start, p.stop)] == list(range(samples))
    assert len({len(p) for p in parts} - {share}) <= 1
