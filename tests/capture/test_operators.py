"""Operators: which nodes they hold, what they are called, what they cost."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gpp.capture.capture import Captured, capture
from tests.program.models import MODELS


def captured(name: str) -> Captured:
    torch.manual_seed(0)
    model, make = MODELS[name]
    return capture(model(), make(4))


class Towers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.d = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        joined = (self.a(x).relu() + self.b(x).tanh()).sigmoid()
        return F.cross_entropy(self.d(joined), y)


def towers() -> Captured:
    return capture(Towers(), {"x": torch.randn(4, 6), "y": torch.zeros(4, dtype=torch.int64)})


def test_a_join_belongs_to_no_branch() -> None:
    graph = towers().graph
    assert [op.name for op in graph.operators] == ["a", "b", "d"]
    assert set(graph.edges) == {(0, 2), (1, 2)}


def test_costs_of_a_linear_layer() -> None:
    a, _, d = towers().graph.operators
    relu = 8
    assert a.forward.flops == 2 * 6 * 8 + relu
    assert a.forward.bytes_per_call == 4 * (6 * 8 + 8)
    assert a.backward_input.flops == relu  # x is of the batch: nothing flows back to it
    assert a.backward_weight.flops == 2 * 6 * 8
    written, summed = 4 * (6 * 8 + 8), 3 * 4 * (6 * 8 + 8)
    assert a.backward_weight.bytes_per_call == written + summed
    assert a.stash == 4 * (6 + 8) or a.stash == 4 * 8  # relu keeps its result, the layer its input
    assert d.backward_input.flops >= 2 * 8 * 5 and d.backward_weight.flops == 2 * 8 * 5
    assert [(p.name, p.bytes, p.trainable) for p in a.parameters] == [
        ("a.bias", 32, True),
        ("a.weight", 192, True),
    ]
    assert a.outputs[0].shape == (8,) and a.outputs[0].needs_grad


@pytest.mark.parametrize("name", MODELS)
def test_names_hold_in_both_modes_and_crossing_values_are_per_sample(name: str) -> None:
    found = captured(name)
    names = set(found.graph.index)
    for mode in (found.traced.train, found.traced.evaluate):
        assert set(mode.operator_of.values()) <= names
        assert all(mode.nodes[b].meta["val"].dim() > 0 for b in mode.boundary)
    assert all(found.graph.is_convex([i]) for i in range(len(names)))


@pytest.mark.parametrize(
    "name, expected",
    [
        ("ResNet", ["a.c1", "a.side", "a.c2", "b.c1", "b.side", "b.c2", "c"]),
        ("UNet", ["down.0", "down.2", "middle.0", "middle.2", "raise_", "up.0", "up.2", "out"]),
        ("Recurrent", ["e", "gru", "lstm", "o"]),
        ("Recommender", ["bags.0", "bags.1", "bottom", "bmm", "top"]),
        ("Blocks", ["twice", "twice#2", "sides.left", "sides.right", "out"]),
    ],
)
def test_operators_are_named_after_their_modules(name: str, expected: list[str]) -> None:
    found = {op.name for op in captured(name).graph.operators}
    assert set(expected) <= found


def test_metrics_alone_carry_no_gradient() -> None:
    graph = captured("Unused").graph
    probe = graph.operators[graph.index["probe"]]
    assert probe.terms and not probe.backward_weight.flops and not probe.backward_input.flops


class Mixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.d = nn.Linear(4, 5)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        heads = x.unflatten(-1, (2, 4)).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(heads, heads, heads)
        return F.cross_entropy(self.d(mixed.mean((1, 2))), y)


def test_costs_of_attention() -> None:
    """Two products of 6 x 6 x 4 in each of two heads, two FLOPs a multiplication."""
    batch = {"x": torch.randn(4, 6, 8), "y": torch.zeros(4, dtype=torch.int64)}
    attention = capture(Mixer(), batch).graph.operators[0]
    assert attention.kind == "attention"
    products = 2 * 2 * 2 * (6 * 6 * 4)
    assert products <= attention.forward.flops <= 1.5 * products


class SequenceFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.d = nn.Linear(8, 8), nn.Linear(8, 5)
        self.encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0), 2, enable_nested_tensor=False
        )

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.d(self.encoder(self.a(x).transpose(0, 1)).mean(0)), y)


def test_what_cannot_be_cut_inside_is_counted() -> None:
    batch = {"x": torch.randn(4, 6, 8), "y": torch.zeros(4, dtype=torch.int64)}
    found = capture(SequenceFirst(), batch)
    assert [op.name for op in found.graph.operators] == ["a", "encoder.layers", "d"]
    assert found.merged == {"encoder.layers": 10}
    assert towers().merged == {}


class Lookup(nn.Module):
    def __init__(self, mode: str) -> None:
        super().__init__()
        self.bag = nn.Embedding(1000, 4) if mode == "none" else nn.EmbeddingBag(1000, 4, mode=mode)
        self.d = nn.Linear(4, 5)

    def forward(self, rows: Tensor, y: Tensor) -> Tensor:
        bag = self.bag(rows)
        return F.cross_entropy(self.d(bag.sum(1) if bag.dim() == 3 else bag), y)


@pytest.mark.parametrize("mode", ["none", "sum", "mean"])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_costs_of_a_lookup(mode: str, device: str) -> None:
    """Forward reads the rows it needs; the gradient is dense: zeros of the table, and added to the sum."""
    with torch.device(device):
        model = Lookup(mode)
        batch = {k: torch.zeros(4, *s, dtype=torch.int64) for k, s in {"rows": (7,), "y": ()}.items()}
    bag = capture(model, batch).graph.operators[0]
    rows, indices, table = 7 * 4 * 4, 7 * 8, 1000 * 4 * 4
    assert bag.forward.bytes_per_call == 0
    assert rows + indices <= bag.forward.bytes < 6 * (rows + indices)
    assert 7 * 4 <= bag.forward.flops <= 3 * 7 * 4
    assert bag.backward_weight.bytes_per_call == 4 * table
    assert 2 * rows + indices <= bag.backward_weight.bytes <= 4 * rows + 3 * indices
    assert bag.backward_input.bytes_per_call == 0
    assert indices <= bag.weight_stash <= indices + rows
    assert indices <= bag.stash < 3 * indices  # no row is kept: only which they were
