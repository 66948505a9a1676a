"""What a pipeline's checkpoints are of and where they go, and how one is read."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from gpp.checkpoint.folder import (
    Kept,
    check_bytes,
    newest,
    opened,
)
from gpp.checkpoint.manifest import MANIFEST, Order, check_name
from gpp.checkpoint.reader import weights
from gpp.checkpoint.shelf import Copy, Shelf
from gpp.checkpoint.tensors import CheckpointError
from gpp.runtime.saving import files_of, restore
from gpp.runtime.state import StageState

from .crew import Crew
from .job import Job, Training, changed_buffers, holders_of, sizes_of
from .memory import InMemory, brought
from .optimizer import optimizer_factor

_OR_WEIGHTS = ", or take the weights alone (launch.export and train.init_from)"

States = Mapping[int, StageState | None]  # of the ranks of this process; None: an idle rank


@dataclass(frozen=True, kw_only=True)
class Checkpoints:
    """Where checkpoints go: `folder`, which all ranks see. The newest `keep` stay; in `fit` one is written
    every `every` steps (None: only by `save`). `texts` are small files to be kept with each. `memory`: `fit`
    makes copies in memory beside them, for those who go on if ranks are lost."""

    folder: Path
    every: int | None = None
    keep: int = 2
    texts: Mapping[str, str] = field(default_factory=dict)
    memory: InMemory | None = None

    def __post_init__(self) -> None:
        for name, value in (("every", 1 if self.every is None else self.every), ("keep", self.keep)):
            if value < 1:
                raise CheckpointError(f"{name} of Checkpoints must be at least 1, it is {value}")
        for name in self.texts:
            check_name(name, "texts of Checkpoints")


@dataclass(frozen=True)
class Subject:
    """What a checkpoint is of: the job, the keys of the module's state_dict with the names behind them, the
    values of those that are in no stage (on rank 0), buffers without a key that training changes, seed, decay
    of the moving average, and the bytes that the optimizer keeps for each byte of parameters."""

    job: Job
    keys: Mapping[str, str]
    outside: Mapping[str, Tensor]
    hidden: tuple[str, ...]
    seed: int
    ema: float | None
    optimizer_factor: float

    @property
    def bytes(self) -> float:
        """About the size of a checkpoint."""
        return self.bytes_of((*self.keys.values(), *self.hidden))

    def bytes_of(self, names: Iterable[str]) -> float:
        """About what these parameters and buffers take of it."""
        sizes = sizes_of(self.job)
        found = [name for name in names if name in sizes]
        trained = sum(sizes[name] for name in {*found}.intersection(self.job.captured.traced.trainable))
        return sum(sizes[name] for name in found) + trained * (self.optimizer_factor + (self.ema is not None))


def subject_of(
    job: Job, names: Mapping[str, str], outside: Mapping[str, Tensor], training: Training, seed: int
) -> Subject:
    """What checkpoints of a job are of. `names` are the keys of the module's state_dict with the names behind
    them, none if it has no other keys than these; `outside` the values in no stage."""
    keys = names or {name: name for name in holders_of(job)}
    known = set(keys.values())
    hidden = tuple(name for name in changed_buffers(job) if name not in known)
    factor = optimizer_factor(training.make_optimizer)
    return Subject(job, keys, outside, hidden, seed, training.ema, factor)


def find(path: Path, damaged: Mapping[Path, str]) -> tuple[Kept, list[str]]:
    """A checkpoint, or the newest whole one of a folder, and what is wrong with newer ones; `damaged` says
    what is known to be wrong. Raises CheckpointError where there is none."""
    if (path / MANIFEST).exists() or not path.is_dir():
        if path in damaged:
            raise CheckpointError(damaged[path])
        return opened(path), []
    kept, wrong = newest(path, damaged)
    if kept is None:
        detail = f": {wrong[0]}" if wrong else ""
        raise CheckpointError(f"there is no whole checkpoint in {path}{detail}")
    return kept, wrong


def find_sound(
    path: Path, crew: Crew, check: Callable[[Kept], None] = lambda _: None
) -> tuple[Kept, list[str]]:
    """A checkpoint, or the newest of a folder of which all bytes are what was written, and what is wrong with
    newer ones; called by all ranks, each of which reads a share of the files. `check` refuses one that does
    not fit before they are read. Raises CheckpointError where there is none."""
    damaged: dict[Path, str] = {}
    while True:
        kept, wrong = crew.of_first(lambda: find(path, damaged))
        error = _damage(kept, crew, check)
        if error is None:
            return kept, wrong
        damaged[kept.path] = error.removeprefix("rank 0: ")


def _damage(kept: Kept, crew: Crew, check: Callable[[Kept], None]) -> str | None:
    """What is wrong with the bytes of a checkpoint: the same on all ranks, whichever has found it."""
    crew.together(lambda: check(kept))

    def look() -> str | None:
        try:
            for rank in crew.mine:
                check_bytes(kept, rank, crew.size)
        except CheckpointError as error:
            return str(error)
        return None

    return crew.first_error(crew.together(look))


def load(
    path: Path, subject: Subject, crew: Crew, states: States, order: Order | None
) -> tuple[Kept, dict[str, Tensor], list[str]]:
    """Give the ranks' states what a checkpoint has, or the newest whole one of a folder; called by all ranks.
    `order` is that of the data with which training goes on, if it is known.

    Returns it, the values outside of all stages (on rank 0), and what is wrong with newer ones.
    """
    kept, wrong = find_sound(path, crew, lambda kept: _check_fits(kept, subject, order))
    return kept, crew.together(lambda: _taken(kept, subject, states)), wrong


def recall(
    shelf: Shelf, copy: Copy, subject: Subject, crew: Crew, states: States, order: Order | None
) -> tuple[Kept, dict[str, Tensor]]:
    """As `load`, from a copy in memory. Raises CheckpointError, on all ranks, where it is of no use; the
    states are then as they were."""
    part = copy.manifest.part
    crew.together(lambda: _check_fits(Kept(shelf.path / copy.name, copy.manifest), subject, order))
    needed = {
        file for state in states.values() for file in files_of(state, part, subject.keys, subject.hidden)
    }
    needed |= {part.weights[key] for key in _outside(subject).values()}
    kept = brought(shelf, copy, needed, crew)
    return kept, crew.together(lambda: _taken(kept, subject, states))


def _outside(subject: Subject) -> dict[str, str]:
    """The keys of the values in no stage by name, on rank 0."""
    return {name: key for key, name in subject.keys.items() if name in subject.outside}


def _taken(kept: Kept, subject: Subject, states: States) -> dict[str, Tensor]:
    for state in states.values():
        if state is not None:
            updates = kept.manifest.step - kept.manifest.skipped
            restore(state, kept, subject.keys, subject.hidden, steps=updates)
    keys = _outside(subject)
    values = weights(kept, keys.values())
    return {name: values[key].clone() for name, key in keys.items()}


def _check_fits(kept: Kept, subject: Subject, order: Order | None) -> None:
    """Raise CheckpointError where the run is not the one that the checkpoint is of."""
    manifest, samples = kept.manifest, subject.job.plan.mini_batch
    if manifest.mini_batch != samples:
        raise CheckpointError(
            f"{kept.path} was made with {manifest.mini_batch} samples a step, this run has {samples}: its "
            f"place in the data would be another. Use the same mini-batch{_OR_WEIGHTS}"
        )
    if manifest.seed != subject.seed:
        raise CheckpointError(
            f"{kept.path} was made with seed {manifest.seed}, this run has {subject.seed}: data and dropout "
            f"would go another way. Use the same seed{_OR_WEIGHTS}"
        )
    if manifest.order is not None and order is not None and manifest.order != order:
        there, here = manifest.order, order
        raise CheckpointError(
            f"{kept.path} was made on {there.samples} training samples in the order of seed {there.seed}, "
            f"this run has {here.samples} in the order of seed {here.seed}: the rest of an epoch would be of "
            f"other samples. Use the same data, of which as many are held out{_OR_WEIGHTS}"
        )
    part = manifest.part
    for there_are, here_are in ((part.weights, subject.keys), (part.buffers, subject.hidden)):
        lacks, has = set(here_are) - set(there_are), set(there_are) - set(here_are)
        for names, what in ((lacks, "lacks"), (has, "has, and the model lacks,")):
            if names:
                raise CheckpointError(
                    f"{kept.path} is of another model: it {what} {min(names)} ({len(names)} names in all)"
                )
