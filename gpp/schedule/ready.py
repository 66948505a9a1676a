"""When may a rank's next instruction run? One rule, for the checker (without a clock) and the simulator.

A channel is a FIFO with `slots` buffers at each end. A Send takes a slot at the sender and does not wait for
the receiver; it waits only while no slot is free. A message crosses once the receiver has a free buffer, for
receives are posted ahead into buffers as these become free (a synchronous send finishes no sooner), and frees
the sender's slot when it is there. The receiver's buffer stays in use until the last pass that reads it has
ended and what that pass made is sent (it may be a view of what came in): activations until the backward of
their samples, whose stash aliases them (until the forward, if none follows), gradients until the backward
that they are for. A Reduce waits until its whole group has come to it.
"""

from collections import defaultdict
from dataclasses import dataclass

from gpp.schedule.grid import refusal
from gpp.schedule.task import (
    INPUT_HALF,
    WEIGHT_HALF,
    Channel,
    Compute,
    Direction,
    Instruction,
    Pass,
    Receive,
    Reduce,
    Report,
    Samples,
    Schedule,
    ScheduleError,
    Send,
    Transfer,
    Update,
)


@dataclass(slots=True)
class Queue:
    """How many messages of a channel have come how far."""

    channel: Channel
    sent: int = 0  # given to the channel by a Send
    started: int = 0  # under way into a buffer at the receiver
    delivered: int = 0
    received: int = 0  # seen by a Receive
    freed: int = 0  # their buffer is free again

    def has_slot(self) -> bool:
        """Whether the sender may give it another message."""
        return self.sent - self.delivered < self.channel.slots

    def can_start(self) -> bool:
        """Whether a message waits for its way and a buffer at the receiver for it."""
        return self.started < self.sent and self.started - self.freed < self.channel.slots

    def cross(self) -> None:
        """Let all messages that can start be there at once: a channel without a clock."""
        while self.can_start():
            self.started += 1
            self.delivered += 1

    def has_message(self) -> bool:
        """Whether the next Receive finds its message."""
        return self.received < self.delivered


class Progress:
    """How far every rank and every channel has come in `passes` runs of a schedule one after the other."""

    def __init__(self, schedule: Schedule, passes: int = 1) -> None:
        self.schedule = schedule
        self.queues = [Queue(channel) for channel in schedule.channels]
        self.done = [0] * len(schedule.programs)  # instructions of each rank, over all passes
        self._ends = [len(program) * passes for program in schedule.programs]
        self._queue = {(c.source, c.target, c.tag): q for q, c in enumerate(schedule.channels)}
        self._frees = [
            {at: tuple(map(self.queue, messages)) for at, messages in last_uses(program).items()}
            for program in schedule.programs
        ]

    def position(self, rank: int) -> int:
        """Where in its program the rank is."""
        length = len(self.schedule.programs[rank])
        return self.done[rank] % length if self.done[rank] < self._ends[rank] else length

    def current(self, rank: int) -> Instruction | None:
        """The rank's next instruction; None at the end."""
        done = self.done[rank]
        if done >= self._ends[rank]:
            return None
        program = self.schedule.programs[rank]
        return program[done % len(program)]

    def queue(self, transfer: Transfer) -> int:
        """The index of a message's queue."""
        return self._queue[transfer.source, transfer.target, transfer.tag]

    def ready(self, rank: int) -> bool:
        """THE rule: whether the rank's next instruction may run."""
        match instruction := self.current(rank):
            case Send(transfer):
                return self.queues[self.queue(transfer)].has_slot()
            case Receive(transfer):
                return self.queues[self.queue(transfer)].has_message()
            case Reduce(_, group):
                return all(self.current(member) == instruction for member in group)
            case Compute() | Update() | Report():
                return True
            case None:
                return False

    def finish(self, rank: int) -> tuple[int, ...]:
        """The rank's next instruction has run; the queues in which a message may start now. A Reduce is
        finished for each rank of its group."""
        position = self.position(rank)
        touched = self._frees[rank].get(position, ())
        for q in touched:
            self.queues[q].freed += 1
        match self.schedule.programs[rank][position]:
            case Send(transfer):
                q = self.queue(transfer)
                self.queues[q].sent += 1
                touched = (*touched, q)
            case Receive(transfer):
                self.queues[self.queue(transfer)].received += 1
            case Compute() | Reduce() | Update() | Report():
                pass
        self.done[rank] += 1
        return touched

    def unfinished(self) -> list[int]:
        """Ranks that are not at their end."""
        return [rank for rank, done in enumerate(self.done) if done < self._ends[rank]]

    def stuck(self) -> ScheduleError:
        """Why nothing can move any more: everyone waits for another one."""
        waits = [f"rank {rank} {self._waits_for(rank)}" for rank in self.unfinished()]
        return refusal(
            self.schedule,
            [self.position(rank) for rank in range(len(self.done))],
            self.unfinished()[0],
            "deadlock: " + "; ".join(waits),
        )

    def _waits_for(self, rank: int) -> str:
        match instruction := self.current(rank):
            case Send(t):
                slots = self.queues[self.queue(t)].channel.slots
                return f"waits for rank {t.target} to free one of {slots} slots of edge {t.edge}"
            case Receive(t):
                queue = self.queues[self.queue(t)]
                if queue.started < queue.sent:
                    slots = queue.channel.slots
                    return f"waits for {t.samples} of edge {t.edge}, and all its {slots} buffers are in use"
                return f"waits for rank {t.source} to send {t.samples} of edge {t.edge}"
            case Reduce(what, group):
                absent = [m for m in group if self.current(m) != instruction]
                return f"waits for ranks {absent} to sum the {what.value}"
            case _:
                return "is not waiting"


def last_uses(program: tuple[Instruction, ...]) -> dict[int, tuple[Transfer, ...]]:
    """Position of an instruction to the messages whose buffers are free after it.

    Activations live until the backward (its weight half, where it is split) of their samples, or until the
    forward where no backward follows; gradients until the backward (its input half) that they are for; all
    until the Sends that directly follow that pass have copied or posted what it made.
    """
    last = {  # the pass that reads the activations of these samples last
        (instruction.task.stage, instruction.task.samples): position
        for position, instruction in enumerate(program)
        if isinstance(instruction, Compute) and instruction.task.kind in (Pass.FORWARD, *WEIGHT_HALF)
    }
    freed: dict[int, list[Transfer]] = defaultdict(list)
    waiting: dict[Direction, list[Transfer]] = {way: [] for way in Direction}
    for position, instruction in enumerate(program):
        if isinstance(instruction, Receive):
            waiting[instruction.transfer.direction].append(instruction.transfer)
        elif isinstance(instruction, Compute):
            task = instruction.task
            if task.kind is Pass.FORWARD:
                used = _take(waiting[Direction.ACTIVATION], task.samples)
                freed[_after_sends(program, last[task.stage, task.samples])] += used
            elif task.kind in INPUT_HALF:
                freed[_after_sends(program, position)] += _take(waiting[Direction.GRADIENT], task.samples)
    return {position: tuple(messages) for position, messages in freed.items()}


def _after_sends(program: tuple[Instruction, ...], position: int) -> int:
    """The last of the Sends that directly follow the pass at `position`; the pass itself if none do."""
    while position + 1 < len(program) and isinstance(program[position + 1], Send):
        position += 1
    return position


def _take(waiting: list[Transfer], samples: Samples) -> list[Transfer]:
    """Remove and return the messages with samples among these."""
    taken = [t for t in waiting if t.samples.intersection(samples)]
    waiting[:] = [t for t in waiting if not t.samples.intersection(samples)]
    return taken
