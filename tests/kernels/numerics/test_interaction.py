import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.interaction import configuration, interaction
from tests.kernels.numerics.compare import DTYPE_NAMES, DTYPES, assert_as_good_as_torch


def torchs(x: Tensor, dense: int) -> Tensor:
    flat = x.reshape(-1, *x.shape[-2:])
    i, j = torch.tril_indices(x.shape[-2], x.shape[-2], -1, device=x.device)
    products = torch.bmm(flat, flat.transpose(1, 2))[:, i, j]
    out = torch.cat([flat[:, :dense].flatten(1), products], dim=-1)
    return out.view(*x.shape[:-2], out.shape[-1])


def random(*shape: int, dtype: torch.dtype, device: str, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(device, dtype)


def assert_right(x: Tensor, dense: int) -> None:
    width = dense * x.shape[-1] + x.shape[-2] * (x.shape[-2] - 1) // 2
    dy = random(*x.shape[:-2], width, dtype=x.dtype, device=str(x.device), seed=1)
    assert_as_good_as_torch(lambda t: interaction(t, dense), lambda t: torchs(t, dense), (x,), dy)


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_NAMES)
@pytest.mark.parametrize(
    "shape, dense",
    [((3, 9, 64), 1), ((2, 27, 40), 2), ((2, 2, 1, 5), 1), ((4, 2, 1), 0), ((14, 70), 7)],
    ids=str,
)
def test_shapes(shape: tuple[int, ...], dense: int, dtype: torch.dtype, device: str) -> None:
    assert_right(random(*shape, dtype=dtype, device=device), dense)


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_NAMES)
def test_more_features_than_a_tile_has(dtype: torch.dtype, device: str) -> None:
    assert configuration(130, 96).features == 64
    assert_right(random(2, 130, 96, dtype=dtype, device=device), 66)


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(samples=st.integers(0, 3), features=st.integers(1, 40), width=st.integers(1, 80), part=st.floats(0, 1))
def test_any_shape(samples: int, features: int, width: int, part: float, device: str) -> None:
    x = random(samples, features, width, dtype=torch.float32, device=device)
    assert_right(x, round(part * features))


def test_strides(device: str) -> None:
    base = random(6, 8, 20, dtype=torch.float32, device=device)
    for x in (base[::2], base[:, ::3], base.transpose(0, 1), base.transpose(1, 2)[:2], base[..., 3:9]):
        assert_right(x, 2)
    for x in (base[:1].expand(3, 8, 20), base[:2, :1].expand(2, 5, 20)):
        assert_right(x, 1)
    x = base[:2].clone().requires_grad_()
    (dx,) = torch.autograd.grad(interaction(x, 1).sum(), x)
    (exact,) = torch.autograd.grad(torchs(x.double(), 1).sum(), x)
    torch.testing.assert_close(dx, exact)


def test_samples_do_not_depend_on_how_many_there_are(device: str) -> None:
    x = random(7, 11, 24, dtype=torch.float32, device=device).requires_grad_()
    whole = interaction(x, 1)
    dy = torch.randn_like(whole)
    (dx,) = torch.autograd.grad(whole, x, dy)
    for size in (1, 3):
        parts = [interaction(part, 1) for part in x.split(size)]
        assert torch.equal(torch.cat(parts), whole)
        assert torch.equal(torch.autograd.grad(torch.cat(parts), x, dy)[0], dx)


def test_an_infinite_sample_leaves_others_alone(device: str) -> None:
    x = random(3, 5, 8, dtype=torch.float32, device=device)
    x[1] = float("inf")
    out = interaction(x, 1)
    assert out[0].isfinite().all() and out[2].isfinite().all()
    torch.testing.assert_close(out, torchs(x, 1), equal_nan=True)
