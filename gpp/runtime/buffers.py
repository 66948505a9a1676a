"""Rings of message buffers: a fixed number of slots at each end of a channel, reused for the whole run.

A message carries the rows of all values of an edge for some samples, one value after another:

    | value 0: n samples | pad | value 1: n samples | pad | ... |        pad: to the next multiple of 64 bytes

A receiver works on views of its slot and gives the slot back when it has no more use for it; a sender copies
into one. Nothing is made between steps, neither memory, which an MPI library then registers once, nor
requests. On a device a slot becomes ready later (see `staging`): whoever waits makes `progress` meanwhile.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, count, cycle

from torch import Tensor

from gpp.program.stage import ValueSpec
from gpp.schedule.task import Channel, Direction

from .communicator import CommunicationError, Communicator, PersistentRequest
from .staging import OnHost, Slot, Staging, Write

ALIGNMENT = 64  # bytes: a cache line, and a multiple of every data type's size


def channel_values(values: Sequence[ValueSpec], direction: Direction) -> tuple[ValueSpec, ...]:
    """What an edge of these values carries in a direction: gradients only of those that need one."""
    return tuple(v for v in values if direction is Direction.ACTIVATION or v.needs_grad)


def message_bytes(values: Sequence[ValueSpec], samples: int) -> int:
    """Bytes of a message of `samples` samples, the padding between values included."""
    return _offsets(values, samples)[-1] + samples * values[-1].bytes if values else 0


def message_views(buffer: Tensor, values: Sequence[ValueSpec], samples: int) -> tuple[Tensor, ...]:
    """Each value's rows [samples, ...] inside a flat uint8 buffer, sharing its memory."""
    offsets = _offsets(values, samples)
    return tuple(
        buffer[offset : offset + samples * v.bytes].view(v.dtype).view(samples, *v.shape)
        for offset, v in zip(offsets, values, strict=True)
    )


def check_rows(views: Sequence[Tensor], tensors: Sequence[Tensor], values: Sequence[ValueSpec]) -> None:
    """Raise CommunicationError, naming the value, unless the tensors have the views' shapes and data types:
    a copy would broadcast or convert them in silence. All in the order of `values`."""
    if len(views) != len(tensors):
        names = ", ".join(v.name for v in values)
        raise CommunicationError(f"the message carries {len(views)} values ({names}), not {len(tensors)}")
    for view, tensor, value in zip(views, tensors, values, strict=True):
        if tensor.shape != view.shape or tensor.dtype != view.dtype:
            raise CommunicationError(
                f"{value.name} is {tensor.dtype} of shape {tuple(tensor.shape)}, the message carries "
                f"{view.dtype} of shape {tuple(view.shape)}"
            )


@dataclass(frozen=True, slots=True)
class Message:
    """A slot with room for `samples` samples: the values that stages read or that are to be sent, what writes
    them at a sending end, and the request that carries its `size` bytes."""

    number: int  # of the slot in its ring
    samples: int
    size: int
    views: tuple[Tensor, ...]
    slot: Slot
    write: Write
    request: PersistentRequest


@dataclass(frozen=True)
class Landing:
    """Where the messages of several ranks lie one after the other: those that make up a micro-batch need not
    be copied into one piece. By number of the slot: the values of the whole, and each rank's slot."""

    sources: tuple[int, ...]
    whole: tuple[tuple[Tensor, ...], ...]
    slots: tuple[tuple[Slot, ...], ...]


def landing(channels: Mapping[Channel, int], value: ValueSpec, staging: Staging) -> Landing:
    """For channels with as many slots each, whose messages all have this many samples of the one value; in
    the order of their samples."""
    counts = list(channels.values())
    cuts = [samples * value.bytes for samples in accumulate(counts, initial=0)]
    (count,) = {channel.slots for channel in channels}
    made = [staging.landing(cuts[-1], cuts) for _ in range(count)]
    return Landing(
        tuple(channel.source for channel in channels),
        tuple(message_views(memory, (value,), sum(counts)) for memory, _ in made),
        tuple(tuple(slots) for _, slots in made),
    )


