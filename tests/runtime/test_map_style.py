from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, IterableDataset, TensorDataset, random_split

from gpp.runtime.data import DataError
from gpp.runtime.map_style import adapt


class Listed(Dataset[Any]):
    def __init__(self, *samples: Any) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        if isinstance(self.samples[index], Exception):
            raise self.samples[index]
        return self.samples[index]


def test_items_of_a_tuple_are_matched_to_the_parameters_in_order() -> None:
    data = adapt(TensorDataset(torch.arange(6).view(3, 2), torch.tensor([5, 6, 7])), ("x", "label", "extra"))
    assert (data.keys, len(data)) == (("x", "label"), 3)
    read = data.read([2, 0], ["x", "label"])
    assert {k: v.tolist() for k, v in read.items()} == {"x": [[4, 5], [0, 1]], "label": [7, 5]}
    assert list(data.read([1], ["label"])) == ["label"]


def test_a_split_of_torch_is_a_map_style_data_set_too() -> None:
    whole = TensorDataset(torch.arange(10))
    part = random_split(whole, [4, 6], torch.Generator().manual_seed(0))[0]
    assert adapt(part, ("x",)).read(range(4), ["x"])["x"].tolist() == [int(part[i][0]) for i in range(4)]


def test_dictionaries_arrays_and_numbers() -> None:
    samples = [{"x": np.array([1.5, i]), "y": i, "z": torch.tensor(True)} for i in range(3)]
    data = adapt(Listed(*samples), ())
    read = data.read([0, 2], data.keys)
    assert (read["x"].dtype, read["x"].tolist()) == (torch.float64, [[1.5, 0], [1.5, 2]])
    assert (read["y"].dtype, read["y"].tolist()) == (torch.int64, [0, 2])
    assert read["z"].dtype == torch.bool
    assert data.read([0], []) == {}


def test_a_sample_that_is_one_tensor_is_the_first_parameter() -> None:
    assert adapt(Listed(torch.ones(2), torch.zeros(2)), ("x", "y")).read([0, 1], ["x"])["x"].shape == (2, 2)


def test_keys_name_the_items_or_choose_among_keys() -> None:
    named = adapt(Listed((1, 2), (3, 4)), ("x", "y"), keys=("label", "x"))
    assert named.read([1], ["label"])["label"].tolist() == [3]
    chosen = adapt(Listed({"a": 1, "b": "no tensor"}), (), keys=("a",))
    assert (chosen.keys, chosen.read([0], ["a"])["a"].tolist()) == (("a",), [1])
    fewer = adapt(named, (), keys=("x",))
    assert (fewer.keys, len(fewer), fewer.read([0], ["x"])["x"].tolist()) == (("x",), 2, [2])
    with pytest.raises(DataError, match="no key 'label'; it has x"):
        fewer.read([0], ["label"])
    for data in (Listed({"a": 1}), named):
        with pytest.raises(DataError, match="no key 'q'"):
            adapt(data, (), keys=("q",))


def test_a_dataset_stays_what_it_is() -> None:
    data = adapt(Listed((1,)), ("x",))
    assert adapt(data, ("other",)) is data


class Stream(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        yield 1


@pytest.mark.parametrize("data", [Stream(), 5, {1, 2}])
def test_what_is_no_data_set_is_refused(data: object) -> None:
    with pytest.raises(DataError, match=f"{type(data).__name__} is no data set: it needs __len__ and"):
        adapt(data, ("x",))


REFUSALS = [
    ([], "the data set Listed is empty"),
    ([(1, 2, 3)], r"a sample has 3 items, there are names for 2 \(x, y\): name them with data.keys"),
    ([(torch.zeros(5),), (torch.zeros(9),)], r"'x' has shape \(5,\) in sample 0 and \(9,\) in sample 1.*pad"),
    ([(1, "text"), (1, "text")], "'y' of sample 0 is of type str, which is no tensor"),
    ([{"x": 1}, {"y": 1}], "sample 1 lacks the key 'x', which sample 0 has"),
    ([(1, 2), (1,)], "sample 1 has 1 items, sample 0 has 2"),
    (
        [(1,), OSError("disk gone")],
        r"sample 1 cannot be read: OSError: disk gone \(.*test_map_style.py:\d+\)",
    ),
    ([OSError("disk gone")], "sample 0 cannot be read: OSError: disk gone"),
]


@pytest.mark.parametrize(("samples", "message"), REFUSALS)
def test_what_does_not_fit_is_refused(samples: list[Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        data = adapt(Listed(*samples), ("x", "y"))
        data.read(range(len(samples)), data.keys)


def test_a_sample_outside_is_refused() -> None:
    with pytest.raises(DataError, match="no sample 1: it has 1"):
        adapt(Listed((1,)), ("x",)).read([1], ["x"])
