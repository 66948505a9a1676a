import pytest
import torch
from torch import Tensor

from gpp.program.random import key_of, keyed_bits, keyed_dropout
from kernels.dropout import dropout
from kernels.keyed import RESOLUTION, reference_factor
from tests.kernels.numerics.compare import DTYPE_NAMES, DTYPES

KEY = key_of(0, "dropout")


def draw(*shape: int, dtype: torch.dtype = torch.float32, device: str) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_NAMES)
@pytest.mark.parametrize("key", [KEY, 5, 1, (1 << 63) - 1])
def test_the_bits_are_those_of_the_stage(dtype: torch.dtype, key: int, device: str) -> None:
    x = draw(5, 7, 33, dtype=dtype, device=device)
    for step, first in ((0, 0), (3, 12), (10**12, 10**15)):
        position = torch.tensor([step, first], device=device)
        for dim, elements in ((0, 7 * 33), (-1, 0)):
            expected = keyed_dropout(x, keyed_bits(position, key, list(x.shape), dim, 1), 0.1)
            assert torch.equal(dropout(x, position, key, elements, 0.1), expected)
            wide = x.float() * reference_factor(x, position, key, elements, 0.1)
            assert torch.equal(wide.to(dtype), expected)


def test_nothing_everything_and_almost_everything_is_dropped(device: str) -> None:
    x, position = draw(1000, device=device), torch.tensor([1, 2], device=device)
    x[3], x[7] = float("nan"), float("inf")
    for p in (0.0, 1.0, 1.0 - 2**-24, 2**-30):
        expected = keyed_dropout(x, keyed_bits(position, KEY, [1000], 0, 1), p)
        torch.testing.assert_close(dropout(x, position, KEY, 1, p), expected, rtol=0, atol=0, equal_nan=True)


def test_a_micro_batch_sees_its_part_of_the_batch(device: str) -> None:
    x = draw(6, 50, device=device)
    whole = dropout(x, torch.tensor([4, 10], device=device), KEY, 50, 0.5)
    parts = [dropout(x[i : i + 2], torch.tensor([4, 10 + i], device=device), KEY, 50, 0.5) for i in (0, 2, 4)]
    assert torch.equal(torch.cat(parts), whole)
    assert 0.35 < (whole == 0).float().mean() < 0.65


def test_the_gradient_has_the_same_bits_and_strides_do_not_matter(device: str) -> None:
    x, position = draw(8, 30, device=device).t().requires_grad_(), torch.tensor([0, 0], device=device)
    y = dropout(x, position, KEY, 8, 0.25)
    (dx,) = torch.autograd.grad(y.sum(), x)  # the gradient of a sum has strides of zero
    expected = reference_factor(y, position, KEY, 8, 0.25)
    assert torch.equal(dx, expected) and torch.equal(y, x * expected)
    assert dropout(x[:0], position, KEY, 8, 0.25).shape == (0, 8)


def test_a_seventh_of_many_is_dropped(device: str) -> None:
    factor = reference_factor(draw(100000, device=device), torch.tensor([0, 0], device=device), KEY, 1, 1 / 7)
    assert abs((factor == 0).double().mean().item() - 1 / 7) < 4e-3
    assert factor.max().item() == pytest.approx(7 / 6) and RESOLUTION == 1 << 24