class Ring:
    """The slots at one end of a channel; `sizes` are all the sample counts that its messages have. With
    `landing` it receives into that.

    It outlives the channel ends below, which belong to one stretch of steps: training, or an evaluation.
    """

    def __init__(
        self,
        communicator: Communicator,
        channel: Channel,
        values: Sequence[ValueSpec],
        sizes: Sequence[int],
        staging: Staging | None = None,
        landing: Landing | None = None,
    ):
        self.communicator = communicator
        self.channel = channel
        self.landing = landing
        self.values = channel_values(values, channel.direction)
        carries = (
            bool(self.values) or not values
        )  # an edge without values is an order: its messages are empty
        if channel.slots < 1 or not sizes or min(sizes) < 1 or not carries:
            raise CommunicationError(
                f"{channel_name(channel)} needs slots, values and messages of at least one sample, it has "
                f"{channel.slots} slots, {len(self.values)} values and messages of {sorted(set(sizes))}"
            )
        largest = message_bytes(self.values, max(sizes))
        self.bytes = largest * channel.slots
        sending = communicator.rank == channel.source
        if landing is not None:
            part = landing.sources.index(channel.source)
            slots = [parts[part] for parts in landing.slots]
        else:
            slots = [(staging or OnHost()).slot(largest, sending=sending) for _ in range(channel.slots)]
        self.slots = tuple(slots)
        self._messages = {
            (number, samples): self._message(number, slot, samples)
            for number, slot in enumerate(slots)
            for samples in sorted(set(sizes))
        }

    def _message(self, number: int, slot: Slot, samples: int) -> Message:
        size, channel, comm = message_bytes(self.values, samples), self.channel, self.communicator
        wire = slot.wire[:size]
        if comm.rank == channel.source:
            request = comm.send_init(wire, channel.target, channel.tag)
            views = message_views(slot.wire, self.values, samples)
        else:
            request = comm.recv_init(wire, channel.source, channel.tag)
            views = message_views(slot.local, self.values, samples)
        return Message(number, samples, size, views, slot, slot.writer(views), request)

    def message(self, slot: int, samples: int) -> Message:
        """The slot as a message of so many samples."""
        return self._messages[slot, samples]


class SendChannel:
    """The sending end: a message waits in its slot until the other end has taken it.

    The k-th message has counts[k mod len(counts)] samples: one cycle is one step. What a stage hands over is
    laid out alike in every cycle, so only the first is looked at.
    """

    def __init__(self, ring: Ring, counts: Sequence[int]):
        self._ring = ring
        self._slots = ring.channel.slots
        self._messages = map(ring.message, cycle(range(self._slots)), cycle(counts))
        self._unseen = len(counts)
        self._lazy = False  # whether some tensors have a sign or conjugate that is yet to be applied
        self._filled: deque[Message] = deque()  # not started: the device has still to write them
        self._under_way: deque[Message] = deque()

    def send(self, tensors: Sequence[Tensor]) -> None:
        """Start sending the next message of the cycle, one tensor [samples, ...] for each value it carries.

        Copies them; waits only if all slots are still on their way.
        """
        if len(self._filled) + len(self._under_way) == self._slots:
            self._make_room()
        message = next(self._messages)
        if self._unseen:
            self._unseen -= 1
            self._look_at(message, tensors)
        if self._lazy:
            tensors = [tensor.resolve_conj().resolve_neg() for tensor in tensors]
        message.write(tensors)
        self._filled.append(message)
        self.progress()

    def _make_room(self) -> None:
        if not self._under_way:
            self._filled[0].slot.settle()
            self.progress()
        message = self._under_way.popleft()
        if not message.request.done():
            self._ring.communicator.wait([message.request])

    def _look_at(self, message: Message, tensors: Sequence[Tensor]) -> None:
        try:
            check_rows(message.views, tensors, self._ring.values)
        except CommunicationError as error:
            raise CommunicationError(f"{channel_name(self._ring.channel)}: {error}") from None
        self._lazy |= any(tensor.is_conj() or tensor.is_neg() for tensor in tensors)

    def progress(self) -> bool:
        """Start the sends whose slots have been written, in order. Returns whether others are left."""
        while self._filled and self._filled[0].slot.ready():
            message = self._filled.popleft()
            message.request.start()
            self._under_way.append(message)
        return bool(self._filled)

    def flush(self) -> None:
        """Wait until everything sent has been taken."""
        for message in self._filled:
            message.slot.settle()
        self.progress()
        self._ring.communicator.wait([message.request for message in self._under_way])
        self._under_way.clear()


