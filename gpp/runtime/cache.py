"""Files made once from a user's data and kept: by one process, also where many start at the same time."""

import fcntl
import hashlib
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from glob import escape
from pathlib import Path
from typing import BinaryIO

from .data import DataError

log = logging.getLogger(__name__)

POLL_SECONDS = 0.05  # between two looks at whether another process has finished


def user_folder() -> Path:
    """Where this user's caches of this project are; it need not exist."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(home, "gpp")


def places(source: Path, folder: str | None) -> tuple[Path, ...]:
    """The folders in which what is made from `source` may be, the best first: `folder` alone if it is given,
    else .gpp beside the source, for all who read it, and the user's cache folder, for who may not write
    there."""
    return (Path(folder),) if folder is not None else (source.parent / ".gpp", user_folder())


def made_from(source: Path, what: str, folder: str | None, make: Callable[[BinaryIO], None]) -> Path:
    """The file `what` made from `source` as it is now; `make` writes it if it is not there yet.

    It is written aside and renamed, so that nobody sees half of it, by one process while the others wait. One
    made from an earlier state of the source (its size or time of change differs) is removed. Raises DataError
    if the source is missing or the file cannot be written; what `make` raises passes.
    """
    state = status(source)
    place = hashlib.sha256(str(source.resolve()).encode()).hexdigest()[:8]
    stamp = hashlib.sha256(f"{state.st_size} {state.st_mtime_ns}".encode()).hexdigest()[:8]
    name = f"{source.name}-{place}-{stamp}.{what}"
    around = places(source, folder)
    for path in around:
        if (path / name).exists():
            return path / name
    target = next((path for path in around if _writable(path)), around[-1]) / name
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target.with_name(f"{source.name}-{place}.{what}.lock"), target):
            if not target.exists():
                _write(target, make, 0o600 | state.st_mode & 0o666)
                for old in target.parent.glob(f"{escape(source.name)}-{place}-????????.{what}"):
                    if old != target:
                        old.unlink(missing_ok=True)
    except OSError as error:
        raise DataError(
            f"what is read from {source} is kept in {target.parent}, which cannot be written "
            f"({error.strerror or error}): name a folder with room for it, data.cache=folder"
        ) from error
    return target


def damaged(made: Path, source: Path, reason: object) -> DataError:
    """The error for a file that was made from `source` and is not what was written any more."""
    return DataError(
        f"{made}, made once from {source}, is damaged ({reason}): remove it, and it is made again"
    )


def missing(sources: Iterable[Path]) -> list[str]:
    """What is wrong with each of the files that cannot be read."""
    found = []
    for source in sources:
        try:
            status(source)
        except DataError as error:
            found.append(str(error))
    return found


def status(source: Path) -> os.stat_result:
    """Size and times of a file. Raises DataError if there is none, or it is a folder."""
    try:
        state = source.stat()
    except OSError as error:
        raise DataError(f"the file {source} cannot be read: {error.strerror or error}") from error
    if source.is_dir():
        raise DataError(f"{source} is a folder: name files, or a pattern such as '{source}/day_*'")
    return state


def _writable(folder: Path) -> bool:
    return os.access(folder if folder.exists() else folder.parent, os.W_OK)


def _write(target: Path, make: Callable[[BinaryIO], None], mode: int) -> None:
    log.info("writing %s, once", target)
    handle, aside = tempfile.mkstemp(dir=target.parent, prefix=f"{target.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            make(file)
        os.chmod(aside, mode)  # read by whoever may read the source
        os.replace(aside, target)
    finally:
        Path(aside).unlink(missing_ok=True)


@contextmanager
def _locked(path: Path, target: Path) -> Iterator[None]:
    """Alone in here among the processes and threads that can lock `path`, or as soon as `target` exists."""
    with path.open("ab") as file:
        said = False
        while not target.exists():
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not said:
                    log.info("another process is writing %s", target)
                said = True
                time.sleep(POLL_SECONDS)
            except OSError:  # a file system without locks: several processes may do the same work
                break
        yield  # closing the file lets go of the lock
