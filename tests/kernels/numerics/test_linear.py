import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from gpp.program.random import keyed_bits, keyed_dropout
from kernels import product
from kernels.activation import ACTIVATIONS, reference_differentiate
from kernels.linear import linear
from kernels.product import Tile, configuration, is_described
from tests.kernels.numerics.compare import DTYPE_NAMES, DTYPES, assert_as_good_as_torch

functional = torch.nn.functional
KEY = (1 << 62) + 12345


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
    for inner, columns in ((70, 50), (72, 56)):  # the latter begin at multiples of 16 bytes
        x = random(3, 15, inner, dtype=dtype, device=device)
        weight = random(columns, inner, dtype=dtype, device=device, seed=1)
        bias = random(columns, dtype=dtype, device=device, seed=2)
        assert_right(x, weight, bias, random(3, 15, columns, dtype=dtype, device=device, seed=3), activation)


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_NAMES)
def test_a_row_does_not_depend_on_how_many_there_are(dtype: torch.dtype, device: str) -> None:
    x, weight = (
        random(200, 136, dtype=dtype, device=device),
        random(72, 136, dtype=dtype, device=device, seed=1),
    )
    whole = linear(x, weight, None, "gelu_tanh")
    for rows in (1, 64, 130):
        assert torch.equal(linear(x[:rows], weight, None, "gelu_tanh"), whole[:rows])


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(1, 80),
    st.integers(1, 20),
    st.integers(1, 20),
    st.sampled_from([1, 4, 8]),
    st.sampled_from(ACTIVATIONS),
    st.booleans(),
    st.sampled_from(DTYPES),
)
def test_any_shape(
    device: str,
    rows: int,
    inner: int,
    columns: int,
    unit: int,
    activation: str,
    adds: bool,
    dtype: torch.dtype,
) -> None:
    x = random(rows, inner * unit, dtype=dtype, device=device)
    weight = random(columns * unit, inner * unit, dtype=dtype, device=device, seed=1)
    residual = random(rows, columns * unit, dtype=dtype, device=device, seed=2) if adds else None

    def plain(x: Tensor, weight: Tensor, residual: Tensor | None) -> Tensor:
        y = torchs(x, weight, None, activation)
        return y if residual is None else residual + y

    def ours(x: Tensor, weight: Tensor, residual: Tensor | None) -> Tensor:
        y: Tensor = linear(x, weight, None, activation, residual)
        return y

    dy = random(rows, columns * unit, dtype=dtype, device=device, seed=3)
    assert_as_good_as_torch(ours, plain, (x, weight, residual), dy)


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


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_NAMES)
@pytest.mark.parametrize(
    "activation, drops, adds",
    [
        ("none", True, True),
        ("relu", True, False),
        ("relu", False, True),
        ("relu", True, True),
        ("gelu_erf", True, False),
        ("silu", True, True),
    ],
)
def test_dropout_and_residual(
    activation: str, drops: bool, adds: bool, dtype: torch.dtype, device: str
) -> None:
    x, weight, bias, residual = (
        random(*shape, dtype=dtype, device=device, seed=seed)
        for seed, shape in enumerate(((3, 15, 70), (50, 70), (50,), (3, 15, 50)))
    )
    position = torch.tensor([5, 12], device=device)
    bits = keyed_bits(position, KEY, [3, 15, 50], 0, 1)

    def plain(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None) -> Tensor:
        y = torchs(x, weight, bias, activation)
        y = keyed_dropout(y, bits, 0.3) if drops else y
        return y if residual is None else residual + y

    def ours(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None) -> Tensor:
        keyed = (position, KEY, 15 * 50, 0.3) if drops else ()
        y: Tensor = linear(x, weight, bias, activation, residual, *keyed)
        return y

    inputs = (x, weight, bias, residual) if adds else (x, weight, bias)
    assert_as_good_as_torch(ours, plain, inputs, random(3, 15, 50, dtype=dtype, device=device, seed=4))


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_NAMES)
@pytest.mark.parametrize("activation, p", [("relu", 0.0), ("relu", 0.5), ("gelu_tanh", 0.3)])
def test_the_derivative_in_the_epilogue(activation: str, p: float, dtype: torch.dtype, device: str) -> None:
    dz = random(45, 40, dtype=dtype, device=device)
    weight = random(40, 72, dtype=dtype, device=device, seed=1)
    saved = random(3, 15, 72, dtype=dtype, device=device, seed=2)
    position = torch.tensor([5, 12], device=device)
    factor = keyed_dropout(
        torch.ones(3, 15, 72, device=device), keyed_bits(position, KEY, [3, 15, 72], 0, 1), p
    )
    keyed = (position, KEY, 15 * 72, p) if p else ()
    found = torch.ops.gpp_kernels.linear_backward_input_activation(dz, weight, saved, activation, *keyed)

    def plain(*given: Tensor) -> Tensor:
        dy = (given[0] @ given[1]).view(3, 15, 72) * factor.to(given[0].dtype)
        return reference_differentiate(dy, given[2], activation).double()

    exact = plain(dz.double(), weight.double(), saved.double())
    error, theirs = ((m.double() - exact).norm() for m in (found, plain(dz, weight, saved)))
    assert found.dtype == dtype and error <= 2 * theirs + 1e-6 * exact.norm()


