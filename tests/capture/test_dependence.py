"""What is per-sample, what mixes samples, and what only counts rows."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gpp.capture.capture import Captured, capture
from gpp.capture.export import CaptureError

WIDTH, CLASSES = 8, 5


class Head(nn.Module):
    """`between` is what a test does between two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES)
        self.norm = nn.BatchNorm1d(WIDTH)

    def between(self, h: Tensor) -> Tensor:
        return h

    def forward(self, x: Tensor, y: Tensor):
        return F.cross_entropy(self.c(self.b(self.between(self.a(x))).relu()), y)


def captured(model: nn.Module, device: str = "cpu") -> Captured:
    torch.manual_seed(0)
    batch = {"x": torch.randn(4, WIDTH), "y": torch.tensor([0, 3, 1, 2])}
    return capture(model.to(device), {k: v.to(device) for k, v in batch.items()})


def operators(found: Captured) -> list[str]:
    return [op.name for op in found.graph.operators]


class Plain(Head):
    pass


class Norm(Head):
    def between(self, h: Tensor) -> Tensor:
        return self.norm(h)


class Centred(Head):
    def between(self, h: Tensor) -> Tensor:
        return h - h.mean(0)


class SampleNorm(Head):
    def between(self, h: Tensor) -> Tensor:
        return F.layer_norm(h, (WIDTH,))


@pytest.mark.parametrize("model, coupled", [(Plain, ()), (Norm, ("b",)), (Centred, ("a",)), (SampleNorm, ())])
def test_what_mixes_samples_is_found(model: type[Head], coupled: tuple[str, ...]) -> None:
    found = captured(model())
    assert operators(found) == ["a", "b", "c"]
    assert found.coupled == coupled
    assert [op.batch_coupled for op in found.graph.operators] == [op in coupled for op in operators(found)]
    assert not found.loss_coupled


def test_batch_norm_is_known_without_values() -> None:
    assert captured(Norm(), "meta").coupled == ("b",)
    assert captured(Plain(), "meta").coupled == ()


class RowNumbers(Head):
    """arange(0, 4 * batch, 4) has the shape of a per-sample value."""

    def forward(self, x: Tensor, y: Tensor):
        h = self.a(x).reshape(4 * x.shape[0], 2)
        rows = torch.arange(0, 4 * x.shape[0], 4) + y.remainder(4)
        return F.cross_entropy(self.c(F.pad(h[rows], (0, WIDTH - 2))), y)


def test_row_numbers_of_the_batch_never_cross() -> None:
    found = captured(RowNumbers())
    assert found.coupled == () and not found.loss_coupled
    assert all(t.dtype != "int64" for t in found.graph.tensors.values())


class LabelCounter(Head):
    """Row numbers computed before one layer and used behind another."""

    def forward(self, x: Tensor, y: Tensor):
        rows = torch.arange(x.shape[0]) + 0 * y
        h = self.b(self.a(x).relu()).relu()
        return F.cross_entropy(self.c(h)[rows], y)


def test_a_row_counter_goes_with_its_reader() -> None:
    found = captured(LabelCounter())
    assert found.coupled == ()
    assert all(t.dtype != "int64" for t in found.graph.tensors.values())


class Positions(Head):
    """Positions in a sequence are a table: nothing of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.p = nn.Embedding(WIDTH, 1)

    def forward(self, x: Tensor, y: Tensor):
        positions = self.p(torch.arange(x.shape[1])).squeeze(-1)
        return F.cross_entropy(self.c(self.a(x + positions)) * positions[:CLASSES], y)


def test_a_table_belongs_to_every_reader() -> None:
    found = captured(Positions())
    assert operators(found) == ["a", "c"]
    assert all("p.weight" in [p.name for p in op.parameters] for op in found.graph.operators)


class Contrastive(Head):
    def forward(self, x: Tensor, y: Tensor):
        z = F.normalize(self.a(x)) @ F.normalize(self.b(x)).T
        return F.cross_entropy(z, torch.arange(x.shape[0]))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_contrastive_loss_is_coupled(device: str) -> None:
    found = captured(Contrastive(), device)
    assert found.loss_coupled
    last = next(op for op in found.graph.operators if op.terms)
    assert last.batch_coupled and last.parameters == ()


class Ignoring(Head):
    def forward(self, x: Tensor, y: Tensor):
        return F.cross_entropy(self.c(self.a(x)), y.where(y < 3, -100))


class IgnoringUnseen(Head):
    def forward(self, x: Tensor, y: Tensor):
        return F.cross_entropy(self.c(self.a(x)), y, ignore_index=4)


class Weighted(Head):
    def forward(self, x: Tensor, y: Tensor):
        return F.cross_entropy(self.c(self.a(x)), y, weight=torch.ones(CLASSES))


class Root(Head):
    def forward(self, x: Tensor, y: Tensor):
        return F.cross_entropy(self.c(self.a(x)), y).sqrt()


class Summed(Head):
    def forward(self, x: Tensor, y: Tensor):
        return F.cross_entropy(self.c(self.a(x)), y, reduction="sum")


@pytest.mark.parametrize("model", [Ignoring, IgnoringUnseen, Weighted, Root, Summed])
def test_a_mean_that_micro_batches_change_is_coupled(model: type[Head]) -> None:
    assert captured(model()).loss_coupled


class Pair(Head):
    def forward(self, x: Tensor, y: Tensor):
        loss = F.cross_entropy(self.c(self.a(x)), y, reduction="sum", ignore_index=4)
        worst = F.cross_entropy(self.c(self.a(x)), y, reduction="none").max()
        return (loss, (y != 4).sum()), {"worst": worst, "count": (y == 1).float().mean()}


def test_a_pair_of_sums_is_not() -> None:
    found = captured(Pair())
    assert not found.loss_coupled
    assert found.coupled_metrics == ("worst",)


class DecayedPair(Head):
    """A penalty of the weights is not a sum over samples: it would be counted once a micro-batch."""

    def forward(self, x: Tensor, y: Tensor):
        loss = F.cross_entropy(self.c(self.a(x)), y, reduction="sum")
        return loss + self.a.weight.pow(2).sum(), torch.ones_like(y).sum()


class DecayedMean(Head):
    def forward(self, x: Tensor, y: Tensor):
        return F.cross_entropy(self.c(self.a(x)), y) + 0.01 * self.a.weight.pow(2).sum()


def test_a_penalty_fits_a_mean_and_not_a_pair() -> None:
    assert captured(DecayedPair()).loss_coupled
    assert not captured(DecayedMean()).loss_coupled


def test_reading_a_number_off_a_tensor_is_refused() -> None:
    class Reads(Head):
        def between(self, h: Tensor) -> Tensor:
            return h * h.sum().item()

    with pytest.raises(CaptureError, match=r"reads a number off a tensor|depends on the values of a tensor"):
        captured(Reads())
