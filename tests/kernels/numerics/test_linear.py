import pytest
import torch
from torch import Tensor

from kernels.activation import ACTIVATIONS
from kernels.linear import linear
from kernels.product import configuration
from tests.kernels.numerics.compare import DTYPE_NAMES, DTYPES, assert_as_good_as_torch

functional = torch.nn.functional


def torchs(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    z = functional.linear(x, weight, bias)
    if activation == "gelu_tanh":
        return functional.gelu(z, approximate="tanh")
    return {"none": lambda v: v, "relu": torch.relu, "gelu_erf": functional.gelu, "silu": functional.silu}[
        activation
    ](z)


def random(*shape: int, dtype: torch.dtype, device: str, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(device, dtype)


def assert_right(x: Tensor, weight: Tensor, bias: Tensor | None, dy: Tensor, activation: str) -> None:
    assert_as_good_as_torch(
        lambda *inputs: linear(*inputs, activation),
        lambda *inputs: torchs(*inputs, activation),
        (x, weight, bias) if bias is not None else (x, weight, None),
        dy,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_NAMES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation: str, dtype: torch.dtype, device: str) -> None:
    x = random(3, 15, 70, dtype=dtype, device=device)
    weight = random(50, 70, dtype=dtype, device=device, seed=1)
    bias = random(50, dtype=dtype, device=device, seed=2)
    assert_right(x, weight, bias, random(3, 15, 50, dtype=dtype, device=device, seed=3), activation)


@pytest.mark.parametrize("rows, inner, columns", [(1, 1, 1), (65, 130, 1), (2, 3, 67), (130, 64, 64)])
def test_shapes(rows: int, inner: int, columns: int, device: str) -> None:
    x = random(rows, inner, dtype=torch.float32, device=device)
    weight = random(columns, inner, dtype=torch.float32, device=device, seed=1)
    dy = random(rows, columns, dtype=torch.float32, device=device, seed=2)
    assert_right(x, weight, None, dy, "silu")
    assert_right(x[0], weight, None, dy[0], "relu")


def test_large_tile(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    large = configuration(4096, 4096, torch.bfloat16)
    assert (large.rows, large.columns) == (128, 128)
    monkeypatch.setattr("kernels.product.configuration", lambda *_: large)
    x = random(150, 72, dtype=torch.bfloat16, device=device)
    weight = random(140, 72, dtype=torch.bfloat16, device=device, seed=1)
    bias = random(140, dtype=torch.bfloat16, device=device, seed=2)
    assert_right(x, weight, bias, random(150, 140, dtype=torch.bfloat16, device=device, seed=3), "gelu_tanh")


def test_strides(device: str) -> None:
    base = random(10, 6, 48, dtype=torch.float32, device=device)
    weight = random(48, 40, dtype=torch.float32, device=device, seed=1).t()
    bias = random(80, dtype=torch.float32, device=device, seed=2)[::2]
    for x in (base[::2], base[:, ::2], base[:1].expand(4, 6, 48)):
        dy = random(40, *x.shape[:-1], dtype=x.dtype, device=device, seed=3).movedim(0, -1)
        assert_right(x, weight, bias, dy, "gelu_erf")
    x = random(48, 9, dtype=torch.float32, device=device, seed=4).t()
    assert_right(x, weight, bias, random(1, 1, dtype=x.dtype, device=device, seed=5).expand(9, 40), "relu")


def test_no_rows(device: str) -> None:
    x = random(0, 3, 16, dtype=torch.float32, device=device).requires_grad_()
    weight = random(8, 16, dtype=torch.float32, device=device).requires_grad_()
    bias = random(8, dtype=torch.float32, device=device).requires_grad_()
    for activation in ACTIVATIONS:
        y = linear(x, weight, bias, activation)
        dx, dweight, dbias = torch.autograd.grad(y.sum(), (x, weight, bias))
        assert y.shape == (0, 3, 8) and dx.shape == (0, 3, 16)
        assert torch.equal(dweight, torch.zeros_like(weight)) and torch.equal(dbias, torch.zeros_like(bias))


def test_no_inner_dimension(device: str) -> None:
    bias = random(8, dtype=torch.float32, device=device)
    y = linear(bias.new_zeros(5, 0), bias.new_zeros(8, 0), bias, "relu")
    assert torch.equal(y, torch.relu(bias).expand(5, 8))


def test_bias_gradient_of_many_rows(device: str) -> None:
    dz = random(1100, 5, dtype=torch.float32, device=device) + 1.0
    dbias = torch.ops.gpp_kernels.linear_backward_bias(dz)
    torch.testing.assert_close(dbias.double(), dz.double().sum(0), rtol=1e-6, atol=0)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_extreme_values(activation: str, device: str) -> None:
    x = torch.tensor([[-1e4], [-30.0], [-0.0], [30.0], [1e4], [float("nan")]], device=device)
    one = torch.ones(1, 1, device=device)
    leaf = x.clone().requires_grad_()
    y = linear(leaf, one, None, activation)
    (dx,) = torch.autograd.grad(y.sum(), leaf)
    exact = x.double().requires_grad_()
    expected = torchs(exact, one.double(), None, activation)
    torch.testing.assert_close(y.double(), expected, rtol=1e-6, atol=1e-6, equal_nan=True)
    (expected_dx,) = torch.autograd.grad(expected.sum(), exact)
    torch.testing.assert_close(dx[:5].double(), expected_dx[:5], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_NAMES)
def test_weight_gradients_are_added_in_float32(dtype: torch.dtype, device: str) -> None:
    total = random(50, 70, dtype=torch.float32, device=device)
    exact = total.double()
    for part in range(3):
        dz = random(3, 15, 50, dtype=dtype, device=device, seed=1 + part)
        x = random(3, 15, 70, dtype=dtype, device=device, seed=9 + part)
        torch.ops.gpp_kernels.linear_accumulate_weight(total, dz, x)
        exact += dz.double().view(45, 50).t() @ x.double().view(45, 70)
    assert (total.double() - exact).norm() <= 1e-6 * exact.norm()  # whatever dz and x are rounded to


def test_nothing_is_added_for_no_rows(device: str) -> None:
    total = random(5, 7, dtype=torch.float32, device=device)
    before = total.clone()
    empty = (random(0, n, dtype=torch.bfloat16, device=device) for n in (5, 7))
    torch.ops.gpp_kernels.linear_accumulate_weight(total, *empty)
    assert torch.equal(total, before)
