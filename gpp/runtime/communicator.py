"""What the runtime needs of a message layer, whatever carries it (threads of one process, MPI).

A message is the bytes of a contiguous tensor; both ends name its exact size. Sends are to be thought of as
synchronous: one is done only when a matching receive has taken it. Rank r is device r of the plan.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor

from .doing import Doing
from .halt import Halt
from .watching import Rules


class CommunicationError(RuntimeError):
    """A message could not be sent or received, or another rank has failed."""


class RanksLostError(CommunicationError):
    """Ranks are gone, and it is for the others to go on without them. `ranks` are those known of."""

    def __init__(self, ranks: Sequence[int]) -> None:
        self.ranks = tuple(ranks)
        super().__init__(f"lost {'rank' if len(self.ranks) == 1 else 'ranks'} {', '.join(map(str, ranks))}")


@dataclass(frozen=True, slots=True)
class Buffer:
    """A tensor's bytes, prepared once for many messages.

    `bytes` is a flat uint8 view of the tensor, `handle` what the layer that prepared it passes on.
    """

    bytes: Tensor
    handle: Any = None


def as_bytes(tensor: Tensor) -> Tensor:
    """The tensor's memory as a flat uint8 tensor, not a copy. Raises CommunicationError for one with gaps."""
    if not tensor.is_contiguous():
        raise CommunicationError(
            f"a message must be contiguous, its tensor of shape {tuple(tensor.shape)} has strides "
            f"{tensor.stride()}; send tensor.contiguous()"
        )
    return tensor.detach().reshape(-1).view(torch.uint8)


def wrong_size(route: tuple[int, int, int], found: int, expected: int) -> CommunicationError:
    """What every layer says of a message that is not as long as its receiver thinks.

    `route` is its (source, target, tag).
    """
    source, target, tag = route
    return CommunicationError(
        f"a message from rank {source} to rank {target} with tag {tag} has {found} bytes, "
        f"{expected} were expected"
    )


class Request(Protocol):
    """A message under way."""

    def done(self) -> bool:
        """Whether it has finished; makes progress, never waits. Raises CommunicationError."""


class PersistentRequest(Request, Protocol):
    """A message that is made once and sent or received many times; one that has not been started is done."""

    def start(self) -> None:
        """Send what is in the buffer now, or receive into it; the last such message must be done. Messages of
        one (source, tag) match in the order in which they are started."""


class Communicator(Protocol):
    """Point-to-point messages and a few collectives among `size` ranks.

    Only one thread of a rank calls it. The collectives are called by all ranks of the group, in the same
    order on each.
    """

    @property
    def rank(self) -> int:
        """This rank."""

    @property
    def size(self) -> int:
        """How many ranks there are."""

    @property
    def doing(self) -> Doing:
        """What this rank is at, for who watches."""

    @property
    def halt(self) -> Halt:
        """How this rank is asked to stop after a step."""

    @property
    def hosts(self) -> tuple[str, ...]:
        """The name of each rank's host, by rank; ranks of one host follow one another."""

    def prepare(self, tensor: Tensor) -> Buffer:
        """Wrap a contiguous tensor that will carry many messages: starting one is then cheaper."""

    def isend(self, buffer: Tensor | Buffer, target: int, tag: int) -> Request:
        """Start a send, tag >= 0; `buffer` must stay as it is until the request is done."""

    def irecv(self, buffer: Tensor | Buffer, source: int, tag: int) -> Request:
        """Post a receive; messages of one (source, tag) match in order. A message of another size than the
        buffer is an error."""

    def send_init(self, buffer: Tensor | Buffer, target: int, tag: int) -> PersistentRequest:
        """A send to be started many times."""

    def recv_init(self, buffer: Tensor | Buffer, source: int, tag: int) -> PersistentRequest:
        """A receive to be started many times."""

    def cancel(self, request: Request) -> bool:
        """Take a posted receive back; it is done afterwards. False: a message had already matched it, and
        lies in its buffer."""

    def wait(self, requests: Sequence[Request]) -> None:
        """Wait until all are done, giving the processor away while idle. Raises CommunicationError."""

    def watch_by(self, rules: Rules, folder: Path | None = None) -> None:
        """How patient those who watch over the ranks are, the same on all; and the folder that reports go
        to."""

    def check(self) -> None:
        """Raise CommunicationError if ranks are known to have failed: for who waits for other things than
        messages."""

    def rest(self, seconds: float) -> None:
        """Let so much time pass while messages get on: what a host does whose device computes."""

    def meanwhile(self, poll: Callable[[], bool]) -> None:
        """From now on call `poll` over and over while this rank waits: what it has to do beside messages. It
        returns whether something is still to be done, and calls nothing that waits."""

    def no_longer(self, poll: Callable[[], bool]) -> None:
        """Stop calling `poll`."""

    def all_gather_object(self, value: Any) -> list[Any]:
        """Every rank's (small, picklable) object, by rank."""

    def broadcast_object(self, make: Callable[[], Any], root: int = 0) -> Any:
        """`make()` is called on `root` alone; every rank returns its result. If it raises, so does every
        rank: `root` its own exception, the others CommunicationError with its text."""

    def neighbor_exchange(
        self, sources: Sequence[int], targets: Sequence[int], objects: Sequence[Any]
    ) -> list[Any]:
        """objects[i] goes to targets[i]; returns what each of `sources` sent to this rank, in that order.
        Called by all ranks, and a rank is among another's sources iff that is among its targets."""

    def barrier(self) -> None:
        """Wait for all ranks."""

    def abort(self, code: int) -> NoReturn:
        """End every rank now."""
