"""A rank's ends of all channels of one schedule: rings that outlive stretches of steps."""

from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from gpp.program.stage import StageFunctions
from gpp.schedule.task import Channel, Receive, Samples, Schedule, Send, Transfer

from .buffers import Landing, Message, ReceiveChannel, Ring, SendChannel, channel_values, landing
from .communicator import Communicator
from .staging import Staging

_Ends = tuple[int, int, int]  # tag, source, target


@dataclass(slots=True)
class Held:
    """A message in use: a tensor [samples, ...] for each value.

    `message` is where it lies, None for one between stages of this rank, which is not copied.
    """

    views: Sequence[Tensor]
    message: Message | None = None
    channel: ReceiveChannel | None = None

    def release(self) -> None:
        """Give the slot back."""
        if self.channel is not None and self.message is not None:
            self.channel.release(self.message)


class Channels:
    """Opened for a stretch of steps, closed when the stretch is over, then opened again."""

    def __init__(
        self,
        comm: Communicator,
        schedule: Schedule,
        stages: Sequence[StageFunctions],
        staging: Staging,
    ) -> None:
        self._comm = comm
        self._staging = staging
        self._rings = _rings(comm, schedule, stages, self._staging) if stages else {}
        # by tag and rank at the other end: a tag is an edge and a direction
        self._memory = {
            slot.local.untyped_storage().data_ptr() for ring, _ in self._rings.values() for slot in ring.slots
        }
        self._receivers: dict[tuple[int, int], ReceiveChannel] = {}
        self._senders: dict[tuple[int, int], SendChannel] = {}
        self._own: dict[int, deque[Held]] = defaultdict(deque)  # by tag, between stages of this rank

    def open(self, steps: int) -> None:
        """Post the first receives of a stretch of `steps` steps."""
        for (tag, source, target), (ring, counts) in self._rings.items():
            if source == self._comm.rank:
                self._senders[tag, target] = SendChannel(ring, counts)
            else:
                self._receivers[tag, source] = ReceiveChannel(ring, counts, len(counts) * steps)
        if self._staging.is_polled:
            self._comm.meanwhile(self._progress)

    def _progress(self) -> bool:
        """Of all ends; whether there is more to do."""
        ends: list[SendChannel | ReceiveChannel] = [*self._senders.values(), *self._receivers.values()]
        return any([end.progress() for end in ends])  # a list: every one has its turn

    def close(self) -> None:
        """Wait for what is still on its way out."""
        if self._staging.is_polled:
            self._comm.no_longer(self._progress)
        for sender in self._senders.values():
            sender.flush()
        for receiver in self._receivers.values():
            receiver.close()

    def receive(self, transfer: Transfer) -> Held:
        """Wait for a message."""
        if transfer.is_local:
            return self._own[transfer.tag].popleft()
        channel = self._receivers[transfer.tag, transfer.source]
        message = channel.next()
        return Held(message.views, message, channel)

    def send(self, transfer: Transfer, rows: Sequence[Tensor]) -> None:
        """Copy the rows of each value into a slot and start sending it; hand them over as they are to a
        stage of this rank."""
        if transfer.is_local:
            self._own[transfer.tag].append(Held([self._kept(value) for value in rows]))
            return
        self._senders[transfer.tag, transfer.target].send(rows)

    def joined(self, parts: Sequence[Held]) -> Sequence[Tensor]:
        """Each value of the messages, one after the other; copied only if that is not how they lie."""
        if len(parts) == 1:
            return parts[0].views
        if (whole := _as_they_lie(parts)) is not None:
            return whole
        return [self._staging.joined(rows) for rows in zip(*(p.views for p in parts), strict=True)]

    def _kept(self, value: Tensor) -> Tensor:
        """For another stage of this rank: as it is, but packed as in a message, and not in a message's own
        memory: that may be given back before the other stage runs."""
        lent = value.untyped_storage().data_ptr() in self._memory
        return value.clone(memory_format=torch.contiguous_format) if lent else value.contiguous()


def apart(stash: Sequence[Tensor], gradients: Sequence[Held]) -> list[Tensor]:
    """The tensors, those that are views of the gradients' buffers copied: these are given back before the
    weight half runs."""
    if not stash:
        return []
    lent = {view.untyped_storage().data_ptr() for held in gradients for view in held.views}
    return [t.clone() if t.untyped_storage().data_ptr() in lent else t for t in stash]


def _as_they_lie(parts: Sequence[Held]) -> Sequence[Tensor] | None:
    """The values of messages that lie one after the other in a landing, and are all of it."""
    channels = [part.channel for part in parts]
    landing = channels[0].landing if channels[0] is not None else None
    if landing is None or landing.sources != tuple(c.source for c in channels if c is not None):
        return None
    numbers = {part.message.number for part in parts if part.message is not None}
    return landing.whole[numbers.pop()] if len(numbers) == 1 else None


def _rings(
    comm: Communicator, schedule: Schedule, stages: Sequence[StageFunctions], staging: Staging
) -> dict[_Ends, tuple[Ring, list[int]]]:
    """A ring for every channel that ends at this rank, with the samples of its messages in order."""
    carried: dict[_Ends, list[Samples]] = defaultdict(list)
    for instruction in schedule.programs[comm.rank]:
        if isinstance(instruction, Send | Receive) and not instruction.transfer.is_local:
            t = instruction.transfer
            carried[t.tag, t.source, t.target].append(t.samples)
    ports = {p.edge: p.values for f in stages for p in (*f.receives, *f.sends)}
    channels = {(c.tag, c.source, c.target): c for c in schedule.channels}
    into: dict[_Ends, Landing] = {}
    for tag in {tag for tag, _, target in carried if target == comm.rank}:
        together = {
            channels[e]: samples for e, samples in carried.items() if (e[0], e[2]) == (tag, comm.rank)
        }
        one = next(iter(together))
        values = channel_values(ports[one.edge], one.direction)
        ordered = _side_by_side(together)
        if ordered is not None and len(values) == 1:
            place = landing(ordered, values[0], staging)
            into |= {(tag, source, comm.rank): place for source in place.sources}
    rings = {}
    for ends, samples in carried.items():
        channel = channels[ends]
        counts = [len(part) for part in samples]
        ring = Ring(comm, channel, ports[channel.edge], counts, staging, into.get(ends))
        rings[ends] = (ring, counts)
    return rings


def _side_by_side(channels: Mapping[Channel, Sequence[Samples]]) -> dict[Channel, int] | None:
    """Several channels in the order of their samples, with the samples of a message, where the messages that
    come at one time are always next to each other, in the same order and of the same sizes."""
    ordered = sorted(channels, key=lambda c: channels[c][0].start)
    counts = {channel: len(channels[channel][0]) for channel in ordered}
    if len(ordered) < 2 or len({channel.slots for channel in ordered}) > 1:
        return None
    if len({len(channels[channel]) for channel in ordered}) > 1:
        return None
    for row in zip(*(channels[channel] for channel in ordered), strict=True):
        if [len(samples) for samples in row] != list(counts.values()):
            return None
        if any(one.stop != other.start for one, other in pairwise(row)):
            return None
    return counts
