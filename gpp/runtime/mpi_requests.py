"""Messages under way between processes. Like `gpp.runtime.mpi` this starts MPI."""

from typing import Protocol, cast

from mpi4py import MPI

from .communicator import Buffer, CommunicationError, wrong_size


class Owner(Protocol):
    """Who makes persistent requests, and frees them."""

    dropped: list[MPI.Request]

    def follow(self, sent: "MpiRequest") -> None:
        """Look after a send that has begun."""


class MpiRequest:
    """A message under way between processes; keeps its buffer alive."""

    def __init__(self, request: MPI.Request, buffer: Buffer, route: tuple[int, int, int], sending: bool):
        self.request = request
        self.buffer = buffer
        self.route = route  # source, target, tag
        self.sending = sending
        self.finished = False
        self.status = MPI.Status()
        self.size = buffer.bytes.numel()

    def done(self) -> bool:
        """See `Request`."""
        if not self.finished:
            try:
                self.finished = self.request.Test(self.status)
            except MPI.Exception as error:
                self.finished = True
                raise failed(error, self.route) from error
            if self.finished and not self.sending:
                self._check_size()
        return self.finished

    def __str__(self) -> str:
        source, target, _ = self.route
        return f"a message to rank {target}" if self.sending else f"a message from rank {source}"

    def _check_size(self) -> None:
        found = self.status.Get_count(MPI.BYTE)
        if found != self.size:
            raise wrong_size(self.route, found, self.size)


class PersistentMpiRequest(MpiRequest):
    """One of MPI's persistent requests. The communicator frees it: when it closes, or sooner if nobody else
    has any use for it."""

    def __init__(
        self,
        owner: Owner,
        request: MPI.Request,
        buffer: Buffer,
        route: tuple[int, int, int],
        sending: bool,
    ):
        super().__init__(request, buffer, route, sending)
        self.owner = owner
        self.finished = True

    def start(self) -> None:
        """See `PersistentRequest`."""
        if not self.finished:
            source, target, tag = self.route
            raise CommunicationError(
                f"the message from rank {source} to rank {target} with tag {tag} is still under way: wait "
                "for it before it is started again"
            )
        self.finished = False
        try:
            cast(MPI.Prequest, self.request).Start()
        except MPI.Exception as error:
            raise failed(error, self.route) from error
        if self.sending:
            self.owner.follow(self)

    def __del__(self) -> None:
        if self.finished:  # freed later: this may be another thread, where MPI is not to be called
            self.owner.dropped.append(self.request)


def failed(error: MPI.Exception, route: tuple[int, int, int]) -> CommunicationError:
    """What is said of a message that MPI did not carry; `route` is its (source, target, tag)."""
    source, target, tag = route
    return CommunicationError(
        f"the message from rank {source} to rank {target} with tag {tag} failed: {error.Get_error_string()}"
    )
