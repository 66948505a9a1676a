"""The interaction as torch sees it; on CPU, so by its reference."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from gpp.models.dlrm import _dots
from kernels.interaction import interaction, interaction_backward


def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


@pytest.mark.parametrize("dense", [0, 1, 3])
def test_opcheck_and_gradients_by_finite_differences(dense: int) -> None:
    x = leaf(2, 3, 4, dtype=torch.float64)
    torch.library.opcheck(interaction, (x, dense))
    assert torch.autograd.gradcheck(lambda t: interaction(t, dense), (x,))
    dy = torch.randn_like(interaction(x, dense))
    torch.library.opcheck(interaction_backward, (dy.detach(), x.detach(), dense))


@pytest.mark.parametrize("towers, bags", [(1, 4), (3, 2), (2, 0), (1, 0)])
def test_it_is_the_model_s(towers: int, bags: int) -> None:
    x = leaf(5, towers + bags, 6)
    rows = list(x.unbind(1))
    plain, fused = _dots(rows[:towers], rows[towers:]), interaction(x, towers)
    assert torch.equal(plain, fused)
    dy = torch.randn_like(plain)
    expected, got = (torch.autograd.grad(y, x, dy)[0] for y in (plain, fused))
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


def test_sixteen_bit_sums_are_float32() -> None:
    x = torch.full((1, 2, 4096), 0.1, dtype=torch.bfloat16)
    exact = (x[0, 0].double() @ x[0, 1].double()).to(torch.bfloat16)
    assert interaction(x, 0).item() == exact.item()


def test_export_with_a_dynamic_batch_and_compile() -> None:
    class Model(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return interaction(x, 1).relu()

    x = leaf(7, 5, 8)
    batch = torch.export.Dim("batch")
    program = torch.export.export(Model(), (leaf(3, 5, 8).detach(),), dynamic_shapes={"x": {0: batch}})
    assert torch.equal(program.module()(x), Model()(x))
    compiled = torch.compile(Model(), backend="aot_eager", fullgraph=True)
    (got,) = torch.autograd.grad(compiled(x).square().sum(), x)
    (expected,) = torch.autograd.grad(Model()(x).square().sum(), x)
    assert torch.equal(got, expected)


def test_only_x_is_kept() -> None:
    saved: list[Tensor] = []
    x = leaf(2, 3, 4)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        interaction(x, 1)
    assert [t.data_ptr() for t in saved] == [x.data_ptr()]
    nodes = make_fx(lambda t: interaction(t, 1))(x.detach()).graph.nodes
    assert [str(node.target) for node in nodes if node.op == "call_function"] == [
        "gpp_kernels.interaction.default"
    ]


def test_shapes_are_known_without_data() -> None:
    x = torch.empty(2, 7, 5, 8, device="meta", dtype=torch.bfloat16, requires_grad=True)
    y = interaction(x, 2)
    assert (y.shape, y.dtype) == ((2, 7, 26), torch.bfloat16)
    y.sum().backward()
    assert x.grad is not None and x.grad.shape == x.shape
    with FakeTensorMode():
        x = torch.empty(7, 5, 8, device="cuda")
        dx = interaction_backward(interaction(x, 1), x, 1)
        assert (dx.shape, dx.device.type) == (x.shape, "cuda")


X = torch.randn(4, 3, 8)
MISTAKES: list[tuple[Callable[[], object], type[Exception], str]] = [
    (lambda: interaction(X[0, 0], 1), ValueError, r"interaction: x must have at least two dim.*\(8,\)"),
    (lambda: interaction(X[:, :0], 0), ValueError, "interaction: x must have at least one feature"),
    (lambda: interaction(X, 4), ValueError, "interaction: dense must be from 0 to 3, x's features, it is 4"),
    (lambda: interaction(X, -1), ValueError, "dense must be from 0 to 3"),
    (lambda: interaction(X.int(), 1), TypeError, "interaction: x must be one of .*it is torch.int32"),
    (lambda: interaction_backward(X, X, 1), ValueError, r"dy must have the result's shape \(4, 11\)"),
    (lambda: interaction_backward(X[:, 0].half(), X, 0), ValueError, r"dy must have .*\(4, 3\)"),
    (lambda: interaction_backward(X[:, 0, :3].half(), X, 0), TypeError, "dy must be torch.float32"),
]


@pytest.mark.parametrize("call, error, message", MISTAKES, ids=[m[2][:40] for m in MISTAKES])
def test_mistakes_are_named(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
