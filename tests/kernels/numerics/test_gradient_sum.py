import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.gradient_sum import GROUP, STATIC, sum_of
from tests.kernels.numerics.compare import DTYPE_NAMES, DTYPES, assert_as_good_as_torch


def ours(*parts: Tensor) -> Tensor:
    y: Tensor = sum_of(parts, parts[0].dtype)
    return y


def torchs(*parts: Tensor) -> Tensor:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def random(*shape: int, dtype: torch.dtype, device: str, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * 2 + 0.5).to(device, dtype)


def several(count: int, *shape: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    return [random(*shape, dtype=dtype, device=device, seed=seed) for seed in range(count)]


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_NAMES)
@pytest.mark.parametrize("count", [2, 3, GROUP, GROUP + 1, 2 * GROUP + 3])
def test_any_number_of_parts(count: int, dtype: torch.dtype, device: str) -> None:
    parts = several(count, 3, 7, 11, dtype=dtype, device=device)
    assert_as_good_as_torch(ours, torchs, parts, random(3, 7, 11, dtype=dtype, device=device, seed=99))
    if dtype == torch.float32:
        assert torch.equal(ours(*parts), torchs(*parts))


@settings(
    max_examples=8,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)
@given(size=st.integers(0, 3 * STATIC.elements), count=st.integers(2, GROUP + 2))
def test_drawn_sizes_have_the_bits_of_additions(size: int, count: int, device: str) -> None:
    parts = several(count, size, dtype=torch.float32, device=device)
    made = ours(*parts)
    assert torch.equal(made, torchs(*parts)) and torch.equal(made, ours(*parts))


@pytest.mark.parametrize("count", [2, GROUP + 1])
def test_narrow_parts_of_a_float32_sum(count: int, device: str) -> None:
    parts = several(count, 40, dtype=torch.bfloat16, device=device)
    parts[1:] = random(40, dtype=torch.float32, device=device), *parts[2:]
    expected = torchs(*(part.float() for part in parts))
    assert torch.equal(sum_of(parts, torch.float32), expected)
    leaves = [part.clone().requires_grad_() for part in parts]
    gradients = torch.autograd.grad(sum_of(leaves, torch.float32), leaves, expected)
    for leaf, gradient in zip(leaves, gradients, strict=True):
        assert torch.equal(gradient, expected.to(leaf.dtype))


def test_strides(device: str) -> None:
    base = random(8, 6, 10, dtype=torch.float32, device=device)
    for parts in (
        (base[::2], base[1::2], base[:4]),
        (base.transpose(0, 2), base.transpose(0, 2), random(10, 6, 8, dtype=base.dtype, device=device)),
        (base[:1].expand(8, 6, 10), base[:, :, :1].expand(8, 6, 10), base),
        (base[0, 0, 0], base[1, 0, 0], base[2, 0, 0]),
    ):
        assert_as_good_as_torch(ours, torchs, parts, parts[0].new_ones(()).expand_as(parts[0]))
