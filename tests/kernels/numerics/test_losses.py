from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.cross_entropy import cross_entropy
from kernels.pointwise_loss import STATIC, binary_cross_entropy_with_logits, mse_loss
from kernels.reduction import REDUCTIONS, SUM_BLOCK, launch_counted_total
from kernels.rows import WHOLE_ROW
from tests.kernels.numerics.compare import DTYPE_NAMES, DTYPES, assert_as_good_as_torch

functional = torch.nn.functional
INFINITY = float("inf")
drawn = settings(
    max_examples=8,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)


def random(*shape: int, dtype: torch.dtype, device: str, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * 3).to(device, dtype)


def classes(*shape: int, count: int, device: str) -> Tensor:
    """Targets of which every fourth or so is ignored."""
    generator = torch.Generator().manual_seed(9)
    target = torch.randint(count, shape, generator=generator)
    return torch.where(torch.rand(shape, generator=generator) < 0.25, -100, target).to(device)


def torchs(x: Tensor, target: Tensor, reduction: str, ignored: int, smoothing: float) -> Tensor:
    loss = functional.cross_entropy(
        x.reshape(-1, x.shape[-1]),
        target.reshape(-1),
        reduction=reduction,
        ignore_index=ignored,
        label_smoothing=smoothing,
    )
    return loss.view(target.shape) if reduction == "none" else loss


def assert_right(x: Tensor, target: Tensor, reduction: str, smoothing: float = 0.0) -> None:
    shape = tuple(target.shape) if reduction == "none" else ()
    assert_as_good_as_torch(
        lambda logits: cross_entropy(logits, target, reduction, -100, smoothing),
        lambda logits: torchs(logits, target, reduction, -100, smoothing),
        (x,),
        random(*shape, dtype=x.dtype, device=str(x.device), seed=5),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_NAMES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy(reduction: str, smoothing: float, dtype: torch.dtype, device: str) -> None:
    target = classes(6, 7, count=130, device=device)
    target[0, :2] = torch.tensor([0, 129])
    assert_right(random(6, 7, 130, dtype=dtype, device=device), target, reduction, smoothing)


@drawn
@given(rows=st.integers(2, 40), count=st.integers(2, 300), smoothing=st.sampled_from([0.0, 0.3]))
def test_cross_entropy_of_drawn_shapes(rows: int, count: int, smoothing: float, device: str) -> None:
    target = classes(rows, count=count, device=device)
    target[0] = count - 1
    assert_right(random(rows, count, dtype=torch.float32, device=device), target, "mean", smoothing)


@pytest.mark.parametrize("count", [WHOLE_ROW, 3 * WHOLE_ROW + 777])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_many_classes(count: int, smoothing: float, device: str) -> None:
    x = random(3, count, dtype=torch.float32, device=device)
    assert_right(x, torch.tensor([count - 1, -100, 5], device=device), "none", smoothing)


@pytest.mark.parametrize("count", [50, WHOLE_ROW + 50])
def test_logits_far_from_zero_keep_their_digits(count: int, device: str) -> None:
    x = random(4, count, dtype=torch.float32, device=device) + 4000.0
    for smoothing in (0.0, 0.5):
        assert_right(x, torch.tensor([0, 1, 2, count - 1], device=device), "mean", smoothing)


def test_confident_logits(device: str) -> None:
    x = torch.zeros(5, 3, device=device)
    x[:, 1] = torch.tensor([0.0, 5.0, 10.0, 80.0, 300.0])
    for target in (0, 1):
        assert_right(x, torch.full((5,), target, device=device), "none")


@pytest.mark.parametrize("width", [4, WHOLE_ROW + 10])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_infinite_logits_are_as_in_torch(width: int, smoothing: float, device: str) -> None:
    x = torch.zeros(7, width)
    x[0, 1:] = -INFINITY  # one class is possible, it is the target
    x[1, 1:] = -INFINITY  # it is not the target
    x[2, :-1] = -INFINITY  # all blocks but the last are empty
    x[3] = -INFINITY
    x[4, 2] = INFINITY
    x[5, 2] = float("nan")
    x, target = x.to(device), torch.tensor([0, 2, width - 1, 0, 2, 0, 1], device=device)
    leaf, wide = x.clone().requires_grad_(), x.double().requires_grad_()
    got = cross_entropy(leaf, target, "none", -100, smoothing)
    expected = torchs(wide, target, "none", -100, smoothing)
    torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=1e-6, equal_nan=True)
    if smoothing == 0.0:
        (dx,), (exact,) = torch.autograd.grad(got.sum(), leaf), torch.autograd.grad(expected.sum(), wide)
        torch.testing.assert_close(dx.double(), exact, rtol=1e-6, atol=1e-6, equal_nan=True)


