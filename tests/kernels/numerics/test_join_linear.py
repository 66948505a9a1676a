import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.activation import ACTIVATIONS
from kernels.join_linear import join_linear
from kernels.join_parts import GROUP, configuration, is_described
from tests.kernels.numerics.compare import DTYPE_NAMES, DTYPES, assert_as_good_as_torch
from tests.kernels.numerics.test_linear import random
from tests.kernels.numerics.test_linear import torchs as linear_of


def torchs(weight: Tensor, bias: Tensor | None, activation: str, *xs: Tensor) -> Tensor:
    return linear_of(torch.cat(xs, -1), weight, bias, activation)


def parts(
    widths: tuple[int, ...], columns: int, *leading: int, dtype: torch.dtype, device: str
) -> tuple[Tensor, Tensor, list[Tensor], Tensor]:
    """(weight, bias, parts, dy)."""
    weight = random(columns, sum(widths), dtype=dtype, device=device)
    bias = random(columns, dtype=dtype, device=device, seed=1)
    xs = [random(*leading, width, dtype=dtype, device=device, seed=9 + i) for i, width in enumerate(widths)]
    return weight, bias, xs, random(*leading, columns, dtype=dtype, device=device, seed=2)


def assert_right(weight: Tensor, bias: Tensor | None, xs: list[Tensor], dy: Tensor, activation: str) -> None:
    assert_as_good_as_torch(
        lambda weight, bias, *xs: join_linear(xs, weight, bias, activation),
        lambda weight, bias, *xs: torchs(weight, bias, activation, *xs),
        (weight, bias, *xs),
        dy,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_NAMES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation: str, dtype: torch.dtype, device: str) -> None:
    assert_right(*parts((40, 70, 3), 50, 3, 15, dtype=dtype, device=device), activation)


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_NAMES)
def test_more_parts_than_a_launch_has(dtype: torch.dtype, device: str) -> None:
    widths = tuple(range(1, 2 * GROUP + 4))
    assert_right(*parts(widths, 9, 5, dtype=dtype, device=device), "silu")


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    widths=st.lists(st.integers(0, 70), min_size=1, max_size=5),
    columns=st.integers(1, 70),
    rows=st.integers(0, 70),
)
def test_any_shape(widths: list[int], columns: int, rows: int, device: str) -> None:
    weight, _, xs, dy = parts(tuple(widths), columns, rows, dtype=torch.float32, device=device)
    assert_right(weight, None, xs, dy, "relu")


