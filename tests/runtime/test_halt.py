"""Ranks that are asked to stop all stop after the same step, whenever and whoever is asked."""

import random
import threading
import time

import pytest
import torch

from gpp.runtime.halt import Halt, halts
from gpp.runtime.loopback import LoopbackCommunicator, LoopbackWorld, run

STEPS = 400


def trained(comm: LoopbackCommunicator, ask_at: dict[int, int], start: int = 0) -> int:
    """Steps in which each rank needs the one before it, as a pipeline does; returns how many were made."""
    number = torch.zeros(1)
    sent = []
    for step in range(start, STEPS):
        if not comm.halt.may_begin(step) and comm.halt.last(step, comm.rest) <= step:
            comm.wait(sent)
            return step
        if ask_at.get(comm.rank) == step:
            comm.halt.ask(f"rank {comm.rank}")
        if comm.rank:
            comm.wait([comm.irecv(number, comm.rank - 1, 0)])
        if comm.rank + 1 < comm.size:
            sent.append(comm.isend(torch.ones(1), comm.rank + 1, 0))
            if len(sent) > 3:  # slots of a ring: a rank is so many steps ahead at most
                comm.wait([sent.pop(0)])
    comm.wait(sent)
    return STEPS


@pytest.mark.parametrize("seed", range(12))
def test_all_stop_after_the_same_step(seed: int) -> None:
    chance = random.Random(seed)
    size = chance.randint(1, 5)
    asking = {rank: chance.randrange(STEPS) for rank in chance.sample(range(size), chance.randint(1, size))}
    world = LoopbackWorld(size)
    (made,) = set(run(world, lambda comm: trained(comm, asking)))
    assert min(asking.values()) < made <= min(asking.values()) + 1 + 4 * size
    reasons = {comm.halt.reason for comm in world.communicators}
    assert len(reasons) == 1 and reasons <= {f"rank {rank}" for rank in asking}


def test_nobody_asks() -> None:
    assert set(run(LoopbackWorld(3), lambda comm: trained(comm, {}))) == {STEPS}


def test_asked_from_outside_and_before_the_first_step() -> None:
    world = LoopbackWorld(3)
    timer = threading.Timer(0.02, world.communicators[2].halt.ask, ("a signal",))
    timer.start()
    (made,) = set(run(world, lambda comm: trained(comm, {})))
    timer.join()
    assert 0 < made <= STEPS
    early = LoopbackWorld(2)
    early.communicators[1].halt.ask("early")
    assert run(early, lambda comm: trained(comm, {}, start=7)) == [7, 7]


def test_a_rank_that_has_made_all_its_steps_is_not_waited_for() -> None:
    first, second = halts(2)
    assert all(first.may_begin(step) for step in range(3))  # and then it evaluates
    assert second.may_begin(0)
    second.ask("late")
    assert not second.may_begin(1)
    assert second.last(1, lambda _: pytest.fail("nobody to wait for")) == 3


def test_who_is_failing_does_not_wait() -> None:
    world = LoopbackWorld(2)

    def work(comm: LoopbackCommunicator) -> None:
        if comm.rank:
            raise ValueError("broken")
        comm.halt.ask("stop")
        comm.halt.last(0, comm.rest)

    with pytest.raises(ValueError, match="broken"):
        run(world, work)


def test_a_request_is_one_message() -> None:
    said: list[object] = []
    halt = Halt(said.append, said.append)
    halt.ask("why")
    assert said == ["why"] and halt.reason is None  # the board tells all, this rank too
    assert halt.may_begin(4)
    halt.paused("why")
    halt.paused("another")
    assert said == ["why", 5] and halt.reason == "why"
    start = time.monotonic()
    threading.Timer(0.02, halt.until, (6,)).start()
    assert halt.last(5, time.sleep) == 6 and time.monotonic() - start > 0.01
    assert said == ["why", 5]
