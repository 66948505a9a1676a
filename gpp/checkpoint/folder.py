"""The folder of a run's checkpoints: which there are, which is the newest whole one, and which are dropped.

step-00000100/          a checkpoint: it has its name only when all of it is on disk
step-00000200.part/     one being written, or what a crash left of it
step-00000100.replaced/ one whose name a newer one of the same step is just taking
"""

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from .manifest import MANIFEST, Manifest, manifest_from_json
from .tensors import CheckpointError, sync_folder

_NAME = re.compile(r"step-(\d{8,18})(\.part|\.replaced)?")


@dataclass(frozen=True, slots=True)
class Kept:
    """A checkpoint on disk and what it holds."""

    path: Path
    manifest: Manifest


def part_of(folder: Path, step: int) -> Path:
    """Where a checkpoint is written."""
    return folder / f"step-{step:08d}.part"


def opened(path: Path) -> Kept:
    """A checkpoint by its path. Raises CheckpointError where it is none, or a file is missing or cut short;
    the bytes of its files are not looked at."""
    if not path.is_dir():
        raise CheckpointError(f"there is no checkpoint {path}: it must be a folder with a {MANIFEST}")
    where = path / MANIFEST
    try:
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


def newest(folder: Path) -> tuple[Kept | None, list[str]]:
    """The newest checkpoint of a folder that can be opened, and what is wrong with newer ones."""
    wrong: list[str] = []
    for path in _paths(folder, (None, ".replaced")):
        try:
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
    """Remove all but the newest `keep` checkpoints. One that is being removed has lost its name first."""
    for path in _paths(folder, (None,))[keep:]:
        doomed = path.with_name(f"{path.name}.part")
        shutil.rmtree(doomed, ignore_errors=True)
        path.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def clear(folder: Path) -> None:
    """Make the folder and remove what a crash left; not while somebody writes there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path in _paths(folder, (".part",)):
            shutil.rmtree(path)
        if not os.access(folder, os.W_OK):
            raise PermissionError(13, "no permission to write there")
    except OSError as error:
        raise CheckpointError(f"checkpoints cannot be kept in {folder}: {error.strerror or error}") from error


def _paths(folder: Path, suffixes: tuple[str | None, ...]) -> list[Path]:
    """The newest first; of the same step the one with its own name first."""
    if not folder.is_dir():
        return []
    found = []
    for path in folder.iterdir():
        match = _NAME.fullmatch(path.name)
        if match is not None and match[2] in suffixes:
            found.append((int(match[1]), match[2] is None, path))
    return [path for _, _, path in sorted(found, reverse=True)]
