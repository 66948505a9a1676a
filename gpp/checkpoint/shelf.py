"""A job's folder in the memory of a host: copies of checkpoints that outlive the ranks that made them.

/dev/shm/gpp-copies-0-1a2b-1/  of user 0, job 1a2b, on its host 1
  lock                         held by every rank of the host; the kernel takes it from one that dies
  copy-00000003-of-00004/      copy 3, of 4 ranks: the files of those that are kept here, and of each its
                               part-R.json, a manifest of what rank R has written, which comes last

Whoever comes last need not be able to clean up: a small process of its own waits until nobody holds the lock,
and removes the folder. If that was killed too, the user's next job does it.
"""

import fcntl
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from .manifest import Manifest, joined, manifest_from_json
from .tensors import CheckpointError

ROOT = Path("/dev/shm")
LOCK = "lock"

_COPY = re.compile(r"copy-(\d{8,18})-of-(\d{5,18})")
_PART = re.compile(r"part-(\d+)\.json")
_CLEANER = """
import fcntl, shutil, sys
with open(sys.argv[1] + "/lock") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    shutil.rmtree(sys.argv[1], ignore_errors=True)
"""


@dataclass(frozen=True, slots=True)
class Stock:
    """What a host has of copy `number` of `ranks` ranks: for each rank whose part is whole there, its
    manifest as text."""

    number: int
    ranks: int
    parts: Mapping[int, str]


@dataclass(frozen=True, slots=True)
class Copy:
    """A whole copy: where it lies in every host's folder, what it holds, and for each file the ranks that
    have reported it."""

    name: str
    manifest: Manifest
    holders: Mapping[str, tuple[int, ...]]


class Shelf:
    """A rank's hold on its host's folder. `number` is that of the last copy begun."""

    def __init__(self, path: Path, cleaner: subprocess.Popen[bytes] | None = None) -> None:
        self.path, self.number = path, 0
        self._cleaner = cleaner  # whoever has started it keeps it until both end
        self._lock = _held(path)

    def begin(self, ranks: int) -> Path:
        """The folder of the next copy."""
        self.number += 1
        made = self.path / name_of(self.number, ranks)
        made.mkdir(exist_ok=True)
        return made

    def stocks(self) -> list[Stock]:
        """What is there."""
        found = []
        for path in self.path.iterdir():
            match = _COPY.fullmatch(path.name)
            if match is not None:
                parts = {int(p[1]): path / p[0] for f in path.iterdir() if (p := _PART.fullmatch(f.name))}
                texts = {rank: file.read_text() for rank, file in parts.items()}
                found.append(Stock(int(match[1]), int(match[2]), texts))
        return found

    def remove_before(self, number: int) -> None:
        """Remove all copies that are older."""
        for path in self.path.iterdir():
            match = _COPY.fullmatch(path.name)
            if match is not None and int(match[1]) < number:
                shutil.rmtree(path, ignore_errors=True)

    def remove(self, name: str) -> None:
        """Remove a copy."""
        shutil.rmtree(self.path / name, ignore_errors=True)

    def held_bytes(self) -> int:
        """What the copies take."""
        sizes = 0
        for file in self.path.glob("copy-*/*"):
            with suppress(FileNotFoundError):
                sizes += file.stat().st_size
        return sizes

    def free_bytes(self) -> int:
        """What the file system has left."""
        return shutil.disk_usage(self.path).free

    def close(self) -> None:
        """The job ends well: remove the folder. Not before all ranks are ready for that."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


def name_of(number: int, ranks: int) -> str:
    """A copy's folder."""
    return f"copy-{number:08d}-of-{ranks:05d}"


def part_name(rank: int) -> str:
    """The file that says that a rank's part is whole."""
    return f"part-{rank}.json"


def path_of(token: str, host: int, root: Path = ROOT) -> Path:
    """A job's folder on one of its hosts. Hosts may see one another's files: each has a name of its own."""
    return root / f"gpp-copies-{os.getuid()}-{token}-{host}"


def build(path: Path) -> Shelf:
    """Make a host's folder, and remove those that dead jobs of this user have left; called by one rank of the
    host, before the others take hold of it. Raises CheckpointError where that is not possible."""
    fresh = path.with_name(f".{path.name}")
    try:
        for old in path.parent.glob(f"gpp-copies-{os.getuid()}-*"):
            _remove_if_dead(old)
        fresh.mkdir(mode=0o700)  # it has weights that are the user's own
        (fresh / LOCK).touch()
        lock = _held(fresh)
        fresh.rename(path)  # nobody sees it before it is held
        cleaner = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _CLEANER, str(path)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # what ends the ranks does not end it
        )
        made = Shelf(path, cleaner)
        os.close(lock)
        return made
    except OSError as error:
        raise CheckpointError(f"no copies in memory: {path} cannot be made ({error})") from error


def newest_whole(reports: Mapping[int, Sequence[Stock]]) -> Copy | None:
    """The newest copy of which all parts are somewhere; `reports` by the ranks that make them, one a host."""
    kinds = {(stock.number, stock.ranks) for stocks in reports.values() for stock in stocks}
    for number, ranks in sorted(kinds, reverse=True):
        texts: dict[int, str] = {}
        where: dict[int, list[int]] = {}
        for reporter, stocks in sorted(reports.items()):
            for stock in stocks:
                if (stock.number, stock.ranks) == (number, ranks):
                    for rank, text in stock.parts.items():
                        texts[rank] = text
                        where.setdefault(rank, []).append(reporter)
        if texts.keys() == set(range(ranks)):
            with suppress(CheckpointError):  # a manifest is damaged
                return _copy(name_of(number, ranks), texts, where)
    return None


def _copy(name: str, texts: Mapping[int, str], where: Mapping[int, Sequence[int]]) -> Copy:
    manifests = {
        rank: manifest_from_json(text, Path(name) / part_name(rank)) for rank, text in sorted(texts.items())
    }
    whole = replace(manifests[0], part=joined(m.part for m in manifests.values()))
    holders = {file: tuple(where[rank]) for rank, m in manifests.items() for file in m.part.files}
    return Copy(name, whole, holders)


def _held(path: Path) -> int:
    """The folder's lock, as long as this process lives. Raises OSError where there is none."""
    descriptor = os.open(path / LOCK, os.O_RDWR | os.O_CLOEXEC)
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    return descriptor


def _remove_if_dead(path: Path) -> None:
    try:
        if path.stat().st_uid != os.getuid():
            return
        descriptor = os.open(path / LOCK, os.O_RDWR | os.O_CLOEXEC)
    except OSError:  # it is just being removed
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(path, ignore_errors=True)
    except BlockingIOError:
        pass  # its job runs
    finally:
        os.close(descriptor)
