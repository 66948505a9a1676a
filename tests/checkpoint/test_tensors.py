import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from gpp.checkpoint.tensors import CheckpointError, check_file, read_tensors, write_tensors, write_text

TYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool)


def tensors() -> dict[str, Tensor]:
    found = {str(dtype): torch.arange(6).reshape(2, 3).to(dtype) for dtype in TYPES}
    found["complex"] = torch.complex(torch.ones(3, dtype=torch.float64), torch.arange(3.0).double())
    found |= {"scalar": torch.tensor(3.5), "empty": torch.zeros(0, 4), "turned": torch.randn(3, 5).T}
    found["nan"] = torch.tensor([float("nan"), float("-inf"), -0.0])
    return found


def test_every_type_comes_back_to_the_bit(tmp_path: Path) -> None:
    file, given = tmp_path / "t.safetensors", tensors()
    record = write_tensors(file, given)
    check_file(file, record)
    found = read_tensors(file)
    assert found.keys() == given.keys()
    for name, value in given.items():
        assert found[name].dtype == value.dtype and found[name].shape == value.shape, name
        assert torch.equal(torch.nan_to_num(found[name]), torch.nan_to_num(value)), name
    assert list(read_tensors(file, ["scalar"])) == ["scalar"]
    assert torch.equal(load_file(file)["turned"], given["turned"])  # for others' tools too


def test_what_is_read_outlives_the_file(tmp_path: Path) -> None:
    file = tmp_path / "t.safetensors"
    write_tensors(file, {"a": torch.ones(100_000)})
    found = read_tensors(file)["a"]
    with file.open("rb+") as opened:
        opened.truncate(10)
    assert found.sum() == 100_000


def test_errors_name_the_file(tmp_path: Path) -> None:
    file = tmp_path / "t.safetensors"
    record = write_tensors(file, tensors())
    with pytest.raises(CheckpointError, match=r"t\.safetensors cannot be read: .*nobody"):
        read_tensors(file, ["nobody"])
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"t\.safetensors is damaged: its bytes are not those"):
        check_file(file, record)
    file.write_bytes(data[:-1])
    with pytest.raises(CheckpointError, match=rf"has {len(data) - 1} bytes, {len(data)} were written"):
        check_file(file, record)
    for broken in (b"", b"\xff" * 8, b"\x08\0\0\0\0\0\0\0not JSON"):
        file.write_bytes(broken)
        with pytest.raises(CheckpointError, match=r"t\.safetensors cannot be read"):
            read_tensors(file)
    file.unlink()
    for read in (lambda: read_tensors(file), lambda: check_file(file, record)):
        with pytest.raises(CheckpointError, match=r"t\.safetensors cannot be read"):
            read()
    nowhere = tmp_path / "nowhere" / "t"
    for write in (lambda: write_tensors(nowhere, tensors()), lambda: write_text(nowhere, "")):
        with pytest.raises(CheckpointError, match="nowhere/t cannot be written"):
            write()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_full_disk_is_an_error(tmp_path: Path) -> None:
    os.symlink("/dev/full", tmp_path / "t.tmp")
    with pytest.raises(CheckpointError, match="t cannot be written: No space left on device"):
        write_text(tmp_path / "t", "text")


def test_a_file_that_was_waited_for_may_be_moved_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, rename = tmp_path / "begun", Path.rename
    folder.mkdir()

    def and_away(self: Path, target: Path) -> None:
        rename(self, target)
        rename(folder, tmp_path / "whole")

    monkeypatch.setattr(Path, "rename", and_away)
    record = write_text(folder / "a.json", "{}")
    check_file(tmp_path / "whole" / "a.json", record)
