"""Initial weights out of safetensors files."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from gpp.capture import pretrained as module
from gpp.capture.export import CaptureError
from gpp.capture.pretrained import Source, pretrained
from gpp.capture.weights import Initialised, build_plain, build_recorded
from tests.equality import models


class Counted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.text, self.head = models.block(), nn.Linear(8, 5)
        self.norm = nn.BatchNorm1d(8)
        self.register_buffer("scratch", torch.zeros(2), persistent=False)


BUILDS = (build_plain, build_recorded)


def filled(names: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    return {n: torch.full(shape, float(i + 1)) for i, (n, shape) in enumerate(names.items())}


def encoder() -> dict[str, Tensor]:
    return filled({n: tuple(v.shape) for n, v in models.block().state_dict().items()})


def written(folder: Path, tensors: dict[str, Tensor], name: str = "weights") -> Path:
    save_file(tensors, folder / f"{name}.safetensors")
    return folder / f"{name}.safetensors"


@pytest.mark.parametrize("build", BUILDS)
def test_a_whole_model(tmp_path: Path, build) -> None:
    initialised = build(Counted, 1)
    state = filled({n: tuple(v.shape) for n, v in initialised.model.state_dict().items()})
    state["norm.num_batches_tracked"] = torch.tensor(7)
    found = pretrained(initialised, [Source(written(tmp_path, state))], strict=True)
    values = found.values([*state, "scratch"])
    assert all(torch.equal(values[n], v) for n, v in state.items())
    assert values["scratch"].tolist() == [0, 0]  # never saved, never missing
    assert values["norm.num_batches_tracked"].dtype == torch.int64


@pytest.mark.parametrize("build", BUILDS)
def test_a_pretrained_part(tmp_path: Path, build) -> None:
    initialised = build(Counted, 1)
    weights = encoder()
    file = written(tmp_path, {**{f"model.{n}": v for n, v in weights.items()}, "head.x": torch.ones(1)})
    found = pretrained(initialised, [Source(file, "text.", "model.")], strict=True)
    own = initialised.values(["head.weight"])
    values = found.values(["text.0.weight", "head.weight"])
    assert torch.equal(values["text.0.weight"], weights["0.weight"])
    assert torch.equal(values["head.weight"], own["head.weight"])


def test_weights_of_another_type_are_cast(tmp_path: Path) -> None:
    file = written(tmp_path, {n: v.bfloat16() for n, v in encoder().items()})
    values = pretrained(build_plain(Counted, 1), [Source(file, "text.")], strict=True).values(["text.0.bias"])
    assert values["text.0.bias"].dtype == torch.float32


def test_of_tied_parameters_one_name_is_enough(tmp_path: Path) -> None:
    for kept in ("a.weight", "d.weight"):
        initialised = build_plain(models.Tied, 1)
        state = filled({n: tuple(v.shape) for n, v in initialised.model.state_dict().items()})
        other = {"a.weight": "d.weight", "d.weight": "a.weight"}[kept]
        file = written(tmp_path, {n: v for n, v in state.items() if n != other}, kept)
        found = pretrained(initialised, [Source(file)], strict=True)
        assert torch.equal(found.values(["a.weight"])["a.weight"], state[kept])


def test_a_later_file_comes_first(tmp_path: Path) -> None:
    first, second = (
        written(tmp_path, encoder()),
        written(tmp_path, {"0.bias": torch.full((16,), 9.0)}, "more"),
    )
    sources = [Source(first, "text."), Source(second, "text.")]
    values = pretrained(build_plain(Counted, 1), sources, strict=False).values(
        ["text.0.bias", "text.0.weight"]
    )
    assert values["text.0.bias"].unique().tolist() == [9.0]
    assert torch.equal(values["text.0.weight"], encoder()["0.weight"])


def test_an_index_of_several_files(tmp_path: Path) -> None:
    whole = encoder()
    parts = {"one": {n: whole[n] for n in list(whole)[:2]}, "two": {n: whole[n] for n in list(whole)[2:]}}
    files = {n: written(tmp_path, tensors, part).name for part, tensors in parts.items() for n in tensors}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": files}))
    values = pretrained(build_plain(Counted, 1), [Source(index, "text.")], strict=True).values(
        [f"text.{n}" for n in whole]
    )
    assert all(torch.equal(values[f"text.{n}"], v) for n, v in whole.items())
    (tmp_path / "two.safetensors").unlink()
    assert "there is no file" in refused(build_plain(Counted, 1), index, strict=False)
    index.write_text("{}")
    assert "no index of safetensors files" in refused(build_plain(Counted, 1), index, strict=False)


def test_only_what_is_asked_for_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    original = module._read
    monkeypatch.setattr(module, "_read", lambda places: read.extend(places) or original(places))
    found = pretrained(build_plain(Counted, 1), [Source(written(tmp_path, encoder()), "text.")], strict=True)
    assert read == []
    found.values(["text.0.bias", "head.bias"])
    assert read == ["text.0.bias"]


def refused(initialised: Initialised, file: Path, prefix: str = "text.", *, strict: bool) -> str:
    with pytest.raises(CaptureError) as error:
        pretrained(initialised, [Source(file, prefix)], strict=strict)
    return str(error.value)


def test_names_that_differ_are_listed(tmp_path: Path) -> None:
    weights = encoder()
    del weights["0.bias"]
    file = written(tmp_path, {**weights, "pooler.weight": torch.ones(1)})
    message = refused(build_plain(Counted, 1), file, strict=True)
    assert "1 missing (text.0.bias)" in message and "1 unexpected (text.pooler.weight)" in message
    assert "Counted below 'text.'" in message and "train.init_strict=false" in message
    loose = pretrained(build_plain(Counted, 1), [Source(file, "text.")], strict=False)
    own = build_plain(Counted, 1).values(["text.0.bias"])
    assert torch.equal(loose.values(["text.0.bias"])["text.0.bias"], own["text.0.bias"])


@pytest.mark.parametrize("strict", [True, False])
def test_shapes_that_differ_are_always_refused(tmp_path: Path, strict: bool) -> None:
    file = written(tmp_path, {**encoder(), "0.bias": torch.ones(17)})
    message = refused(build_plain(Counted, 1), file, strict=strict)
    assert "1 of another shape (text.0.bias is (17,) in the file and (16,) in the model)" in message


def test_a_file_that_gives_nothing_is_refused(tmp_path: Path) -> None:
    file = written(tmp_path, {"other.weight": torch.ones(1)})
    assert "1 unexpected (text.other.weight)" in refused(build_plain(Counted, 1), file, strict=False)


def test_files_that_are_not_there_or_something_else(tmp_path: Path) -> None:
    assert "there is no file" in refused(build_plain(Counted, 1), tmp_path / "nope", strict=True)
    (tmp_path / "text").write_text("no tensors here")
    assert "is no safetensors file" in refused(build_plain(Counted, 1), tmp_path / "text", strict=True)
