"""Files between ranks, beside training: each function is one side, to be gone on with when what it has handed
out last is done. Nothing in here waits."""

import os
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpp.checkpoint.manifest import manifest_from_json
from gpp.checkpoint.shelf import part_name
from gpp.checkpoint.tensors import CheckpointError, write_text

from .collectives import PARCELS, VOTES
from .communicator import Communicator, Request

PIECE = 4 << 20  # bytes of a message: what training sends does not wait behind more than a few of them
AHEAD = 2  # messages under way

Waits = Generator[Request, None, bool]  # what it waits for, and in the end whether all went well


class Work:
    """Something that a thread does, as if it were a message."""

    def __init__(self, future: Future[Any]) -> None:
        self.future = future

    def done(self) -> bool:
        """See `Request`; what failed says so by its result."""
        return self.future.done()


class Tasks:
    """Several such functions, side by side."""

    def __init__(self, tasks: Iterable[Waits]) -> None:
        self._pending: list[tuple[Waits, Request | None]] = [(task, None) for task in tasks]
        self.good = True

    def go_on(self) -> bool:
        """As far as it goes; whether something is left."""
        left: list[tuple[Waits, Request | None]] = []
        for task, request in self._pending:
            waits = request
            while waits is None or waits.done():
                try:
                    waits = next(task)
                except StopIteration as end:
                    self.good = self.good and bool(end.value)
                    break
            else:
                left.append((task, waits))
        self._pending = left
        return bool(left)


def sending(comm: Communicator, target: int, folder: Path, text: str) -> Waits:
    """A rank's part to `target`: its manifest and files; without a text there is none to be had."""
    content = text.encode()
    yield comm.isend(torch.tensor([len(content)]), target, PARCELS)
    if content:
        yield comm.isend(torch.frombuffer(bytearray(content), dtype=torch.uint8), target, PARCELS)
        for name, record in manifest_from_json(text, folder).part.files.items():
            yield from sending_file(comm, target, folder / name, record.bytes)
    return bool(content)


def receiving(comm: Communicator, source: int, folder: Path, pool: Executor) -> Waits:
    """Its part from `source`; it counts when its manifest is there."""
    size = torch.zeros(1, dtype=torch.int64)
    yield comm.irecv(size, source, PARCELS)
    if not int(size):
        return False
    content = torch.empty(int(size), dtype=torch.uint8)
    yield comm.irecv(content, source, PARCELS)
    text, good = content.numpy().tobytes().decode(), True
    for name, record in manifest_from_json(text, folder).part.files.items():
        there = yield from receiving_file(comm, source, folder / name, record.bytes, pool)
        good = good and there
    if not good:
        return False
    try:
        write_text(folder / part_name(source), text)
    except CheckpointError:
        return False
    return True


def sending_file(comm: Communicator, target: int, path: Path, size: int) -> Waits:
    """A file, out of its own pages."""
    if not size:
        return True
    going: deque[Request] = deque()
    for piece in _pieces(torch.from_file(str(path), shared=True, size=size, dtype=torch.uint8)):
        going.append(comm.isend(piece, target, PARCELS))
        if len(going) == AHEAD:
            yield going.popleft()
    yield from going
    return True


def receiving_file(comm: Communicator, source: int, path: Path, size: int, pool: Executor) -> Waits:
    """A file of so many bytes, which a thread writes."""
    slots = list(_pieces(torch.empty(min(size, 2 * AHEAD * PIECE), dtype=torch.uint8)))
    writes: list[Future[bool] | None] = [None] * len(slots)
    coming: deque[tuple[Request, int]] = deque()  # with where it belongs in the file
    descriptor, good = _made(path), True

    def arrived(at: int) -> None:
        slot = at // PIECE % len(slots)
        writes[slot] = pool.submit(_write, descriptor, slots[slot][: size - at], at)

    for at in range(0, size, PIECE):
        slot = at // PIECE % len(slots)
        if (before := writes[slot]) is not None:
            yield Work(before)
            good = good and before.result()
        coming.append((comm.irecv(slots[slot][: size - at], source, PARCELS), at))
        if len(coming) == AHEAD:
            request, place = coming.popleft()
            yield request
            arrived(place)
    for request, place in coming:
        yield request
        arrived(place)
    for last in writes:
        if last is not None:
            yield Work(last)
            good = good and last.result()
    if descriptor is not None:
        os.close(descriptor)
    return good and descriptor is not None


def voting(comm: Communicator, *, good: bool) -> Waits:
    """Whether all ranks say that all is well; the same on all of them. In the round of distance d a rank
    hears of 2d of them."""
    known, distance = torch.tensor([int(good)]), 1
    while distance < comm.size:
        heard = torch.zeros(1, dtype=torch.int64)
        coming = comm.irecv(heard, (comm.rank - distance) % comm.size, VOTES)
        yield comm.isend(known.clone(), (comm.rank + distance) % comm.size, VOTES)
        yield coming
        known = torch.minimum(known, heard)
        distance *= 2
    return bool(known)


def _pieces(memory: Tensor) -> Iterator[Tensor]:
    return (memory[at : at + PIECE] for at in range(0, memory.numel(), PIECE))


def _made(path: Path) -> int | None:
    try:
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    except OSError:
        return None


def _write(descriptor: int | None, piece: Tensor, at: int) -> bool:
    if descriptor is None:
        return False
    left = memoryview(piece.numpy().data)
    try:
        while left:
            count = os.pwrite(descriptor, left, at)
            left, at = left[count:], at + count
    except OSError:
        return False
    return True
