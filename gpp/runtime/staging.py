"""How a message's bytes get from the device that computes to memory that the message layer reads, and back.

The layer knows nothing of streams, and no device ever waits for a message: the host alone decides. It starts
a send when the device has written the slot (an event says so, which is polled with the messages), and posts a
receive into a slot again when the device has read it. Three ways: stages compute on the host and share its
memory (`OnHost`); a device whose messages are staged in pinned memory, by copies on a stream of their own
(`Pinned`); a device whose memory the MPI library takes (`OnDevice`).
"""

from collections.abc import Callable, Sequence
from ctypes import memmove
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from .communicator import CommunicationError

SMALL = 1 << 22  # bytes: torch's own copies may use several threads, but they take longer to begin

Write = Callable[[Sequence[Tensor]], None]


class Slot(Protocol):
    """The memory of one message at one end of a channel, used again and again.

    A sender writes it, waits until it is `ready` and sends; a receiver is told when a message has `arrived`
    and when stages have `launched` all that reads it, and waits until it is `ready` for the next one.
    """

    @property
    def wire(self) -> Tensor:
        """The bytes [n] that travel."""

    @property
    def local(self) -> Tensor:
        """The bytes [n] that stages work on; the same memory where nothing is staged."""

    def writer(self, views: Sequence[Tensor]) -> Write:
        """What copies tensors to these views of `wire`, of the same shapes and types, sooner or later."""

    def arrived(self, size: int) -> None:
        """A message of `size` bytes is in `wire`: what stages do from now on finds it in `local`."""

    def launched(self) -> None:
        """Stages will not use the message any more but for what they have launched."""

    def ready(self) -> bool:
        """Whether the device has done with `wire` what it was last asked to. Never waits."""

    def settle(self) -> None:
        """Wait until it is ready."""


class Staging(Protocol):
    """Makes the slots of a rank."""

    @property
    def is_polled(self) -> bool:
        """Whether slots become ready only later."""

    def slot(self, size: int, *, sending: bool) -> Slot:
        """A slot of `size` bytes of its own at a sending or receiving end."""

    def landing(self, size: int, cuts: Sequence[int]) -> tuple[Tensor, Sequence[Slot]]:
        """Memory [size] that stages work on, and a receiving slot for each part of it between two `cuts`."""

    def joined(self, parts: Sequence[Tensor]) -> Tensor:
        """The rows of several messages, one after the other: a stage wants them in one piece."""


class HostSlot:
    """Host memory that stages on the host share."""

    def __init__(self, memory: Tensor) -> None:
        self.wire = self.local = memory

    def writer(self, views: Sequence[Tensor]) -> Write:
        """See `Slot`."""
        places = [(view.data_ptr(), view.nbytes, view) for view in views]

        def write(tensors: Sequence[Tensor]) -> None:
            for (address, size, view), tensor in zip(places, tensors, strict=True):
                if tensor.nbytes != size:  # the first ones were looked at, see `buffers`
                    raise CommunicationError(
                        f"a stage has made {tensor.nbytes} bytes of shape {tuple(tensor.shape)} where the "
                        f"message has {size}: batches must be of the same shapes and types in every step"
                    )
                if size <= SMALL and tensor.is_contiguous():
                    memmove(address, tensor.data_ptr(), size)
                else:
                    view.copy_(tensor.detach())

        return write

    def arrived(self, size: int) -> None:
        """See `Slot`."""

    def launched(self) -> None:
        """See `Slot`."""

    def ready(self) -> bool:
        """See `Slot`."""
        return True

    def settle(self) -> None:
        """See `Slot`."""


class OnHost:
    """Stages compute on the host."""

    is_polled = False

    def slot(self, size: int, *, sending: bool) -> HostSlot:
        """See `Staging`."""
        return HostSlot(_bytes(size))

    def landing(self, size: int, cuts: Sequence[int]) -> tuple[Tensor, Sequence[HostSlot]]:
        """See `Staging`."""
        memory = _bytes(size)
        return memory, [HostSlot(part) for part in _parts(memory, cuts)]

    def joined(self, parts: Sequence[Tensor]) -> Tensor:
        """See `Staging`."""
        return torch.cat(list(parts))


