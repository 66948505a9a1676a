"""Copies of checkpoints in memory, made beside training: each part lies on its own host and on a neighbour's.

A copy is whole when all ranks have voted that theirs of it is; only then is the one before removed. So at any
moment one of the two is whole on the hosts that are left, whichever host is lost.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from gpp.checkpoint.manifest import Manifest, manifest_to_json
from gpp.checkpoint.shelf import Shelf, part_name
from gpp.checkpoint.tensors import CheckpointError, write_text
from gpp.checkpoint.writer import Contents, write_part

from .communicator import Communicator
from .guardians import first_of_host, guardians, wards
from .parcels import Tasks, Waits, Work, receiving, sending, voting

REST = 1e-3  # seconds between two looks


class Copies:
    """One rank's. `hosts` are the names of all ranks' hosts, `shelf` is that of this rank's. `on_failed` is
    called on rank 0, once, with why there is no copy of a step; the one before stays."""

    def __init__(
        self, comm: Communicator, shelf: Shelf, hosts: tuple[str, ...], on_failed: Callable[[str], None]
    ) -> None:
        self._comm, self._shelf, self._on_failed = comm, shelf, on_failed
        self._guardian, self._wards = guardians(hosts)[comm.rank], wards(hosts, comm.rank)
        self._cleans = first_of_host(hosts, comm.rank) == comm.rank
        self._pool = ThreadPoolExecutor(2, "gpp-copies")
        self._parts: Tasks | None = None
        self._vote: Tasks | None = None
        self._step = 0
        self._number, self._name = 0, ""
        self._error = "another rank has no room for it"  # or has failed otherwise

    def take(self, contents: Contents, manifest: Manifest) -> None:
        """Begin a copy, once the one before is whole; `manifest` has no part yet. Called by all ranks after
        the same step."""
        self.wait()
        folder = self._shelf.begin(self._comm.size)
        self._number, self._name, self._step = self._shelf.number, folder.name, manifest.step
        own = self._own(self._pool.submit(self._written, folder, contents, manifest), folder)
        kept = [receiving(self._comm, ward, folder, self._pool) for ward in self._wards]
        self._parts = Tasks([own, *kept])
        self._comm.meanwhile(self.poll)
        self.poll()

    def poll(self) -> bool:
        """Go on with it, as far as it goes without waiting; whether something is left."""
        if self._parts is not None and not self._parts.go_on():
            self._vote = Tasks([voting(self._comm, good=self._parts.good)])
            self._parts = None
        if self._vote is not None and not self._vote.go_on():
            good, self._vote = self._vote.good, None
            self._comm.no_longer(self.poll)
            self._end(good=good)
        return self._parts is not None or self._vote is not None

    def wait(self) -> None:
        """Until the last copy that was begun is whole, or has failed."""
        while self.poll():
            self._comm.check()
            self._comm.rest(REST)

    def abandon(self) -> None:
        """Ranks are lost: what was begun is over. Messages that MPI may still write to stay with the
        communicator, which goes on holding `poll`."""
        self._pool.shutdown()

    def _own(self, written: "Future[str]", folder: Path) -> Waits:
        yield Work(written)
        text = written.result()
        if self._guardian is not None:
            yield from sending(self._comm, self._guardian, folder, text)
        return bool(text)

    def _written(self, folder: Path, contents: Contents, manifest: Manifest) -> str:
        """The rank's own part, in a thread; its manifest, or nothing where that fails."""
        try:
            text = manifest_to_json(replace(manifest, part=write_part(folder, contents)))
            write_text(folder / part_name(self._comm.rank), text)
            return text
        except (CheckpointError, OSError) as error:
            self._error = f"{error}"
            return ""

    def _end(self, *, good: bool) -> None:
        if self._cleans and good:
            self._pool.submit(self._shelf.remove_before, self._number)
        elif self._cleans:
            self._pool.submit(self._shelf.remove, self._name)
        if not good and self._comm.rank == 0:
            self._on_failed(f"no copy in memory of step {self._step}, an older one stays: {self._error}")
            self._on_failed = lambda _: None
