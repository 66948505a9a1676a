import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import BinaryIO

import pytest

from gpp.runtime.cache import made_from, user_folder
from gpp.runtime.data import DataError

from ..mpirun import job_environment


class Upper:
    """Writes the source in capitals, slowly, and counts how often."""

    def __init__(self, source: Path, seconds: float = 0.0) -> None:
        self.source, self.seconds, self.calls = source, seconds, 0

    def __call__(self, file: BinaryIO) -> None:
        self.calls += 1
        file.write(self.source.read_bytes().upper())
        time.sleep(self.seconds)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    path = tmp_path / "data" / "words"
    path.write_text("one")
    return path


def files(folder: Path) -> list[str]:
    return sorted(path.suffix for path in folder.iterdir())


def test_it_is_made_once_beside_the_source(source: Path) -> None:
    make = Upper(source)
    first = made_from(source, "upper", None, make)
    assert first.read_bytes() == b"ONE" and first.parent == source.parent / ".gpp"
    assert made_from(source, "upper", None, make) == first and make.calls == 1
    assert made_from(source, "lower", None, make) != first and make.calls == 2


def test_a_changed_source_is_read_again_and_the_old_file_goes(source: Path) -> None:
    make = Upper(source)
    first = made_from(source, "upper", None, make)
    stamp = source.stat().st_mtime_ns
    source.write_text("two")
    os.utime(source, ns=(stamp, stamp + 1))  # the same size, the clock a tick on
    second = made_from(source, "upper", None, make)
    assert second.read_bytes() == b"TWO" and not first.exists()
    source.write_text("three")
    os.utime(source, ns=(stamp, stamp + 1))  # the same time, another size
    assert made_from(source, "upper", None, make).read_bytes() == b"THREE"
    assert files(source.parent / ".gpp") == [".lock", ".upper"]


def test_names_that_are_patterns_too(tmp_path: Path) -> None:
    source = tmp_path / "a[1]*"
    for text in ("one", "three"):
        source.write_text(text)
        made_from(source, "upper", None, Upper(source))
    assert files(tmp_path / ".gpp") == [".lock", ".upper"]


def test_two_sources_of_one_name_share_a_folder(source: Path, tmp_path: Path) -> None:
    other = tmp_path / "words"
    other.write_text("two")
    found = [made_from(path, "upper", str(tmp_path / "kept"), Upper(path)) for path in (source, other)]
    assert [path.read_bytes() for path in found] == [b"ONE", b"TWO"]
    assert {path.parent for path in found} == {tmp_path / "kept"}


def test_threads_that_start_together_make_it_once(source: Path) -> None:
    make, found = Upper(source, 0.2), []
    work = [
        threading.Thread(target=lambda: found.append(made_from(source, "upper", None, make))) for _ in "abc"
    ]
    for thread in work:
        thread.start()
    for thread in work:
        thread.join()
    assert make.calls == 1 and [path.read_bytes() for path in found] == [b"ONE"] * 3


PROGRAM = """
import sys, time
from pathlib import Path
from gpp.runtime.cache import made_from

def make(file):
    with open(sys.argv[2], "a") as calls:
        calls.write("x")
    file.write(b"a")
    file.flush()
    time.sleep(0.5)
    file.write(b"b")

source = Path(sys.argv[1])
assert made_from(source, "slow", None, make).read_bytes() == b"ab"
"""


def test_processes_that_start_together_make_it_once(source: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", PROGRAM, str(source), str(tmp_path / "calls")]
    work = [subprocess.Popen(command, env=job_environment()) for _ in range(3)]
    assert [process.wait(60) for process in work] == [0, 0, 0]
    assert (tmp_path / "calls").read_text() == "x"


def test_one_that_fails_leaves_nothing_and_the_next_can(source: Path) -> None:
    def fail(file: BinaryIO) -> None:
        file.write(b"half")
        raise DataError("line 3 is torn")

    with pytest.raises(DataError, match=r"^line 3 is torn"):
        made_from(source, "upper", None, fail)
    assert files(source.parent / ".gpp") == [".lock"]
    assert made_from(source, "upper", None, Upper(source)).read_bytes() == b"ONE"


def test_what_is_made_may_be_read_by_whom_the_source_may(source: Path) -> None:
    for mode, expected in ((0o600, 0o600), (0o664, 0o664), (0o444, 0o644)):
        source.chmod(mode)
        made = made_from(source, f"m{mode:o}", None, Upper(source))
        assert made.stat().st_mode & 0o777 == expected


def test_where_nobody_may_write_it_goes_to_the_users_folder(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    assert user_folder() == tmp_path / "home" / "gpp"
    shared = made_from(source, "upper", None, Upper(source))
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert made_from(source, "upper", None, Upper(source)) == shared  # somebody else has made it
    assert made_from(source, "lower", None, Upper(source)).parent == user_folder()
    assert made_from(source, "lower", str(tmp_path / "kept"), Upper(source)).parent == tmp_path / "kept"


def test_what_cannot_be(source: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"the file .*nothing cannot be read: No such file"):
        made_from(tmp_path / "nothing", "upper", None, Upper(source))
    with pytest.raises(DataError, match=r"is a folder: name files, or a pattern"):
        made_from(tmp_path, "upper", None, Upper(source))
    (tmp_path / "file").write_text("")
    with pytest.raises(
        DataError, match=r"cannot be written \(.*\): name a folder with room.*data.cache=folder"
    ):
        made_from(source, "upper", str(tmp_path / "file"), Upper(source))
