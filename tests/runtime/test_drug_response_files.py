import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from gpp.runtime.data import DataError
from gpp.runtime.drug_response_files import DrugResponseFiles

HEADER = "SOURCE\tCELL\tDRUG1\tDOSE1\tDRUG2\tDOSE2\tGROWTH\tSTUDY"
RESPONSES = [
    "X\tcell.a\tdrug.1\t4.5\tdrug.2\t6\t50\t1",
    "X\tcell.b\tdrug.2\t5\t\t\t-25\t1",
    "X\tcell.b\tdrug.3\t5\t\t\t10\t1",  # no such drug
    "X\tcell.z\tdrug.1\t5\t\t\t10\t1",  # no such cell
    "X\tcell.a\tdrug.2\t7\tdrug.1\t8\t100\t1",
]
COLUMNS = {key: key.upper() for key in ("cell", "drug1", "drug2", "dose1", "dose2", "growth")}
WIDTHS = {
    "dose1": 1, "dose2": 1, "cell_rnaseq": 2, "drug1_descriptors": 3, "drug1_fingerprints": 2,
    "drug2_descriptors": 3, "drug2_fingerprints": 2,
}  # fmt: skip
CELLS = "Sample\tg1\tg2\ncell.a\t1\t2\ncell.b\t3\t6\n"
DRUGS = "NAME,d1,d2,d3\ndrug.1,1,2,3\ndrug.2,3,2,5\n"
PRINTS = "NAME,f1,f2\ndrug.2,1,0\ndrug.1,0,1\n"


def files(folder: Path, **changes: str) -> dict[str, str]:
    given = {
        "responses": "\n".join([HEADER, *RESPONSES]),
        "cell_rnaseq": CELLS,
        "drug_descriptors": DRUGS,
        "drug_fingerprints": PRINTS,
    }
    for name, text in (given | changes).items():
        (folder / name).write_text(text)
    return {name: str(folder / name) for name in given}


def opened(folder: Path, changed: dict[str, str] | None = None, **changes: Any) -> DrugResponseFiles:
    arguments = {"features": WIDTHS, "branches": 7, "columns": COLUMNS, "growth_scale": 0.01}
    return DrugResponseFiles(**(files(folder, **(changed or {})) | arguments | changes))


