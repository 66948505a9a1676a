import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpp.plan import PlanError
from gpp.planner.placement import place
from tests.graphs import make_cluster


@pytest.mark.parametrize(
    "counts, devices, per_host, expected",
    [
        ([1, 1, 1], 4, 4, [(0,), (1,), (2,)]),
        ([1, 2, 1], 4, 2, [(0,), (2, 3), (1,)]),  # both replicas in one host
        ([1, 4, 1, 2], 8, 4, [(0,), (4, 5, 6, 7), (1,), (2, 3)]),
        ([1, 2, 2, 1, 2], 8, 4, [(0,), (1, 2), (4, 5), (3,), (6, 7)]),
        ([1, 1, 1, 2, 1, 2], 8, 4, [(0,), (1,), (2,), (4, 5), (3,), (6, 7)]),
        ([8, 1], 12, 4, [tuple(range(8)), (8,)]),
        ([1, 8], 12, 4, [(0,), tuple(range(4, 12))]),  # two hosts rather than three
        ([2, 2, 2], 6, 3, [(0, 1), (3, 4), (2, 5)]),  # nothing is left in one host
        # in order the second four would be torn apart: the largest choose first
        ([2, 1, 4, 4, 1], 12, 6, [(4, 5), (10,), (0, 1, 2, 3), (6, 7, 8, 9), (11,)]),
    ],
)
def test_replicas_share_a_host(counts, devices, per_host, expected):
    assert place(counts, make_cluster(devices, per_host=per_host)) == expected


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.sampled_from([1, 2, 4, 8]), min_size=1, max_size=8),
    st.sampled_from([1, 2, 4, 8]),
    st.integers(0, 5),
)
def test_with_powers_of_two_nothing_crosses_hosts_needlessly(counts, per_host, spare):
    devices = sum(counts) + spare
    places = place(counts, make_cluster(devices, per_host=per_host))
    assert sorted(d for p in places for d in p) == sorted({d for p in places for d in p})
    for count, found in zip(counts, places, strict=True):
        assert len(found) == count
        if count <= per_host and devices % per_host == 0:
            assert found[0] // per_host == found[-1] // per_host


def test_too_few_devices_are_refused():
    with pytest.raises(PlanError, match="the stages need 5 devices, the cluster has 4"):
        place([4, 1], make_cluster(4))
