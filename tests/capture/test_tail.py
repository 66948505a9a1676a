"""Losses as linear combinations of terms."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gpp.capture.capture import Captured, capture
from gpp.capture.export import CaptureError

WIDTH, CLASSES = 8, 5


class Heads(nn.Module):
    def __init__(self, combine: Callable[..., object]) -> None:
        super().__init__()
        self.a, self.combine = nn.Linear(WIDTH, WIDTH), combine
        self.heads = nn.ModuleList(nn.Linear(WIDTH, CLASSES) for _ in range(3))

    def forward(self, x: Tensor, y: Tensor):
        h = self.a(x)
        return self.combine(*(F.cross_entropy(head(h), y) for head in self.heads))


def captured(combine: Callable[..., object]) -> Captured:
    batch = {"x": torch.randn(4, WIDTH), "y": torch.randint(0, CLASSES, (4,))}
    return capture(Heads(combine), batch)


def coefficients(found: Captured) -> tuple[float, ...]:
    return tuple(round(c, 6) for _, c in found.train.loss.terms)


@pytest.mark.parametrize(
    "combine, expected, constant",
    [
        (lambda a, b, c: a + 0.3 * b - 2 * c, (1, 0.3, -2), 0),
        (lambda a, b, c: sum([a, b, c]) / 3, (0.333333,) * 3, 0),
        (lambda a, b, c: 0.5 * (a + 2 * (b - (c + 1))), (0.5, 1, -1), -1),
        (lambda a, b, c: 1.0 - (a + b) / 4 - -c, (-0.25, -0.25, 1), 1),
        (lambda a, b, c: torch.add(a, b, alpha=2) + torch.sub(a, c, alpha=3), (2, 2, -3), 0),
        (lambda a, b, c: a + a + b + c, (2, 1, 1), 0),
        (lambda a, b, c: (a + b + c, {"total": a + b}), (1, 1, 1), 0),
    ],
)
def test_linear_combinations_are_split(
    combine: Callable[..., object], expected: tuple[float, ...], constant: float
) -> None:
    found = captured(combine)
    assert coefficients(found) == expected
    assert found.train.loss.constant == constant
    assert dict(found.train.loss.terms) == found.roots
    # every head is a sink of its own
    sinks = [op.name for op in found.graph.operators if op.terms]
    assert sinks == ["heads.0", "heads.1", "heads.2"]


def test_what_is_not_linear_is_one_term() -> None:
    found = captured(lambda a, b, c: a * b + c)
    assert len(found.train.loss.terms) == 2
    found = captured(lambda a, b, c: torch.stack([a, b, c]).mean())
    assert len(found.train.loss.terms) == 1


def test_terms_are_shared_by_loss_and_metrics() -> None:
    found = captured(lambda a, b, c: (a + 0.1 * b, {"a": a, "c": c, "half": a / 2}))
    terms = dict(found.train.loss.terms)
    metrics = {m.name: m for m in found.train.metrics}
    ((name, _),) = metrics["a"].terms
    assert name in terms
    assert metrics["half"].terms == ((name, 0.5),)
    ((other, _),) = metrics["c"].terms
    assert other not in found.roots


def test_pairs_are_split_too() -> None:
    class Padded(Heads):
        def forward(self, x: Tensor, y: Tensor):
            h = self.a(x)
            present = (y > 1).float()
            sums = [(F.cross_entropy(m(h), y, reduction="none") * present).sum() for m in self.heads]
            return sums[0] + 0.5 * sums[1], present.sum()

    batch = {"x": torch.randn(4, WIDTH), "y": torch.randint(0, CLASSES, (4,))}
    found = capture(Padded(lambda: None), batch)
    assert coefficients(found) == (1, 0.5)
    assert found.train.loss.weight is not None and len(found.train.loss.weight) == 1
    assert found.graph.loss_weighted


def test_a_pair_with_a_constant_is_refused() -> None:
    with pytest.raises(CaptureError, match="pair of loss adds a constant"):
        captured(lambda a, b, c: (a + 1, b.detach()))


def test_a_loss_used_inside_the_model_is_refused() -> None:
    class Uses(Heads):
        def forward(self, x: Tensor, y: Tensor):
            h = self.a(x)
            first = F.cross_entropy(self.heads[0](h), y)
            second = F.cross_entropy(self.heads[1](h), y)
            both = first + second
            return both + F.cross_entropy(self.heads[2](h * both), y)

    batch = {"x": torch.randn(4, WIDTH), "y": torch.randint(0, CLASSES, (4,))}
    with pytest.raises(CaptureError, match="part of the loss and is also used inside the model"):
        capture(Uses(lambda: None), batch)
