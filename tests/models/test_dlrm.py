import pytest
import torch
from torch import Tensor

from gpp.models.dlrm import ConcatBag, Dlrm
from gpp.runtime.synthetic import clicks

SIZES = {"dense": 2, "features": 5, "tables": 3, "rows": 11, "bag": 4}
LAYERS = {"dense_layers": 2, "hidden": 8, "dimension": 4, "top_layers": 2}


def tiny(pooling: str = "sum", interaction: str = "concat", **changes: int) -> Dlrm:
    torch.manual_seed(0)
    return Dlrm(**(SIZES | LAYERS | changes), pooling=pooling, interaction=interaction)


def batch(samples: int) -> dict[str, Tensor]:
    data = clicks(200, **SIZES)
    return data.read(range(samples), data.keys)


@pytest.mark.parametrize(
    "pooling, interaction",
    [("concat", "concat"), ("sum", "concat"), ("mean", "concat"), ("sum", "dot"), ("mean", "dot")],
)
def test_samples_do_not_see_each_other_and_everything_learns(pooling: str, interaction: str) -> None:
    model, given = tiny(pooling, interaction).double(), batch(12)
    given = {k: v.double() if v.is_floating_point() else v for k, v in given.items()}
    loss, metrics = model(**given)
    alone = [model(**{key: value[i : i + 1] for key, value in given.items()}) for i in range(12)]
    torch.testing.assert_close(loss, torch.stack([x[0] for x in alone]).mean(), rtol=0, atol=1e-12)
    assert metrics["accuracy"].item() == pytest.approx(sum(x[1]["accuracy"].item() for x in alone) / 12)
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_a_bag_of_embeddings_side_by_side() -> None:
    bag = ConcatBag(5, 2)
    rows = torch.tensor([[3, 0, 3], [1, 4, 2]])
    expected = torch.stack([torch.cat([bag.weight[i] for i in sample]) for sample in rows])
    assert torch.equal(bag(rows), expected)


def test_the_dot_interaction_has_every_pair_once() -> None:
    model, given = tiny("sum", "dot"), batch(3)
    seen: list[Tensor] = []
    model.top.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(**given)
    parts = [tower(given[f"dense_{i}"]) for i, tower in enumerate(model.towers)]
    parts += [bag(given[f"sparse_{i}"]) for i, bag in enumerate(model.bags)]
    pairs = [(parts[i] * parts[j]).sum(-1) for i in range(5) for j in range(i)]
    expected = torch.cat([*parts[:2], torch.stack(pairs, 1)], 1)
    torch.testing.assert_close(seen[0], expected)


def test_the_papers_size() -> None:
    """Towers, tables, and what reads seven towers' 4096 and seven bags' 100 x 64 numbers."""
    with torch.device("meta"):
        model = Dlrm(
            dense=7, features=4096, dense_layers=4, hidden=4096, tables=7, rows=1_000_000, dimension=64,
            bag=100, pooling="concat", interaction="concat", top_layers=4,
        )  # fmt: skip
    layer = 4096 * 4097
    joined = 7 * 4096 + 7 * 6400
    expected = 7 * 4 * layer + 7 * 64_000_000 + (joined + 1) * 4096 + 3 * layer + 4097
    assert sum(p.numel() for p in model.parameters()) == expected


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"pooling": "max"}, "pooling must be one of concat, sum, mean, it is max"),
        ({"interaction": "cross"}, "interaction must be one of concat, dot, it is cross"),
        ({"pooling": "concat", "interaction": "dot"}, "use pooling sum or mean"),
        ({"dense": 0}, "they are 0 and 3"),
    ],
)
def test_what_cannot_be(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(**changes)
