"""Puts a case's fault into this process: functions of the library are wrapped, it has no hooks of its own."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

import gpp.capture.capture as capture
import gpp.checkpoint.tensors as tensors
import gpp.checkpoint.writer as writer
from gpp.api.saving import Saving
from gpp.checkpoint.folder import opened
from gpp.checkpoint.manifest import MANIFEST
from gpp.checkpoint.tensors import CheckpointError
from gpp.runtime.binding import Arrival, Call, Departure
from gpp.runtime.executor import _Step
from gpp.runtime.halt import Halt
from gpp.runtime.reports import Reports
from gpp.runtime.trainer import Trainer
from gpp.runtime.watch import Watch
from gpp.runtime.watching import Rules
from gpp.schedule.task import Pass, Reduce, Update

from .cases import LONGEST, RANKS, SILENCE, Case, Fault, Place
from .notes import Phase, Struck, write_note
from .scene import Samples

STOPS_AFTER = 4  # updates of the rank that is asked to stop
SECOND_LOOK = 2e-3  # seconds between two looks for the first fault
PASSES = {
    Pass.FORWARD: Place.FORWARD,
    Pass.BACKWARD: Place.BACKWARD,
    Pass.BACKWARD_INPUT: Place.BACKWARD,
    Pass.BACKWARD_WEIGHT: Place.WEIGHT,
}


class Injector:
    """Strikes once, on the rank that the case names; `folder` is where the job's notes are, `kept` where its
    checkpoints."""

    def __init__(self, case: Case, rank: int, folder: Path, kept: Path) -> None:
        self.case, self.rank, self.phase = case, rank, Phase.SETUP
        self._folder, self._kept = folder, kept
        self._times = 0
        _before(Trainer, "fit", self._trains)
        if rank == case.rank:
            self._wrap()
            if case.place is Place.MOMENT:
                _later(case.share * LONGEST, self.strike)
        elif case.place is Place.STOPPING and rank == (case.rank + 1) % RANKS[case.shape]:
            _before(_Step, "update", self._ask)
        if rank == case.second:
            threading.Thread(target=self._follow, daemon=True).start()

    def at(self, place: Place) -> None:
        """The rank has come to a place."""
        if self._comes(place):
            self.strike()

    def _comes(self, place: Place) -> bool:
        """Whether it is to strike now."""
        if place is not self.case.place or self.rank != self.case.rank:
            return False
        self._times += 1
        return self._times == self.case.occurrence + 1

    def strike(self) -> None:
        """Note it, and do it."""
        whole = tuple(path.name for path in sorted(self._kept.glob("step-*")) if _whole(path))
        write_note(self._folder, Struck(time.monotonic(), os.getpid(), self.phase, whole))
        _do(self.case.fault, self.case.place)

    def _follow(self) -> None:
        while not Struck.path(self._folder).exists():
            time.sleep(SECOND_LOOK)
        time.sleep(self.case.delay)
        os.kill(os.getpid(), signal.SIGKILL)

    def _read(self, *_: object) -> None:
        if threading.current_thread().name == "read":  # not the example for capture
            self.at(Place.READ)

    def _trains(self, trainer: Trainer, *_: object, **__: object) -> None:
        if not self.case.elastic:
            trainer.comm.watch_by(Rules(SILENCE))
        self.phase = Phase.TRAINING

    def _reach(self, phase: Phase) -> None:
        self.phase = phase

    def _ask(self, step: _Step) -> None:
        self._times += 1
        if self._times == STOPS_AFTER:
            step.owner.comm.halt.ask("somebody asked")

    def _wrap(self) -> None:
        _before(_Step, "execute", lambda step, instruction: self.at(_place(step, instruction)))
        _before(Samples, "read", self._read)
        _before(capture, "export_mode", lambda *_, **__: self.at(Place.SETUP))
        _before(Reports, "exchange", lambda *_, **__: self.at(Place.LOSSES))
        _before(Watch, "configure", lambda *_, **__: self._reach(Phase.WATCHED))
        _before(Saving, "_write", lambda *_, **__: self.at(Place.COPY))
        _before(Halt, "last", lambda *_, **__: self.at(Place.STOPPING))
        _before(writer, "commit", lambda *_, **__: self.at(Place.RENAME))
        _before(writer, "prune", lambda *_, **__: self.at(Place.PRUNE))
        _before(tensors, "save_file", self._tensor_file)
        _before(writer, "write_text", self._text_file)

    def _tensor_file(self, values: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
        if self._comes(Place.BYTES):
            self._cut(path, save(values, metadata))
            self.strike()

    def _text_file(self, path: Path, text: str) -> None:
        place = Place.MANIFEST if path.name == MANIFEST else Place.PART
        if path.name.startswith(("part-", MANIFEST)) and self._comes(place):
            self._cut(path.with_name(f"{path.name}.tmp"), text.encode())
            self.strike()

    def _cut(self, path: Path, data: bytes) -> None:
        """So many bytes of it are on disk."""
        with path.open("wb") as file:
            file.write(data[: round(self.case.share * len(data))])
            file.flush()
            os.fsync(file.fileno())


def _place(step: _Step, instruction: Any) -> Place:
    if step.owner.schedule.forward_only:
        return Place.EVALUATION
    match instruction:
        case Arrival():
            return Place.RECEIVE
        case Departure():
            return Place.SEND
        case Call(task=task):
            return PASSES[task.kind]
        case Reduce():
            return Place.REDUCE
        case Update():
            return Place.UPDATE
    raise TypeError(f"{instruction} is no instruction")


def _before(owner: Any, name: str, first: Callable[..., object]) -> None:
    """`first` is called with the arguments of a function, before it."""
    function = getattr(owner, name)

    def wrapped(*arguments: Any, **named: Any) -> Any:
        first(*arguments, **named)
        return function(*arguments, **named)

    setattr(owner, name, wrapped)


def _do(fault: Fault, place: Place) -> None:
    match fault:
        case Fault.KILL:
            os.kill(os.getpid(), signal.SIGKILL)
        case Fault.STOP:
            os.kill(os.getpid(), signal.SIGSTOP)
        case Fault.ABORT:
            os.abort()
        case Fault.EXIT_0:
            os._exit(0)
        case Fault.EXIT_7:
            os._exit(7)
        case Fault.RUNTIME:
            raise RuntimeError("injected")
        case Fault.VALUE:
            raise ValueError("injected")
        case Fault.SYS_EXIT:
            sys.exit(5)
        case Fault.MEMORY:
            passes = place in (Place.FORWARD, Place.BACKWARD, Place.WEIGHT)
            raise torch.OutOfMemoryError("injected") if passes else MemoryError("injected")
        case Fault.HANG:
            time.sleep(1e6)


def _later(seconds: float, work: Callable[[], None]) -> None:
    timer = threading.Timer(seconds, work)
    timer.daemon = True
    timer.start()


def _whole(path: Path) -> bool:
    if path.suffix:
        return False
    try:
        opened(path)
    except CheckpointError:
        return False
    return True
