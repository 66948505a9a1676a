"""Operators alone: what is called the same work, and how long it takes."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gpp.capture.capture import Captured, capture
from gpp.program.build import Roots
from gpp.program.signature import signature
from gpp.program.stopwatch import time_passes

CPU = torch.device("cpu")


class Net(nn.Module):
    """Four layers, the first two and the last two of one size; a frozen one; dropout that is drawn twice."""

    def __init__(self, width: int = 8, p: float = 0.5) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(width, width), nn.Linear(width, width)
        self.c, self.d, self.e = nn.Linear(width, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.f, self.last = nn.Linear(16, 16), nn.Linear(16, 3)
        self.e.requires_grad_(False)
        self.p = p

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x = self.b(self.a(x))
        x = F.dropout(self.d(self.c(x).relu()), self.p, self.training)
        x = F.dropout(self.f(self.e(x)), self.p, self.training)
        return F.cross_entropy(self.last(x), y)


def captured(width: int = 8, p: float = 0.5, seed: int = 0) -> Captured:
    torch.manual_seed(0)
    batch = {"x": torch.randn(4, width), "y": torch.zeros(4, dtype=torch.int64)}
    return capture(Net(width, p), batch, seed=seed)


def of(found: Captured, *names: str, size: int = 4) -> str:
    return signature(found.traced, names, size, Roots(found.roots, True))


def test_the_same_work_has_the_same_signature() -> None:
    net, other = captured(), captured(seed=5)
    for name in net.graph.index:
        assert of(net, name) == of(other, name)  # another seed of dropout, another process's objects
    assert of(net, "d") == of(net, "f")  # the same layer, dropout drawn under another key
    assert of(net, "a", "b") == of(other, "a", "b")


def test_other_work_has_another_signature() -> None:
    net = captured()
    assert of(net, "a") != of(net, "b")  # a's input is of the batch: no gradient flows back to it
    assert of(net, "c") != of(net, "d") and of(net, "d") != of(net, "e")
    assert of(net, "d", size=4) != of(net, "d", size=8)
    assert of(net, "d") != of(captured(p=0.25), "d")
    assert of(net, "b") != of(captured(width=12), "b")
    assert of(net, "last") != of(net, "c")
    assert len({of(net, name) for name in net.graph.index}) == len(net.graph.index) - 1


def test_times_are_those_of_the_work() -> None:
    torch.set_num_threads(1)
    found, roots = captured(width=512), Roots({}, True)
    batch = {"x": torch.randn(64, 512)}

    def measured(name: str, size: int):
        return time_passes(found.traced, (name,), size, roots, batch, CPU, seconds=0.1)

    large, small = measured("b", 64), measured("b", 1)
    assert 0 < small.forward < large.forward
    assert large.backward_input > small.backward_input > 0
    first = measured("a", 64)  # no gradient flows to the batch
    assert first.backward_input < large.backward_input / 4
    frozen = time_passes(found.traced, ("e",), 64, roots, {}, CPU, seconds=0.1)
    assert frozen.backward_weight < measured("d", 64).backward_weight


def test_a_batch_that_is_too_small_is_seen() -> None:
    found = captured()
    with pytest.raises((RuntimeError, KeyError)):
        time_passes(found.traced, ("a",), 4, Roots({}, True), {}, CPU)
