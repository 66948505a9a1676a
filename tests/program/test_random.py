"""Random numbers by (seed, operator, step, sample), whatever the micro-batches."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gpp.capture.capture import capture
from gpp.capture.export import CaptureError
from gpp.program.random import keyed_bits, keyed_dropout, keyed_normal, keyed_uniform


@pytest.mark.parametrize("shape, dim, per_sample", [((6, 3), 0, 1), ((4, 6, 3), 1, 1), ((24, 3), 0, 4)])
def test_bits_do_not_depend_on_the_split(shape: tuple[int, ...], dim: int, per_sample: int) -> None:
    whole = keyed_bits(torch.tensor([3, 10]), 7, shape, dim, per_sample)
    parts = []
    for first, samples in ((0, 1), (1, 3), (4, 2)):
        part = list(shape)
        part[dim] = samples * per_sample
        parts.append(keyed_bits(torch.tensor([3, 10 + first]), 7, part, dim, per_sample))
    assert torch.equal(torch.cat(parts, dim), whole)
    assert whole.unique().numel() > 0.9 * whole.numel()


def test_bits_change_with_step_key_and_sample() -> None:
    one = keyed_bits(torch.tensor([0, 0]), 7, (64,), 0, 1)
    for position, key in (([1, 0], 7), ([0, 64], 7), ([0, 0], 8)):
        assert (one == keyed_bits(torch.tensor(position), key, (64,), 0, 1)).float().mean() < 0.1


def test_distributions() -> None:
    first, second = (keyed_bits(torch.tensor([0, 0]), k, (40000,), 0, 1) for k in (1, 2))
    uniform, normal = keyed_uniform(first, torch.float32), keyed_normal(first, second, torch.float32)
    assert 0 <= uniform.min() and uniform.max() < 1 and abs(uniform.mean() - 0.5) < 0.01
    assert abs(normal.mean()) < 0.02 and abs(normal.std() - 1) < 0.02
    kept = keyed_dropout(torch.ones(40000), first, 0.3)
    assert abs((kept > 0).float().mean() - 0.7) < 0.01
    assert torch.allclose(kept[kept > 0], torch.tensor(1 / 0.7))
    assert not keyed_dropout(torch.ones(4), first[:4], 1.0).any()


class Draws(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.a, self.layer, self.b = nn.Linear(8, 8), layer, nn.Linear(8, 5)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.b(self.layer(self.a(x))), y)


class Permutes(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[:, torch.randperm(8)]


class Sequence(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(8, 8, 2, batch_first=True, dropout=0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.gru(x.unsqueeze(1))[0][:, 0]


@pytest.mark.parametrize(
    "layer, says",
    [
        (nn.AlphaDropout(0.1), "alpha_dropout"),
        (nn.RReLU(), "rrelu"),
        (Permutes(), "randperm"),
        (Sequence(), "build it of single layers"),
    ],
)
def test_what_has_no_keyed_form_is_refused_by_name(layer: nn.Module, says: str) -> None:
    with pytest.raises(CaptureError, match=says) as error:
        capture(Draws(layer), {"x": torch.randn(4, 8), "y": torch.zeros(4, dtype=torch.int64)})
    assert "layer" in str(error.value)
