import gzip
import math
from pathlib import Path

import numpy as np
import pytest

from gpp.runtime.data import DataError
from gpp.runtime.delimited import Kept, kept, numbers, positions, rows


def table(folder: Path, content: str | bytes) -> Path:
    path = folder / "table"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize("between", ["\t", ","])
def test_tabs_or_commas(tmp_path: Path, between: str) -> None:
    text = 'id,"x 1",y\na,1,2\r\n\n"b",,"3"\n'.replace(",", between)
    expected = [(1, ["id", "x 1", "y"]), (2, ["a", "1", "2"]), (4, ["b", "", "3"])]
    assert list(rows(table(tmp_path, text))) == expected
    assert list(rows(table(tmp_path, gzip.compress(text.encode())))) == expected
    assert list(rows(table(tmp_path, b"\xef\xbb\xbf" + text.encode()))) == expected


def test_commas_inside_fields_between_tabs(tmp_path: Path) -> None:
    assert list(rows(table(tmp_path, "id\ta,b\n1\t2,3"))) == [(1, ["id", "a,b"]), (2, ["1", "2,3"])]


def test_numbers_and_what_is_missing() -> None:
    found = numbers(Path("t"), 3, "abcdef", ["1", "-2.5e3", "", "NA", " - ", "NaN"])
    assert found[:2] == [1.0, -2500.0] and all(map(math.isnan, found[2:]))
    with pytest.raises(DataError, match=r"^t, line 3: column 'b' must be a number, it is 'x7'$"):
        numbers(Path("t"), 3, "ab", ["na", "x7"])
    with pytest.raises(DataError, match=r"^t, line 3: column 'b' is infinite"):
        numbers(Path("t"), 3, "ab", ["1", "-inf"])


def test_columns_are_found_by_name() -> None:
    assert positions(Path("t"), ["a", "b", "c"], ["c", "a"]) == [2, 0]
    with pytest.raises(DataError, match=r"^t has no column 'z'; it has c0, .*, c7, \.\.\.$"):
        positions(Path("t"), [f"c{i}" for i in range(20)], ["c3", "z"])


@pytest.mark.parametrize(("content", "message"), [
    ("a\tb\n1\t2\n3\n", "table, line 3: it has 1 columns, the header has 2"),
    ("", "table is empty: it has no header"),
    ("\n\n", "table is empty: it has no header"),
    (b"a,b\n\xff,1\n", "table is no text in UTF-8"),
    (gzip.compress(b"a,b\n" * 99, mtime=0)[:-9], "table is a damaged gzip file"),
])  # fmt: skip
def test_what_is_no_table(tmp_path: Path, content: str | bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        list(rows(table(tmp_path, content)))


def test_an_array_and_its_names_are_kept(tmp_path: Path) -> None:
    path, calls = table(tmp_path, "x"), []

    def make() -> Kept:
        calls.append(1)
        return np.arange(6, dtype=np.float32).reshape(2, 3), {"ids": ["a", "é"]}

    for _ in range(2):
        array, names = kept(path, "test", None, make, lambda found: len(found[1]["ids"]) == 2)
        assert isinstance(array, np.memmap) and array.tolist() == [[0, 1, 2], [3, 4, 5]]
        assert names == {"ids": ["a", "é"]}
    assert len(calls) == 1
