"""Copies of checkpoints in the memory of hosts, for those who go on when ranks are lost."""

import secrets
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from gpp.checkpoint.folder import Kept
from gpp.checkpoint.shelf import ROOT, Copy, Shelf, Stock, build, newest_whole, path_of
from gpp.checkpoint.tensors import CheckpointError, check_file
from gpp.plan_table import readable_bytes
from gpp.runtime.agreement import agree
from gpp.runtime.communicator import Communicator
from gpp.runtime.copies import REST
from gpp.runtime.guardians import first_of_host, kept_on, transfers
from gpp.runtime.memory import available
from gpp.runtime.parcels import Tasks, Waits, receiving_file, sending_file

from .crew import Crew

SLOTS = 2  # a whole copy stays while another is made


@dataclass(frozen=True)
class InMemory:
    """Copies in memory: one every `every` steps, on the job's `shelf`. `say` is called on rank 0 with what
    its user should know."""

    shelf: Shelf
    every: int
    say: Callable[[str], None] = print

    def __post_init__(self) -> None:
        if self.every < 1:
            raise CheckpointError(f"every of InMemory must be at least 1, it is {self.every}")


def shelf_of(comm: Communicator, root: Path = ROOT) -> Shelf:
    """A shelf for a job, once for its whole life; called by all ranks. Raises CheckpointError, on all ranks,
    where there is no memory file system."""
    host = list(dict.fromkeys(comm.hosts)).index(comm.hosts[comm.rank])
    path = path_of(comm.broadcast_object(lambda: secrets.token_hex(8)), host, root)
    made: Shelf | None = None
    for first in (True, False):
        error: str | None = None
        try:
            if (first_of_host(comm.hosts, comm.rank) == comm.rank) is first:
                made = build(path) if first else Shelf(path)
        except (CheckpointError, OSError) as problem:
            error = f"{problem}"
        if (found := agree(comm, error)) is not None:
            raise CheckpointError(found)
    assert made is not None
    return made


def found_copy(shelf: Shelf, comm: Communicator) -> Copy | None:
    """The newest copy of which all parts are on some host; called by all ranks."""
    stocks: list[Stock] = []
    if first_of_host(comm.hosts, comm.rank) == comm.rank:
        with suppress(OSError):  # the shelf is gone, or just going
            stocks = shelf.stocks()
    said = comm.all_gather_object((shelf.number, stocks))
    shelf.number = max(number for number, _ in said)  # ranks are lost while some have begun the next copy
    return newest_whole({rank: there for rank, (_, there) in enumerate(said)})


def why_not(shelf: Shelf, sizes: Sequence[float], crew: Crew) -> str | None:
    """Why copies have no room, if so: the same on all ranks, by all of which it is called. `sizes` are the
    bytes of each rank's part."""
    hosts, rank = crew.comm.hosts, crew.comm.rank
    needed = SLOTS * sum(sizes[other] for other in kept_on(hosts, rank))
    room = min(shelf.free_bytes(), available()) + shelf.held_bytes()
    short = needed > room and first_of_host(hosts, rank) == rank
    text = f"host {hosts[rank]} has {readable_bytes(room)} of memory for them, they need "
    return crew.first_error(f"{text}{readable_bytes(needed)}" if short else None)


def brought(shelf: Shelf, copy: Copy, needed: set[str], crew: Crew) -> Kept:
    """A copy as a checkpoint of which this rank can read the `needed` files; called by all ranks. Raises
    CheckpointError, on all of them, where one does not arrive or is damaged."""
    comm, folder, files = crew.comm, shelf.path / copy.name, copy.manifest.part.files
    missing = []
    with ThreadPoolExecutor(1) as pool:
        with suppress(OSError):
            folder.mkdir(exist_ok=True)
        for name in sorted(needed):
            path = folder / name
            if not path.is_file() or path.stat().st_size != files[name].bytes:
                missing.append(name)
        plan = transfers(comm.all_gather_object(missing), copy.holders, comm.hosts)
        sizes = {name: files[name].bytes for name, _, _ in plan}
        tasks = Tasks(
            [_sends(shelf, copy, plan, sizes, comm), _receives(shelf, copy, plan, sizes, comm, pool)]
        )
        comm.meanwhile(tasks.go_on)  # where it stays if ranks are lost: MPI may still write to its memory
        while tasks.go_on():
            comm.check()
            comm.rest(REST)
        comm.no_longer(tasks.go_on)
    arrived = crew.first_error(None if tasks.good else f"{folder} has no room for what its host lacks")
    error: str | None = None
    try:
        for name in sorted(needed) if arrived is None else ():
            check_file(folder / name, files[name])
    except CheckpointError as problem:
        error = f"{problem}"
    if (first := arrived or crew.first_error(error)) is not None:
        raise CheckpointError(f"the copy in memory of step {copy.manifest.step} is of no use: {first}")
    return Kept(folder, copy.manifest)


Moves = Sequence[tuple[str, int, int]]  # file, sender, receiver


def _sends(shelf: Shelf, copy: Copy, plan: Moves, sizes: Mapping[str, int], comm: Communicator) -> Waits:
    for name, sender, receiver in plan:
        if sender == comm.rank:
            yield from sending_file(comm, receiver, shelf.path / copy.name / name, sizes[name])
    return True


def _receives(
    shelf: Shelf, copy: Copy, plan: Moves, sizes: Mapping[str, int], comm: Communicator, pool: Executor
) -> Waits:
    good = True
    for name, sender, receiver in plan:
        if receiver == comm.rank:
            path = shelf.path / copy.name / name
            there = yield from receiving_file(comm, sender, path, sizes[name], pool)
            good = good and there
    return good
