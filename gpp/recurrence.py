"""The max-plus recurrence of a schedule: who waits for what, and for how long, without a clock.

Every rank's order is fixed and every channel a FIFO. A pass ends its own seconds after the end of the one
before it and the last arrival of what it reads. A message arrives its travel after it was sent and the one
before it on its channel arrived. A reduction ends its seconds after the last of its ranks came. Any order of
evaluation that respects these dependencies gives the same times, so each rank goes on until it lacks a
message, then the next rank goes on, to and fro along the pipeline.

A guarded channel is one whose sends may wait for a slot and whose messages may wait for a buffer.
"""

from collections import deque
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass, field

from gpp.schedule.task import ScheduleError

Times = deque[float]
# the slots that are free (None: always enough), where the message goes, its channel's last arrival, seconds
Post = tuple[Times | None, Times, list[float], float]
# seconds of a pass; what it reads; what is sent after it, in order; whose buffers are free after that
Entry = tuple[float, Sequence[Times], Sequence[Post], Sequence[Times]]
Actor = Generator[int, None, None]
DONE = -1  # what an actor yields at the end of a step; else a number that has grown if it got on


@dataclass(frozen=True, slots=True)
class Channel:
    """Messages on their way: those that are there, and when the last of them arrived."""

    there: Times
    last: list[float]


@dataclass(frozen=True, slots=True)
class Guard:
    """What a guarded channel waits for: since when slots (sender) and buffers (receiver) are free."""

    channel: Channel
    slots: Times
    free: Times
    sent: Times = field(default_factory=deque)


@dataclass(slots=True)
class Meeting:
    """A reduction: how many ranks meet, those that have come this time, and when each step's ended."""

    seconds: float
    members: int = 0
    came: list[float] = field(default_factory=list)
    ends: list[float] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Rank:
    """A rank's step: its passes, its reductions, seconds of its updates; and when each of its steps ended."""

    program: Sequence[Entry]
    meetings: Sequence[Meeting]
    update: float
    ends: list[float] = field(default_factory=list)


def run(actors: Iterable[Actor]) -> None:
    """Take all actors through one step. Raises ScheduleError if they wait for each other for ever."""
    left = list(actors)
    before: list[int] = []
    while left:
        now = [next(actor) for actor in left]
        if now == before:
            raise ScheduleError("deadlock: with so many samples in flight all stages wait for each other")
        back = [i for i in range(len(now) - 1, -1, -1) if now[i] != DONE]
        left, before = [left[i] for i in back], [now[i] for i in back]


def compute(rank: Rank) -> Actor:
    """What a rank does, step after step."""
    program, meetings, ends = rank.program, rank.meetings, rank.ends
    now, at = 0.0, 0
    while True:
        for seconds, reads, posts, frees in program:
            for read in reads:
                if not read:
                    at += 1
                    while not read:
                        yield at
                arrival = read.popleft()
                if arrival > now:
                    now = arrival
            now += seconds
            for slots, there, last, travel in posts:
                if slots is None:
                    arrival = last[0]
                    last[0] = arrival = (now if now > arrival else arrival) + travel
                    there.append(arrival)
                    continue
                if not slots:
                    at += 1
                    while not slots:
                        yield at
                now = max(now, slots.popleft())
                there.append(now)
            for free in frees:
                free.append(now)
        for meeting in meetings:
            meeting.came.append(now)
            if len(meeting.came) == meeting.members:
                meeting.ends.append(max(meeting.came) + meeting.seconds)
                meeting.came.clear()
            at += 1
            while len(meeting.ends) == len(ends):
                yield at
            now = meeting.ends[-1]
        now += rank.update
        ends.append(now)
        yield DONE


def carry(guard: Guard, travels: Sequence[float]) -> Actor:
    """Move the messages of a guarded channel, one after the other; `travels` are their seconds in a step."""
    sent, free, slots = guard.sent, guard.free, guard.slots
    there, last = guard.channel.there, guard.channel.last
    at = 1
    while True:
        for travel in travels:
            while not sent or not free:
                yield at
            at += 1
            last[0] = max(sent.popleft(), free.popleft(), last[0]) + travel
            there.append(last[0])
            slots.append(last[0])
        yield DONE
