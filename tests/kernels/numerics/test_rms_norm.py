import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.rms_norm import rms_norm
from kernels.rows import WHOLE_ROW
from tests.kernels.numerics.compare import DTYPE_NAMES, DTYPES, assert_as_good_as_torch
from tests.thorough import ALL

EPS = 1e-5


def ours(x: Tensor, weight: Tensor | None = None) -> Tensor:
    return rms_norm(x, weight, EPS)


def torchs(x: Tensor, weight: Tensor | None = None) -> Tensor:
    return torch.nn.functional.rms_norm(x, x.shape[-1:], weight, EPS)


def random(*shape: int, dtype: torch.dtype, device: str, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * 2 + 0.5).to(device, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_NAMES)
@pytest.mark.parametrize("shape", [(3, 5, 7), (1, 2), (4, 2, 1000), (37,)], ids=str)
def test_shapes(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    x, dy = (random(*shape, dtype=dtype, device=device, seed=s) for s in (0, 3))
    assert_as_good_as_torch(ours, torchs, (x, random(shape[-1], dtype=dtype, device=device, seed=1)), dy)


@settings(
    max_examples=8,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)
@given(rows=st.integers(1, 40), width=st.integers(2, 300), weighted=st.booleans())
def test_drawn_shapes(rows: int, width: int, weighted: bool, device: str) -> None:
    x, dy = (random(rows, width, dtype=torch.float32, device=device, seed=s) for s in (0, 1))
    weight = random(width, dtype=torch.float32, device=device, seed=2) if weighted else None
    assert_as_good_as_torch(ours, torchs, (x, weight), dy)


@pytest.mark.parametrize("width", [WHOLE_ROW, WHOLE_ROW + 999] if ALL else [WHOLE_ROW + 999])
def test_widest_row_in_registers_and_rows_in_a_loop(width: int, device: str) -> None:
    x, dy = (random(2, width, dtype=torch.float32, device=device, seed=s) for s in (0, 1))
    assert_as_good_as_torch(ours, torchs, (x, random(width, dtype=x.dtype, device=device, seed=2)), dy)


def test_float32_weight_of_a_bfloat16_input(device: str) -> None:
    x, dy = (random(9, 40, dtype=torch.bfloat16, device=device, seed=s) for s in (0, 1))
    weight = random(40, dtype=torch.float32, device=device, seed=2)
    y = ours(x, weight.requires_grad_())
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), torchs(x.double(), weight.double()), rtol=2**-8, atol=2**-8)
    (dweight,) = torch.autograd.grad(y, weight, dy)
    wide = weight.detach().double().requires_grad_()
    (exact,) = torch.autograd.grad(torchs(x.double(), wide), wide, dy.double())
    assert dweight.dtype == torch.float32
    torch.testing.assert_close(dweight.double(), exact, rtol=1e-5, atol=1e-5)


def test_strides(device: str) -> None:
    base = random(8, 6, 48, dtype=torch.float32, device=device)
    for x in (
        base[::2],
        base[:, ::2],
        base.transpose(1, 2),
        base[..., 3:40],
        base[:1].expand(5, 6, 48),
        base[..., :1].expand(8, 6, 48),
    ):
        weight = random(2 * x.shape[-1], dtype=x.dtype, device=device, seed=1)[::2]
        dy = random(*x.transpose(0, -1).shape, dtype=x.dtype, device=device, seed=3).transpose(0, -1)
        assert_as_good_as_torch(ours, torchs, (x, weight), dy)
        assert_as_good_as_torch(ours, torchs, (x, weight), dy[:1, :1, :1].expand_as(x))


def test_no_rows(device: str) -> None:
    x = random(0, 3, 16, dtype=torch.float32, device=device).requires_grad_()
    weight = random(16, dtype=torch.float32, device=device).requires_grad_()
    y = ours(x, weight)
    dx, dweight = torch.autograd.grad(y.sum(), (x, weight))
    assert y.shape == dx.shape == (0, 3, 16)
    assert torch.equal(dweight, torch.zeros_like(weight))


def test_one_column(device: str) -> None:
    x = torch.tensor([[3.0], [-0.5], [0.0]], device=device, requires_grad=True)
    y = ours(x)
    (dx,) = torch.autograd.grad(y.sum(), x)  # almost all of it cancels
    wide = x.detach().double().requires_grad_()
    exact = torchs(wide)
    torch.testing.assert_close(y.double(), exact)
    torch.testing.assert_close(dx.double(), *torch.autograd.grad(exact.sum(), wide), rtol=1e-5, atol=1e-6)


def test_a_row_of_zeros_has_a_finite_gradient(device: str) -> None:
    x = torch.zeros(2, 5, device=device, requires_grad=True)
    y = ours(x)
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(y, torch.zeros_like(y))
    torch.testing.assert_close(dx, torch.full_like(dx, EPS**-0.5))


def test_rows_do_not_depend_on_how_many_there_are(device: str) -> None:
    x = random(37, 200, dtype=torch.float32, device=device)
    whole = ours(x)
    assert torch.equal(ours(x), whole)
    for size in (1, 8, 36):
        assert torch.equal(torch.cat([ours(part) for part in x.split(size)]), whole)
