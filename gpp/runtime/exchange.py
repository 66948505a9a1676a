"""What members of a group send one another in every step, made once: collectives without anything new."""

from collections.abc import Sequence

from torch import Tensor

from .collectives import PIECES
from .communicator import CommunicationError, Communicator


class Exchange:
    """`outgoing[i]` goes to rank group[i] and `incoming[i]` is what that rank sends here; a member's own two
    are left alone. All members make it, and run theirs in the same order.

    A gather is one in which all that goes out is the same piece. What member a sends to member b has the same
    size on both, else running it raises CommunicationError, as making it does for a group without this rank.
    """

    def __init__(
        self,
        comm: Communicator,
        group: tuple[int, ...],
        outgoing: Sequence[Tensor],
        incoming: Sequence[Tensor],
    ) -> None:
        if comm.rank not in group or len(set(group)) != len(group):
            raise CommunicationError(
                f"a group needs distinct ranks and rank {comm.rank} among them, it is {group}"
            )
        for pieces in (outgoing, incoming):
            if len(pieces) != len(group):
                raise CommunicationError(
                    f"a group of {len(group)} ranks needs as many pieces, there are {len(pieces)}"
                )
        self._comm = comm
        others = [i for i, rank in enumerate(group) if rank != comm.rank]
        self._requests = [
            *(comm.recv_init(incoming[i], group[i], PIECES) for i in others),
            *(comm.send_init(outgoing[i], group[i], PIECES) for i in others),
        ]

    def run(self) -> None:
        """Send what is in the outgoing pieces now, and wait for everyone's."""
        for request in self._requests:
            request.start()
        self._comm.wait(self._requests)
