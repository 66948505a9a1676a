"""A model of CUDA's streams and events: what is launched runs later, in any order that the rules allow.

Memory holds one number. Streams run their operations in order, streams among themselves in a random one; a
`copy_` is launched on the current stream. Only what `gpp.runtime.staging` uses.
"""

import random
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


class Machine:
    """Takes the place of the module torch."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.streams: list[Stream] = []
        self.compute = self.current = Stream(self)
        self.cuda = Cuda(self)
        self.uint8 = None

    def empty(self, size: int, **_: Any) -> "Memory":
        return Memory(self)

    def launch(self, work: Callable[[], None]) -> None:
        self.current.queue.append((lambda: True, work))

    def step(self) -> bool:
        """Run one operation that may run; False: there is none."""
        able = [s for s in self.streams if s.queue and s.queue[0][0]()]
        if not able:
            return False
        self.random.choice(able).queue.popleft()[1]()
        return True

    def some(self) -> None:
        for _ in range(self.random.choice((0, 0, 1, 1, 2, 5))):
            self.step()


class Stream:
    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.queue: deque[tuple[Callable[[], bool], Callable[[], None]]] = deque()
        machine.streams.append(self)

    def wait_event(self, event: "Event") -> None:
        number = event.recorded
        self.queue.append((lambda: event.done >= number, lambda: None))


class Event:
    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.recorded = self.done = 0

    def record(self, stream: Stream) -> None:
        self.recorded += 1
        number = self.recorded

        def finish() -> None:
            self.done = number

        stream.queue.append((lambda: True, finish))

    def query(self) -> bool:
        self.machine.some()
        return self.done == self.recorded

    def synchronize(self) -> None:
        while self.done < self.recorded:
            assert self.machine.step(), "the device waits for something that nobody launches"


@dataclass
class Memory:
    machine: Machine
    value: int = -1

    def __getitem__(self, _: slice) -> "Memory":
        return self

    def copy_(self, source: "Memory", non_blocking: bool = False) -> None:
        def copy() -> None:
            self.value = source.value

        self.machine.launch(copy)


class Cuda:
    """Takes the place of torch.cuda."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    def Event(self) -> Event:
        return Event(self.machine)

    def Stream(self, device: Any) -> Stream:
        return Stream(self.machine)

    def current_stream(self, device: Any) -> Stream:
        return self.machine.current

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        kept, self.machine.current = self.machine.current, stream
        try:
            yield
        finally:
            self.machine.current = kept
