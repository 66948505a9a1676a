import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gpp.checkpoint import manifest
from gpp.checkpoint.manifest import (
    CHECKSUM,
    Manifest,
    OptimizerEntry,
    Part,
    index_to_json,
    joined,
    manifest_from_json,
    manifest_to_json,
    part_from_json,
    part_to_json,
)
from gpp.checkpoint.tensors import CheckpointError, FileRecord

from ..mutated_json import JSON, changed, places

WHERE = Path("run/manifest.json")
FILE = "model-00001-of-00001.safetensors"
ENTRY = OptimizerEntry(FILE, ("exp_avg",), {"step": 3}, {"lr": 0.1, "betas": [0.9, 0.99], "foreach": None})
PART = Part({FILE: FileRecord(10, 11)}, {"a": FILE, "b": FILE}, {"a": FILE}, {"a": ENTRY}, "torch.optim.Adam")
MANIFEST = Manifest(7, 16, 3, 0.9, PART)


def checked(content: Any) -> str:
    """As JSON with the checksum that belongs to it."""
    if isinstance(content, dict):
        content = {key: value for key, value in content.items() if key != CHECKSUM}
        content[CHECKSUM] = manifest._checksum(content)
    return json.dumps(content)


CONTENT = json.loads(manifest_to_json(MANIFEST))


def test_there_and_back() -> None:
    assert manifest_from_json(manifest_to_json(MANIFEST), WHERE) == MANIFEST
    assert part_from_json(part_to_json(PART), WHERE) == PART
    assert MANIFEST.bytes == 10
    index = json.loads(index_to_json(PART, 24))
    assert index == {"metadata": {"total_size": 24}, "weight_map": {"a": FILE, "b": FILE}}


def test_parts_are_joined() -> None:
    other = Part({"x": FileRecord(1, 2)}, {"c": "x"}, {}, {}, None)
    whole = joined([other, PART])
    assert whole.weights == {"c": "x", "a": FILE, "b": FILE} and whole.optimizer_class == "torch.optim.Adam"
    assert whole.files.keys() == {"x", FILE} and joined([]).optimizer_class is None


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ((), [], "run/manifest.json is damaged: it must be an object, it is a list"),
        (("format",), "other", "is no manifest of a checkpoint: its format is 'other'"),
        (("version",), 2, "run/manifest.json has version 2, this program reads version 1"),
        (
            ("step",),
            -1,
            "run/manifest.json: step is damaged: it must be a whole number of at least 0, it",
        ),
        (("mini_batch",), 0, "mini_batch is damaged: it must be a whole number of at least 1"),
        (("ema",), "much", "ema is damaged: it must be a number, it is 'much'"),
        (("ema",), 10**400, "ema is damaged: it is too large a number"),
        (("part",), None, "run/manifest.json: part is damaged: it must be an object, it is None"),
        (("part", "files"), {"../x": {}}, "part: files names the file '../x': files of a checkpoint lie in"),
        (("part", "files"), {"x\0": {}}, "names the file 'x"),
        (("part", "files"), {"x" * 101: {}}, "files of a checkpoint lie in its folder"),
        (("part", "weights", "a"), "y", "part: weights: a is damaged: there is no file 'y'"),
        (("part", "optimizer", "a"), {"file": FILE}, "part: optimizer: a is damaged: it has no 'tensors'"),
        (("part", "optimizer_class"), 3, "optimizer_class is damaged: it must be a text, it is 3"),
    ],
)
def test_errors_name_file_and_place(path: tuple, value: Any, message: str) -> None:
    with pytest.raises(CheckpointError) as error:
        manifest_from_json(checked(changed(CONTENT, path, value)), WHERE)
    assert message in str(error.value)


def test_another_number_does_not_pass() -> None:
    with pytest.raises(CheckpointError, match="is damaged: it does not say what was written"):
        manifest_from_json(manifest_to_json(MANIFEST).replace('"step": 7', '"step": 8'), WHERE)


@given(st.sampled_from(places(CONTENT)), JSON)
@example(("ema",), 10**400)
@example(("part", "files"), {"": {}})
def test_no_content_makes_another_error(path: tuple, value: Any) -> None:
    for read, text in (
        (manifest_from_json, checked(changed(CONTENT, path, value))),
        (
            part_from_json,
            json.dumps(changed(CONTENT, path, value)["part"] if path[:1] == ("part",) else value),
        ),
    ):
        try:
            read(text, WHERE)
        except CheckpointError as error:
            assert "run/manifest.json" in str(error)


@given(st.text() | st.binary().map(lambda b: b.decode("latin-1")))
@example("[" * 100_000)
@example('{"format": "gpp-checkpoint", "version": 1e999}')
@example("9" * 10_000)
def test_no_text_makes_another_error(text: str) -> None:
    for read in (manifest_from_json, part_from_json):
        with pytest.raises(CheckpointError, match=r"run/manifest\.json"):
            read(text, WHERE)
