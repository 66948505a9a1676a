from pathlib import Path

import numpy as np
import pytest

from gpp.runtime.data import DataError
from gpp.runtime.feature_table import FeatureTable

TEXT = "Sample\ttype\tg1\tg2\tg3\tg4\nA\tlung\t1\t5\t\t0.5\nB\tskin\t3\t5\t-\t\nC\t?\t\t5\tna\t2.5\n"


def table(folder: Path, text: str = TEXT) -> Path:
    (folder / "table.tsv").write_text(text)
    return folder / "table.tsv"


def test_what_is_missing_is_the_mean(tmp_path: Path) -> None:
    found = FeatureTable(table(tmp_path), scale=False, skip=["type"])
    assert found.width == 4 and found.rows == {"A": 0, "B": 1, "C": 2}
    assert found.values.dtype == np.float32 and isinstance(found.values, np.memmap)
    assert found.values.tolist() == [[1, 5, 0, 0.5], [3, 5, 0, 1.5], [2, 5, 0, 2.5]]


def test_scaled_columns_have_mean_0_and_variance_1(tmp_path: Path) -> None:
    found = FeatureTable(table(tmp_path), scale=True, skip=["type"]).values.astype(np.float64)
    half = 1.5**0.5
    np.testing.assert_allclose(found[:, 0], [-half, half, 0], atol=1e-6)
    np.testing.assert_allclose(found[:, 3], [-half, 0, half], atol=1e-6)
    assert (found[:, 1:3] == 0).all()  # constant, and missing everywhere


def test_many_columns_one_by_one_or_together(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(1e4, 3, (9, 200)).astype(np.float32)
    header = ",".join(["id", *(f"c{i}" for i in range(200))])
    lines = [",".join([f"r{i}", *map(str, row)]) for i, row in enumerate(values.tolist())]
    found = FeatureTable(table(tmp_path, "\n".join([header, *lines])), scale=True).values
    exact = values.astype(np.float64)
    np.testing.assert_allclose(found, (exact - exact.mean(0)) / exact.std(0), atol=1e-6)


def test_another_choice_is_another_file(tmp_path: Path) -> None:
    path = table(tmp_path)
    raw = FeatureTable(path, scale=False, skip=["type"])
    assert FeatureTable(path, scale=False, skip=["type", "g4"]).width == 3
    assert FeatureTable(path, scale=True, skip=["type"]).values[0, 0] != raw.values[0, 0]


@pytest.mark.parametrize(("text", "message"), [
    ("id,a\nx,1\ny,2\nx,3\n", r"line 4: the id 'x' has been on line 2 already"),
    ("id,a\nx,1\ny,two\n", r"line 3: column 'a' must be a number, it is 'two'"),
    ("id,a\nx,1\ny\n", r"line 3: it has 1 columns, the header has 2"),
    ("id\nx\n", r"has no column of numbers beside its first, the ids"),
    ("id,a\n", r"is empty: it has a header and no rows"),
    ("", r"is empty: it has no header"),
])  # fmt: skip
def test_what_is_no_table_of_features(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        FeatureTable(table(tmp_path, text), scale=False)
    assert [p.suffix for p in (tmp_path / ".gpp").iterdir()] == [".lock"]


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"the file .*nothing.tsv cannot be read: No such file"):
        FeatureTable(tmp_path / "nothing.tsv", scale=False)
