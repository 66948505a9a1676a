"""Data, what is made of it, weights, kernels' tables: damaged ones end in an error that names the file."""

import gzip
import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from gpp.capture.export import CaptureError
from gpp.capture.pretrained import Source, pretrained
from gpp.capture.weights import build_plain
from gpp.checkpoint.folder import check_bytes, opened
from gpp.checkpoint.manifest import Manifest, Part, manifest_to_json
from gpp.checkpoint.reader import weights
from gpp.checkpoint.tensors import CheckpointError, read_tensors, write_tensors
from gpp.runtime.criteo import Criteo
from gpp.runtime.data import DataError, Dataset
from gpp.runtime.drug_response_files import DrugResponseFiles
from gpp.runtime.feature_table import FeatureTable
from kernels.tuning import TableError, read_table

from .damaged import survives, written
from .mutated_json import mutated_bytes, mutated_text

CLICK = "\t".join(["1", *map(str, range(13)), *(f"{i:08x}" for i in range(26))])
CLICKS = f"{CLICK}\n{CLICK}\n\n".encode()
TABLE = b"id\ta\tb\nx\t1\t2.5\ny\t3\t\nz\t0\t1e5\n"
RESPONSES = b"CELL\tDRUG1\tDRUG2\tDOSE1\tDOSE2\tGROWTH\nx\ty\tz\t1\t2\t50\nx\tz\t\t1\t\t20\n"
COLUMNS = {name.lower(): name for name in ("CELL", "DRUG1", "DRUG2", "DOSE1", "DOSE2", "GROWTH")}
FEATURES = {"dose1": 1, "dose2": 1, "cell_rnaseq": 2, "drug1_descriptors": 2, "drug2_descriptors": 2}
SIZES = {"dense": 1, "features": 13, "tables": 26, "rows": 100, "bag": 1}


def clicks(folder: Path) -> None:
    used(Criteo(str(folder / "day_0"), **SIZES, cache=str(folder / "kept")))


def responses(folder: Path) -> None:
    table = str(written(folder / "table.tsv", TABLE))
    data = DrugResponseFiles(
        responses=str(folder / "responses.tsv"),
        cell_rnaseq=table,
        drug_descriptors=table,
        features=FEATURES,
        branches=5,
        columns=COLUMNS,
        cache=str(folder / "kept"),
    )
    used(data)


def features(folder: Path) -> None:
    table = FeatureTable(folder / "table.tsv", scale=True, cache=str(folder / "kept"))
    assert table.values[:].shape == (len(table.rows), table.width)


def used(data: Dataset) -> None:
    data.read(range(len(data)), data.keys)


SOURCES: dict[str, tuple[str, bytes, Callable[[Path], None]]] = {
    "clicks": ("day_0", CLICKS, clicks),
    "packed clicks": ("day_0", gzip.compress(CLICKS), clicks),
    "responses": ("responses.tsv", RESPONSES, responses),
    "features": ("table.tsv", TABLE, features),
}


@pytest.mark.parametrize("name", SOURCES)
def test_a_damaged_file_of_data(name: str, tmp_path: Path) -> None:
    file, good, read = SOURCES[name]

    def use(data: bytes) -> None:
        shutil.rmtree(tmp_path / "kept", ignore_errors=True)
        written(tmp_path / file, data)
        read(tmp_path)

    use(good)
    survives(mutated_bytes(good), use, (DataError,), file, share=0.6)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("clicks", "lines"), ("packed clicks", "text"), ("responses", "responses"), ("features", "features")],
)
def test_a_damaged_file_that_was_made_once(name: str, kind: str, tmp_path: Path) -> None:
    file, good, read = SOURCES[name]
    written(tmp_path / file, good)
    read(tmp_path)
    (kept,) = (tmp_path / "kept").glob(f"{file}*.{kind}")
    content = kept.read_bytes()

    def use(data: bytes) -> None:
        if kind == "text":  # where its lines begin is found anew
            for lines in (tmp_path / "kept").glob("*.lines"):
                lines.unlink()
        written(kept, data)
        read(tmp_path)

    survives(mutated_bytes(content), use, (DataError,), file, share=0.6)
    written(kept, content)
    read(tmp_path)
    for size in (0, len(content) // 2, len(content) - 8) if kind != "text" else ():
        written(kept, content[:size])
        with pytest.raises(DataError) as error:
            read(tmp_path)
        assert f"{kept}, made once from " in str(error.value) and "it is made again" in str(error.value)


def test_a_damaged_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "step-00000001"
    folder.mkdir()
    values = {"a": torch.ones(3), "b": torch.ones(2, dtype=torch.complex128)}
    record = write_tensors(folder / "w.safetensors", values)
    part = Part({"w.safetensors": record}, dict.fromkeys(values, "w.safetensors"), {}, {})
    manifest = manifest_to_json(Manifest(1, 2, 0, None, part))
    good = (folder / "w.safetensors").read_bytes()

    def use(content: Any, file: str) -> None:
        written(folder / "manifest.json", manifest)
        written(folder / "w.safetensors", good)
        same = (folder / file).read_bytes() == written(folder / file, content).read_bytes()
        kept = opened(folder)
        check_bytes(kept)
        found = weights(kept, values)
        assert file != "w.safetensors" or (same and all(torch.equal(found[n], v) for n, v in values.items()))

    for strategy, file in ((mutated_bytes(good), "w.safetensors"), (mutated_text(manifest), "manifest.json")):
        survives(strategy, partial(use, file=file), (CheckpointError,), str(folder), share=0.6)
    target = tmp_path / "alone.safetensors"
    survives(
        mutated_bytes(good), lambda data: read_tensors(written(target, data)), (CheckpointError,), str(target)
    )


def test_damaged_initial_weights(tmp_path: Path) -> None:
    model = build_plain(lambda: nn.Linear(3, 2), 0)
    target, index = tmp_path / "m.safetensors", tmp_path / "m.json"
    save_file({"weight": torch.ones(2, 3), "bias": torch.ones(2)}, target)
    good = target.read_bytes()

    def use(file: Path) -> None:
        pretrained(model, [Source(file)], strict=True).values(["weight", "bias"])

    shards = json.dumps({"weight_map": {"weight": target.name, "bias": target.name}})
    survives(mutated_text(shards), lambda text: use(written(index, text)), (CaptureError,), str(tmp_path))
    survives(mutated_bytes(good), lambda data: use(written(target, data)), (CaptureError,), str(target))


def test_a_damaged_table_of_configurations(tmp_path: Path) -> None:
    sizes = {"float32 rows=1 columns=1 inner=1": {"rows": 64, "warps": 4}}
    content = {"format": "gpp.tuned/1", "gpu": "X", "measured": {}, "operators": {"product": sizes}}
    file = tmp_path / "x.json"
    survives(
        mutated_text(json.dumps(content)),
        lambda text: read_table(written(file, text)),
        (TableError,),
        str(file),
    )
