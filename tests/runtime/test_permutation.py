import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpp.runtime.permutation import Permuted


@given(st.integers(1, 700), st.integers(0, 2**40))
def test_every_number_comes_once(length: int, seed: int) -> None:
    found = Permuted(length, 0, length, (seed, 3))[np.arange(length)]
    assert found.dtype == np.int64 and sorted(found.tolist()) == list(range(length))


def test_a_place_is_the_same_alone_and_in_a_part() -> None:
    whole = Permuted(10**11, 0, 10**11, (5,))
    places = np.array([7, 10**11 - 1, 0, 7])
    found = whole[places]
    assert found[0] == found[3] and [whole[places[i : i + 1]][0] for i in range(4)] == found.tolist()
    part = Permuted(10**11, 5, 9, (5,))
    assert len(part) == 4 and part[np.array([2])][0] == found[0]


def test_it_is_the_same_everywhere() -> None:
    assert Permuted(10, 0, 10, (1, 2))[np.arange(10)].tolist() == [7, 2, 5, 9, 1, 4, 3, 8, 6, 0]


def test_numbers_of_a_stretch_are_uniform_and_neighbours_unrelated() -> None:
    length = 3_000_000
    found = Permuted(length, 0, length, (0, 1))[np.arange(40_000)] / length
    counts = np.histogram(found, 40, (0, 1))[0]
    assert counts.min() > 1000 - 5 * 32 and counts.max() < 1000 + 5 * 32
    assert abs(np.corrcoef(found[:-1], found[1:])[0, 1]) < 0.025
    other = Permuted(length, 0, length, (0, 2))[np.arange(40_000)] / length
    assert abs(np.corrcoef(found, other)[0, 1]) < 0.025


def test_small_orders_are_about_equally_likely() -> None:
    firsts = [Permuted(5, 0, 5, (seed,))[np.arange(5)].tolist() for seed in range(2400)]
    kinds, counts = np.unique(np.array(firsts), axis=0, return_counts=True)
    assert len(kinds) == 120 and counts.max() < 20 * 2.5
    assert [row.count(0) for row in zip(*firsts, strict=True)] == pytest.approx([480] * 5, abs=110)