class ReceiveChannel:
    """The receiving end: a receive is posted, ahead of need, for every slot that is free.

    The k-th message has counts[k mod len(counts)] samples: one cycle is one step. Posting goes on across the
    borders of steps, so `close` takes back what the next step would have filled. With `messages`, the number
    there will ever be, no more are posted; then the next user of the same source and tag may follow at once,
    else only after a barrier behind `close`.
    """

    def __init__(self, ring: Ring, counts: Sequence[int], messages: int | None = None):
        self._ring = ring
        self._counts = tuple(counts)
        self._numbers = iter(count() if messages is None else range(messages))
        self._posted: deque[Message] = deque()
        self._lent: set[int] = set()
        self._free = deque(range(ring.channel.slots))  # not posted: the device has still to read them
        self.progress()

    @property
    def landing(self) -> Landing | None:
        """Where its messages lie beside those of other channels, if they do."""
        return self._ring.landing

    @property
    def source(self) -> int:
        """The rank that sends."""
        return self._ring.channel.source

    def next(self) -> Message:
        """Wait for the oldest message that is still to come; its views hold until `release`."""
        if not self._posted and self._free:
            self._ring.slots[self._free[0]].settle()
            self.progress()
        if not self._posted:
            raise CommunicationError(
                f"{channel_name(self._ring.channel)}: no receive is posted, {len(self._lent)} of "
                f"{self._ring.channel.slots} slots are in use; release one before the next message"
            )
        message = self._posted.popleft()
        if not message.request.done():
            self._ring.communicator.wait([message.request])
        self._lent.add(message.number)
        message.slot.arrived(message.size)
        return message

    def release(self, message: Message) -> None:
        """Give the slot back: its memory belongs to a later message from now on."""
        if message.number not in self._lent:
            raise CommunicationError(
                f"{channel_name(self._ring.channel)}: slot {message.number} is not in use"
            )
        self._lent.remove(message.number)
        message.slot.launched()
        self._free.append(message.number)
        self.progress()

    def progress(self) -> bool:
        """Post receives into the free slots that have been read, in order. Returns whether others are
        left."""
        while self._free and self._ring.slots[self._free[0]].ready():
            number = next(self._numbers, None)
            if number is None:
                self._free.clear()
                break
            message = self._ring.message(self._free.popleft(), self._counts[number % len(self._counts)])
            message.request.start()
            self._posted.append(message)
        return bool(self._free)

    def close(self) -> int:
        """Take back every posted receive. Returns how many messages had come that nobody asked for: 0 if all
        ranks stopped at the same step."""
        unwanted = sum(not self._ring.communicator.cancel(message.request) for message in self._posted)
        self._posted.clear()
        self._numbers = iter(range(0))
        return unwanted


def channel_name(channel: Channel) -> str:
    """How an error speaks of a channel."""
    ends = f"from rank {channel.source} to rank {channel.target}"
    return f"edge {channel.edge} ({channel.direction.value}s {ends})"


def _offsets(values: Sequence[ValueSpec], samples: int) -> list[int]:
    """Where each value starts."""
    offsets = [0] if values else []
    for value in values[:-1]:
        offsets.append(offsets[-1] + -(-samples * value.bytes // ALIGNMENT) * ALIGNMENT)
    return offsets
