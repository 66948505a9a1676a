"""Copies in memory, of ranks that are threads and take themselves to be on several hosts."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from gpp.api import memory
from gpp.api.crew import Crew
from gpp.api.memory import InMemory, brought, found_copy, shelf_of, why_not
from gpp.checkpoint import writer
from gpp.checkpoint.manifest import Manifest, Part
from gpp.checkpoint.owners import Owners
from gpp.checkpoint.reader import weights
from gpp.checkpoint.shelf import Copy, Shelf
from gpp.checkpoint.tensors import CheckpointError
from gpp.checkpoint.writer import Contents
from gpp.runtime import parcels
from gpp.runtime.copies import Copies
from gpp.runtime.loopback import LoopbackCommunicator, LoopbackWorld, run

HOSTS = ("a", "a", "b", "c")
BASE = Manifest(0, 16, 7, None, Part({}, {}, {}, {}))


def contents(rank: int, ranks: int, step: int) -> Contents:
    file = Owners({}, ranks).file("model", rank)
    tensors = {f"w{rank}": torch.full((1000 + rank,), float(step))}
    return Contents({file: tensors}, {f"w{rank}": file}, {}, {}, None, {})


def manifest(step: int) -> Manifest:
    return Manifest(step, 16, 7, None, Part({}, {}, {}, {}))


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Callable[[Sequence[str]], LoopbackWorld]:
    monkeypatch.setattr(parcels, "PIECE", 1 << 9)  # so that a file is several messages
    monkeypatch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))

    def made(hosts: Sequence[str]) -> LoopbackWorld:
        monkeypatch.setattr(LoopbackCommunicator, "hosts", property(lambda _: tuple(hosts)))
        return LoopbackWorld(len(hosts))

    return made


World = Callable[[Sequence[str]], LoopbackWorld]


def copied(
    world: World, hosts: Sequence[str], root: Path, steps: Sequence[int]
) -> tuple[list[Shelf], list[str]]:
    """The shelves, by rank, after copies of these steps, and what was said."""
    said: list[str] = []

    def work(comm: LoopbackCommunicator) -> Shelf:
        shelf = shelf_of(comm, root)
        copies = Copies(comm, shelf, comm.hosts, said.append)
        for step in steps:
            copies.take(contents(comm.rank, comm.size, step), manifest(step))
        copies.wait()
        copies.abandon()
        return shelf

    return run(world(hosts), work), said


def left(world: World, hosts: Sequence[str], shelves: Sequence[Shelf]) -> list[Copy | None]:
    return run(world(hosts), lambda comm: found_copy(shelves[comm.rank], comm))


def test_the_loss_of_any_host_loses_nothing(world: World, tmp_path: Path) -> None:
    shelves, said = copied(world, HOSTS, tmp_path, [3, 6, 9])
    assert said == [] and len({shelf.path for shelf in shelves}) == 3
    for shelf in shelves:
        assert [path.name for path in shelf.path.iterdir() if path.is_dir()] == ["copy-00000003-of-00004"]
    for lost in "abc":
        stay = [rank for rank in range(4) if HOSTS[rank] != lost]
        hosts, there = [HOSTS[rank] for rank in stay], [shelves[rank] for rank in stay]

        def work(comm: LoopbackCommunicator, there: Sequence[Shelf] = there) -> None:
            copy = found_copy(there[comm.rank], comm)
            assert copy is not None and copy.manifest.step == 9
            kept = brought(there[comm.rank], copy, set(copy.manifest.part.files), Crew(comm))
            found = weights(kept, [f"w{rank}" for rank in range(4)])
            assert all(torch.equal(found[f"w{rank}"], torch.full((1000 + rank,), 9.0)) for rank in range(4))

        run(world(hosts), work)
    assert left(world, ["a"], [shelves[0]]) == [None]  # two hosts that are neighbours
    for shelf in shelves:
        shelf.close() if shelf.path.exists() else None


def test_on_one_host_each_part_is_there_once(world: World, tmp_path: Path) -> None:
    shelves, _ = copied(world, ("a", "a", "a"), tmp_path, [2])
    (copy,) = left(world, ["a"], shelves[2:])
    assert copy is not None and copy.manifest.part.weights.keys() == {"w0", "w1", "w2"}
    files = [path.name for path in (shelves[0].path / copy.name).iterdir()]
    assert sorted(files) == sorted([*copy.manifest.part.files, *(f"part-{rank}.json" for rank in range(3))])
    shelves[0].close()


def test_a_copy_that_fails_leaves_the_one_before(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the rank that writes it, and on the one that keeps it for another."""
    real, write = writer.write_tensors, parcels._write

    def no_room(path: Path, tensors: object) -> object:
        if "copy-00000002" in str(path) and "00001-of" in path.name:
            raise CheckpointError(f"{path} cannot be written: No space left on device")
        return real(path, tensors)  # type: ignore[arg-type]

    monkeypatch.setattr(writer, "write_tensors", no_room)
    shelves, said = copied(world, ("a", "b"), tmp_path, [3, 6])
    assert len(said) == 1 and "no copy in memory of step 6, an older one stays: " in said[0]
    assert "No space left on device" in said[0]
    assert [c and c.manifest.step for c in left(world, ("a", "b"), shelves)] == [3, 3]
    assert shelves[0].number == 2
    monkeypatch.setattr(writer, "write_tensors", real)

    writes = []

    def full(descriptor: int | None, piece: torch.Tensor, at: int) -> bool:
        writes.append(at)
        return len(writes) > 1 and write(descriptor, piece, at)

    monkeypatch.setattr(parcels, "_write", full)
    others, said = copied(world, ("a", "b"), tmp_path, [3, 6])
    assert [text.split(",")[0] for text in said] == ["no copy in memory of step 3"]
    assert [c and c.manifest.step for c in left(world, ("a", "b"), others)] == [6, 6]
    for shelf in (*shelves, *others):
        shelf.close()


def test_what_is_damaged_is_refused_by_all(world: World, tmp_path: Path) -> None:
    shelves, _ = copied(world, ("a", "b"), tmp_path, [3])
    (file,) = shelves[1].path.glob("copy-*/model-00001-of*")
    file.write_bytes(file.read_bytes()[:-1] + b"\xaa")

    def work(comm: LoopbackCommunicator) -> None:
        copy = found_copy(shelves[comm.rank], comm)
        assert copy is not None
        with pytest.raises(CheckpointError, match=r"of step 3 is of no use: rank 1: .*00001-of.* is damaged"):
            brought(shelves[comm.rank], copy, set(copy.manifest.part.files), Crew(comm))

    run(world(("a", "b")), work)
    for shelf in shelves:
        shelf.close()


def test_room_is_looked_for_on_every_host(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(comm: LoopbackCommunicator) -> list[str | None]:
        shelf = shelf_of(comm, tmp_path)
        monkeypatch.setattr(memory, "available", lambda: 1e6)
        crew = Crew(comm)
        found = [why_not(shelf, sizes, crew) for sizes in ([1e5] * 4, [1e5, 1e5, 1e5, 4e5])]
        comm.barrier()
        shelf.close()
        return found

    for few, many in run(world(HOSTS), asked):
        assert few is None
        # host a keeps the parts of 0, 1 and 3, each in two copies
        assert many == "rank 0: host a has 977 KiB of memory for them, they need 1.14 MiB"


def test_how_often() -> None:
    with pytest.raises(CheckpointError, match="every of InMemory must be at least 1, it is 0"):
        InMemory(Shelf.__new__(Shelf), 0)
