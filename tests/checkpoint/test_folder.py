"""What is found in a folder, whatever a crash has left there and whatever has happened to its files."""

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gpp.checkpoint import folder as folders
from gpp.checkpoint import tensors, writer
from gpp.checkpoint.folder import check_place, check_space, newest, opened, prune, settle
from gpp.checkpoint.manifest import MANIFEST
from gpp.checkpoint.tensors import CheckpointError

from .samples import assert_is_of, read_all, write


class Crash(BaseException):
    """The process is gone."""


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests write thousands of files."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


@contextmanager
def crash_at(monkeypatch: pytest.MonkeyPatch, when: int, torn: bool) -> Iterator[list[int]]:
    """The process ends before the `when`-th thing that it does to files; what it writes is `torn`: half of it
    is there. Yields how many things were done."""
    count = [0]

    def instead(real: Callable[..., Any], writes: bool = False) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            count[0] += 1
            if count[0] == when:
                if torn and writes:
                    real(*arguments, **options)
                    path = next(a for a in arguments if isinstance(a, Path))
                    os.truncate(path, path.stat().st_size // 2)
                raise Crash
            return real(*arguments, **options)

        return call

    with monkeypatch.context() as patch:
        for name in ("fsync", "rename", "mkdir", "unlink", "rmdir", "replace"):
            patch.setattr(os, name, instead(getattr(os, name)))
        patch.setattr(tensors, "save_file", instead(tensors.save_file, writes=True))
        patch.setattr(Path, "write_text", instead(Path.write_text, writes=True))
        yield count


class Scene(NamedTuple):
    """Checkpoints of steps with contents, and the step, content and number kept of the one that fails."""

    before: tuple[tuple[int, int], ...]
    step: int
    content: int
    keep: int


SCENES = {
    "first": Scene((), 1, 1, 2),
    "next": Scene(((1, 1),), 2, 2, 2),
    "one is dropped": Scene(((1, 1), (2, 2)), 3, 3, 1),
    "the same step again": Scene(((1, 1), (2, 2)), 2, 5, 2),
}


@pytest.mark.parametrize("torn", [False, True])
@pytest.mark.parametrize("name", SCENES)
def test_a_crash_at_any_point_leaves_a_whole_one(
    name: str, torn: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = SCENES[name]
    start = tmp_path / "start"
    settle(start, 0)
    for step, content in scene.before:
        write(start, step, keep=9, content=content)
    old = scene.before[-1] if scene.before else None
    done, points, seen = False, 0, set()
    while not done:
        points += 1
        folder = tmp_path / f"at-{points}"
        shutil.copytree(start, folder)
        with crash_at(monkeypatch, points, torn) as count:
            try:
                write(folder, scene.step, scene.keep, scene.content)
                done = count[0] < points
            except Crash:
                pass
        contents = _newest_content(folder, old, (scene.step, scene.content))
        seen.add(contents)
        settle(folder, 0)
        assert _newest_content(folder, old, (scene.step, scene.content)) == contents
        assert not list(folder.glob("*.part")) and not list(folder.glob("*.replaced"))
        write(folder, scene.step, scene.keep, scene.content)
        found, wrong = newest(folder)
        assert found is not None and not wrong
        assert_is_of(found, scene.content)
        assert len(list(folder.iterdir())) <= max(scene.keep, 2)
        shutil.rmtree(folder)
    assert points > 20 and seen == {old, (scene.step, scene.content)}


def _newest_content(folder: Path, old: tuple | None, new: tuple) -> tuple | None:
    """Which of the two checkpoints is the newest; it is whole."""
    kept, wrong = newest(folder)
    assert not wrong
    if kept is None:
        assert old is None
        return None
    text = (kept.path / "config.yaml").read_text()
    found = (kept.manifest.step, int(text.removeprefix("step: ")))
    assert found in (old, new)
    assert_is_of(kept, found[1])
    return found


def test_all_is_on_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    rename = os.rename

    def note(descriptor: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))

    def check(source: Any, target: Any) -> None:
        if Path(target).name == "step-00000001":
            made = [str(path) for path in Path(source).iterdir()]
            assert len(made) == 9
            assert {*made, str(source)} <= {path.removesuffix(".tmp") for path in synced}
        rename(source, target)

    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(os, "rename", check)
    write(tmp_path, 1)
    assert synced[-1] == str(tmp_path) and newest(tmp_path)[0] is not None


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    write(folder, 4)
    return folder / "step-00000004"


def files(whole: Path) -> list[str]:
    return sorted(path.name for path in whole.iterdir())


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_byte_can_change_unseen(whole: Path, tmp_path: Path, data: st.DataObject) -> None:
    damaged = tmp_path / "step-00000004"
    shutil.rmtree(damaged, ignore_errors=True)
    shutil.copytree(whole, damaged)
    name = data.draw(st.sampled_from(files(whole)))
    content = (whole / name).read_bytes()
    place = data.draw(st.integers(0, len(content) - 1))
    way = data.draw(st.sampled_from(("flip", "cut", "more", "gone")))
    if way == "flip":
        bits = data.draw(st.integers(1, 255))
        changed = content[:place] + bytes([content[place] ^ bits]) + content[place + 1 :]
    else:
        changed = content[:place] if way == "cut" else content + b"\0"
    if way == "gone":
        (damaged / name).unlink()
    else:
        (damaged / name).write_bytes(changed)
    try:
        kept = opened(damaged)
        read_all(kept)
    except CheckpointError as error:
        assert name in str(error)
    else:  # white space of the manifest
        assert name == MANIFEST and kept.manifest == opened(whole).manifest


def test_the_newest_whole_one_is_found_and_others_are_named(tmp_path: Path) -> None:
    for step in (1, 2, 10):
        write(tmp_path, step, keep=9)
    (tmp_path / "step-00000010" / "model-00002-of-00002.safetensors").unlink()
    (tmp_path / "step-00000002" / MANIFEST).write_text("{}")
    (tmp_path / "step-00000011").mkdir()
    (tmp_path / "notes").mkdir()
    kept, wrong = newest(tmp_path)
    assert kept is not None and kept.manifest.step == 1
    assert [text.partition("step-000000")[2][:2] for text in wrong] == ["11", "10", "02"]
    assert "model-00002-of-00002.safetensors is not there" in wrong[1]
    assert newest(tmp_path / "nowhere") == (None, [])


def test_a_thread_that_leaves_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "commit", lambda *_: sys.exit(5))
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 1 is written: SystemExit\(5\)"):
        write(tmp_path, 1)


