"""Linear layers with dropout and a residual, and their gradients; on CPU, so by their references."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from gpp.program.random import key_of, keyed_bits, keyed_dropout
from kernels.activation import ACTIVATIONS
from kernels.linear import linear
from tests.kernels.test_operators import bits, leaf, linear_leaves, unfused_linear

ops = torch.ops.gpp_kernels
POSITION, KEY = torch.tensor([3, 8]), key_of(0, "node")
DROPS = (POSITION, KEY, 3 * 6, 0.25)


def unfused(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, activation: str) -> Tensor:
    y = unfused_linear(x, weight, bias, activation)
    return residual + keyed_dropout(y, keyed_bits(POSITION, KEY, list(y.shape), 0, 1), 0.25)


def leaves(dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    return *linear_leaves(dtype), leaf(4, 3, 6, dtype=dtype, seed=3)


@pytest.mark.parametrize("activation", ["none", "relu", "gelu_tanh"])
def test_opcheck(activation: str) -> None:
    x, weight, bias, residual = leaves()
    torch.library.opcheck(linear, (x, weight, bias, activation, residual, *DROPS))
    torch.library.opcheck(linear, (x, weight, None, activation, None, *DROPS))
    if activation != "none":
        x, weight, bias, residual = (t.detach() for t in leaves())
        torch.library.opcheck(ops.linear_keeping.default, (x, weight, bias, activation, residual, *DROPS))
        dz = x.view(12, 8)
        z = leaf(4, 3, 6, seed=4).detach()
        torch.library.opcheck(ops.linear_backward_activation.default, (z, z, activation, *DROPS))
        arguments = (dz, weight.t().contiguous(), z, activation)
        torch.library.opcheck(ops.linear_backward_input_activation.default, arguments)
        torch.library.opcheck(ops.linear_backward_input_activation.default, (*arguments, *DROPS))


@pytest.mark.parametrize("activation", ["none", "relu", "silu"])
@pytest.mark.parametrize("adds", [False, True])
def test_finite_differences(activation: str, adds: bool) -> None:
    inputs = leaves(torch.float64)

    def function(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        made: Tensor = linear(x, weight, bias, activation, residual if adds else None, *DROPS)
        return made + residual

    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_bits_are_those_of_torch(activation: str) -> None:
    dy = leaf(4, 3, 6, seed=4).detach()
    fused = bits(lambda *t: linear(*t[:3], activation, t[3], *DROPS), leaves(), dy)
    plain = bits(lambda *t: unfused(*t, activation), leaves(), dy)
    for ours, theirs in zip(fused, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_dropping_nothing_changes_nothing() -> None:
    x, weight, bias, residual = leaves()
    for keyed in ((POSITION, KEY, 18, 0.0), (POSITION, KEY, 0, 0.0), (POSITION, 0, 0, 0.0)):
        for activation in ("none", "relu", "silu"):
            plain = linear(x, weight, bias, activation, residual)
            assert torch.equal(linear(x, weight, bias, activation, residual, *keyed), plain)
            z = residual.detach()
            if activation != "none":
                derived = ops.linear_backward_activation(z, z, activation)
                assert torch.equal(ops.linear_backward_activation(z, z, activation, *keyed), derived)


@pytest.mark.parametrize(
    "activation, adds, kept", [("none", True, 0), ("relu", False, 1), ("relu", True, 1), ("silu", True, 1)]
)
def test_what_is_kept_besides_x_weight_and_position(activation: str, adds: bool, kept: int) -> None:
    x, weight, bias, residual = leaves()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = linear(x, weight, bias, activation, residual if adds else None, *DROPS)
    assert len(saved) == 3 + kept
    assert any(t.data_ptr() == y.data_ptr() for t in saved) == (activation == "relu" and not adds)


def test_export_and_compile() -> None:
    class Module(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(8, 8)

        def forward(self, x: Tensor, position: Tensor) -> Tensor:
            made: Tensor = linear(x, *self.linear.parameters(), "relu", x, position, KEY, 24, 0.25)
            return made

    module, x = Module(), torch.randn(5, 3, 8)
    shapes = {"x": {0: torch.export.Dim("batch")}, "position": None}
    program = torch.export.export(module, (torch.randn(4, 3, 8), POSITION), dynamic_shapes=shapes)
    expected = module(x, POSITION)
    assert torch.equal(program.module()(x, POSITION), expected)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x, POSITION), expected)
    gradients = [
        torch.autograd.grad(m(x, POSITION).sum(), list(module.parameters())) for m in (compiled, module)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_shapes_are_known_without_values() -> None:
    for x in (torch.empty(2, 5, 8, device="meta"), FakeTensorMode().from_tensor(torch.empty(2, 5, 8))):
        weight, z, position = x.new_empty(6, 8), x.new_empty(10, 6), x.new_empty(2, dtype=torch.int64)
        y = linear(x, weight, None, "silu", x.new_empty(2, 5, 6), position, KEY, 30, 0.1)
        assert y.shape == (2, 5, 6)
        assert ops.linear_backward_input_activation(z, weight, x, "silu").shape == x.shape


X, WEIGHT, BIAS, SAVED = torch.randn(4, 8), torch.randn(6, 8), torch.randn(6), torch.randn(3, 8)
MISTAKES: list[tuple[Callable[[], object], type[Exception], str]] = [
    (
        lambda: linear(X, WEIGHT, BIAS, "relu", X),
        ValueError,
        r"linear: residual must have the result's shape \(4, 6\), it is \(4, 8\)",
    ),
    (
        lambda: linear(X, WEIGHT, BIAS, "relu", torch.randn(4, 6).half()),
        TypeError,
        "linear: residual must be torch.float32, it is torch.float16",
    ),
    (
        lambda: linear(X, WEIGHT, BIAS, "relu", None, None, 0, 0, 0.5),
        ValueError,
        "p must be 0 without a position",
    ),
    (
        lambda: linear(X, WEIGHT, BIAS, "relu", None, POSITION, 0, 6, 1.5),
        ValueError,
        r"p must lie in \[0, 1\]",
    ),
    (
        lambda: ops.linear_keeping(X, WEIGHT, BIAS, "none", torch.randn(4, 6)),
        ValueError,
        "linear_keeping: activation must be one of relu, gelu_tanh, gelu_erf, silu",
    ),
    (
        lambda: ops.linear_backward_input_activation(torch.randn(4, 6), WEIGHT, SAVED, "relu"),
        ValueError,
        r"saved must have 4 rows of 8, those of dz times weight, it is \(3, 8\)",
    ),
    (
        lambda: ops.linear_backward_input_activation(X, WEIGHT, X, "relu"),
        ValueError,
        r"linear_backward_input_activation: weight must be \[8, inner\]",
    ),
    (
        lambda: ops.linear_backward_input_activation(torch.randn(4, 6), WEIGHT, X, "none"),
        ValueError,
        "activation must be one of relu",
    ),
]


@pytest.mark.parametrize("call, error, message", MISTAKES, ids=[m[2][:40] for m in MISTAKES])
def test_mistakes_are_named(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
