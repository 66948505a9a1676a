"""Means that are no means over samples, where the first samples of the data look even."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gpp.capture.capture import capture
from gpp.capture.export import CaptureError
from gpp.program.stage import Results, TermSum
from gpp.runtime.data import DataError
from gpp.runtime.results import check_labels


class Net(nn.Module):
    def __init__(self, loss) -> None:
        super().__init__()
        self.d, self.loss = nn.Linear(4, 5), loss

    def forward(self, x: Tensor, m: Tensor, y: Tensor):
        return self.loss(F.cross_entropy(self.d(x), y, reduction="none"), m, self.d(x), y)


def batch(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "x": torch.randn(4, 4, generator=generator, dtype=dtype),
        "m": torch.ones(4),
        "y": torch.randint(0, 5, (4,), generator=generator),
    }


def test_a_quotient_of_sums_is_no_mean_over_samples() -> None:
    assert capture(Net(lambda losses, m, z, y: (losses * m).sum() / m.sum()), batch()).loss_coupled
    assert not capture(Net(lambda losses, m, z, y: losses.mean()), batch()).loss_coupled


def test_labels_that_a_mean_leaves_out_are_counted() -> None:
    found = capture(Net(lambda losses, m, z, y: F.cross_entropy(z, y)), batch())
    assert not found.loss_coupled and len(found.train.ignored) == 1
    (name,) = found.train.ignored
    assert name in found.graph.operators[-1].terms
    assert not capture(Net(lambda losses, m, z, y: losses.mean()), batch()).train.ignored


def test_left_out_labels_end_a_run_of_several_micro_batches() -> None:
    results = Results(TermSum("loss", (("l", 1.0),), 0.0, None), (), ("n",))
    check_labels(results, {"n": [(0, 2, 0.0), (2, 4, 0.0)]})
    check_labels(results, {"n": [(0, 4, 1.0)]})
    with pytest.raises(DataError, match="samples 2 to 3 of a mini-batch are labels"):
        check_labels(results, {"n": [(0, 2, 0.0), (2, 4, 1.0)]})


@pytest.mark.parametrize("name", ["loss", "step", "grad_norm"])
def test_names_that_results_have_already(name: str) -> None:
    with pytest.raises(CaptureError, match=f"a metric called '{name}'"):
        capture(Net(lambda losses, m, z, y: (losses.mean(), {name: losses.mean()})), batch())


def test_the_number_of_samples_is_a_weight() -> None:
    found = capture(Net(lambda losses, m, z, y: (losses.sum(), losses.shape[0])), batch())
    assert not found.loss_coupled
    assert found.train.loss.weight is not None


def test_a_dtype_that_does_not_fit_is_said_with_its_module() -> None:
    with pytest.raises(CaptureError, match=r"'d' fails on the data set's first samples.*x torch\.float64"):
        capture(Net(lambda losses, m, z, y: losses.mean()), batch(torch.float64))


def test_a_division_by_zero_is_the_models_own() -> None:
    capture(Net(lambda losses, m, z, y: losses.mean() / 0 + losses.mean()), batch())