def test_ignored_rows_are_zero_whatever_their_logits(device: str) -> None:
    x = torch.tensor([[1.0, INFINITY], [0.0, float("nan")], [2.0, 3.0]], device=device).requires_grad_()
    target = torch.tensor([1, 1, 0], device=device)
    losses = cross_entropy(x, target, "none", 1, 0.0)
    (dx,) = torch.autograd.grad(losses.sum(), x)
    assert torch.equal(losses[:2], torch.zeros(2, device=device)) and losses[2] > 1
    assert torch.equal(dx[:2], torch.zeros(2, 2, device=device)) and dx[2, 0] < 0
    assert torch.equal(cross_entropy(x, target, "mean", 1, 0.0), losses[2])
    assert cross_entropy(x, torch.ones_like(target), "mean", 1, 0.0).isnan()
    assert cross_entropy(x, torch.ones_like(target), "sum", 1, 0.0) == 0


def test_targets_that_are_no_class_make_not_a_number(device: str) -> None:
    x = random(3, 5, dtype=torch.float32, device=device).requires_grad_()
    losses = cross_entropy(x, torch.tensor([5, -1, 4], device=device), "none", -100, 0.0)
    (dx,) = torch.autograd.grad(losses.sum(), x)
    assert losses[:2].isnan().all() and dx[:2].isnan().all()
    assert losses[2].isfinite() and dx[2].isfinite().all()


def test_cross_entropy_of_strides_and_expansions(device: str) -> None:
    base = random(8, 6, 48, dtype=torch.float32, device=device)
    for x in (base[::2], base[:, ::2], base.transpose(1, 2), base[..., 3:40], base[:1].expand(5, 6, 48)):
        target = classes(*x.shape[:-1], count=x.shape[-1], device=device)
        assert_right(x, target.int().long(), "none")
        assert_right(x, target.t().contiguous().t(), "mean")
    logits, target = base[0].requires_grad_(), torch.zeros(6, dtype=torch.int32, device=device)
    losses = cross_entropy(logits, target, "none", -100, 0.0)
    expected = functional.cross_entropy(logits, target.long(), reduction="none")
    for reduce in (
        lambda t: t.sum(),
        lambda t: t[::2].square().sum(),
    ):  # an expanded gradient, then a strided one
        (got,), (exact,) = (
            torch.autograd.grad(reduce(t), logits, retain_graph=True) for t in (losses, expected)
        )
        torch.testing.assert_close(got, exact)


def test_a_single_row_without_leading_shape(device: str) -> None:
    assert_right(random(9, dtype=torch.float32, device=device), torch.tensor(3, device=device), "none")


def test_rows_do_not_depend_on_how_many_there_are(device: str) -> None:
    x = random(37, 200, dtype=torch.float32, device=device)
    target = classes(37, count=200, device=device)
    whole = cross_entropy(x, target, "none", -100, 0.1)
    assert torch.equal(cross_entropy(x, target, "none", -100, 0.1), whole)
    for size in (1, 8, 36):
        parts = zip(x.split(size), target.split(size), strict=True)
        assert torch.equal(torch.cat([cross_entropy(*part, "none", -100, 0.1) for part in parts]), whole)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_nothing_to_lose(reduction: str, device: str) -> None:
    x = torch.zeros(0, 3, 4, device=device, requires_grad=True)
    target = torch.zeros(0, 3, dtype=torch.int64, device=device)
    for got, expected in (
        (cross_entropy(x, target, reduction, -100, 0.0), torchs(x, target, reduction, -100, 0.0)),
        (mse_loss(x, x.detach(), reduction), functional.mse_loss(x, x.detach(), reduction=reduction)),
    ):
        torch.testing.assert_close(got, expected, equal_nan=True)
        assert torch.autograd.grad(got.sum(), x)[0].shape == x.shape


Loss = Callable[[Tensor, Tensor, str], Tensor]


