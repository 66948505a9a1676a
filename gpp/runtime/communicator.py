"""What the runtime needs of a message layer, whatever carries it (threads of one process, MPI).

Buffers are contiguous torch tensors of dtype uint8 unless said otherwise. Rank r is device r of the plan.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import Tensor


class CommunicationError(RuntimeError):
    """A message could not be sent or received, or another rank has failed."""


class Request(Protocol):
    """A message under way."""

    def done(self) -> bool:
        """Whether it has finished; makes progress, never waits."""


class Communicator(Protocol):
    """Point-to-point messages and a few collectives among `size` ranks."""

    @property
    def rank(self) -> int:
        """This rank."""

    @property
    def size(self) -> int:
        """How many ranks there are."""

    def isend(self, buffer: Tensor, target: int, tag: int) -> Request:
        """Start a send; `buffer` must stay as it is until the request is done."""

    def irecv(self, buffer: Tensor, source: int, tag: int) -> Request:
        """Post a receive; messages of one (source, tag) match in order."""

    def cancel(self, request: Request) -> None:
        """Take a posted receive back that nothing will match."""

    def wait(self, requests: Sequence[Request]) -> None:
        """Wait until all are done, giving the processor away while idle. Raises CommunicationError."""

    def all_to_all(self, group: tuple[int, ...], pieces: Sequence[Tensor]) -> list[Tensor]:
        """Piece i goes to rank group[i]; returns what each member sent to this rank, in group order. Pieces
        addressed to the same member have the same size on every rank."""

    def all_gather(self, group: tuple[int, ...], piece: Tensor) -> list[Tensor]:
        """Every member's piece, in group order; sizes may differ."""

    def all_gather_object(self, value: Any) -> list[Any]:
        """Every rank's (small, picklable) object, by rank."""

    def broadcast_object(self, make: Callable[[], Any], root: int = 0) -> Any:
        """`make()` is called on `root` alone; every rank returns its result."""

    def barrier(self) -> None:
        """Wait for all ranks."""

    def abort(self, code: int) -> None:
        """End every rank now."""
