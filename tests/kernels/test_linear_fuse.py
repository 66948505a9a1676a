"""What follows a linear layer and is taken into it, in the graphs of stages."""

import pytest
import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional

from gpp.capture.capture import capture
from gpp.program.carve import carve, interface
from gpp.program.random import keyed_attention, keyed_dropout
from kernels.fuse import FuseReport, fuse
from kernels.patterns.match import Keyed

KEYED = Keyed(torch.ops.gpp.keyed_bits.default, keyed_dropout, keyed_attention)
POSITION = torch.tensor([2, 4])


class Layer(nn.Module):
    """A linear layer and what `follows(z, x, drop)` makes of it."""

    def __init__(self, follows: object) -> None:
        super().__init__()
        self.linear, self.drop, self.follows = nn.Linear(6, 6), nn.Dropout(0.4), follows

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        made = self.follows(self.linear(x), x, self.drop)
        return (made * y).sum() / 30


def fused(
    follows: object, dtype: torch.dtype = torch.float32
) -> tuple[fx.GraphModule, fx.GraphModule, FuseReport]:
    """The graph of a stage, what becomes of it, and the report."""
    example = {name: torch.randn(4, 5, 6, dtype=dtype) for name in "xy"}
    captured = capture(Layer(follows).to(dtype), example)
    mode = captured.traced.train
    operators = [operator.name for operator in captured.graph.operators]
    face = interface(mode, operators)
    plain = carve(mode, operators, 4, face.parameters, face.buffers, device=torch.device("cpu"))
    return plain, *fuse(plain, KEYED)


def linears(report: FuseReport) -> list[tuple[str, ...]]:
    return [item.nodes for item in report.fused if item.operator == "gpp_kernels.linear.default"]


TAKEN = [
    (lambda z, x, drop: drop(functional.gelu(z)), 4),
    (lambda z, x, drop: x + drop(functional.gelu(z, approximate="tanh")), 5),
    (lambda z, x, drop: drop(functional.relu(z, inplace=True)).add_(x), 5),
    (lambda z, x, drop: functional.silu(z, inplace=True) + x, 3),
    (lambda z, x, drop: drop(z) + x, 4),
    (lambda z, x, drop: drop(z), 3),
    (lambda z, x, drop: functional.relu(z) + 1.0, 2),  # a number is no residual
    (lambda z, x, drop: functional.relu(z) + x[:, :1], 2),  # nor is what has to be stretched
    (lambda z, x, drop: torch.add(functional.relu(z), x, alpha=2.0), 2),
    (lambda z, x, drop: functional.relu(z) + x.double(), 2),
    (lambda z, x, drop: x.clone().add_(functional.relu(z)), 3),  # a stage overwrites no values
    (lambda z, x, drop: (h := functional.relu(z)) + h, 2),
    (lambda z, x, drop: (h := functional.relu(z)) + h.exp(), 2),
]


@pytest.mark.parametrize("follows, nodes", TAKEN)
def test_what_follows_is_taken(follows: object, nodes: int) -> None:
    torch.manual_seed(0)
    plain, module, report = fused(follows)
    assert [len(names) for names in linears(report)] == [nodes], str(report)
    weight, bias, x, y = torch.randn(6, 6), torch.randn(6), torch.randn(4, 5, 6), torch.randn(4, 5, 6)
    results = []
    for graph in (module, plain):
        leaves = [t.clone().requires_grad_() for t in (weight, bias)]
        loss = graph(*leaves, x.clone(), y, POSITION)[0]
        results.append([loss, *torch.autograd.grad(loss, leaves)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


LEFT = [
    (lambda z, x, drop: z + x, "no activation follows but add: a plain product stays with torch"),
    (lambda z, x, drop: z * 2 + drop(x), "no activation follows but mul"),
    (lambda z, x, drop: functional.relu(z) + z, "2 nodes read its output"),
]


@pytest.mark.parametrize("follows, reason", LEFT)
def test_what_is_left_to_torch(follows: object, reason: str) -> None:
    _, _, report = fused(follows)
    assert not linears(report) and any(reason in item.reason for item in report.left)


def test_half_precision_is_taken() -> None:
    plain, module, report = fused(lambda z, x, drop: drop(functional.gelu(z)) + x, torch.bfloat16)
    assert len(linears(report)) == 1
    given = [torch.randn(*shape, dtype=torch.bfloat16) for shape in ((6, 6), (6,), (4, 5, 6), (4, 5, 6))]
    torch.testing.assert_close(module(*given, POSITION)[0], plain(*given, POSITION)[0])


def test_samples_in_another_dimension_are_dropped_by_torch() -> None:
    *_, report = fused(lambda z, x, drop: drop(functional.relu(z).transpose(0, 1)).transpose(0, 1))
    assert [len(names) for names in linears(report)] == [2]


def test_sums_into_something_else_are_left() -> None:
    def added(x: Tensor, weight: Tensor, into: Tensor) -> Tensor:
        return into.add_(functional.relu(functional.linear(x, weight))) * 2

    plain = make_fx(added, pre_dispatch=True)(torch.randn(4, 6), torch.randn(6, 6), torch.randn(4, 6))
    assert isinstance(plain, fx.GraphModule)
    assert [len(names) for names in linears(fuse(plain)[1])] == [2]
