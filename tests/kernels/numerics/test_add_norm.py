from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from kernels.add_norm import add_norm
from kernels.keyed import reference_factor
from kernels.rows import WHOLE_ROW, nested_rows
from tests.kernels.numerics.compare import DTYPE_NAMES, DTYPES, assert_as_good_as_torch, assert_no_worse
from tests.thorough import ALL

EPS, KEY, P = 1e-5, 7140753179600768748, 0.3
Both = Callable[..., tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Case:
    """What is computed of (x, residual, weight, bias)."""

    centred: bool = True
    position: Tensor | None = None
    narrow: torch.dtype | None = None  # the dtype of y, if not that of the sum

    def ours(
        self, x: Tensor, residual: Tensor, weight: Tensor | None = None, bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        dtype = self.narrow or torch.promote_types(x.dtype, residual.dtype)
        dropped = (None, 0, 0, 0.0)
        if self.position is not None:
            dropped = (self.position, KEY, x[0].numel(), P)
        y, s = add_norm(x, residual, weight, bias, EPS, self.centred, dtype, *dropped)
        return y, s

    def torchs(
        self, x: Tensor, residual: Tensor, weight: Tensor | None = None, bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        if self.position is not None:
            factor = reference_factor(x.detach().cpu(), self.position.cpu(), KEY, x[0].numel(), P)
            x = x * (factor.to(x.device) != 0) * (1 / (1 - P))
        s = x + residual
        shape = s.shape[-1:]
        if self.centred:
            y = functional.layer_norm(s, shape, weight, bias, EPS)
        else:
            y = functional.rms_norm(s, shape, weight, EPS)
        return y if self.narrow is None or s.dtype == torch.float64 else y.to(self.narrow), s


def random(*shape: int, dtype: torch.dtype, device: str, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * 2 + 0.5).to(device, dtype)


def at(device: str, sample: int = 8) -> Tensor:
    return torch.tensor([3, sample], device=device)


def results(
    function: Both, inputs: list[Tensor | None], dy: Tensor | None, ds: Tensor | None
) -> list[Tensor]:
    """y, s and the gradients; without dy or ds nobody reads that result."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in inputs]
    made = function(*leaves)
    pairs = [(m, g.to(m.dtype)) for m, g in zip(made, (dy, ds), strict=True) if g is not None]
    wanted = [t for t in leaves[: 2 if dy is None else None] if t is not None]
    gradients = torch.autograd.grad([m for m, _ in pairs], wanted, [g for _, g in pairs])
    return [*(m.detach() for m in made), *gradients]


def assert_right(case: Case, inputs: list[Tensor | None], dy: Tensor | None, ds: Tensor | None) -> None:
    wide = [None if t is None else t.double() for t in inputs]
    assert_no_worse(
        results(case.ours, inputs, dy, ds),
        results(case.torchs, inputs, dy, ds),
        results(case.torchs, wide, dy, ds),
    )


def operands(case: Case, *shape: int, dtype: torch.dtype, device: str) -> list[Tensor | None]:
    vectors = [random(shape[-1], dtype=dtype, device=device, seed=s) for s in (3, 4)]
    bias = vectors[1] if case.centred else None
    return [*(random(*shape, dtype=dtype, device=device, seed=s) for s in (1, 2)), vectors[0], bias]


centred = pytest.mark.parametrize("centred", [True, False], ids=["layer norm", "rms norm"])


@centred
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_NAMES)
@pytest.mark.parametrize("shape", [(3, 5, 7), (2, 2), (3, 2, 1000), (37,)], ids=str)
def test_shapes(shape: tuple[int, ...], dtype: torch.dtype, centred: bool, device: str) -> None:
    case = Case(centred, at(device))
    dy, ds = (random(*shape, dtype=dtype, device=device, seed=s) for s in (5, 6))
    assert_right(case, operands(case, *shape, dtype=dtype, device=device), dy, ds)


@settings(
    max_examples=10,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)
@given(
    rows=st.integers(1, 40),
    width=st.integers(2, 300),
    centred=st.booleans(),
    dropped=st.booleans(),
    weighted=st.booleans(),
    readers=st.sampled_from(["both", "norm", "sum"]),
)
def test_drawn(
    rows: int, width: int, centred: bool, dropped: bool, weighted: bool, readers: str, device: str
) -> None:
    case = Case(centred, at(device) if dropped else None)
    inputs = operands(case, rows, width, dtype=torch.float32, device=device)
    dy, ds = (random(rows, width, dtype=torch.float32, device=device, seed=s) for s in (5, 6))
    if not weighted:
        inputs[2:] = [None, None]
    assert_right(case, inputs, None if readers == "sum" else dy, None if readers == "norm" else ds)


@centred
@pytest.mark.parametrize("width", [WHOLE_ROW, WHOLE_ROW + 999] if ALL else [WHOLE_ROW + 999])
def test_rows_in_a_loop(width: int, centred: bool, device: str) -> None:
    case = Case(centred, at(device))
    inputs = operands(case, 1, width, dtype=torch.float32, device=device)
    dy, ds = (random(1, width, dtype=torch.float32, device=device, seed=s) for s in (5, 6))
    assert_right(case, inputs, dy, ds)


@centred
@pytest.mark.parametrize("dropped", [False, True])
def test_a_wide_residual_and_a_narrow_result(dropped: bool, centred: bool, device: str) -> None:
    """As under autocast: what is added is bfloat16, the stream float32, the norm cast to bfloat16."""
    case = Case(centred, at(device) if dropped else None, torch.bfloat16)
    inputs = operands(case, 6, 5, 40, dtype=torch.float32, device=device)
    inputs[0] = random(6, 5, 40, dtype=torch.bfloat16, device=device, seed=1)
    dy, ds = (random(6, 5, 40, dtype=t, device=device, seed=5) for t in (torch.bfloat16, torch.float32))
    assert_right(case, inputs, dy, ds)
    assert_right(case, inputs, dy, None)
    assert_right(case, inputs, None, ds)
    inputs[:2] = inputs[1], inputs[0]  # a residual that is narrower than what is added to it
    assert_right(case, inputs, dy, ds)


def test_strides(device: str) -> None:
    base = random(8, 6, 48, dtype=torch.float32, device=device)
    other = random(8, 6, 48, dtype=torch.float32, device=device, seed=1)
    for x, residual in (
        (base[::2], other[1::2]),
        (base[:, ::2], other[:, :3]),
        (base.transpose(0, 1), other[:6, :1].expand(6, 8, 48)),
        (base.transpose(1, 2), other.transpose(1, 2)),
        (base[..., 3:40], other[..., 5:42]),
        (base[:1].expand(5, 6, 48), other[:5]),
        (base, other[..., :1].expand(8, 6, 48)),
    ):
        case = Case(True, at(device))
        weight = random(2 * x.shape[-1], dtype=x.dtype, device=device, seed=2)[::2]
        assert_right(case, [x, residual, weight, None], residual, x)
    assert_right(case, [x, residual, weight, None], x[:1, :1, :1].expand_as(x), None)


def test_transposed_rows_are_not_copied() -> None:
    base = torch.randn(5, 4, 3, 2, 8)
    for x in (base, base.transpose(0, 1)[0], base[:, :, 1], base[2:, ::2].flatten(2, 3), base[1, 1, 1, 0]):
        rows = nested_rows(x)
        count = x.numel() // 8
        first = [
            (i // rows.inner) * rows.outer_stride + (i % rows.inner) * rows.inner_stride for i in range(count)
        ]
        assert rows.tensor is x
        start = x.storage_offset()
        found = torch.stack([base.view(-1)[start + i : start + i + 8] for i in first])
        assert torch.equal(found, x.reshape(count, 8))
    assert nested_rows(base.transpose(0, 2)).tensor.shape == (120, 8), "three levels"


def test_no_rows(device: str) -> None:
    case = Case(True, at(device))
    inputs = operands(case, 1, 3, 16, dtype=torch.float32, device=device)
    inputs[:2] = (torch.zeros(0, 3, 16, device=device) for _ in range(2))
    leaves = [t.requires_grad_() for t in inputs if t is not None]
    y, s = add_norm(*leaves, EPS, True, torch.float32, at(device), KEY, 48, P)
    gradients = torch.autograd.grad(y.sum() + s.sum(), leaves)
    assert [tuple(t.shape) for t in (y, s, *gradients)] == [(0, 3, 16)] * 4 + [(16,)] * 2
    assert not any(g.any() for g in gradients[2:])


@centred
def test_micro_batches_have_the_bits_of_the_whole(centred: bool, device: str) -> None:
    inputs = operands(Case(centred), 12, 3, 100, dtype=torch.float32, device=device)
    dy, ds = (random(12, 3, 100, dtype=torch.float32, device=device, seed=s) for s in (5, 6))
    x, residual, *vectors = inputs
    assert x is not None and residual is not None
    whole = results(Case(centred, at(device)).ours, inputs, dy, ds)[:4]
    again = results(Case(centred, at(device)).ours, inputs, dy, ds)[:4]
    assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))
    for size in (1, 5):
        parts = [
            results(Case(centred, at(device, 8 + size * place)).ours, [a, b, *vectors], *tangents)[:4]
            for place, (a, b, *tangents) in enumerate(
                zip(*(t.split(size) for t in (x, residual, dy, ds)), strict=True)
            )
        ]
        joined = [torch.cat(same) for same in zip(*parts, strict=True)]
        assert all(torch.equal(a, b) for a, b in zip(joined, whole, strict=True))


def test_the_dropped_elements_are_those_of_the_reference(device: str) -> None:
    x = torch.ones(4, 5, 60, device=device, requires_grad=True)
    zeros = torch.zeros_like(x)
    _, s = Case(True, at(device)).ours(x, zeros)
    (dx,) = torch.autograd.grad(s.sum(), x)
    factor = reference_factor(torch.ones(4, 5, 60), at("cpu"), KEY, 300, P)
    assert torch.equal(s.cpu(), factor) and torch.equal(dx.cpu(), factor)


def test_a_large_mean_does_not_cancel(device: str) -> None:
    x = random(4, 100, dtype=torch.float32, device=device) + 1000.0
    assert_as_good_as_torch(
        lambda x: Case().ours(x, x)[0], lambda x: Case().torchs(x, x)[0], (x,), torch.ones_like(x)
    )