def test_large_tile(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    large = configuration(4096, 4096, torch.bfloat16)
    assert (large.rows, large.columns) == (128, 128)
    monkeypatch.setattr("kernels.join_linear.configuration", lambda *_: large)
    monkeypatch.setattr("kernels.join_gradient.configuration", lambda *_: large)
    weight, bias, xs, dy = parts((72, 130), 140, 150, dtype=torch.bfloat16, device=device)
    assert_right(weight, bias, xs, dy, "gelu_tanh")
    assert_added(weight, xs, dy)


def hopper(device: str) -> bool:
    return device == "cpu" or torch.cuda.get_device_capability() >= (9, 0)


@pytest.mark.parametrize("activation", ["relu", "gelu_tanh"])
@pytest.mark.parametrize("widths", [(64, 128, 40), (64,) * (GROUP + 1)], ids=["3 parts", "two launches"])
def test_parts_that_descriptors_can_describe(
    widths: tuple[int, ...], activation: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, bias, xs, dy = parts(widths, 40, 70, dtype=torch.bfloat16, device=device)
    xs[0] = torch.cat([xs[0], xs[0]], 1)[:, 64:]
    assert is_described(weight, [xs]) == hopper(device)
    assert_right(weight, bias, xs, dy, activation)
    made = join_linear(xs, weight, bias, activation)
    monkeypatch.setattr("kernels.join_linear.is_described", lambda *_: False)
    assert torch.equal(join_linear(xs, weight, bias, activation), made)  # the sums have the same order


def test_wide_tile(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wide = configuration(4096, 4096, torch.bfloat16, wide=True)
    assert (wide.rows, wide.columns) == (128, 256)
    monkeypatch.setattr("kernels.join_linear.configuration", lambda *_: wide)
    assert_right(*parts((64, 8), 264, 130, dtype=torch.float16, device=device), "relu")


def test_what_descriptors_cannot_describe(device: str) -> None:
    weight, _, xs, _ = parts((64, 64), 40, 70, dtype=torch.bfloat16, device=device)
    assert is_described(weight, [xs]) == hopper(device)
    for other in (
        (weight, [[*xs, xs[0][:, :63].clone()]]),  # rows of 126 bytes
        (weight, [[xs[0][:, :56], xs[1]]]),  # a block of two parts
        (weight.t(), [xs]),
        (weight.flatten()[1:].unfold(0, 64, 64), [xs]),  # an address of two bytes more
        (weight.float(), [[x.float() for x in xs]]),
        (weight, [[x[:0] for x in xs]]),
    ):
        assert not is_described(*other)


def test_strides(device: str) -> None:
    base = random(10, 6, 48, dtype=torch.float32, device=device)
    turned = random(48, 5, 6, dtype=torch.float32, device=device, seed=4).movedim(0, -1)
    xs = [base[::2], turned, base[:1].expand(5, 6, 48), base[5:, :, 1::2], base[:5, :, :9]]
    weight = random(sum(x.shape[-1] for x in xs), 20, dtype=torch.float32, device=device, seed=1).t()
    bias = random(40, dtype=torch.float32, device=device, seed=2)[::2]
    dy = random(1, 1, 1, dtype=torch.float32, device=device, seed=3).expand(5, 6, 20)
    assert_right(weight, bias, xs, dy, "gelu_erf")
    assert_added(weight, [x.half() for x in xs], dy.half())


def assert_added(weight: Tensor, xs: list[Tensor], dz: Tensor) -> None:
    """Gradients of two micro-batches are added in float32, whatever they are rounded to."""
    total = weight.float().contiguous()
    exact = total.double()
    for scale in (1, 2):
        torch.ops.gpp_kernels.join_linear_accumulate_weight(total, dz * scale, xs)
        wide = torch.cat(xs, -1).double().flatten(0, -2)
        exact += (dz * scale).double().flatten(0, -2).t() @ wide
    assert (total.double() - exact).norm() <= 1e-6 * exact.norm()


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_NAMES)
@pytest.mark.parametrize("widths", [(40, 70, 3), tuple(range(2 * GROUP + 1)), (5,)], ids=str)
def test_weight_gradients_are_added_in_float32(
    widths: tuple[int, ...], dtype: torch.dtype, device: str
) -> None:
    weight, _, xs, dz = parts(widths, 50, 3, 15, dtype=dtype, device=device)
    assert_added(weight, xs, dz)


def test_every_run_has_the_same_bits(device: str) -> None:
    weight, bias, xs, _ = parts((33, 40), 20, 70, dtype=torch.bfloat16, device=device)
    whole = join_linear(xs, weight, bias, "silu")
    assert torch.equal(whole, join_linear(xs, weight, bias, "silu"))
    totals = [torch.zeros(20, 73, device=device) for _ in range(2)]
    for total in totals:
        torch.ops.gpp_kernels.join_linear_accumulate_weight(total, whole, xs)
    assert torch.equal(*totals)


def test_no_rows_and_no_columns(device: str) -> None:
    weight, bias, xs, dz = parts((3, 0, 4), 5, 0, 2, dtype=torch.bfloat16, device=device)
    leaves = [t.requires_grad_() for t in (weight, bias, *xs)]
    y = join_linear(xs, weight, bias, "relu")
    dweight, dbias, *dxs = torch.autograd.grad(y.sum(), leaves)
    assert y.shape == (0, 2, 5) and [dx.shape for dx in dxs] == [x.shape for x in xs]
    assert not dweight.any() and not dbias.any()
    total = torch.ones(5, 7, device=device)
    torch.ops.gpp_kernels.join_linear_accumulate_weight(total, dz, [x.detach() for x in xs])
    assert (total == 1).all()
    nothing = [bias.detach().new_zeros(4, 0)] * 2
    y = join_linear(nothing, bias.detach().new_zeros(5, 0), bias.detach(), "relu")
    assert torch.equal(y, torch.relu(bias).expand(4, 5))
