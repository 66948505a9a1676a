"""Collectives made of point-to-point messages, the same over every message layer.

A rank that waits in one sleeps, which an MPI library's own collectives do not, and no sub-communicators have
to be made for groups of ranks. Messages of one (source, target, tag) keep their order, so a fixed tag for
each purpose is enough: members of a group call its collectives in the same order.
"""

import pickle
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .communicator import Buffer, CommunicationError, Request
from .doing import Doing
from .halt import halts

RESERVED_TAGS = 5  # a layer that knows no negative tags adds this to every tag
PIECES, OBJECTS, BARRIER = -1, -2, -3
PARCELS, VOTES = -4, -5  # of copies in memory, beside everything else


class Collectives(ABC):
    """The collective half of `Communicator`, given its point-to-point half."""

    def __init__(self) -> None:
        self._polls: list[Callable[[], bool]] = []
        self.doing = Doing()
        self.halt = halts(1)[0]

    @property
    @abstractmethod
    def rank(self) -> int:
        """This rank."""

    @property
    @abstractmethod
    def size(self) -> int:
        """How many ranks there are."""

    @abstractmethod
    def isend(self, buffer: Tensor | Buffer, target: int, tag: int) -> Request:
        """See `Communicator`."""

    @abstractmethod
    def irecv(self, buffer: Tensor | Buffer, source: int, tag: int) -> Request:
        """See `Communicator`."""

    @abstractmethod
    def wait(self, requests: Sequence[Request]) -> None:
        """See `Communicator`."""

    def meanwhile(self, poll: Callable[[], bool]) -> None:
        """See `Communicator`."""
        self._polls.append(poll)

    def no_longer(self, poll: Callable[[], bool]) -> None:
        """See `Communicator`."""
        self._polls.remove(poll)

    def poll(self) -> bool:
        """What is to be done beside messages; whether some of it is still to be done."""
        return any([poll() for poll in self._polls])  # a list: every one has its turn

    def all_gather_object(self, value: Any) -> list[Any]:
        """See `Communicator`. After the round of distance d a rank knows the values of the 2d ranks from
        itself on (Bruck's algorithm: as many rounds as the size has bits)."""
        known = {self.rank: pickle.dumps(value)}
        distance = 1
        while distance < self.size:
            count = min(distance, self.size - distance)
            block = {r: known[r] for r in ((self.rank + i) % self.size for i in range(count))}
            left, right = (self.rank - distance) % self.size, (self.rank + distance) % self.size
            known |= pickle.loads(self._exchange({left: pickle.dumps(block)}, [right])[right])
            distance *= 2
        return [pickle.loads(known[r]) for r in range(self.size)]

    def broadcast_object(self, make: Callable[[], Any], root: int = 0) -> Any:
        """See `Communicator`. Along a binomial tree; a failure of `make` travels in place of its result."""
        position = (self.rank - root) % self.size
        failure: Exception | SystemExit | None = None
        if position == 0:
            try:
                message = pickle.dumps((True, make()))
            except (Exception, SystemExit) as error:  # whatever it is, the others must not wait for ever
                failure = error
                message = pickle.dumps((False, f"{type(error).__name__}: {error}"))
        span = 1
        while span < self.size and not position & span:
            span *= 2
        if position:
            parent = (position - span + root) % self.size
            message = self._exchange({}, [parent])[parent]
        while span > 1:
            span //= 2
            if position + span < self.size:
                self._exchange({(position + span + root) % self.size: message}, [])
        if failure is not None:
            raise failure
        good, value = pickle.loads(message)
        if not good:
            raise CommunicationError(f"rank {root} failed: {value}")
        return value

    def neighbor_exchange(
        self, sources: Sequence[int], targets: Sequence[int], objects: Sequence[Any]
    ) -> list[Any]:
        """See `Communicator`."""
        outgoing = {t: pickle.dumps(o) for t, o in zip(targets, objects, strict=True)}
        received = self._exchange(outgoing, sources)
        return [pickle.loads(received[s]) for s in sources]

    def barrier(self) -> None:
        """See `Communicator`. In the round of distance d a rank hears that 2d ranks have come."""
        nothing = torch.empty(0, dtype=torch.uint8)
        distance = 1
        while distance < self.size:
            arrived = self.irecv(nothing, (self.rank - distance) % self.size, BARRIER)
            self.wait([self.isend(nothing, (self.rank + distance) % self.size, BARRIER), arrived])
            distance *= 2

    def _exchange(self, outgoing: Mapping[int, bytes], sources: Sequence[int]) -> dict[int, bytes]:
        """Send bytes to some ranks and receive some from others: first the sizes, then the contents."""
        lengths = {source: torch.zeros(1, dtype=torch.int64) for source in sources}
        requests = [self.irecv(length, source, OBJECTS) for source, length in lengths.items()]
        for target, content in outgoing.items():
            requests.append(self.isend(torch.tensor([len(content)]), target, OBJECTS))
            # a pickle is never empty, and bytearray copies because a tensor's memory must be writable
            requests.append(
                self.isend(torch.frombuffer(bytearray(content), dtype=torch.uint8), target, OBJECTS)
            )
        self.wait(requests[: len(lengths)])
        contents = {s: torch.empty(int(n), dtype=torch.uint8) for s, n in lengths.items()}
        arriving = [self.irecv(content, source, OBJECTS) for source, content in contents.items()]
        self.wait(requests[len(lengths) :] + arriving)
        return {source: content.numpy().tobytes() for source, content in contents.items()}
