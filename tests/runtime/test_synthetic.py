import numpy as np
import pytest
import torch
from torch import nn

from gpp.models.candle_uno import CandleUno
from gpp.models.dlrm import Dlrm
from gpp.runtime.data import DataError
from gpp.runtime.synthetic import Synthetic, clicks, drug_responses, vectors


def mixed(**changes: object) -> Synthetic:
    arguments = {
        "name": "y",
        "target": "value",
        "numbers": {"a": (3,), "b": (2, 4)},
        "tokens": {"t": (50, 6)},
    }
    return Synthetic(1 << 40, **(arguments | changes))


def test_a_sample_depends_on_its_index_alone() -> None:
    data, keys = mixed(), ("a", "b", "t", "y")
    assert data.keys == keys and len(data) == 1 << 40
    whole = data.read([5, 1 << 39, 5, 0], keys)
    for i, index in enumerate((5, 1 << 39, 5, 0)):
        alone = data.read([index], keys)
        assert all(torch.equal(alone[key][0], whole[key][i]) for key in keys)
    assert {key: tuple(value.shape) for key, value in whole.items()} == {
        "a": (4, 3), "b": (4, 2, 4), "t": (4, 6), "y": (4,),
    }  # fmt: skip
    assert [whole[key].dtype for key in keys] == [torch.float32, torch.float32, torch.int64, torch.float32]
    assert data.read([], ("b",))["b"].shape == (0, 2, 4)


def test_seeds_and_keys_differ() -> None:
    first, second = (mixed(seed=seed).read(range(20), ("a", "t", "y")) for seed in (0, 1))
    assert all(not torch.equal(first[key], second[key]) for key in first)
    same = mixed(numbers={"a": (3,), "b": (3,)}).read(range(20), ("a", "b"))
    assert not torch.equal(same["a"], same["b"])


def test_numbers_and_tokens_are_uniform() -> None:
    read = mixed().read(range(4000), ("b", "t"))
    numbers, tokens = read["b"].double(), read["t"]
    assert numbers.mean().abs() < 0.02 and (numbers.var() - 1).abs() < 0.02
    assert numbers.abs().max() < 3**0.5 + 1e-6
    counts = np.bincount(tokens.flatten().numpy(), minlength=50)
    assert len(counts) == 50 and counts.min() > 360 and counts.max() < 600  # 480 each, +- 5 sigma
    correlation = torch.corrcoef(numbers.flatten(1).T) - torch.eye(8, dtype=torch.float64)
    assert correlation.abs().max() < 0.08


def test_targets() -> None:
    values = mixed().read(range(4000), ("y",))["y"]
    assert values.mean().abs() < 0.1 and (values.var() - 1).abs() < 0.15
    signs = mixed(target="click").read(range(4000), ("y",))["y"]
    assert torch.equal(signs, (values > 0).float())
    labels = mixed(target="label", classes=4).read(range(4000), ("y",))["y"]
    assert labels.dtype == torch.int64 and torch.equal(labels >= 2, values > 0)
    assert torch.bincount(labels).tolist() == pytest.approx([1000] * 4, rel=0.2)


def test_the_target_is_a_linear_rule_of_the_numbers() -> None:
    data = mixed(tokens={})
    read = data.read(range(500), data.keys)
    inputs = torch.cat([read["a"], read["b"].flatten(1)], 1).double()
    rule = torch.linalg.lstsq(inputs[:100], read["y"][:100].double()[:, None]).solution
    torch.testing.assert_close((inputs @ rule).squeeze(1), read["y"].double(), atol=1e-5, rtol=0)


def test_what_models_read() -> None:
    data = clicks(9, dense=2, features=3, tables=1, rows=7, bag=5)
    assert data.keys == ("dense_0", "dense_1", "sparse_0", "label")
    assert set(data.read(range(9), ("label",))["label"].tolist()) <= {0.0, 1.0}
    assert int(data.read(range(9), ("sparse_0",))["sparse_0"].max()) < 7
    assert vectors(9, branches=1, sequence=4, hidden=2, classes=3).keys == ("vectors_0", "label")


def train(model: nn.Module, data: Synthetic, steps: int, rate: float) -> dict[str, torch.Tensor]:
    """Train on the first samples of the data set, and return the last 1000."""
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    for step in range(steps):
        loss, _ = model(**data.read(range(64 * step, 64 * step + 64), data.keys))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return data.read(range(len(data) - 1000, len(data)), data.keys)


def area_under_curve(scores: torch.Tensor, labels: torch.Tensor) -> float:
    """The share of pairs of a click and none in which the click has the higher score."""
    return (scores[labels == 1][:, None] > scores[labels == 0]).double().mean().item()


def test_a_small_dlrm_learns_the_clicks() -> None:
    sizes = {"dense": 2, "features": 4, "tables": 2, "rows": 20, "bag": 3}
    torch.manual_seed(0)
    model = Dlrm(
        **sizes, dense_layers=2, hidden=32, dimension=4, pooling="sum", interaction="concat", top_layers=1
    )
    logits: list[torch.Tensor] = []
    model.out.register_forward_hook(lambda module, given, out: logits.append(out.squeeze(-1)))
    held_out = train(model, clicks(200 * 64 + 1000, **sizes), 200, 0.01)
    loss, metrics = model(**held_out)
    assert held_out["label"].mean().item() == pytest.approx(0.5, abs=0.1)
    assert loss.item() < 0.35 and metrics["accuracy"].item() > 0.85  # a guess: 0.69 and 0.5
    assert area_under_curve(logits[-1].detach(), held_out["label"]) > 0.93  # a guess: 0.5


def test_a_small_candle_uno_learns_the_responses() -> None:
    features = {"dose": 1, "cell": 6, "drug": 9}
    torch.manual_seed(0)
    model = CandleUno(features, branches=3, layers=2, hidden=32, top_layers=1)
    held_out = train(model, drug_responses(200 * 64 + 1000, features=features, branches=3), 200, 0.003)
    loss, _ = model(**held_out)
    assert loss.item() < 0.05 * held_out["growth"].var().item()  # the variance is what the mean alone leaves


def test_what_cannot_be() -> None:
    with pytest.raises(DataError, match="there are 0 samples"):
        Synthetic(0, name="y", target="value", numbers={"a": (1,)})
    with pytest.raises(DataError, match="need samples and inputs"):
        Synthetic(3, name="y", target="value", numbers={})
    with pytest.raises(DataError, match="no key 'z'; it has a, b, t, y"):
        mixed().read([0], ("z",))