def torchs_mse(x: Tensor, t: Tensor, reduction: str) -> Tensor:
    return functional.mse_loss(x, t, reduction=reduction)


def torchs_bce(x: Tensor, t: Tensor, reduction: str) -> Tensor:
    return functional.binary_cross_entropy_with_logits(x, t, reduction=reduction)


POINTWISE = [(mse_loss, torchs_mse), (binary_cross_entropy_with_logits, torchs_bce)]
both = pytest.mark.parametrize("ours, theirs", POINTWISE, ids=["mse", "bce"])


def assert_pointwise_right(ours: Loss, theirs: Loss, x: Tensor, t: Tensor, reduction: str) -> None:
    shape = tuple(x.shape) if reduction == "none" else ()
    assert_as_good_as_torch(
        lambda *inputs: ours(*inputs, reduction),
        lambda *inputs: theirs(*inputs, reduction),
        (x, t),
        random(*shape, dtype=x.dtype, device=str(x.device), seed=5),
    )


def pair(*shape: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    x, t = (random(*shape, dtype=dtype, device=device, seed=s) for s in (0, 1))
    return x, t.sigmoid()


@both
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_NAMES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_pointwise(ours: Loss, theirs: Loss, reduction: str, dtype: torch.dtype, device: str) -> None:
    x, t = pair(3, 37, 11, dtype=dtype, device=device)
    assert_pointwise_right(ours, theirs, x, t, reduction)


@both
@drawn
@given(size=st.integers(1, 3 * STATIC.elements), reduction=st.sampled_from(REDUCTIONS))
def test_pointwise_of_drawn_sizes(ours: Loss, theirs: Loss, size: int, reduction: str, device: str) -> None:
    assert_pointwise_right(ours, theirs, *pair(size, dtype=torch.float32, device=device), reduction)


@both
def test_several_tiles_a_program(
    ours: Loss, theirs: Loss, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kernels.pointwise_loss.SUMS", 3)
    x, t = pair(8 * STATIC.elements + 5, dtype=torch.float32, device=device)
    assert_pointwise_right(ours, theirs, x, t, "mean")
    assert torch.equal(ours(x, t, "sum"), ours(x, t, "sum"))


@both
def test_pointwise_of_strides_and_expansions(ours: Loss, theirs: Loss, device: str) -> None:
    x, t = pair(8, 6, 10, dtype=torch.float32, device=device)
    for a, b in ((x[::2], t[::2]), (x.transpose(0, 2), t[:, :, :1].expand(8, 6, 10).transpose(0, 2))):
        assert_pointwise_right(ours, theirs, a, b, "mean")
        assert_pointwise_right(ours, theirs, a, b, "none")
    leaf = x.clone().requires_grad_()
    got = torch.autograd.grad(ours(leaf, t, "none").sum(), leaf)
    torch.testing.assert_close(got, torch.autograd.grad(theirs(leaf, t, "none").sum(), leaf))


@pytest.mark.parametrize("target", [0.0, 1.0, 0.5])
def test_extreme_logits(target: float, device: str) -> None:
    x = torch.tensor(
        [-INFINITY, -200.0, -30.0, -9.0, -1e-6, -0.0, 1e-6, 9.0, 30.0, 200.0, INFINITY, float("nan")]
    )
    leaf = x.to(device).requires_grad_()
    wide = x.to(device).double().requires_grad_()
    got = binary_cross_entropy_with_logits(leaf, torch.full_like(leaf, target), "none")
    expected = torchs_bce(wide, torch.full_like(wide, target), "none")
    torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=2e-15, equal_nan=True)
    (dx,), (exact,) = torch.autograd.grad(got.sum(), leaf), torch.autograd.grad(expected.sum(), wide)
    torch.testing.assert_close(dx.double(), exact, rtol=1e-6, atol=1e-7, equal_nan=True)


def test_totals_of_many_sums(device: str) -> None:
    sums = random(2 * SUM_BLOCK + 100, dtype=torch.float32, device=device)
    counts = torch.ones_like(sums) * 3
    total, count = sums.new_empty(()), sums.new_empty((1,))
    launch_counted_total(sums, counts, total, count)
    assert count.item() == 3 * len(sums)
    torch.testing.assert_close(total.double(), sums.double().sum() / (3 * len(sums)), rtol=1e-5, atol=1e-9)
