import pytest

from gpp.schedule.lower import lower
from gpp.schedule.ready import Progress, Queue, last_uses
from gpp.schedule.task import Channel, Direction, Receive, Reduce, Schedule, Send
from tests.strategies import chain, make_plan


def queue(slots: int) -> Queue:
    return Queue(Channel(0, 1, 0, 0, Direction.ACTIVATION, slots, 16))


def test_a_send_waits_for_a_slot_and_a_message_for_a_buffer():
    q = queue(2)
    for _ in range(4):  # two into the receiver's buffers, two more into the sender's slots
        assert q.has_slot()
        q.sent += 1
        q.cross()
    assert (q.delivered, q.has_slot(), q.can_start()) == (2, False, False)
    q.received += 1  # seen, but its buffer is still in use
    assert not q.can_start() and not q.has_slot()
    q.freed += 1
    assert q.can_start()
    q.cross()
    assert (q.delivered, q.has_slot()) == (3, True)


def test_a_receive_waits_for_delivery_not_for_sending():
    q = queue(1)
    q.sent += 1
    assert not q.has_message()
    q.cross()
    assert q.has_message()


def run(progress: Progress, rank: int, count: int) -> None:
    """Finish the next `count` instructions of a rank; messages cross at once."""
    for _ in range(count):
        assert progress.ready(rank)
        for q in progress.finish(rank):
            progress.queues[q].cross()


def freed_after(schedule: Schedule, edge: int, direction: Direction) -> int:
    """After how many instructions of rank 1 the first buffer of a channel is free."""
    progress = Progress(schedule)
    index = next(
        i for i, c in enumerate(schedule.channels) if (c.edge, c.direction, c.target) == (edge, direction, 1)
    )
    count = 0
    while progress.queues[index].freed == 0:
        for rank in (0, 2):
            while rank < len(schedule.programs) and progress.ready(rank):
                run(progress, rank, 1)
        run(progress, 1, 1)
        count += 1
    return count


@pytest.mark.parametrize(
    "frozen, forward_only, count",
    [
        ((), False, 4),  # receive, forward, backward, and its gradient sent
        ((0,), False, 3),  # no gradient to send
        ((0, 1), False, 2),  # no backward: receive, forward
        ((), True, 2),
    ],
)
def test_an_activation_buffer_is_in_use_until_the_last_pass_that_reads_it(frozen, forward_only, count):
    schedule = lower(make_plan(chain(2), [1, 1], 4, frozen=frozen), forward_only=forward_only)
    assert freed_after(schedule, 0, Direction.ACTIVATION) == count


def test_a_gradient_buffer_is_in_use_until_its_backward_has_sent_on():
    schedule = lower(make_plan(chain(3), [1, 1, 1], 4))
    first = next(
        i
        for i, x in enumerate(schedule.programs[1])
        if isinstance(x, Receive) and x.transfer.direction is Direction.GRADIENT
    )
    assert freed_after(schedule, 1, Direction.GRADIENT) == first + 3  # receive, backward, send


def test_last_uses_name_every_message_once():
    program = lower(make_plan([(0, 2), (1, 2)], [2, 1, 2], 4, replicas=[2, 1, 1])).programs[3]
    uses = last_uses(program)
    received = [i.transfer for i in program if isinstance(i, Receive)]
    assert sorted(map(repr, received)) == sorted(repr(t) for found in uses.values() for t in found)
    assert all(isinstance(program[at], Send) for at in uses)


def test_a_reduction_waits_for_its_whole_group():
    progress = Progress(lower(make_plan([], [2], 2, replicas=[2])))
    run(progress, 0, 3)  # forward, backward, report
    assert isinstance(progress.current(0), Reduce)
    assert not progress.ready(0)
    run(progress, 1, 3)
    assert progress.ready(0) and progress.ready(1)


def test_passes_follow_one_another_and_end():
    progress = Progress(lower(make_plan([], [1], 1)), passes=2)
    run(progress, 0, 4)  # forward, backward, report, update
    assert progress.position(0) == 0 and progress.unfinished() == [0]
    run(progress, 0, 4)
    assert progress.current(0) is None and progress.position(0) == 4
    assert not progress.ready(0) and progress.unfinished() == []
