import pytest
import torch
from torch import Tensor

from gpp.models.candle_uno import CandleUno, branch_features
from gpp.runtime.synthetic import drug_responses

WIDTHS = {"dose": 1, "cell": 6, "drug": 9}


def tiny(branches: int = 3, **changes: int) -> CandleUno:
    torch.manual_seed(0)
    return CandleUno(WIDTHS, **({"branches": branches, "layers": 2, "hidden": 16, "top_layers": 1} | changes))


def batch(samples: int, branches: int = 3) -> dict[str, Tensor]:
    data = drug_responses(200, features=WIDTHS, branches=branches)
    return data.read(range(samples), data.keys)


def test_branches_go_round_the_feature_sets() -> None:
    assert branch_features(WIDTHS, 2) == {"dose": 1, "cell": 6}
    assert branch_features(WIDTHS, 7) == {
        "dose": 1, "cell": 6, "drug": 9, "dose_2": 1, "cell_2": 6, "drug_2": 9, "dose_3": 1,
    }  # fmt: skip
    for features, branches in ((WIDTHS, 0), ({}, 1)):
        with pytest.raises(ValueError, match="needs a branch and a feature set"):
            branch_features(features, branches)


@pytest.mark.parametrize("branches", [1, 3, 5])
def test_results_are_means_over_samples(branches: int) -> None:
    model, given = tiny(branches).double(), {k: v.double() for k, v in batch(6, branches).items()}
    loss, metrics = model(**given)
    alone = [model(**{key: value[i : i + 1] for key, value in given.items()}) for i in range(6)]
    torch.testing.assert_close(loss, torch.stack([x[0] for x in alone]).mean(), rtol=0, atol=1e-12)
    assert metrics["mae"].item() == pytest.approx(sum(x[1]["mae"].item() for x in alone) / 6)
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_the_rule_of_the_synthetic_data_is_learnt() -> None:
    """On samples that were not trained on the error falls well below the target's variance, 1."""
    data = drug_responses(2048, features=WIDTHS, branches=3)
    model = tiny(hidden=32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(150):
        rows = range(step * 64 % 1024, step * 64 % 1024 + 64)
        loss, _ = model(**data.read(rows, data.keys))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    held_out = data.read(range(1024, 2048), data.keys)
    assert held_out["growth"].var().item() == pytest.approx(1, abs=0.35)
    assert model(**held_out)[0].item() < 0.3


def test_the_papers_size() -> None:
    widths = {"dose1": 1, "dose2": 1, "rna": 942, "d1": 5270, "f1": 2048, "d2": 5270, "f2": 2048}
    with torch.device("meta"):
        model = CandleUno(widths, branches=7, layers=4, hidden=4096, top_layers=4)
    layer = 4096 * 4097
    first = sum(4096 * (w + 1) for w in widths.values())
    expected = first + 21 * layer + 4096 * (7 * 4096 + 1) + 3 * layer + 4097
    assert sum(p.numel() for p in model.parameters()) == expected
