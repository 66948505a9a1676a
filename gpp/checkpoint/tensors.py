"""Files of a checkpoint: named tensors in the safetensors format, with their size and checksum."""

import json
import os
import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

CHUNK = 1 << 20  # bytes read at a time: they stay in the processor's cache for their checksum
_COMPLEX = "complex128"  # a type that the format lacks: kept as pairs of float64, named in the metadata


class CheckpointError(ValueError):
    """A checkpoint that is not there, is damaged, does not fit, or cannot be written."""


@dataclass(frozen=True, slots=True)
class FileRecord:
    """What a file must be: its size and the CRC-32 of its bytes."""

    bytes: int
    crc32: int


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> FileRecord:
    """Write host tensors by name and force them to disk. Raises CheckpointError naming file and reason."""
    pairs = [name for name, t in tensors.items() if t.dtype == torch.complex128]
    plain = {n: torch.view_as_real(t) if t.dtype == torch.complex128 else t for n, t in tensors.items()}
    metadata = {"format": "pt", **({_COMPLEX: json.dumps(pairs)} if pairs else {})}
    try:
        save_file({name: t.contiguous() for name, t in plain.items()}, path, metadata)
        with ThreadPoolExecutor(1) as pool:
            syncing = pool.submit(_sync, path)
            record = _record(path)
            syncing.result()
        return record
    except (OSError, SafetensorError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be written: {error}") from error


def write_text(path: Path, text: str) -> FileRecord:
    """Write a small file, whole or not at all under its name, and force it to disk."""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        temporary.write_text(text)
        _sync(temporary)
        record = _record(temporary)
        temporary.rename(path)  # the last that is done: who waits for the file may move its folder at once
        return record
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error.strerror or error}") from error


def read_tensors(path: Path, names: Sequence[str] | None = None, *, copy: bool = True) -> dict[str, Tensor]:
    """Some tensors of a file, or all. Without `copy` they are the file's own pages, for who copies them at
    once: memory of their own costs more than the reading. Raises CheckpointError naming the file."""
    try:
        with safe_open(path, framework="pt") as file:
            pairs = json.loads((file.metadata() or {}).get(_COMPLEX, "[]"))
            wanted = file.keys() if names is None else names
            found = {name: file.get_tensor(name) for name in wanted}
            if copy:  # the file is removed one day
                found = {name: value.clone() for name, value in found.items()}
        return {n: torch.view_as_complex(t) if n in pairs else t for n, t in found.items()}
    except (OSError, SafetensorError, ValueError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def check_file(path: Path, record: FileRecord) -> None:
    """Raise CheckpointError if the file is not the one that was written."""
    try:
        found = _record(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    if found.bytes != record.bytes:
        raise CheckpointError(f"{path} is damaged: it has {found.bytes} bytes, {record.bytes} were written")
    if found.crc32 != record.crc32:
        raise CheckpointError(f"{path} is damaged: its bytes are not those that were written (CRC-32)")


def sync_folder(folder: Path) -> None:
    """Force to disk which files a folder has."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _record(path: Path) -> FileRecord:
    size = checksum = 0
    chunk = memoryview(bytearray(CHUNK))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(chunk):
            size += count
            checksum = zlib.crc32(chunk[:count], checksum)
    return FileRecord(size, checksum)
