import pytest

from gpp.planner.pace import Beat, Hop, pace

EVEN = Beat(1.0, 1.0, 1.0, 0.0, 0.0)


def chain(count: int, there: float = 0.0) -> list[Hop]:
    return [Hop(s, s + 1, there, there) for s in range(count - 1)]


@pytest.mark.parametrize("stages", [1, 2, 4])
@pytest.mark.parametrize("rounds", [4, 8, 64])
def test_a_balanced_chain_takes_its_closed_form(stages, rounds):
    warms = [stages - s for s in range(stages)]
    found = pace([EVEN] * stages, chain(stages), warms, [0] * stages, rounds)
    assert found.seconds == pytest.approx(3.0 * (rounds + stages - 1))


@pytest.mark.parametrize("rounds", [8, 16, 64])
def test_trailing_weight_halves_leave_a_third_of_the_bubble(rounds):
    stages = 4
    warms = [stages - s for s in range(stages)]
    lags = [stages - warm for warm in warms]
    found = pace([EVEN] * stages, chain(stages), warms, lags, rounds)
    assert found.seconds == pytest.approx(3.0 * rounds + (stages - 1))


def test_the_last_reduction_hides_behind_the_drain():
    slow = Beat(1.0, 1.0, 1.0, 5.0, 0.5)
    source = pace([slow, EVEN, EVEN], chain(3), [3, 2, 1], [0, 0, 0], 8).seconds
    sink = pace([EVEN, EVEN, slow], chain(3), [3, 2, 1], [0, 0, 0], 8).seconds
    assert source == pytest.approx(3.0 * 10 + 5.5)
    assert sink == pytest.approx(3.0 * 10)


def test_a_meeting_is_a_barrier():
    found = pace([EVEN, EVEN], chain(2), [2, 1], [0, 0], 4, meeting=0.25)
    assert found.seconds == pytest.approx(3.0 * 5 + 0.25)


def test_what_does_not_train_runs_ahead():
    frozen = Beat(1.0, 0.0, 0.0, 0.0, 0.0, trains=False)
    found = pace([frozen, EVEN], [Hop(0, 1, 0.0, None)], [2, 1], [0, 0], 8)
    assert found.seconds == pytest.approx(3.0 * 8)


def test_shares_name_who_is_waited_for():
    heavy = Beat(3.0, 3.0, 3.0, 0.0, 0.0)
    hops = [Hop(0, 2, 0.0, 0.0), Hop(1, 2, 0.0, 0.0)]
    found = pace([EVEN, heavy, EVEN], hops, [2, 2, 1], [0, 0, 0], 8)
    assert found.shares[1] > 0.8 * found.seconds
    assert found.shares[0] == 0.0


def test_clipped_warm_ups_deadlock():
    with pytest.raises(ValueError, match="deadlock"):
        pace([EVEN, EVEN], chain(2), [1, 2], [0, 0], 8)
