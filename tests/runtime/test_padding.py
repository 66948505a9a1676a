from typing import Any

import pytest
import torch

from gpp.runtime.data import DataError
from gpp.runtime.map_style import adapt
from gpp.runtime.padding import Pad, padded, pads

from .test_map_style import Listed


def test_what_may_be_said() -> None:
    assert pads({"x": 3}) == {"x": Pad(3, 0, "refuse")}
    assert pads({"x": {"length": 3, "value": -1, "longer": "cut"}}) == {"x": Pad(3, -1, "cut")}
    assert pads({}) == {}


@pytest.mark.parametrize(("given", "message"), [
    (64, r"data.pad must say a length for each of its keys, \{key: length\}, it is 64"),
    ({"x": 0}, r"^data.pad.x: a length to pad to must be a whole number of at least 1, it is 0"),
    ({"x": "long"}, r"^data.pad.x: a length .* it is 'long'"),
    ({"x": {"length": 3, "fill": 1}}, r"^data.pad.x: there is no fill; it has length, value, longer"),
    ({"x": {"value": 3}}, r"^data.pad.x: there is no default length; it has length"),
    ({"x": {"length": 3, "value": "z"}}, r"^data.pad.x: the value to pad with must be a number, it is 'z'"),
    ({"x": {"length": 3, "longer": "wrap"}}, r"^data.pad.x: longer must be refuse or cut, it is 'wrap'"),
])  # fmt: skip
def test_what_may_not(given: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        pads(given)


def test_shorter_samples_are_filled_at_the_end() -> None:
    short = torch.tensor([[1, 2], [3, 4]])
    assert padded("x", 0, short, Pad(4, -1)).tolist() == [[1, 2], [3, 4], [-1, -1], [-1, -1]]
    assert (
        padded("x", 0, short, Pad(2)) is not None and padded("x", 0, short, Pad(2)).tolist() == short.tolist()
    )
    assert padded("x", 0, torch.zeros(0), Pad(2, 0.5)).tolist() == [0.5, 0.5]
    assert padded("x", 0, torch.ones(1, dtype=torch.bool), Pad(2)).tolist() == [True, False]


def test_longer_ones_are_refused_or_cut() -> None:
    sample = torch.arange(5)
    assert padded("x", 7, sample, Pad(3, longer="cut")).tolist() == [0, 1, 2]
    message = (
        r"'x' of sample 7 has length 5, more than data.pad.x allows \(3\): raise it, or cut what is longer"
    )
    with pytest.raises(DataError, match=message):
        padded("x", 7, sample, Pad(3))


@pytest.mark.parametrize(("dtype", "value"), [(torch.uint8, -1), (torch.int64, 0.5), (torch.bool, 2)])
def test_a_value_that_the_type_cannot_hold(dtype: torch.dtype, value: float) -> None:
    with pytest.raises(DataError, match=rf"'x' is of type {dtype}, which cannot hold data.pad.x's {value}"):
        padded("x", 0, torch.zeros(2, dtype=dtype), Pad(4, value))


def test_a_map_style_data_set_of_sequences() -> None:
    samples = [{"x": torch.arange(1, n + 1), "y": n} for n in (3, 1, 4)]
    data = adapt(Listed(*samples), (), pads={"x": Pad(5)})
    read = data.read([2, 0, 1], ["x", "y"])
    assert read["x"].tolist() == [[1, 2, 3, 4, 0], [1, 2, 3, 0, 0], [1, 0, 0, 0, 0]]
    assert read["y"].tolist() == [4, 3, 1]
    tuples = adapt(Listed(([1, 2], 0), ([3], 1)), ("x", "y"), pads={"x": Pad(2, -1)})
    assert tuples.read([0, 1], ["x"])["x"].tolist() == [[1, 2], [3, -1]]


def test_unpadded_sequences_are_refused_saying_how_to_pad() -> None:
    data = adapt(Listed((torch.zeros(5),), (torch.zeros(9),)), ("words",))
    with pytest.raises(
        DataError, match=r"'words' has shape \(5,\).*pad sequences to a bound, data.pad=\{words: length\}"
    ):
        data.read([0, 1], ["words"])


def test_what_cannot_be_padded() -> None:
    with pytest.raises(DataError, match=r"the data set has no key 'z'; it has x"):
        adapt(Listed((1,)), ("x",), pads={"z": Pad(3)})
    with pytest.raises(DataError, match=r"'x' of sample 0 is a single number, data.pad is for sequences"):
        adapt(Listed((1,)), ("x",), pads={"x": Pad(3)}).read([0], ["x"])
    ready = adapt(Listed((1,)), ("x",))
    with pytest.raises(DataError, match=r"data.pad is for data sets with __getitem__, MapDataset has read"):
        adapt(ready, ("x",), pads={"x": Pad(3)})
