"""Bytes a second to and from a disk, beside torch.save and torch.load of the same tensors."""

import ctypes
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from benchmarks.section import Cell, Section
from gpp.checkpoint.folder import check_bytes, opened
from gpp.checkpoint.manifest import Manifest, Part
from gpp.checkpoint.reader import weights
from gpp.checkpoint.writer import CheckpointWriter, Contents

MEGABYTES = 256
ROUNDS = 5
LEAST = 0.7  # of torch's rate, with a checksum of every byte
FILE = "model-00001-of-00001.safetensors"


def bytes_a_second(megabytes: int = MEGABYTES, rounds: int = ROUNDS) -> Section:
    """The best of some rounds, each way in each round. What is read is copied into weights that are there."""
    tensors = {f"layers.{i}.weight": torch.randn(1024, 1024) for i in range(megabytes // 4)}
    size = sum(value.nbytes for value in tensors.values())
    with TemporaryDirectory() as name:
        folder = Path(name)
        ways: dict[str, Callable[[], None]] = {
            "write": lambda: _write(folder, tensors),
            "torch.save and fsync": lambda: _save(folder, tensors),
            "read": lambda: _read(folder, tensors),
            "torch.load": lambda: _load(folder, tensors),
        }
        found: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(rounds):
            for way, work in ways.items():
                found[way].append(_seconds(work))
    rates = {way: size / min(seconds) / 1e9 for way, seconds in found.items()}
    ratios = (rates["write"] / rates["torch.save and fsync"], rates["read"] / rates["torch.load"])
    rows: tuple[tuple[Cell, ...], ...] = tuple(
        (way, rates[way], min(seconds), max(seconds)) for way, seconds in found.items()
    )
    return Section(
        name="disk",
        what=f"a checkpoint of {megabytes} MiB on one rank, written and read with its checksums",
        reach=f"written at {LEAST} of the rate of torch.save with fsync",
        measured=f"written at {rates['write']:.2f} GB/s ({ratios[0]:.2f} of torch's), read at "
        f"{rates['read']:.2f} GB/s ({ratios[1]:.2f} of torch's)",
        reached=ratios[0] >= LEAST,
        columns=("way", "GB/s", "best (s)", "worst (s)"),
        rows=rows,
        note="Files are read from the page cache, where they have just been written, into weights that are "
        "there, by a process without free memory: what malloc keeps from a round before would make "
        "torch.load ten times as fast as it is for a run that starts. A checkpoint is read twice, once for "
        "its checksums, and copied from the files' pages; torch.load looks at none, and makes tensors.",
    )


def _seconds(work: Callable[[], None]) -> float:
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _write(folder: Path, tensors: dict[str, Tensor]) -> None:
    writer = CheckpointWriter(folder, 0, 1, keep=1)
    found = Contents({FILE: tensors}, dict.fromkeys(tensors, FILE), {}, {}, None, {})
    writer.write(found, Manifest(1, 1, 0, None, Part({}, {}, {}, {})))
    writer.wait()


def _save(folder: Path, tensors: dict[str, Tensor]) -> None:
    with (folder / "plain.pt").open("wb") as file:
        torch.save(tensors, file)
        file.flush()
        os.fsync(file.fileno())


def _read(folder: Path, into: Mapping[str, Tensor]) -> None:
    kept = opened(folder / "step-00000001")
    check_bytes(kept)
    for name, value in weights(kept, kept.manifest.part.weights).items():
        into[name].copy_(value)


def _load(folder: Path, into: Mapping[str, Tensor]) -> None:
    for name, value in torch.load(folder / "plain.pt", weights_only=True).items():
        into[name].copy_(value)
