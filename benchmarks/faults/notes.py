"""What a job's ranks leave for those who judge it: files in its folder."""

import faulthandler
import json
import os
import signal
import time
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from .cases import Case, Fault, Place, Shape

CASE = "case.json"
TRACES = "traces"  # and -RANK: of its threads


class Phase(StrEnum):
    """How far a rank is."""

    SETUP = "set-up"
    WATCHED = "watched"  # those who watch over the job know of it
    TRAINING = "training"
    CLOSED = "closed"


@dataclass(frozen=True, slots=True)
class Struck:
    """A fault: when on the clock that all processes of a host share, in which process, at which phase, and
    the checkpoints that were whole by then."""

    at: float
    process: int
    phase: Phase
    whole: tuple[str, ...]

    @staticmethod
    def path(folder: Path) -> Path:
        """The file of it."""
        return folder / "struck.json"


def write_note(folder: Path, struck: Struck) -> None:
    """On disk, whole, before it returns."""
    write(Struck.path(folder), asdict(struck))


def read_note(folder: Path) -> Struck | None:
    """The fault, None if there was none."""
    path = Struck.path(folder)
    if not path.exists():
        return None
    found = json.loads(path.read_text())
    return Struck(found["at"], found["process"], Phase(found["phase"]), tuple(found["whole"]))


def write_process(folder: Path, rank: int) -> None:
    """A rank has started. Who wants to know what its threads are at sends it SIGUSR2."""
    faulthandler.register(signal.SIGUSR2, (folder / f"{TRACES}-{rank}").open("w"))
    write(folder / f"rank-{rank}.json", {"process": os.getpid(), "at": time.monotonic()})


def read_processes(folder: Path) -> dict[int, int]:
    """The process of each rank that has started."""
    files = folder.glob("rank-*.json")
    return {int(file.stem.removeprefix("rank-")): json.loads(file.read_text())["process"] for file in files}


def write_case(folder: Path, case: Case) -> None:
    """What is to be done."""
    write(folder / CASE, asdict(case))


def read_case(folder: Path) -> Case:
    """What is to be done."""
    found = json.loads((folder / CASE).read_text())
    kinds = {"shape": Shape(found["shape"]), "place": Place(found["place"]), "fault": Fault(found["fault"])}
    return Case(**{**found, **kinds})


def write(path: Path, found: dict[str, Any]) -> None:
    """JSON under its name, whole or not at all."""
    temporary = path.with_name(f".{path.name}-{os.getpid()}")
    with temporary.open("w") as file:
        json.dump(found, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)
