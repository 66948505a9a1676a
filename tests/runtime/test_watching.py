"""When a job is taken to have failed, and what is said then."""

import pytest

from gpp.runtime.doing import Doing, Place
from gpp.runtime.watching import (
    COLLECT,
    MISMATCH,
    Rules,
    Sight,
    Watcher,
    sight_from_json,
    sight_of,
    sight_to_json,
)

HOSTS = ("a", "a", "b")
INSIDE, OUTSIDE, LEFT, SETUP = Place.INSIDE, Place.OUTSIDE, Place.LEFT, Place.SETUP


def watcher(rules: Rules | None = None) -> Watcher:
    made = Watcher(HOSTS, rules or Rules(silence=60.0), 0.0)
    made.stages = ("left", "right", "head")
    return made


def seen(watch: Watcher, now: float, *sights: Sight) -> None:
    for rank, sight in enumerate(sights):
        watch.saw(rank, sight, now)


def sight(count: int = 1, place: Place = INSIDE, waits: bool = True, text: str = "waits") -> Sight:
    return Sight(count, place, waits, text)


def text_of(watch: Watcher, now: float) -> str:
    """The verdict, after all who are there have spoken."""
    assert watch.is_asking and watch.verdict is None
    for rank, member in enumerate(watch.members):
        if not member.gone and not member.over:
            watch.explained(rank, member.sight, f"frames of {rank}", now)
    watch.tick(now)
    assert watch.verdict is not None and watch.verdict.code == 1
    return watch.verdict.text


def test_a_job_that_moves_is_left_alone() -> None:
    watch = watcher()
    for now in range(0, 600, 10):
        seen(watch, now, *[sight(count=now)] * 3)
        watch.tick(now)
    assert not watch.is_asking


def test_a_death_is_told_with_what_the_others_wait_for() -> None:
    watch = watcher()
    seen(watch, 1.0, sight(text="step 3: waits for x"), sight(waits=False, text="step 3: forward"), sight())
    watch.ended(1, 1.5)
    text = text_of(watch, 1.6)
    assert text.startswith("rank 1 on a ended without a word")
    assert "  rank 0 (left): step 3: waits for x" in text
    assert "  rank 1 (right): is gone; 0.6 s ago: step 3: forward" in text
    assert watch.verdict is not None
    assert "--- rank 0 (left): step 3: waits for x\nframes of 0" in watch.verdict.traces
    assert "frames of 1" not in watch.verdict.traces


def test_a_host_takes_all_of_its_ranks_with_it() -> None:
    watch = watcher()
    seen(watch, 1.0, *[sight()] * 3)
    watch.ended(0, 1.0)
    watch.ended(1, 1.01)
    assert text_of(watch, 1.1).startswith("ranks 0, 1 on a ended without a word")


def test_who_does_not_answer_is_not_waited_for() -> None:
    watch = watcher()
    seen(watch, 1.0, *[sight()] * 3)
    watch.failed(2, "no memory", 1, 1.0)
    watch.explained(0, sight(), "frames", 1.0)
    watch.tick(1.0 + 0.9 * COLLECT)
    assert watch.verdict is None
    watch.tick(1.0 + 1.1 * COLLECT)
    assert watch.verdict is not None
    assert watch.verdict.text.startswith("rank 2: no memory\n")
    assert "  rank 1 (right): does not answer; 0.3 s ago: waits" in watch.verdict.text


def test_an_error_says_where_it_came_from_and_the_first_counts() -> None:
    watch = watcher()
    seen(watch, 1.0, *[sight()] * 3)
    watch.explained(1, sight(text="step 4: forward"), "Traceback of 1", 1.1)
    watch.failed(1, "KeyError: 'mine'", 1, 1.1, shown=True)
    watch.explained(1, sight(), "where it waits for the end", 1.1)
    watch.failed(2, "another", 5, 1.1)
    watch.explained(0, sight(), "frames of 0", 1.2)
    watch.tick(1.2)
    assert watch.verdict is not None
    text = watch.verdict.text
    assert text.startswith("rank 1: KeyError: 'mine'\n") and text.endswith("\nTraceback of 1")
    assert "  rank 1 (right): failed; step 4: forward" in text
    assert "  rank 2 (head): failed (another); waits" in text


def test_who_ends_after_the_others_is_no_death() -> None:
    watch = watcher()
    seen(watch, 1.0, sight(), sight(place=LEFT), sight())
    watch.ended(1, 1.1)  # it has left: MPI lets it go when all have
    watch.members[2].over = True
    watch.ended(2, 1.2)
    watch.tick(1.3)
    assert not watch.is_asking


