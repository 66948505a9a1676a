"""Seconds of calls: on the GPU alone, and as their caller sees them.

GPU time is that of a CUDA graph which runs a call on each of several sets of inputs in turn, together more
than the L2 cache holds, so that every call finds it cold. Wall time is a loop of plain calls up to the moment
when the GPU has done them, by their number: launches and autograd included.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from statistics import median, quantiles
from time import perf_counter
from typing import Any, Protocol

import torch

Call = Callable[[], Any]


@dataclass(frozen=True, slots=True)
class Spread:
    """Seconds of a call: the median, and what a tenth of the measurements is below and above.

    `graph`: of a CUDA graph; else of plain calls one after the other, gaps between launches included.
    """

    median: float
    low: float
    high: float
    graph: bool = True


def spread(seconds: Sequence[float], *, graph: bool = True) -> Spread:
    """Of at least one measurement."""
    if len(seconds) == 1:
        return Spread(seconds[0], seconds[0], seconds[0], graph)
    tenths = quantiles(seconds, n=10, method="inclusive")
    return Spread(median(seconds), tenths[0], tenths[-1], graph)


class Clock(Protocol):
    """What cases are timed with."""

    device: torch.device

    def sets(self, size: int) -> int:
        """How many sets of inputs of `size` bytes it takes for the cache to be cold."""
        ...

    def scope(self) -> AbstractContextManager[Any]:
        """In which calls must be prepared and made."""
        ...

    def gpu(self, calls: Sequence[Call]) -> Spread:
        """GPU seconds of one call."""
        ...

    def wall(self, calls: Sequence[Call]) -> Spread:
        """Wall seconds of one call."""
        ...

    def forget(self) -> None:
        """What is in caches: compiled functions, freed memory."""
        ...


class CudaClock:
    """The clock of a CUDA device. Calls are prepared and made on a stream of its own, as graphs demand."""

    def __init__(self, seconds: float = 0.1, device: torch.device | None = None) -> None:
        self.device = device or torch.device("cuda", torch.cuda.current_device())
        self.seconds = seconds
        self._stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        about = torch.cuda.get_device_properties(self.device)
        self._cache, self._memory = about.L2_cache_size, about.total_memory

    def sets(self, size: int) -> int:
        """Twice what the cache holds, in at most 64 sets and an eighth of the memory."""
        cold = -(-2 * self._cache // max(size, 1))
        return max(1, min(cold, 64, self._memory // 8 // max(size, 1)))

    def scope(self) -> AbstractContextManager[Any]:
        """The clock's stream."""
        return torch.cuda.stream(self._stream)

    def gpu(self, calls: Sequence[Call]) -> Spread:
        """Replays of a graph of about two milliseconds, at most 100 of them in about `seconds`.

        What waits for the device cannot be in a graph, some rivals do: their calls are made one by one.
        """
        with self.scope():
            for call in (*calls[:2], *calls):  # the first compiles
                call()
            once = self._between(lambda: [call() for call in calls])
            turns = max(1, min(50, int(2e-3 / max(once, 1e-6))))

            def run() -> None:
                for _ in range(turns):
                    for call in calls:
                        call()

            graph = self._captured(run)
            replay: Call = run if graph is None else graph.replay
            self._between(replay)
            length = self._between(replay)
            count = max(5, min(100, int(self.seconds / max(length, 1e-6))))
            found = [self._between(replay) / (turns * len(calls)) for _ in range(count)]
        return spread(found, graph=graph is not None)

    def _captured(self, run: Call) -> torch.cuda.CUDAGraph | None:
        """The graph of a run, or none if there cannot be one."""
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self._stream):
                run()
        except torch.cuda.OutOfMemoryError:
            raise
        except RuntimeError:
            torch.cuda.synchronize()
            return None
        return graph

    def wall(self, calls: Sequence[Call]) -> Spread:
        """Loops of about five milliseconds, as many as fit in about half of `seconds`."""
        with self.scope():
            start = perf_counter()
            for call in calls:
                call()
            self._stream.synchronize()
            once = perf_counter() - start
            turns = max(1, int(5e-3 / max(once, 1e-6)))
            found = []
            for _ in range(max(5, min(15, int(self.seconds / 2 / max(once * turns, 1e-6))))):
                start = perf_counter()
                for _ in range(turns):
                    for call in calls:
                        call()
                self._stream.synchronize()
                found.append((perf_counter() - start) / (turns * len(calls)))
        return spread(found)

    def forget(self) -> None:
        """See `Clock`."""
        torch.compiler.reset()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()

    def _between(self, run: Call) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record(self._stream)
        run()
        end.record(self._stream)
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3
