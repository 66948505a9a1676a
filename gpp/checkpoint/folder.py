"""The folder of a run's checkpoints: which there are, which is the newest whole one, and which are dropped.

step-00000100/          a checkpoint: it has its name only when all of it is on disk
step-00000200.part/     one being written, or what a crash left of it
step-00000200.damaged/  one whose bytes are not what was written, set aside: nobody reads or removes it
step-00000100.replaced/ one whose name a newer one of the same step is just taking
.seen-1a2b              by which the other ranks tell that they see the folder
"""

import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from gpp.plan_table import readable_bytes

from .manifest import MANIFEST, Manifest, manifest_from_json
from .tensors import CheckpointError, check_file, sync_folder

_NAME = re.compile(r"step-(\d{8,18})(\.part|\.replaced)?")
_MARK = ".seen-"
_NONE: Mapping[Path, str] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Kept:
    """A checkpoint on disk and what it holds."""

    path: Path
    manifest: Manifest


def part_of(folder: Path, step: int) -> Path:
    """Where a checkpoint is written."""
    return folder / f"step-{step:08d}.part"


def named(path: Path, step: int) -> Path:
    """The checkpoint of that step: the path itself, or in that folder."""
    return path if (path / MANIFEST).exists() else path / f"step-{step:08d}"


def mark_of(folder: Path, token: str) -> Path:
    """A file by which other ranks tell that they see the folder."""
    return folder / f"{_MARK}{token}"


def opened(path: Path) -> Kept:
    """A checkpoint by its path. Raises CheckpointError where it is none, or a file is missing or cut short;
    the bytes of its files are not looked at."""
    where = path / MANIFEST
    try:
        if not path.is_dir():
            raise CheckpointError(f"there is no checkpoint {path}: it must be a folder with a {MANIFEST}")
        text = where.read_text()
    except FileNotFoundError:
        raise CheckpointError(f"{path} is no whole checkpoint: it has no {MANIFEST}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{where} cannot be read: {error}") from error
    manifest = manifest_from_json(text, where)
    for name, record in manifest.part.files.items():
        file = path / name
        size = file.stat().st_size if file.is_file() else None
        if size != record.bytes:
            found = "is not there" if size is None else f"has {size} bytes"
            raise CheckpointError(f"{file} {found}, {record.bytes} were written")
    return Kept(path, manifest)


def newest(folder: Path, damaged: Mapping[Path, str] = _NONE) -> tuple[Kept | None, list[str]]:
    """The newest checkpoint of a folder that can be opened, and what is wrong with newer ones; `damaged` says
    what is known to be wrong. Raises CheckpointError for a folder that cannot be read."""
    wrong: list[str] = []
    for path in _paths(folder, (None, ".replaced")):
        try:
            if path in damaged:
                raise CheckpointError(damaged[path])
            return opened(path), wrong
        except CheckpointError as error:
            wrong.append(str(error))
    return None, wrong


def commit(folder: Path, step: int) -> Path:
    """Give a checkpoint, of which every file is on disk, its name."""
    part, final = part_of(folder, step), folder / f"step-{step:08d}"
    old = folder / f"{final.name}.replaced"
    sync_folder(part)
    if final.exists():
        shutil.rmtree(old, ignore_errors=True)
        final.rename(old)
    part.rename(final)
    sync_folder(folder)
    shutil.rmtree(old, ignore_errors=True)
    return final


def prune(folder: Path, keep: int) -> None:
    """Remove what is older than the newest `keep` whole checkpoints. One that is being removed has lost its
    name first."""
    whole = 0
    for path in _paths(folder, (None,)):
        if whole >= keep:
            doomed = path.with_name(f"{path.name}.part")
            shutil.rmtree(doomed, ignore_errors=True)
            path.rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)
        whole += _is_whole(path)


def check_bytes(kept: Kept, share: int = 0, shares: int = 1) -> None:
    """Hold the bytes of one share of a checkpoint's files against their checksums. Raises CheckpointError."""
    records = kept.manifest.part.files
    order = sorted(records, key=lambda name: -records[name].bytes)
    for name in order[share::shares]:
        check_file(kept.path / name, records[name])


def settle(folder: Path, step: int) -> None:
    """Make the folder and put in order what a crash left there; not while somebody writes there. Checkpoints
    of steps after `step` are set aside if their bytes are damaged: they would be taken for the newest.

    Raises CheckpointError if nothing can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for old in _paths(folder, (".replaced",)):
            final = old.with_suffix("")
            if final.exists():
                shutil.rmtree(old)
            else:
                old.rename(final)
        for left in _paths(folder, (".part",)):
            shutil.rmtree(left)
        for path in _paths(folder, (None,)):
            if _is_later_and_damaged(path, step):
                aside = path.with_name(f"{path.name}.damaged")
                shutil.rmtree(aside, ignore_errors=True)
                path.rename(aside)
        for mark in folder.glob(f"{_MARK}*"):
            mark.unlink(missing_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(13, "no permission to write there")
        sync_folder(folder.parent)
    except OSError as error:
        raise CheckpointError(f"checkpoints cannot be kept in {folder}: {error.strerror or error}") from error


def check_place(folder: Path, step: int) -> None:
    """Raise CheckpointError if the folder has a whole checkpoint of a later step: of what is written from
    `step` on it would be taken for the newest, and what is new dropped."""
    kept, _ = newest(folder)
    if kept is not None and kept.manifest.step > step:
        raise CheckpointError(
            f"{folder} has a checkpoint of step {kept.manifest.step}, and this run is at step {step}: go on "
            "from that one (train.resume=auto), keep this run's checkpoints in another folder, or remove it"
        )


def check_space(folder: Path, size: float, keep: int) -> None:
    """Raise CheckpointError if the disk has no room for `keep` checkpoints of `size` bytes and the one that
    is being written, beside those already there. The folder need not exist yet."""
    there = sum(_is_whole(path) for path in _paths(folder, (None,)))
    count = max(1, keep + 1 - there)
    free = shutil.disk_usage(next(place for place in (folder, *folder.parents) if place.exists())).free
    if free < count * size:
        raise CheckpointError(
            f"{folder} has {readable_bytes(free)} of free disk space, checkpoints need "
            f"{readable_bytes(count * size)}: {count} of about {readable_bytes(size)} each (the newest "
            f"{keep} stay while another is written). Make room, keep fewer, or keep them in another folder"
        )


def _is_whole(path: Path) -> bool:
    try:
        opened(path)
    except CheckpointError:
        return False
    return True


def _is_later_and_damaged(path: Path, step: int) -> bool:
    try:
        kept = opened(path)
    except CheckpointError:
        return False  # it does not count as one anyway
    if kept.manifest.step <= step:
        return False
    try:
        check_bytes(kept)
    except CheckpointError:
        return True
    return False


def _paths(folder: Path, suffixes: tuple[str | None, ...]) -> list[Path]:
    """The newest first; of the same step the one with its own name first."""
    found = []
    try:
        if not folder.is_dir():
            return []
        for path in folder.iterdir():
            match = _NAME.fullmatch(path.name)
            if match is not None and match[2] in suffixes:
                found.append((int(match[1]), match[2] is None, path))
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be read: {error.strerror or error}") from error
    return [path for _, _, path in sorted(found, reverse=True)]
