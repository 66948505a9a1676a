import sys
import threading
import time
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from gpp.runtime.data import DataError
from gpp.runtime.prefetch import Prefetcher


class Recorder:
    """Twice the index under `x` and `y`; keeps what was asked for."""

    keys = ("x", "y")

    def __init__(self, bad: int | None = None) -> None:
        self.bad = bad
        self.asked: list[tuple[tuple[int, ...], tuple[str, ...]]] = []

    def __len__(self) -> int:
        return 100

    def read(self, indices: Sequence[int], keys: Sequence[str]) -> dict[str, Tensor]:
        self.asked.append((tuple(indices), tuple(keys)))
        if self.bad in indices:
            raise KeyError("torn page")
        return {key: torch.tensor(indices) * 2 for key in keys}


def pair(step: int) -> range:
    return range(2 * step, 2 * step + 2)


def reading() -> int:
    return sum(thread.name == "read" for thread in threading.enumerate())


def wait_until(seen: list[object], count: int) -> None:
    deadline = time.monotonic() + 10
    while len(seen) < count and time.monotonic() < deadline:
        time.sleep(0.001)


def test_steps_come_in_order_and_nothing_else_is_read() -> None:
    data = Recorder()
    with Prefetcher(data, ["y"], pair, 3, 7) as reader:
        read = [reader.next() for _ in range(4)]
    assert [batch["y"].tolist() for batch in read] == [[12, 14], [16, 18], [20, 22], [24, 26]]
    assert data.asked == [(tuple(pair(step)), ("y",)) for step in range(3, 7)]


def test_it_reads_ahead_but_not_further_than_depth() -> None:
    data = Recorder()
    with Prefetcher(data, ["x"], pair, 0, 50, depth=3) as reader:
        wait_until(data.asked, 3)
        time.sleep(0.05)
        assert len(data.asked) == 3
        reader.next()
        wait_until(data.asked, 4)
        assert len(data.asked) == 4


class Slow(Recorder):
    """A read takes 30 ms, in which it waits as for a disk."""

    def read(self, indices: Sequence[int], keys: Sequence[str]) -> dict[str, Tensor]:
        time.sleep(0.03)
        return super().read(indices, keys)


def test_a_read_overlaps_the_step() -> None:
    """Steps take the longer of reading and computing, 30 ms, not the 60 ms of both."""
    with Prefetcher(Slow(), ["x"], pair, 0, 21) as reader:
        reader.next()
        start = time.perf_counter()
        for _ in range(20):
            time.sleep(0.03)
            reader.next()
        seconds = time.perf_counter() - start
    assert 20 * 0.03 <= seconds < 20 * 0.045


def test_a_reader_in_pure_python_lets_go_of_the_lock_often() -> None:
    before = sys.getswitchinterval()
    try:
        sys.setswitchinterval(0.005)
        Prefetcher(Recorder(), ["x"], pair, 0, 1).close()
        assert sys.getswitchinterval() == pytest.approx(1e-4)
        sys.setswitchinterval(1e-5)
        Prefetcher(Recorder(), ["x"], pair, 0, 1).close()
        assert sys.getswitchinterval() == pytest.approx(1e-5)  # who has chosen less keeps it
    finally:
        sys.setswitchinterval(before)


def test_without_keys_nothing_is_read() -> None:
    data = Recorder()
    with Prefetcher(data, (), pair, 0, 2) as reader:
        assert reading() == 0
        assert [reader.next(), reader.next()] == [{}, {}]
    assert data.asked == []


def test_the_data_sets_own_error_names_sample_and_place() -> None:
    data = Recorder(bad=5)
    with Prefetcher(data, ["x"], pair, 0, 10) as reader:
        reader.next(), reader.next()
        with pytest.raises(
            DataError, match=r"sample 5 cannot be read: KeyError: 'torn page' \(.*prefetch\.py:\d+\)"
        ):
            reader.next()
        with pytest.raises(DataError, match="nothing is left"):
            reader.next()


def test_an_error_of_the_data_layer_comes_as_it_is() -> None:
    def missing(step: int) -> list[int]:
        raise DataError("the data set has no sample 7")

    with (
        Prefetcher(Recorder(), ["x"], missing, 0, 1) as reader,
        pytest.raises(DataError, match=r"^the data set has"),
    ):
        reader.next()


def test_an_error_that_no_sample_has_alone_names_all() -> None:
    class Pairs(Recorder):
        def read(self, indices: Sequence[int], keys: Sequence[str]) -> dict[str, Tensor]:
            if len(indices) > 1:
                raise MemoryError("too many")
            return super().read(indices, keys)

    with (
        Prefetcher(Pairs(), ["x"], pair, 0, 1) as reader,
        pytest.raises(DataError, match="samples 0, 1 together cannot be read: MemoryError"),
    ):
        reader.next()


def test_closing_ends_the_thread_early() -> None:
    data = Recorder()
    reader = Prefetcher(data, ["x"], pair, 0, 10**9)
    reader.next()
    assert reading() == 1
    reader.close()
    reader.close()
    assert reading() == 0
    with pytest.raises(DataError, match="nothing is left"):
        reader.next()


def test_after_the_last_step_nothing_is_left() -> None:
    reader = Prefetcher(Recorder(), ["x"], pair, 2, 3)
    reader.next()
    with pytest.raises(DataError, match="nothing is left"):
        reader.next()
    reader.close()
