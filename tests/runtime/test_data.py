import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gpp.runtime.data import (
    Batches,
    DataError,
    Subset,
    checked,
    evaluation_batches,
    hold_out,
    majority_share,
    order,
)


class Squares:
    keys = ("x", "square")

    def __len__(self) -> int:
        return 20

    def read(self, indices: list[int], keys: tuple[str, ...]) -> dict[str, Tensor]:
        rows = torch.as_tensor(checked(indices, len(self), keys, self.keys))
        return {key: {"x": rows, "square": rows**2}[key] for key in keys}


def test_the_order_is_the_same_everywhere() -> None:
    assert order(0, 0, 8).tolist() == [3, 2, 1, 6, 0, 7, 4, 5]
    assert hold_out(20, 7).held_out.tolist() == [1, 16]
    assert not order(0, 0, 8).flags.writeable


@given(st.integers(0, 2**40), st.integers(0, 1000), st.integers(1, 200))
def test_an_order_has_every_sample_once(seed: int, epoch: int, length: int) -> None:
    assert sorted(order(seed, epoch, length).tolist()) == list(range(length))


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = {tuple(order(seed, epoch, 50).tolist()) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


def test_another_process_finds_the_same() -> None:
    code = "from gpp.runtime.data import order; print(order(5, 3, 40).tolist())"
    environment = os.environ | {"PYTHONHASHSEED": "1"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=True)
    assert run.stdout.decode().strip() == str(order(5, 3, 40).tolist())


@given(st.integers(1, 300), st.integers(0, 99), st.sampled_from([0.0, 0.1, 0.25, 0.9]))
def test_a_split_has_every_sample_on_one_side(length: int, seed: int, fraction: float) -> None:
    split = hold_out(length, seed, fraction)
    assert sorted([*split.train, *split.held_out]) == list(range(length))
    assert len(split.held_out) == int(length * fraction)
    for side in (split.train, split.held_out):
        assert np.all(np.diff(side) > 0)


def test_a_split_survives_a_growing_data_set() -> None:
    before, after = hold_out(1000, 3), hold_out(1010, 3)
    assert len(set(before.held_out) - set(after.held_out)) <= 2
    assert set(hold_out(1000, 4).held_out) != set(before.held_out)


@pytest.mark.parametrize(("length", "fraction"), [(0, 0.1), (10, 1.0), (10, -0.1)])
def test_a_split_leaves_something_to_train_on(length: int, fraction: float) -> None:
    with pytest.raises(DataError, match=rf"there are {length} samples, the fraction is {fraction}"):
        hold_out(length, 0, fraction)


def test_negative_seeds_are_refused() -> None:
    with pytest.raises(DataError, match="a seed must not be negative, it is -1"):
        order(-1, 0, 5)


@given(st.integers(1, 60), st.data())
def test_batches_cover_each_epoch_but_its_last_samples(length: int, data: st.DataObject) -> None:
    batches = Batches(length, data.draw(st.integers(1, length)), seed=1)
    assert batches.per_epoch * batches.mini_batch + batches.dropped == length
    for epoch in range(3):
        steps = range(epoch * batches.per_epoch, (epoch + 1) * batches.per_epoch)
        read = [i for step in steps for i in batches.at(step).tolist()]
        assert {batches.epoch(step) for step in steps} == {epoch}
        assert len(read) == len(set(read)) == length - batches.dropped
        assert all(len(batches.at(step)) == batches.mini_batch for step in steps)


@pytest.mark.parametrize("mini_batch", [0, -1, 11])
def test_a_mini_batch_must_be_fillable(mini_batch: int) -> None:
    with pytest.raises(
        DataError, match=rf"all of the 10 training samples, it has {mini_batch}: change train"
    ):
        Batches(10, mini_batch, 0)


def test_evaluation_reads_every_sample_once_in_order() -> None:
    assert [list(b) for b in evaluation_batches(7, 3)] == [[0, 1, 2], [3, 4, 5], [6]]
    assert [list(b) for b in evaluation_batches(6, 3)] == [[0, 1, 2], [3, 4, 5]]
    assert evaluation_batches(0, 3) == ()


def test_a_subset_counts_anew() -> None:
    subset = Subset(Subset(Squares(), np.arange(10, 20)), np.array([3, 1]))
    assert (len(subset), subset.keys) == (2, ("x", "square"))
    assert subset.read([1, 0, 0], ["square"])["square"].tolist() == [121, 169, 169]
    with pytest.raises(DataError, match="no sample 2: it has 2"):
        subset.read([2], ["x"])


@pytest.mark.parametrize("index", [-1, 20])
def test_a_sample_outside_is_named(index: int) -> None:
    with pytest.raises(DataError, match=f"no sample {index}: it has 20, counted from 0"):
        Squares().read([0, index], ["x"])


def test_an_unknown_key_is_named_with_those_known() -> None:
    with pytest.raises(DataError, match="no key 'cube'; it has x, square"):
        Squares().read([0], ["x", "cube"])


def test_the_majority_share_is_that_of_the_most_frequent_label() -> None:
    assert majority_share(torch.tensor([4, 1, 1, 0, 1, 4, 7, 4])) == 3 / 8


def test_orders_that_are_too_long_to_sort(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every sample of an epoch once, in an order of its own, and the split's parts are all samples."""
    monkeypatch.setattr("gpp.runtime.data.SORTED", 50)
    batches = Batches(103, 10, 4)
    epochs = [np.concatenate([batches.at(step) for step in range(10 * e, 10 * e + 10)]) for e in range(2)]
    assert all(len(set(epoch.tolist()) & set(range(103))) == 100 for epoch in epochs)
    assert epochs[0].tolist() != epochs[1].tolist()
    assert batches.at(13).tolist() == Batches(103, 10, 4).at(13).tolist()
    split = hold_out(103, 4, 0.1)
    parts = [part[np.arange(len(part))].tolist() for part in (split.train, split.held_out)]
    assert [len(part) for part in parts] == [93, 10] and sorted(parts[0] + parts[1]) == list(range(103))
    with pytest.raises(DataError, match="a seed must not be negative, it is -1"):
        hold_out(103, -1)


def test_a_subset_of_very_many_samples_takes_no_memory() -> None:
    class Many(Squares):
        def __len__(self) -> int:
            return 10**12

    data = Many()
    split = hold_out(len(data), 0, 0.1)
    train, held_out = Subset(data, split.train), Subset(data, split.held_out)
    assert (len(train), len(held_out)) == (9 * 10**11, 10**11)
    read = [part.read([0, len(part) - 1], ("x",))["x"].tolist() for part in (train, held_out)]
    assert len({*read[0], *read[1]}) == 4 and all(0 <= x < 10**12 for part in read for x in part)
    assert len(Batches(len(train), 4096, 0).at(10**6)) == 4096
