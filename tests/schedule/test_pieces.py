import dataclasses

from hypothesis import given
from hypothesis import strategies as st

from gpp.plan import Stage, StageSeconds
from gpp.schedule.pieces import micro_batches, piece
from gpp.schedule.task import Samples


def stage(micro_batch: int, devices: tuple[int, ...]) -> Stage:
    return Stage("s", ("op",), devices, micro_batch, micro_batch, StageSeconds(1.0, 1.0, 1.0))


def test_the_last_micro_batch_may_be_ragged():
    assert micro_batches(stage(4, (0,)), 10) == (Samples(0, 4), Samples(4, 8), Samples(8, 10))


def test_replicas_take_equal_shares_and_the_first_ones_what_is_left():
    s = stage(8, (5, 6, 7, 9))
    assert [piece(s, Samples(8, 16), j) for j in range(4)] == [Samples(a, a + 2) for a in (8, 10, 12, 14)]
    assert [piece(s, Samples(8, 11), j) for j in range(4)] == [Samples(8, 10), Samples(10, 11), None, None]


@given(st.integers(1, 40), st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 3]))
def test_pieces_partition_any_number_of_samples(samples, replicas, share):
    s = dataclasses.replace(stage(replicas * share, (0,)), devices=tuple(range(replicas)))
    parts = [p for whole in micro_batches(s, samples) for j in range(replicas) if (p := piece(s, whole, j))]
    assert [i for p in parts for i in range(p.start, p.stop)] == list(range(samples))
    assert len({len(p) for p in parts} - {share}) <= 1
