"""Rings of message buffers: a fixed number of slots at each end of a channel, reused for the whole run.

A message carries the rows of all values of an edge for some samples, one value after another:

    | value 0: n samples | pad | value 1: n samples | pad | ...        pad: to the next multiple of 64 bytes

A receiver works on views of its slot and gives the slot back when it has no more use for it; a sender copies
into one. Nothing is allocated between steps, so an MPI library registers the memory once.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count

import torch
from torch import Tensor

from gpp.program.stage import ValueSpec
from gpp.schedule.task import Channel, Direction

from .communicator import Buffer, CommunicationError, Communicator, Request

ALIGNMENT = 64  # bytes: a cache line, and a multiple of every data type's size


def channel_values(values: Sequence[ValueSpec], direction: Direction) -> tuple[ValueSpec, ...]:
    """What an edge of these values carries in a direction: gradients only of those that need one."""
    return tuple(v for v in values if direction is Direction.ACTIVATION or v.needs_grad)


def message_bytes(values: Sequence[ValueSpec], samples: int) -> int:
    """Bytes of a message of `samples` samples, padding included."""
    return _offsets(values, samples)[-1]


def message_views(buffer: Tensor, values: Sequence[ValueSpec], samples: int) -> tuple[Tensor, ...]:
    """Each value's rows [samples, ...] inside a flat uint8 buffer, sharing its memory."""
    offsets = _offsets(values, samples)
    return tuple(
        buffer[offset : offset + samples * v.bytes].view(v.dtype).view(samples, *v.shape)
        for offset, v in zip(offsets, values, strict=False)
    )


def pack(views: Sequence[Tensor], tensors: Sequence[Tensor], values: Sequence[ValueSpec]) -> None:
    """Copy the tensors into the views, both in the order of `values`.

    Raises CommunicationError naming the value whose shape or data type is not the message's: a copy would
    broadcast or convert it in silence.
    """
    if len(views) != len(tensors):
        names = ", ".join(v.name for v in values)
        raise CommunicationError(f"the message carries {len(views)} values ({names}), not {len(tensors)}")
    for view, tensor, value in zip(views, tensors, values, strict=True):
        if tensor.shape != view.shape or tensor.dtype != view.dtype:
            raise CommunicationError(
                f"{value.name} is {tensor.dtype} of shape {tuple(tensor.shape)}, the message carries "
                f"{view.dtype} of shape {tuple(view.shape)}"
            )
        view.copy_(tensor.detach())


@dataclass(frozen=True, slots=True)
class Message:
    """A slot with room for `samples` samples: its values, and the bytes that travel."""

    slot: int
    samples: int
    views: tuple[Tensor, ...]
    buffer: Buffer


class Ring:
    """The slots at one end of a channel; `sizes` are all the sample counts that its messages have.

    It outlives the channel ends below, which belong to one stretch of steps: training, or an evaluation.
    """

    def __init__(
        self,
        communicator: Communicator,
        channel: Channel,
        values: Sequence[ValueSpec],
        sizes: Sequence[int],
        device: torch.device | str = "cpu",
    ):
        self.communicator = communicator
        self.channel = channel
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
        slots = [torch.empty(largest, dtype=torch.uint8, device=device) for _ in range(channel.slots)]
        self.bytes = largest * channel.slots
        self._messages = {
            (slot, samples): Message(
                slot,
                samples,
                message_views(memory, self.values, samples),
                communicator.prepare(memory[: message_bytes(self.values, samples)]),
            )
            for slot, memory in enumerate(slots)
            for samples in sorted(set(sizes))
        }

    def message(self, slot: int, samples: int) -> Message:
        """The slot as a message of so many samples."""
        return self._messages[slot, samples]


class SendChannel:
    """The sending end: a message waits in its slot until the other end has taken it.

    The k-th message has counts[k mod len(counts)] samples: one cycle is one step.
    """

    def __init__(self, ring: Ring, counts: Sequence[int]):
        self._ring = ring
        self._counts = tuple(counts)
        self._sent = 0
        self._under_way: deque[Request] = deque()

    def send(self, tensors: Sequence[Tensor]) -> None:
        """Start sending the next message of the cycle, one tensor [samples, ...] for each value it carries.

        Copies them; waits only if all slots are still on their way.
        """
        channel, communicator = self._ring.channel, self._ring.communicator
        if len(self._under_way) == channel.slots:
            communicator.wait([self._under_way.popleft()])
        samples = self._counts[self._sent % len(self._counts)]
        message = self._ring.message(self._sent % channel.slots, samples)
        try:
            pack(message.views, tensors, self._ring.values)
        except CommunicationError as error:
            raise CommunicationError(f"{channel_name(channel)}: {error}") from None
        self._under_way.append(communicator.isend(message.buffer, channel.target, channel.tag))
        self._sent += 1

    def flush(self) -> None:
        """Wait until everything sent has been taken."""
        self._ring.communicator.wait(list(self._under_way))
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
        self._posted: deque[tuple[Message, Request]] = deque()
        self._lent: set[int] = set()
        for slot in range(ring.channel.slots):
            self._post(slot)

    def next(self) -> Message:
        """Wait for the oldest message that is still to come; its views hold until `release`."""
        if not self._posted:
            raise CommunicationError(
                f"{channel_name(self._ring.channel)}: no receive is posted, {len(self._lent)} of "
                f"{self._ring.channel.slots} slots are in use; release one before the next message"
            )
        message, request = self._posted[0]
        self._ring.communicator.wait([request])
        self._posted.popleft()
        self._lent.add(message.slot)
        return message

    def release(self, message: Message) -> None:
        """Give the slot back: its memory belongs to a later message from now on."""
        if message.slot not in self._lent:
            raise CommunicationError(f"{channel_name(self._ring.channel)}: slot {message.slot} is not in use")
        self._lent.remove(message.slot)
        self._post(message.slot)

    def close(self) -> int:
        """Take back every posted receive. Returns how many messages had come that nobody asked for: 0 if all
        ranks stopped at the same step."""
        unwanted = sum(not self._ring.communicator.cancel(request) for _, request in self._posted)
        self._posted.clear()
        self._numbers = iter(range(0))
        return unwanted

    def _post(self, slot: int) -> None:
        number = next(self._numbers, None)
        if number is not None:
            channel = self._ring.channel
            message = self._ring.message(slot, self._counts[number % len(self._counts)])
            request = self._ring.communicator.irecv(message.buffer, channel.source, channel.tag)
            self._posted.append((message, request))


def channel_name(channel: Channel) -> str:
    """How an error speaks of a channel."""
    ends = f"from rank {channel.source} to rank {channel.target}"
    return f"edge {channel.edge} ({channel.direction.value}s {ends})"


def _offsets(values: Sequence[ValueSpec], samples: int) -> list[int]:
    """Where each value starts, and where the message ends."""
    offsets = [0]
    for value in values:
        offsets.append(offsets[-1] + -(-samples * value.bytes // ALIGNMENT) * ALIGNMENT)
    return offsets
