"""What is found on a shelf, who removes it, and which copy is the newest whole one."""

import fcntl
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest

from gpp.checkpoint.manifest import Part, manifest_to_json
from gpp.checkpoint.shelf import LOCK, Shelf, Stock, build, name_of, newest_whole, part_name, path_of
from gpp.checkpoint.tensors import CheckpointError, FileRecord

from .samples import manifest

PATIENCE = 30.0  # seconds


def text(rank: int, step: int = 8) -> str:
    part = Part({f"model-{rank}": FileRecord(10, rank)}, {f"weight{rank}": f"model-{rank}"}, {}, {})
    return manifest_to_json(replace(manifest(step), part=part))


def stock(number: int, ranks: int, *parts: int) -> Stock:
    return Stock(number, ranks, {rank: text(rank, number) for rank in parts})


@pytest.mark.parametrize(
    ("reports", "found"),
    [
        ({}, None),
        ({0: []}, None),
        ({0: [stock(3, 2, 0, 1)]}, (3, 2)),
        ({0: [stock(3, 2, 0, 1), stock(4, 2, 0, 1)]}, (4, 2)),
        ({0: [stock(3, 2, 0, 1), stock(4, 2, 0)]}, (3, 2)),  # they died while it was made
        ({0: [stock(3, 3, 0, 1)], 2: [stock(3, 3, 2), stock(4, 3, 2)]}, (3, 3)),
        ({0: [stock(3, 3, 0, 1)], 2: [stock(3, 3, 1)]}, None),  # of rank 2 nobody has anything
        ({0: [stock(5, 2, 0), stock(4, 4, 0, 1)], 1: [stock(4, 4, 2, 3)]}, (4, 4)),  # two losses, one soon
    ],
)
def test_the_newest_of_which_all_parts_are_somewhere(
    reports: dict[int, list[Stock]], found: tuple[int, int] | None
) -> None:
    copy = newest_whole(reports)
    if found is None:
        assert copy is None
    else:
        number, ranks = found
        assert copy is not None and copy.name == name_of(number, ranks) and copy.manifest.step == number
        assert copy.manifest.part.files.keys() == {f"model-{rank}" for rank in range(ranks)}
        for rank in range(ranks):
            there = [
                r for r, kept in reports.items() if any(rank in s.parts and s.number == number for s in kept)
            ]
            assert copy.holders[f"model-{rank}"] == tuple(there)


def test_a_damaged_manifest_is_no_copy() -> None:
    bad = Stock(4, 2, {0: text(0), 1: text(1)[:-9]})
    copy = newest_whole({0: [bad, stock(3, 2, 0, 1)]})
    assert copy is not None and copy.name == name_of(3, 2)


def test_parts_count_when_their_manifest_is_there(tmp_path: Path) -> None:
    shelf = build(path_of("job", 0, tmp_path))
    first, second = shelf.begin(2), shelf.begin(2)
    (first / part_name(1)).write_text("of 1")
    (second / "model-00001-of-00002.safetensors").write_bytes(b"half of")
    assert sorted(shelf.stocks(), key=lambda s: s.number) == [Stock(1, 2, {1: "of 1"}), Stock(2, 2, {})]
    assert shelf.held_bytes() == 11
    shelf.remove_before(2)
    assert [path.name for path in shelf.path.iterdir() if path.is_dir()] == [second.name]
    shelf.close()


def test_the_last_one_leaves_nothing(tmp_path: Path) -> None:
    shelf = build(path_of("job", 0, tmp_path))
    other = Shelf(shelf.path)
    (shelf.begin(1) / "model").write_bytes(b"weights")
    assert (shelf.path.stat().st_mode & 0o777) == 0o700
    os.close(shelf._lock)  # as the kernel does when a process dies
    time.sleep(0.3)
    assert shelf.path.is_dir()
    os.close(other._lock)
    end = time.monotonic() + PATIENCE
    while shelf.path.exists() and time.monotonic() < end:
        time.sleep(0.01)
    assert list(tmp_path.iterdir()) == []


def test_the_next_job_removes_what_dead_ones_left(tmp_path: Path) -> None:
    dead, alive = path_of("dead", 0, tmp_path), path_of("alive", 0, tmp_path)
    for path in (dead, alive):
        (path / "copy-00000001-of-00002").mkdir(parents=True)
        (path / LOCK).touch()
    with (alive / LOCK).open() as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        shelf = build(path_of("next", 0, tmp_path))
        assert sorted(tmp_path.iterdir()) == [alive, shelf.path]
        shelf.close()
    assert list(tmp_path.iterdir()) == [alive]


def test_where_there_is_no_memory_file_system(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no copies in memory: .* cannot be made"):
        build(path_of("job", 0, tmp_path / "nowhere"))
