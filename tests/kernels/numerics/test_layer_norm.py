import pytest
import torch
from torch import Tensor

from kernels.layer_norm import layer_norm
from kernels.rows import WHOLE_ROW
from tests.kernels.numerics.compare import DTYPE_NAMES, DTYPES, assert_as_good_as_torch
from tests.thorough import ALL

EPS = 1e-5


def ours(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    return layer_norm(x, weight, bias, EPS)


def torchs(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    return torch.nn.functional.layer_norm(x, x.shape[-1:], weight, bias, EPS)


def random(*shape: int, dtype: torch.dtype, device: str, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * 2 + 0.5).to(device, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_NAMES)
@pytest.mark.parametrize("shape", [(3, 5, 7), (1, 1), (70, 64), (4, 2, 1000), (2, 3, 3000), (37,)], ids=str)
def test_shapes(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    x = random(*shape, dtype=dtype, device=device)
    weight, bias = (random(shape[-1], dtype=dtype, device=device, seed=s) for s in (1, 2))
    assert_as_good_as_torch(
        ours, torchs, (x, weight, bias), random(*shape, dtype=dtype, device=device, seed=3)
    )


@pytest.mark.parametrize("width", [WHOLE_ROW, WHOLE_ROW + 999] if ALL else [WHOLE_ROW + 999])
def test_widest_row_in_registers_and_rows_in_a_loop(width: int, device: str) -> None:
    x, dy = (random(2, width, dtype=torch.float32, device=device, seed=s) for s in (0, 1))
    weight, bias = (random(width, dtype=torch.float32, device=device, seed=s) for s in (2, 3))
    assert_as_good_as_torch(ours, torchs, (x, weight, bias), dy)


@pytest.mark.parametrize("parts", ["none", "weight", "bias"])
def test_without_weight_or_bias(parts: str, device: str) -> None:
    x, dy = (random(6, 50, dtype=torch.float32, device=device, seed=s) for s in (0, 1))
    vector = random(50, dtype=torch.float32, device=device, seed=2)
    inputs = (x, vector if parts == "weight" else None, vector if parts == "bias" else None)
    assert_as_good_as_torch(ours, torchs, inputs, dy)


def test_float32_weight_of_a_bfloat16_input(device: str) -> None:
    x, dy = (random(9, 40, dtype=torch.bfloat16, device=device, seed=s) for s in (0, 1))
    weight, bias = (random(40, dtype=torch.float32, device=device, seed=s) for s in (2, 3))
    y = ours(x, weight.requires_grad_(), bias.requires_grad_())
    exact = torchs(x.double(), weight.double(), bias.double())
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), exact, rtol=2**-8, atol=2**-8)
    dweight, dbias = torch.autograd.grad(y, (weight, bias), dy)
    assert dweight.dtype == dbias.dtype == torch.float32
    torch.testing.assert_close(dbias.double(), dy.double().sum(0), rtol=1e-6, atol=1e-5)


def views(device: str) -> dict[str, Tensor]:
    base = random(8, 6, 48, dtype=torch.float32, device=device)
    return {
        "every other sample": base[::2],
        "every other row": base[:, ::2],
        "transposed": base.transpose(1, 2),
        "part of each row": base[..., 3:40],
        "expanded rows": base[:1].expand(5, 6, 48),
        "expanded columns": base[..., :1].expand(8, 6, 48),
    }


@pytest.mark.parametrize("name", list(views("cpu")))
def test_strides(name: str, device: str) -> None:
    x = views(device)[name]
    weight, bias = (random(x.shape[-1], dtype=x.dtype, device=device, seed=s) for s in (1, 2))
    dy = random(*x.transpose(0, -1).shape, dtype=x.dtype, device=device, seed=3).transpose(0, -1)
    if name == "expanded columns":  # a constant row: 1 / sqrt(eps) magnifies whatever rounding there is
        torch.testing.assert_close(ours(x, weight, bias), bias.expand_as(x), rtol=0, atol=1e-3)
    else:
        assert_as_good_as_torch(ours, torchs, (x, weight, bias), dy)
        assert_as_good_as_torch(ours, torchs, (x, weight, bias), dy[:1, :1, :1].expand_as(x))


def test_no_rows(device: str) -> None:
    x = random(0, 3, 16, dtype=torch.float32, device=device).requires_grad_()
    weight, bias = (random(16, dtype=torch.float32, device=device).requires_grad_() for _ in range(2))
    y = ours(x, weight, bias)
    dx, dweight, dbias = torch.autograd.grad(y.sum(), (x, weight, bias))
    assert y.shape == dx.shape == (0, 3, 16)
    assert torch.equal(dweight, torch.zeros_like(weight)) and torch.equal(dbias, torch.zeros_like(bias))


def test_a_large_mean_does_not_cancel(device: str) -> None:
    x = random(4, 100, dtype=torch.float32, device=device) + 1000.0
    exact = torchs(x.double())
    assert (ours(x).double() - exact).norm() <= 1e-4 * exact.norm()


def test_rows_do_not_depend_on_how_many_there_are(device: str) -> None:
    x = random(37, 200, dtype=torch.float32, device=device)
    whole = ours(x)
    for size in (1, 8, 36):
        assert torch.equal(torch.cat([ours(part) for part in x.split(size)]), whole)


def test_many_groups_of_rows_are_summed(device: str) -> None:
    x, dy = (random(1100, 3, dtype=torch.float32, device=device, seed=s) for s in (0, 1))
    weight, bias = (random(3, dtype=torch.float32, device=device, seed=s) for s in (2, 3))
    assert_as_good_as_torch(ours, torchs, (x, weight, bias), dy)
