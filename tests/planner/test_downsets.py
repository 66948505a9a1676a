import itertools
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpp.formats import read_profile
from gpp.planner.downset_line import depth_first
from gpp.planner.downsets import Link, TooManyDownsets, contained, downsets, equal_branches
from tests.graphs import parent_lists, towers

PROFILES = Path(os.environ.get("GPP_PROFILES", Path(__file__).parents[3] / "shared" / "profiles"))


def every(needs: list[list[int]]) -> set[frozenset[int]]:
    units = range(len(needs))
    sets = (frozenset(s) for size in range(len(needs) + 1) for s in itertools.combinations(units, size))
    return {s for s in sets if all(u in s for v in s for u in needs[v])}


def tower_needs(branches: int, layers: int) -> list[list[int]]:
    """A join that comes first, as in sets grown from the sinks, and equal branches of layers after it."""
    parents = towers(branches, layers)
    place = {name: i for i, name in enumerate(parents)}
    needs: list[list[int]] = [[] for _ in place]
    for name, before in parents.items():
        for other in before.split():
            needs[place[other]].append(place[name])
    return needs


@settings(max_examples=60, deadline=None)
@given(parent_lists(max_operators=9), st.randoms(use_true_random=False))
def test_every_downset_once_by_size(parents, random) -> None:
    number = list(range(len(parents)))
    random.shuffle(number)
    needs: list[list[int]] = [[] for _ in parents]
    for v, us in enumerate(parents):
        needs[number[v]] = [number[u] for u in us]
    found = downsets(needs, 1 << 12)
    sets = [frozenset(np.flatnonzero(row).tolist()) for row in found.members]
    assert len(sets) == len(set(sets)) and set(sets) == every(needs)
    assert [len(s) for s in sets] == sorted(len(s) for s in sets)
    for size, (start, stop) in enumerate(itertools.pairwise(found.levels)):
        assert all(len(s) == size for s in sets[start:stop])
    inside = contained(found.words, found.words)
    assert all(inside[i, j] == (b <= a) for i, a in enumerate(sets) for j, b in enumerate(sets))


@pytest.mark.parametrize("count", [63, 64, 65, 130])
def test_more_units_than_a_word_has_bits(count: int) -> None:
    found = downsets([[v - 1] if v else [] for v in range(count)], 1000)
    assert found.members.sum(1).tolist() == list(range(count + 1))
    assert contained(found.words, found.words).sum() == (count + 1) * (count + 2) // 2


def test_a_limit() -> None:
    assert len(downsets([[]] * 6, 64).words) == 64
    with pytest.raises(TooManyDownsets, match="more than 63 downsets"):
        downsets([[]] * 6, 63)
    with pytest.raises(TooManyDownsets, match="of its 900 operators"):  # and not after 2^900
        downsets([[]] * 900, 10_000)


def test_equal_branches_are_chains_with_the_same_neighbours() -> None:
    links = [Link(0, frozenset({1, 3, 5}), 8.0)]
    links += [Link(u, frozenset({v}), 4.0) for u, v in ((1, 2), (3, 4), (5, 6), (2, 7), (4, 7), (6, 7))]
    assert equal_branches(links, "abcbcbcd") == (((1, 2), (3, 4), (5, 6)),)
    assert equal_branches(links, "abcbcbxd") == (((1, 2), (3, 4)),)
    links[-1] = Link(6, frozenset({7}), 5.0)
    assert equal_branches(links, "abcbcbcd") == (((1, 2), (3, 4)),)
    # who shares a tensor differs
    links[0] = Link(0, frozenset({1, 5}), 8.0)
    assert equal_branches([*links, Link(0, frozenset({3}), 8.0)], "abcbcbcd") == ()


@pytest.mark.parametrize(("branches", "layers"), [(3, 2), (4, 3), (7, 5)])
def test_equal_branches_leave_multisets(branches: int, layers: int) -> None:
    group = tuple(tuple(range(b * layers, (b + 1) * layers)) for b in range(branches))
    found = len(downsets(tower_needs(branches, layers), 1 << 20, (group,)).words)
    positions = range(layers + 1)
    assert found == 1 + sum(1 for _ in itertools.combinations_with_replacement(positions, branches))


@settings(deadline=None)
@given(parent_lists())
def test_depth_first_respects_the_order(parents) -> None:
    order = depth_first(parents)
    place = {v: i for i, v in enumerate(order)}
    assert sorted(order) == list(range(len(parents)))
    assert all(place[u] < place[v] for v, us in enumerate(parents) for u in us)


def test_depth_first_does_one_branch_after_the_other() -> None:
    parents = [[], [0], [0], [1], [2], [3], [4]]
    assert depth_first(parents) in ([0, 1, 3, 5, 2, 4, 6], [0, 2, 4, 6, 1, 3, 5])


@pytest.mark.skipif(not PROFILES.is_dir(), reason="needs the published profiles (GPP_PROFILES)")
@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("piper/bert32a100.json", 43),
        ("piper/resnet.json", 242),
        ("piper/gnmt.json", 17_914),
        ("multibranch/mmt4x8_layers.piper.json", 10_001),
        ("multibranch/candle4x4.piper.json", 1_301),
    ],
)
def test_as_many_as_piper_counts(name: str, count: int) -> None:
    graph = read_profile((PROFILES / name).read_text(), name).graph
    assert len(downsets(graph.successors, 40_000).words) == count