def test_deaths_of_an_elastic_job_are_for_the_survivors() -> None:
    watch = watcher(Rules(60.0, elastic=True))
    seen(watch, 1.0, *[sight()] * 3)
    watch.ended(0, 1.1)
    watch.ended(2, 1.2)
    watch.tick(9.0)
    assert watch.lost == (0, 2) and not watch.is_asking


@pytest.mark.parametrize("patience", [1.0, 10.0])
def test_a_rank_that_says_nothing(patience: float) -> None:
    watch = watcher()
    quiet = Sight(1, INSIDE, True, "step 1: forward", patience)
    seen(watch, 0.0, quiet, quiet, quiet)
    for now in range(0, int(60 * patience) + 2):
        seen(watch, now, quiet, *[sight(count=now)])
        watch.tick(now)
        if now <= 60 * patience:
            assert not watch.is_asking
    assert text_of(watch, now).startswith(f"rank 2 on b said nothing for {60 * patience:g} s")


def test_a_job_in_which_nothing_moves_names_who_does_not_wait() -> None:
    watch = watcher()
    for now in range(0, 62):
        seen(watch, now, sight(), sight(waits=False, text="step 1: forward of samples 0-3"), sight())
        watch.tick(now)
    text = text_of(watch, 61.0)
    assert text.startswith("nothing moved for 60 s: rank 1 did not go on\n")
    assert "  rank 1 (right): step 1: forward of samples 0-3, for 61.0 s" in text


def test_a_message_is_a_movement_though_the_call_is_the_same() -> None:
    watch = watcher()
    for now in range(0, 4 * round(MISMATCH)):
        seen(watch, now, sight(place=LEFT), sight(waits=now % 4 > 0, place=SETUP), sight(place=SETUP))
        watch.tick(now)
    assert not watch.is_asking


def test_ranks_that_wait_for_one_another() -> None:
    watch = watcher()
    for now in range(0, 62):
        seen(watch, now, *[sight()] * 3)
        watch.tick(now)
    assert text_of(watch, 61.0).startswith("nothing moved for 60 s: ranks 0, 1, 2 wait for one another\n")


@pytest.mark.parametrize("place", [INSIDE, SETUP])
def test_a_rank_that_left_while_others_wait_for_it(place: Place) -> None:
    watch = watcher()
    for now in range(0, 4):
        seen(watch, now, sight(), sight(place=LEFT), sight(place=place))
        watch.tick(now)
    assert not watch.is_asking
    watch.tick(MISMATCH + 1)
    assert text_of(watch, 7.0).startswith("rank 1 left the pipeline while ranks 0, 2 still wait for it")


@pytest.mark.parametrize(
    "sights",
    [
        (sight(), sight(place=LEFT), sight(waits=False)),  # it may still come to its end
        (sight(), sight(place=LEFT), sight(place=OUTSIDE, waits=False)),  # a user's own program
        (sight(place=LEFT), sight(place=LEFT), sight(place=LEFT)),  # MPI waits
        (sight(), sight(), sight(place=SETUP, waits=False)),  # capture takes as long as it takes
    ],
)
def test_what_may_still_go_on(sights: tuple[Sight, ...]) -> None:
    watch = watcher()
    for now in range(0, 50):
        seen(watch, now, *sights)
        watch.tick(now)
    assert not watch.is_asking


def test_a_users_own_program_may_take_its_time_and_ours_may_not() -> None:
    for strict in (False, True):
        watch = watcher(Rules(60.0, strict=strict))
        for now in range(0, 62):
            seen(watch, now, sight(), sight(), sight(place=OUTSIDE, waits=False))
            watch.tick(now)
        assert watch.is_asking is strict


def test_a_large_job_shows_those_that_matter() -> None:
    watch = Watcher(["a"] * 100, Rules(), 0.0)
    seen(watch, 1.0, *[sight()] * 100)
    watch.ended(70, 1.1)
    text = text_of(watch, 1.2)
    assert len(text.splitlines()) == 3 and "rank 70: is gone" in text and "100 ranks" in text


def test_sights_travel_and_say_where_a_rank_is() -> None:
    doing = Doing()
    assert sight_of(doing) == Sight(0, SETUP, False, "starts")
    with doing.inside("trains"):
        doing.step, doing.describe = 3, lambda what: f"pass {what}"
        doing.now(7)
        assert sight_of(doing).text == "step 3: pass 7" and sight_of(doing).place is INSIDE
        assert sight_from_json(sight_to_json(sight_of(doing))) == sight_of(doing)
    assert sight_of(doing).place is OUTSIDE and sight_of(doing).text.startswith("in the program")
    doing.waits = ["a message from rank 2", "another"]
    assert sight_of(doing).place is INSIDE  # who waits for messages is in some call
    assert sight_of(doing).text.endswith("waits for a message from rank 2 and 1 more")