def test_rows_are_joined_with_their_features(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        data = opened(tmp_path)
    assert len(data) == 3 and data.keys == (*WIDTHS, "growth")
    assert (
        "responses: 2 of 5 rows left out, their features are missing; the first is cell 'cell.z'"
        in caplog.text
    )
    found = data.read([2, 0, 1], data.keys)
    assert all(value.dtype == torch.float32 for value in found.values())
    assert {key: tuple(value.shape) for key, value in found.items()} == {
        **{key: (3, width) for key, width in WIDTHS.items()}, "growth": (3,),
    }  # fmt: skip
    torch.testing.assert_close(found["growth"], torch.tensor([1.0, 0.5, -0.25]))
    assert found["cell_rnaseq"].tolist() == [[-1, -1], [-1, -1], [1, 1]]  # scaled
    assert found["drug1_descriptors"].tolist() == [[1, 0, 1], [-1, 0, -1], [1, 0, 1]]
    assert found["drug1_fingerprints"].tolist() == [[1, 0], [0, 1], [1, 0]]  # not scaled
    assert found["drug2_fingerprints"].tolist() == [[0, 1], [1, 0], [1, 0]]


def test_a_single_drug_comes_in_two_halves(tmp_path: Path) -> None:
    found = opened(tmp_path).read([0, 1], WIDTHS)
    torch.testing.assert_close(found["dose1"], torch.tensor([[4.5], [5.30103]]))
    torch.testing.assert_close(found["dose2"], torch.tensor([[6.0], [5.30103]]))
    for kind in ("descriptors", "fingerprints"):
        assert torch.equal(found[f"drug1_{kind}"][1], found[f"drug2_{kind}"][1])


def test_branches_beyond_the_feature_sets_read_them_again(tmp_path: Path) -> None:
    data = opened(tmp_path, branches=10)
    assert data.keys == (*WIDTHS, "dose1_2", "dose2_2", "cell_rnaseq_2", "growth")
    found = data.read([0, 2], ("cell_rnaseq", "cell_rnaseq_2", "dose2", "dose2_2"))
    assert torch.equal(found["cell_rnaseq"], found["cell_rnaseq_2"])
    assert torch.equal(found["dose2"], found["dose2_2"])


def test_only_what_the_model_reads_must_be_there(tmp_path: Path) -> None:
    data = opened(tmp_path, branches=3, drug_descriptors=None, drug_fingerprints=None)
    assert data.keys == ("dose1", "dose2", "cell_rnaseq", "growth") and len(data) == 4
    alone = opened(tmp_path, branches=3, columns=COLUMNS | {"drug2": None, "dose2": None})
    torch.testing.assert_close(alone.read([0], ("dose2",))["dose2"], torch.tensor([[4.80103]]))


def test_a_table_that_changes_is_read_again(tmp_path: Path) -> None:
    assert len(opened(tmp_path)) == 3
    assert len(opened(tmp_path, {"cell_rnaseq": CELLS + "cell.z\t5\t6\n"})) == 4
    assert len(opened(tmp_path, {"responses": "\n".join([HEADER, *RESPONSES[:1]])})) == 1


def response(line: str) -> dict[str, str]:
    return {"responses": "\n".join([HEADER, RESPONSES[0], line])}


REFUSALS = [
    (response("X\tcell.a\tdrug.1\thigh\t\t\t1\t1"), r"line 3: column 'DOSE1' must be a number, it is 'high'"),
    (response("X\tcell.a\tdrug.1\t5\tdrug.2\t\t1\t1"), r"line 3: column 'DOSE2' has no number"),
    (response("X\tcell.a\tdrug.1\t5\t\t\tNA\t1"), r"line 3: column 'GROWTH' has no number"),
    (response("X\t\tdrug.1\t5\t\t\t1\t1"), r"line 3: column 'CELL' is empty, it must name a cell"),
    (response("X\tcell.a\tdrug.1\t5"), r"line 3: it has 4 columns, the header has 8"),
    ({"responses": HEADER}, r"responses is empty: it has a header and no rows"),
    ({"responses": "CELL\tGROWTH\na\t1"}, r"responses has no column 'DRUG1'; it has CELL, GROWTH"),
    ({"cell_rnaseq": "Sample\tg1\tg2\nother\t1\t2\n"}, r"no row of .* cell 'cell.a', which .*rnaseq"),
    ({"cell_rnaseq": "Sample\tg1\ncell.a\t1\n"}, r"the files: use model.features.cell_rnaseq=1$"),
    ({"drug_descriptors": "N,a\ndrug.1,1"}, r"use .*drug1_descriptors=1 model.features.drug2_descriptors=1$"),
]  # fmt: skip


@pytest.mark.parametrize(("changed", "message"), REFUSALS)
def test_files_that_do_not_fit(tmp_path: Path, changed: dict[str, str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        opened(tmp_path, changed)


@pytest.mark.parametrize(("changes", "message"), [
    ({"responses": None}, r"data.responses is missing: name the file, data.responses=path"),
    ({"drug_fingerprints": None}, r"data.drug_fingerprints is missing"),
    ({"responses": "nothing.tsv"}, r"the file nothing.tsv cannot be read"),
    ({"columns": COLUMNS | {"growth": None}}, r"data.columns.growth must name a column"),
    ({"columns": COLUMNS | {"study": "S"}}, r"there is no data.columns.study; it has cell, drug1"),
    ({"features": WIDTHS | {"mordred": 9}, "branches": 8}, r"no feature set 'mordred' .* they have dose1"),
    ({"features": WIDTHS | {"dose1": 2}}, r"use model.features.dose1=1$"),
])  # fmt: skip
def test_what_cannot_be(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        opened(tmp_path, **changes)


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no sample 3: it has 3"):
        opened(tmp_path).read([3], ("growth",))
    with pytest.raises(DataError, match="no key 'rna'"):
        opened(tmp_path).read([0], ("rna",))