def test_damaged_ones_do_not_count_as_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        write(tmp_path, step, keep=9)
    (tmp_path / "step-00000004" / MANIFEST).unlink()
    (tmp_path / "step-00000002" / MANIFEST).unlink()
    prune(tmp_path, 2)
    assert files(tmp_path) == [f"step-0000000{step}" for step in (1, 2, 3, 4)]
    prune(tmp_path, 1)
    assert files(tmp_path) == ["step-00000003", "step-00000004"]


def test_a_later_checkpoint_is_in_the_way(tmp_path: Path) -> None:
    write(tmp_path, 5)
    for step in (5, 6):
        check_place(tmp_path, step)
    with pytest.raises(CheckpointError, match="checkpoint of step 5, and this run is at step 0: go on"):
        check_place(tmp_path, 0)


def test_space_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=3000)
    monkeypatch.setattr(folders.shutil, "disk_usage", lambda _: usage)
    check_space(tmp_path, 1000, 2)
    with pytest.raises(CheckpointError, match=r"has 2.93 KiB of free .* need 3.91 KiB: 4 of about 0.977 KiB"):
        check_space(tmp_path, 1000.0, 3)
    for step in (1, 2):
        write(tmp_path, step)
    check_space(tmp_path, 2500, 2)  # two are there, and one of them is dropped afterwards
    with pytest.raises(CheckpointError, match="1 of about"):
        check_space(tmp_path, 3001, 2)


def test_a_folder_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "deeper"):
        with pytest.raises(CheckpointError, match="checkpoints cannot be kept in"):
            settle(path, 0)
        with pytest.raises(CheckpointError):
            opened(path)
