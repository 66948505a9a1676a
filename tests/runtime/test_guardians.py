"""Who keeps whose copies."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpp.runtime.guardians import first_of_host, guardians, kept_on, transfers, wards


@pytest.mark.parametrize(
    ("hosts", "expected"),
    [
        ("a", (None,)),
        ("aaa", (None, None, None)),
        ("ab", (1, 0)),
        ("aabb", (2, 3, 0, 1)),
        ("aaab", (3, 3, 3, 0)),
        ("abbcc", (1, 3, 4, 0, 0)),
    ],
)
def test_neighbours(hosts: str, expected: tuple[int | None, ...]) -> None:
    assert guardians(tuple(hosts)) == expected


@given(st.lists(st.integers(1, 4), min_size=2, max_size=5))
@settings(max_examples=30, deadline=None)
def test_every_part_survives_every_host(counts: list[int]) -> None:
    hosts = tuple(f"h{number}" for number, count in enumerate(counts) for _ in range(count))
    everyone = range(len(hosts))
    for lost in set(hosts):
        left = {part for rank in everyone if hosts[rank] != lost for part in kept_on(hosts, rank)}
        assert left == set(everyone)
    assert sorted(ward for rank in everyone for ward in wards(hosts, rank)) == list(everyone)
    assert all(first_of_host(hosts, rank) <= rank for rank in everyone)


def test_a_file_comes_to_a_host_once() -> None:
    hosts = ("a", "a", "b", "b", "c")
    missing = [["x"], ["x", "y"], [], ["y"], []]
    holders = {"x": (2, 4), "y": (4,)}
    assert transfers(missing, holders, hosts) == [("x", 2, 0), ("y", 4, 1), ("y", 4, 3)]
