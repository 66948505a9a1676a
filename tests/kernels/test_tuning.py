"""Tuned tables: what they may change, what they may not, and the errors of those that are wrong."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from kernels import (
    attention_tiles,
    bag_sums,
    dropout,
    embedding_bag,
    gradient_sum,
    interaction,
    join_parts,
    pointwise_loss,
    product,
    rows,
    tuning,
)
from kernels.tuning import SPACES, Space, Table, TableError, tuned, using

GPU = "NVIDIA H200"
BUCKET = "bfloat16 rows=1024 columns=4096 inner=1024"
STATIC = product.configuration(1000, 4096, torch.bfloat16)
SIZES = {"rows": 1000, "columns": 4096, "inner": 1024}
CONFIGURATIONS = {
    "product": STATIC,
    "described_product": product.configuration(1000, 4096, torch.bfloat16, described=True),
    "join": join_parts.configuration(1024, 4096, torch.bfloat16, wide=True),
    **dict.fromkeys(("norm", "norm_backward"), rows.configuration(1024)),
    **dict.fromkeys(("add_norm", "add_norm_backward"), rows.configuration(1024)),
    **dict.fromkeys(("cross_entropy", "cross_entropy_backward"), rows.configuration(1024)),
    **{
        f"attention_{kernel}": attention_tiles.configuration(kernel, 64, torch.bfloat16, False)
        for kernel in ("forward", "query", "key_value")
    },
    "dropout": dropout.STATIC,
    "sum": gradient_sum.STATIC,
    "bags": embedding_bag.STATIC,
    "bag_sums": bag_sums.STATIC,
    "interaction": interaction.configuration(9, 64),
    "pointwise_loss": pointwise_loss.STATIC,
}


class OnGpu:
    """What `tuned` reads of a tensor on a GPU."""

    is_cuda = True
    device = torch.device("cuda", 0)
    dtype = torch.bfloat16


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(tuning, "FOLDER", tmp_path)
    monkeypatch.setattr(tuning, "gpu_name", lambda index: GPU)
    monkeypatch.setattr(tuning, "_tables", {})
    tuning._chosen.cache_clear()
    yield tmp_path
    tuning._chosen.cache_clear()


def choose() -> object:
    return tuned("product", STATIC, OnGpu(), **SIZES)


def test_a_table_overrides_what_it_names(folder: Path) -> None:
    table = Table(GPU, {"product": {BUCKET: {"columns": 256, "warps": 8}}}, {"date": "today"})
    path = tuning.path_of(GPU)
    assert path == folder / "nvidia_h200.json"
    path.write_text(tuning.table_to_json(table))
    assert tuning.read_table(path) == table
    assert asdict(choose()) == asdict(STATIC) | {"columns": 256, "warps": 8}
    other = tuned("product", STATIC, OnGpu(), **SIZES | {"rows": 1025})
    assert other is STATIC or other == STATIC


def test_without_a_gpu_or_a_table_the_static_configuration_counts() -> None:
    assert choose() == STATIC
    with using(Table(GPU, {"product": {BUCKET: {"warps": 4}}})):
        for device in ("cpu", "meta"):
            like = torch.empty(1, dtype=torch.bfloat16, device=device)
            assert tuned("product", STATIC, like, **SIZES) is STATIC
        assert choose() != STATIC
    assert choose() == STATIC


def test_all_sizes_up_to_a_power_of_two_share_an_entry() -> None:
    for count in (513, 1000, 1024):
        assert tuning.bucket_of("product", torch.bfloat16, SIZES | {"rows": count}) == BUCKET
    assert tuning.bucket_of("product", torch.bfloat16, SIZES | {"rows": 1025}) != BUCKET
    flags = [tuning.bucket_of("attention_query", torch.float32, {"head": 64, "mask_rows": m}) for m in (0, 1)]
    assert flags == ["float32 head=64 mask_rows=0", "float32 head=64 mask_rows=1"]
    with pytest.raises(ValueError, match=r"product is tuned by .'rows', 'columns', 'inner'."):
        tuning.bucket_of("product", torch.bfloat16, {"rows": 1})


def test_what_orders_a_sum_cannot_depend_on_the_batch() -> None:
    with pytest.raises(ValueError, match="must not depend on the batch, rows is a size of it"):
        Space(("rows", "width"), {"warps": (1, 2)}, reorders=True)
    free = {name for name, space in SPACES.items() if not space.reorders}
    assert {"product", "dropout"} <= free
    assert "inner" not in SPACES["product"].options  # its blocks order the sum


def test_every_option_is_a_field_and_every_static_value_may_be_chosen() -> None:
    assert set(CONFIGURATIONS) == set(SPACES)
    for operator, static in CONFIGURATIONS.items():
        fields = asdict(static)
        for name, values in SPACES[operator].options.items():
            assert fields[name] in values, (operator, name)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("{", "not JSON"),
        ("[]", "format must be 'gpp.tuned/1', it is None"),
        ({"format": "gpp.tuned/0"}, "format must be 'gpp.tuned/1', it is 'gpp.tuned/0'"),
        ({"gpu": 7}, "gpu must be the name of a GPU, it is 7"),
        ({"operators": []}, r"operators must be an object, it is \[\]"),
        ({"operators": {"gemm": {}}}, "operators.gemm: no such operator; there are product"),
        ({"operators": {"product": {BUCKET: 3}}}, "must be an object, it is 3"),
        ({"operators": {"product": {BUCKET: {"inner": 32}}}}, r"1024'\].inner is not tuned; of product rows"),
        (
            {"operators": {"product": {BUCKET: {"warps": 3}}}},
            r"\['bfloat16 rows=1024 columns=4096 inner=1024'\].warps must be one of \(4, 8\), it is 3",
        ),
    ],
)
def test_a_table_that_is_wrong_names_file_and_key(content: object, named: str) -> None:
    path = tuning.path_of(GPU)
    right = {"format": tuning.FORMAT, "gpu": GPU, "operators": {}}
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    if isinstance(content, dict):
        path.write_text(json.dumps(right | content))
    with pytest.raises(TableError, match=named) as caught:
        choose()
    assert str(path) in str(caught.value)
