import gzip
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpp.runtime import text_lines
from gpp.runtime.data import DataError
from gpp.runtime.text_lines import TextLines

LINE = st.text(alphabet="ab \t0", min_size=0, max_size=9).map(str.encode)


def read(lines: TextLines, *rows: int) -> list[bytes]:
    return lines.read(np.array(rows, np.int64))


@given(
    st.lists(LINE, min_size=1, max_size=20),
    st.sampled_from(["", "\n", "\n\n\n"]),
    st.sampled_from([1, 7, 64]),
)
def test_every_line_is_found(
    tmp_path_factory: pytest.TempPathFactory, given: list[bytes], end: str, chunk: int
) -> None:
    while given and not given[-1]:
        given.pop()
    path = tmp_path_factory.mktemp("lines") / "file"
    path.write_bytes(b"\n".join(given) + end.encode())
    before, text_lines.CHUNK = text_lines.CHUNK, chunk
    try:
        if not given:
            with pytest.raises(DataError, match="is empty: there are no lines"):
                TextLines(path)
            return
        lines = TextLines(path)
    finally:
        text_lines.CHUNK = before
    assert len(lines) == len(given)
    backwards = list(reversed(range(len(given))))
    assert read(lines, *backwards) == [given[i] for i in backwards]


def test_any_order_and_twice(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"zero\r\none\r\n\r\nthree")
    lines = TextLines(path)
    assert len(lines) == 4 and read(lines, 3, 0, 3, 2, 1) == [b"three", b"zero", b"three", b"", b"one"]
    assert read(lines) == []


def test_the_index_is_kept_and_follows_the_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("one\ntwo\n")
    assert len(TextLines(path)) == 2
    index = next((tmp_path / ".gpp").glob("*.lines"))
    assert index.stat().st_size == 3 * 8
    made = index.stat().st_mtime_ns
    assert len(TextLines(path)) == 2 and index.stat().st_mtime_ns == made
    path.write_text("one\ntwo\nthree\n")
    assert read(TextLines(path), 2) == [b"three"] and not index.exists()


def test_gzip_is_unpacked_once_whatever_its_name(tmp_path: Path) -> None:
    path = tmp_path / "packed"
    path.write_bytes(gzip.compress(b"one\ntwo"))
    lines = TextLines(path, str(tmp_path / "kept"))
    assert read(lines, 1, 0) == [b"two", b"one"] and lines.path == path
    made = sorted(p.suffix for p in (tmp_path / "kept").iterdir())
    assert made == [".lines", ".lock", ".lock", ".text"]
    path.write_bytes(gzip.compress(b"a\nb\nc"))
    assert len(TextLines(path, str(tmp_path / "kept"))) == 3


def test_what_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"the file .*nothing cannot be read"):
        TextLines(tmp_path / "nothing")
    for name, content in {"empty": b"", "blank": b"\n\r\n"}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=rf"{name} is empty: there are no lines"):
            TextLines(tmp_path / name)
    (tmp_path / "torn.gz").write_bytes(gzip.compress(b"line\n" * 1000)[:-9])
    with pytest.raises(DataError, match=r"torn.gz is a damaged gzip file"):
        TextLines(tmp_path / "torn.gz")
