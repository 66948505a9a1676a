"""The lines of a large text file, read in any order without holding the file."""

import gzip
import os
import shutil
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np

from .cache import damaged, made_from, status
from .data import DataError, Indices

CHUNK = 1 << 24  # bytes looked at together for line ends
TAIL = 1 << 16  # bytes at the end in which there must be a line that is not blank
_GZIP = b"\x1f\x8b"


class TextLines:
    """The lines of the file at `path`, counted from 0.

    Where each line starts is found once and kept (8 bytes a line, memory-mapped; see `cache.made_from` for
    where `cache` puts it), and found anew when the file has changed. A gzip file is unpacked there once:
    there is no way into its middle. Blank lines at the end do not count. Raises DataError for a file that is
    missing, empty or damaged.
    """

    def __init__(self, path: Path, cache: str | None = None) -> None:
        self.path = path
        text = path
        if status(path).st_size and _is_packed(path):
            text = made_from(path, "text", cache, lambda file: _unpack(path, file))
            cache = str(text.parent)
        index = made_from(text, "lines", cache, lambda file: _index(path, text, file))
        self._file = text.open("rb", buffering=0)
        self._size, self._index = text.stat().st_size, index
        self._starts = self._mapped()

    def __len__(self) -> int:
        return len(self._starts) - 1

    def _mapped(self) -> Indices:
        try:
            starts = np.memmap(self._index, dtype=np.int64, mode="r")
        except ValueError as error:
            raise damaged(self._index, self.path, "its size") from error
        begin, end = int(starts[0]), int(starts[-1])
        if len(starts) < 2 or begin != 0 or not 0 < end <= self._size or self._size - end > TAIL:
            raise damaged(self._index, self.path, "it is of another file")
        if os.pread(self._file.fileno(), self._size - end, end).strip(b"\r\n"):
            raise damaged(self._index, self.path, "lines are missing")
        return starts

    def read(self, rows: Indices) -> list[bytes]:
        """The lines at `rows`, in their order, without line ends."""
        first, last = self._starts[rows], self._starts[rows + 1]
        if len(rows) and not (0 <= first.min() and (first < last).all() and last.max() <= self._size):
            raise damaged(self._index, self.path, "lines do not follow each other")
        starts, sizes = first.tolist(), (last - first).tolist()
        file = self._file.fileno()
        # All are asked for before the first is waited for: 4096 lines from a disk then took a quarter of the
        # time. Both calls let go of the interpreter's lock, which a page fault in mapped memory keeps.
        if hasattr(os, "posix_fadvise"):
            for start, size in zip(starts, sizes, strict=True):
                os.posix_fadvise(file, start, size, os.POSIX_FADV_WILLNEED)
        pairs = zip(starts, sizes, strict=True)
        return [os.pread(file, size, start).rstrip(b"\r\n") for start, size in pairs]


def _is_packed(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == _GZIP


def _unpack(path: Path, target: BinaryIO) -> None:
    try:
        with gzip.open(path) as source:
            shutil.copyfileobj(source, target, CHUNK)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path} is a damaged gzip file: {error}") from error


def _index(path: Path, text: Path, target: BinaryIO) -> None:
    """The start of every line, and the end of the last, as int64 numbers."""
    target.write(np.zeros(1, np.int64).tobytes())
    position, last = 0, b"\n"
    with text.open("rb") as source:
        while chunk := source.read(CHUNK):
            ends = np.flatnonzero(np.frombuffer(chunk, np.uint8) == ord("\n"))
            target.write((ends + (position + 1)).astype(np.int64).tobytes())
            position, last = position + len(chunk), chunk[-1:]
        source.seek(-min(position, TAIL), os.SEEK_END)
        tail = source.read()
    if last != b"\n":
        target.write(np.array([position], np.int64).tobytes())
        tail += b"\n"
    filled = tail.rstrip(b"\r\n")
    if not filled:
        raise DataError(f"{path} is empty: there are no lines in its {len(tail)} last bytes")
    blank = tail[len(filled) :].count(b"\n") - 1
    target.truncate(target.tell() - 8 * blank)
