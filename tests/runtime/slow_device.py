"""A device that does what it is told only after it has been looked at some times; and sees who is early."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from gpp.runtime.staging import Write

GARBAGE = 0xA5


class SlowSlot:
    """See `gpp.runtime.staging.Slot`. What is sent before it is written is garbage; what is received before
    the last message has been read fails."""

    def __init__(self, size: int, lag: int, local: Tensor | None = None) -> None:
        self.wire = torch.full((size,), GARBAGE, dtype=torch.uint8)
        self.local = self.wire if local is None else local
        self.lag = lag
        self.looks = 0  # before it is done
        self.work: Callable[[], None] = lambda: None

    def writer(self, views: Sequence[Tensor]) -> Write:
        def write(tensors: Sequence[Tensor]) -> None:
            assert self.looks == 0, "filled again before it was sent"
            self.wire.fill_(GARBAGE)
            sources = [tensor.clone() for tensor in tensors]

            def copy() -> None:
                for view, source in zip(views, sources, strict=True):
                    view.copy_(source)

            self.work, self.looks = copy, self.lag

        return write

    def arrived(self, size: int) -> None:
        assert self.looks == 0, "a message arrived before the last one was read"
        self.local[:size].copy_(self.wire[:size])

    def launched(self) -> None:
        seen = self.wire.clone()

        def check() -> None:
            assert torch.equal(self.wire, seen), "overwritten before it was read"

        self.work, self.looks = check, self.lag

    def ready(self) -> bool:
        if self.looks:
            self.looks -= 1
            if self.looks == 0:
                self.work()
        return self.looks == 0

    def settle(self) -> None:
        while not self.ready():
            pass


class SlowDevice:
    """See `gpp.runtime.staging.Staging`."""

    is_polled = True

    def __init__(self, lag: int) -> None:
        self.lag = lag
        self.slots: list[SlowSlot] = []
        self.landings = 0

    def slot(self, size: int, *, sending: bool) -> SlowSlot:
        self.slots.append(SlowSlot(size, self.lag, None if sending else torch.full((size,), GARBAGE).byte()))
        return self.slots[-1]

    def landing(self, size: int, cuts: Sequence[int]) -> tuple[Tensor, Sequence[SlowSlot]]:
        memory = torch.full((size,), GARBAGE).byte()
        self.landings += 1
        made = [SlowSlot(stop - start, self.lag, memory[start:stop]) for start, stop in pairwise(cuts)]
        self.slots += made
        return memory, made

    def joined(self, parts: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(parts))
