"""Writes checkpoints beside training: a thread on each rank, and nothing that the ranks would wait for.

Each rank forces its files to disk and then says so by a part-R.json; rank 0 waits for those of all ranks,
writes the manifest, and gives the folder its name. A crash before that leaves a folder that nobody reads.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Event, Thread

from torch import Tensor

from .folder import commit, part_of, prune
from .manifest import (
    INDEX,
    MANIFEST,
    Manifest,
    OptimizerEntry,
    Part,
    index_to_json,
    joined,
    manifest_to_json,
    part_from_json,
    part_to_json,
)
from .tensors import CheckpointError, write_tensors, write_text

LOOK = 0.05  # seconds between two looks at whether it is worth to wait
POLL = 0.02  # seconds between two looks for the other ranks' parts


@dataclass(frozen=True)
class Contents:
    """What one rank writes, on the host and not shared with training: files of tensors, and where things are.

    `texts` are small files (configuration, plan), rank 0's alone."""

    files: Mapping[str, Mapping[str, Tensor]]
    weights: Mapping[str, str]
    averages: Mapping[str, str]
    optimizer: Mapping[str, OptimizerEntry]
    optimizer_class: str | None
    texts: Mapping[str, str]
    buffers: Mapping[str, str] = field(default_factory=dict)


class CheckpointWriter:
    """One rank's writer into `folder`, which all of `ranks` see; of the checkpoints the newest `keep` stay.

    What goes wrong in the background is raised, as CheckpointError, by the next call.
    """

    def __init__(self, folder: Path, rank: int, ranks: int, keep: int) -> None:
        self._folder, self._rank, self._ranks, self._keep = folder, rank, ranks, keep
        self._thread: Thread | None = None
        self._error: CheckpointError | None = None
        self._given_up, self._own_done = Event(), Event()

    def write(self, contents: Contents, manifest: Manifest) -> None:
        """Begin to write; waits for the one before. `manifest` has no part yet."""
        self.wait()
        self._own_done.clear()
        self._thread = Thread(
            target=self._write, args=(contents, manifest), name="gpp-checkpoint", daemon=True
        )
        self._thread.start()

    def check(self) -> None:
        """Raise what went wrong so far; does not wait."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def wait(self, look: Callable[[], None] = lambda: None) -> None:
        """Until what was begun is on disk: on rank 0 the whole checkpoint, elsewhere the rank's own part.
        `look` is called now and then; what it raises ends the waiting."""
        while self._thread is not None:
            self._thread.join(LOOK)
            if self._thread.is_alive():
                look()
            else:
                self._thread = None
        self.check()

    def wait_for_part(self) -> None:
        """Until the rank's own part of what was begun is on disk."""
        self._own_done.wait()
        self.check()

    def give_up(self) -> None:
        """Wait for no other rank any more: what was begun will not be whole."""
        self._given_up.set()

    def begin_anew(self) -> None:
        """After `give_up`: forget what was begun, once it has stopped."""
        if self._thread is not None and self._given_up.is_set():
            self._thread.join()
            self._thread = self._error = None
        self._given_up.clear()

    def _write(self, contents: Contents, manifest: Manifest) -> None:
        try:
            part = part_of(self._folder, manifest.step)
            part.mkdir(parents=True, exist_ok=True)
            own = write_part(part, contents)
            if self._rank:
                write_text(part / f"part-{self._rank}.json", part_to_json(own))
            self._own_done.set()
            if not self._rank:
                self._complete(part, own, manifest)
        except CheckpointError as error:
            self._error = error
        except (Exception, SystemExit) as error:  # nobody sees what a thread raises
            self._error = CheckpointError(f"no checkpoint of step {manifest.step} is written: {error!r}")
        finally:
            self._own_done.set()

    def _complete(self, folder: Path, own: Part, manifest: Manifest) -> None:
        parts = [own]
        for rank in range(1, self._ranks):
            path = folder / f"part-{rank}.json"
            while not path.exists():
                if self._given_up.wait(POLL):
                    return
            parts.append(part_from_json(path.read_text(), path))
            path.unlink()
        whole = joined(parts)
        names = set(whole.weights.values())
        total = sum(record.bytes for name, record in whole.files.items() if name in names)
        index = write_text(folder / INDEX, index_to_json(whole, total))
        whole = replace(whole, files={**whole.files, INDEX: index})
        write_text(folder / MANIFEST, manifest_to_json(replace(manifest, part=whole)))
        commit(self._folder, manifest.step)
        prune(self._folder, self._keep)


def write_part(folder: Path, contents: Contents) -> Part:
    """A rank's files; what it has written. Raises CheckpointError."""
    files = {name: write_tensors(folder / name, tensors) for name, tensors in contents.files.items()}
    for name, text in contents.texts.items():
        files[name] = write_text(folder / name, text)
    own = contents
    return Part(files, own.weights, own.averages, own.optimizer, own.optimizer_class, own.buffers)
