import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpp.plan import Policy
from gpp.schedule.inflight import in_flight
from gpp.schedule.task import ScheduleError
from tests.strategies import chain

ONE_F_ONE_B = Policy()
FAN_IN = ((4,), (4,), (4,), (4,), (5,), ())


def successors(count: int) -> list[list[int]]:
    return [[t for s, t in chain(count) if s == u] for u in range(count)]


@pytest.mark.parametrize(
    "after, micro_batches, ks, expected",
    [
        # GraphPipe's figure 5: one micro-batch size for all, and its own for each stage
        (successors(3), [4, 4, 4], None, (12, 8, 4)),
        (successors(3), [1, 2, 4], None, (10, 8, 4)),
        # the strategy files that its authors published: CANDLE-Uno as a graph and as a chain, ResNet
        (FAN_IN, [64] * 6, None, (192, 192, 192, 192, 128, 64)),
        (successors(6), [64] * 6, None, (384, 320, 256, 192, 128, 64)),
        (successors(8), [1] + [2] * 7, [2] + [1] * 7, (16, 14, 12, 10, 8, 6, 4, 2)),
        # a coarse stage above finer ones: its first gradient takes two rounds
        (successors(3), [2, 1, 1], None, (6, 2, 1)),
        # the longest path counts, not the first or the number of stages
        ([[1, 3], [2], [3], []], [1] * 4, None, (4, 3, 2, 1)),
        ([[2], [2], []], [1] * 3, None, (2, 2, 1)),
        ([[], []], [4, 2], [1, 3], (4, 6)),
    ],
)
def test_published_and_hand_made_numbers(after, micro_batches, ks, expected):
    assert in_flight(after, micro_batches, ONE_F_ONE_B, 1024, ks=ks) == expected


def test_extra_warm_up_adds_micro_batches_on_every_hop():
    eager = Policy(extra_warm_up=1)
    assert in_flight(successors(4), [2] * 4, eager, 64) == (14, 10, 6, 2)
    assert in_flight(successors(4), [2] * 4, Policy(extra_warm_up=2), 64) == (20, 14, 8, 2)


def test_gpipe_holds_the_whole_mini_batch():
    assert in_flight(successors(3), [4, 2, 1], Policy("gpipe"), 32) == (32, 32, 32)


def test_never_more_than_the_mini_batch():
    assert in_flight(successors(6), [4] * 6, ONE_F_ONE_B, 12) == (12, 12, 12, 12, 8, 4)


def test_stages_out_of_order_are_refused():
    with pytest.raises(ScheduleError, match="topological order"):
        in_flight([[], [0]], [1, 1], ONE_F_ONE_B, 8)


@given(
    st.lists(st.sampled_from([1, 2, 4, 8]), min_size=2, max_size=9).flatmap(
        lambda bs: st.tuples(st.just(bs), st.sets(st.tuples(*[st.integers(0, len(bs) - 1)] * 2)))
    )
)
def test_falls_along_every_edge_in_whole_micro_batches(case):
    micro_batches, pairs = case
    edges = {(min(p), max(p)) for p in pairs if p[0] != p[1]}
    after = [[t for s, t in sorted(edges) if s == u] for u in range(len(micro_batches))]
    held = in_flight(after, micro_batches, ONE_F_ONE_B, 10**6)
    for u, v in edges:
        assert held[u] >= held[v] + max(micro_batches[u], micro_batches[v])
    assert all(h % b == 0 for h, b in zip(held, micro_batches, strict=True))