class DeviceSlot:
    """Device memory that is sent from and received into: everything is on the stream of the stages."""

    def __init__(self, memory: Tensor, device: torch.device) -> None:
        self.wire = self.local = memory
        self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._device = device

    def writer(self, views: Sequence[Tensor]) -> Write:
        """See `Slot`."""

        def write(tensors: Sequence[Tensor]) -> None:
            for view, tensor in zip(views, tensors, strict=True):
                view.copy_(tensor)
            self.launched()

        return write

    def arrived(self, size: int) -> None:
        """See `Slot`. What MPI has received, every later launch sees."""

    def launched(self) -> None:
        """See `Slot`."""
        self._done.record(torch.cuda.current_stream(self._device))

    def ready(self) -> bool:
        """See `Slot`."""
        return bool(self._done.query())  # type: ignore[no-untyped-call]

    def settle(self) -> None:
        """See `Slot`."""
        self._done.synchronize()


class OnDevice:
    """The message layer takes device memory."""

    is_polled = True

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def slot(self, size: int, *, sending: bool) -> DeviceSlot:
        """See `Staging`."""
        return DeviceSlot(_bytes(size, self._device), self._device)

    def landing(self, size: int, cuts: Sequence[int]) -> tuple[Tensor, Sequence[DeviceSlot]]:
        """See `Staging`."""
        memory = _bytes(size, self._device)
        return memory, [DeviceSlot(part, self._device) for part in _parts(memory, cuts)]

    def joined(self, parts: Sequence[Tensor]) -> Tensor:
        """See `Staging`."""
        return torch.cat(list(parts))


class PinnedSlot:
    """Pinned host memory, and `local` device memory of the same size where messages arrive."""

    def __init__(
        self, size: int, device: torch.device, side: torch.cuda.Stream, local: Tensor | None
    ) -> None:
        self.wire = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        self.local = self.wire if local is None else local
        self._device = device
        self._side = side
        # stages have launched what the copy has to wait for
        self._given = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._sources: Sequence[Tensor] = ()  # held until they are copied: their memory is not to be reused

    def writer(self, views: Sequence[Tensor]) -> Write:
        """See `Slot`."""

        def write(tensors: Sequence[Tensor]) -> None:
            self._sources = tuple(tensors)
            self._given.record(torch.cuda.current_stream(self._device))
            self._side.wait_event(self._given)
            with torch.cuda.stream(self._side):
                for view, tensor in zip(views, tensors, strict=True):
                    view.copy_(tensor, non_blocking=True)
            self._copied.record(self._side)

        return write

    def arrived(self, size: int) -> None:
        """See `Slot`. Copied as soon as the launches that read the message before have run."""
        self._side.wait_event(self._given)
        with torch.cuda.stream(self._side):
            self.local[:size].copy_(self.wire[:size], non_blocking=True)
        self._copied.record(self._side)
        torch.cuda.current_stream(self._device).wait_event(self._copied)

    def launched(self) -> None:
        """See `Slot`. The next message may arrive when this one is copied, it need not have been used."""
        self._given.record(torch.cuda.current_stream(self._device))

    def ready(self) -> bool:
        """See `Slot`."""
        if not self._copied.query():  # type: ignore[no-untyped-call]
            return False
        self._sources = ()
        return True

    def settle(self) -> None:
        """See `Slot`."""
        self._copied.synchronize()
        self._sources = ()


class Pinned:
    """Messages of a device lie in pinned host memory."""

    is_polled = True

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def slot(self, size: int, *, sending: bool) -> PinnedSlot:
        """See `Staging`."""
        return PinnedSlot(size, self._device, self._side, None if sending else _bytes(size, self._device))

    def landing(self, size: int, cuts: Sequence[int]) -> tuple[Tensor, Sequence[PinnedSlot]]:
        """See `Staging`."""
        memory = _bytes(size, self._device)
        parts = _parts(memory, cuts)
        return memory, [PinnedSlot(len(part), self._device, self._side, part) for part in parts]

    def joined(self, parts: Sequence[Tensor]) -> Tensor:
        """See `Staging`."""
        return torch.cat(list(parts))


def _bytes(size: int, device: torch.device | None = None) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, device=device)


def _parts(memory: Tensor, cuts: Sequence[int]) -> list[Tensor]:
    return [memory[start:stop] for start, stop in pairwise(cuts)]


def host_staging(device: torch.device) -> Staging:
    """The way through host memory, where stages compute on `device`."""
    return OnHost() if device.type == "cpu" else Pinned(device)