LARGE = Tile(128, 128, 64, 8, 3, 4)


@pytest.mark.parametrize("tile", [LARGE, Tile(64, 64, 64, 4, 4, 2, 2)], ids=["large", "small"])
def test_both_kernels_make_the_same_bits(tile: Tile, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dtype, launched, launch = torch.bfloat16, [], product.launch
    x = random(150, 72, dtype=dtype, device=device)
    weight = random(136, 72, dtype=dtype, device=device, seed=1)
    bias = random(136, dtype=dtype, device=device, seed=2)
    residual, dz = (random(150, 136, dtype=dtype, device=device, seed=s) for s in (3, 4))
    keyed = (torch.tensor([0, 7], device=device), KEY, 136, 0.4)

    def watched(kernel: object, *arguments: object, **options: object) -> None:
        launched.append(getattr(kernel, "__name__", None) or kernel.fn.__name__)  # type: ignore[attr-defined]
        launch(kernel, *arguments, **options)

    def everything() -> list[Tensor]:
        total = random(136, 72, dtype=torch.float32, device=device, seed=5)
        torch.ops.gpp_kernels.linear_accumulate_weight(total, dz, x)
        derived = torch.ops.gpp_kernels.linear_backward_input_activation(
            dz, weight, x, "silu", *keyed[:2], 72, 0.4
        )
        kept = torch.ops.gpp_kernels.linear_keeping(x, weight, bias, "gelu_erf", residual, *keyed)
        return [total, derived, *kept]

    monkeypatch.setattr(product, "launch", watched)
    monkeypatch.setattr(product, "configuration", lambda *_: tile)
    described = is_described(x, weight)
    first = everything()
    monkeypatch.setattr(product, "is_described", lambda *_: False)
    second = everything()
    name = "described_product_kernel" if described else "product_kernel"
    assert launched == [name] * 3 + ["product_kernel"] * 3
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_which_products_descriptors_make(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(product, "architecture", lambda _: 90)
    a, b = (random(24, 16, dtype=torch.bfloat16, device=device) for _ in range(2))
    out = a.new_empty(24, 24)
    assert is_described(a, b, out, None) and is_described(a.t(), b.t()) and is_described(a[:, :8], b[::2, 8:])
    left = (
        (a.float(), b.float(), "4-byte elements"),
        (a[:, 4:12], b[:, 4:12], "begins between multiples of 16 bytes"),
        (a[:, :9].contiguous(), b[:, :9].contiguous(), "rows begin between them"),
        (a[:, ::2], b[:, ::2], "every other element of a row"),
        (a[:1].expand(24, 16), b, "one row many times"),
        (a[:0], b, "no rows"),
    )
    for first, second, reason in left:
        assert not is_described(first, second), reason
    assert not is_described(a, b, out, random(24, 25, dtype=a.dtype, device=device)[:, 1:])
    large = random(256, 262, dtype=torch.bfloat16, device=device)
    assert is_described(large, large) and not is_described(large, large, large)
    assert not is_described(large, large[:255])
    monkeypatch.setattr(product, "architecture", lambda _: 80)
    assert not is_described(a, b, out)


def test_large_operands_are_copied_to_where_descriptors_reach(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels: list[object] = []
    launch = product.launch
    monkeypatch.setattr(
        product, "launch", lambda k, *rest, **how: (kernels.append(k), launch(k, *rest, **how))
    )
    monkeypatch.setattr(product, "WORTH_A_COPY", 40)
    wide = random(45, 150, dtype=torch.bfloat16, device=device)
    for x in (wide[:, :70], wide[:, ::2][:, :70], random(70, 45, dtype=torch.bfloat16, device=device).t()):
        weight = random(56, 70, dtype=torch.bfloat16, device=device, seed=1)
        assert_right(x, weight, None, random(45, 56, dtype=torch.bfloat16, device=device, seed=2), "relu")
    if is_described(wide, wide):
        assert kernels == [product.described_product_kernel] * 3
