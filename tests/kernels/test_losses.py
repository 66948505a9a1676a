"""The losses as torch sees them: schema, shapes, autograd, tracing; on CPU, so by their references."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from kernels.cross_entropy import cross_entropy, cross_entropy_forward
from kernels.pointwise_loss import binary_cross_entropy_with_logits, mse_loss
from kernels.reduction import REDUCTIONS

functional = torch.nn.functional
ops = torch.ops.gpp_kernels
TARGET = torch.tensor([3, 0, -100, 4])
POINTWISE = [
    (mse_loss, functional.mse_loss, ops.mse_loss_backward.default),
    (
        binary_cross_entropy_with_logits,
        functional.binary_cross_entropy_with_logits,
        ops.binary_cross_entropy_with_logits_backward.default,
    ),
]
both = pytest.mark.parametrize("loss, torchs, backward", POINTWISE, ids=["mse", "bce"])


def leaf(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


@pytest.mark.parametrize("reduction, smoothing", [("none", 0.0), ("mean", 0.2), ("sum", 0.0)])
def test_cross_entropy_passes_opcheck(reduction: str, smoothing: float) -> None:
    options = (reduction, -100, smoothing)
    x = leaf(4, 5)
    torch.library.opcheck(cross_entropy, (x, TARGET, *options))
    x = x.detach()
    torch.library.opcheck(cross_entropy_forward, (x, TARGET, *options))
    loss, *statistics = cross_entropy_forward(x, TARGET, *options)
    backward = ops.cross_entropy_backward.default
    torch.library.opcheck(backward, (loss, x, TARGET, *statistics, *options))


@both
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_pointwise_losses_pass_opcheck(
    loss: Callable[..., Tensor], torchs: object, backward: Callable[..., Tensor], reduction: str
) -> None:
    x, t = leaf(4, 5), leaf(4, 5, seed=1).detach()
    torch.library.opcheck(loss, (x, t, reduction))
    x = x.detach()
    torch.library.opcheck(backward, (loss(x, t, reduction), x, t, reduction))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradients_by_finite_differences(reduction: str) -> None:
    x, t = leaf(4, 5, dtype=torch.float64), leaf(4, 5, dtype=torch.float64, seed=1)
    for smoothing in (0.0, 0.3):
        assert torch.autograd.gradcheck(cross_entropy, (x, TARGET, reduction, -100, smoothing))
    for loss, _, _ in POINTWISE:
        assert torch.autograd.gradcheck(loss, (x, t, reduction))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_on_cpu_is_torchs(reduction: str, smoothing: float) -> None:
    x = leaf(3, 4, 5)
    target = torch.stack([TARGET, TARGET.flip(0), TARGET])
    got = cross_entropy(x, target, reduction, -100, smoothing)
    expected = functional.cross_entropy(
        x.movedim(-1, 1), target, reduction=reduction, label_smoothing=smoothing
    )
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(*(torch.autograd.grad(t.square().sum(), x) for t in (got, expected)))


@both
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_pointwise_losses_on_cpu_have_the_bits_of_torch(
    loss: Callable[..., Tensor], torchs: Callable[..., Tensor], backward: object, reduction: str
) -> None:
    x, t = leaf(3, 4), leaf(3, 4, seed=1).detach()
    got, expected = loss(x, t, reduction), torchs(x, t, reduction=reduction)
    assert torch.equal(got, expected)
    gradients = (torch.autograd.grad(t.square().sum(), x) for t in (got, expected))
    torch.testing.assert_close(*gradients)


def test_losses_are_of_the_dtype_of_the_logits_and_statistics_float32() -> None:
    x = leaf(4, 5, dtype=torch.bfloat16).detach()
    loss, peak, total, count = cross_entropy_forward(x, TARGET, "mean", -100, 0.0)
    assert loss.dtype == torch.bfloat16 and {t.dtype for t in (peak, total, count)} == {torch.float32}
    torch.testing.assert_close(peak + total.log(), x.float().logsumexp(-1))
    assert count.item() == 3
    assert mse_loss(x, x, "none").dtype == torch.bfloat16


class Losses(torch.nn.Module):
    def forward(self, x: Tensor, target: Tensor, t: Tensor) -> Tensor:
        pointwise = ops.mse_loss(x, t, "mean") + ops.binary_cross_entropy_with_logits(x, t, "sum")
        total: Tensor = pointwise + ops.cross_entropy(x, target, "mean", -100, 0.1)
        return total


def unfused(x: Tensor, target: Tensor, t: Tensor) -> Tensor:
    bce = functional.binary_cross_entropy_with_logits(x, t, reduction="sum")
    return functional.mse_loss(x, t) + bce + functional.cross_entropy(x, target, label_smoothing=0.1)


def samples(count: int) -> tuple[Tensor, Tensor, Tensor]:
    return leaf(count, 5), torch.arange(count) % 5, leaf(count, 5, seed=1).detach()


def test_export_with_a_dynamic_batch_and_compile() -> None:
    batch = torch.export.Dim("batch")
    program = torch.export.export(Losses(), samples(4), dynamic_shapes=({0: batch},) * 3)
    inputs = samples(7)
    torch.testing.assert_close(program.run_decompositions().module()(*inputs), unfused(*inputs))
    loss = torch.compile(Losses(), backend="aot_eager", fullgraph=True)(*inputs)
    torch.testing.assert_close(loss, unfused(*inputs))
    torch.testing.assert_close(*(torch.autograd.grad(t, inputs[0]) for t in (loss, unfused(*inputs))))


def test_a_joint_trace_has_forward_and_backward_operators() -> None:
    def step(x: Tensor, target: Tensor, t: Tensor, dloss: Tensor) -> tuple[Tensor, ...]:
        x = x.detach().requires_grad_()
        return torch.autograd.grad(Losses()(x, target, t), x, dloss)

    graph = make_fx(step)(*samples(4), torch.tensor(0.5)).graph
    graph.eliminate_dead_code()
    names = [str(n.target).split(".")[1] for n in graph.nodes if "gpp_kernels" in str(n.target)]
    assert sorted(names) == [
        "binary_cross_entropy_with_logits_backward",
        "cross_entropy_backward",
        "cross_entropy_forward",
        "mse_loss_backward",
    ]
    with torch.no_grad():
        graph = make_fx(Losses())(*samples(4)).graph
    assert "cross_entropy_forward" not in str(graph) and "gpp_kernels.cross_entropy.default" in str(graph)


def test_shapes_are_known_of_meta_and_fake_tensors() -> None:
    x = torch.empty(2, 3, 8, device="meta", dtype=torch.bfloat16, requires_grad=True)
    target = torch.empty(2, 3, device="meta", dtype=torch.int64)
    loss = cross_entropy(x, target, "none", -100, 0.0)
    assert (loss.shape, loss.dtype) == ((2, 3), torch.bfloat16)
    (loss.sum() + mse_loss(x, x.detach(), "mean")).backward()
    assert x.grad is not None and x.grad.shape == x.shape
    with FakeTensorMode():
        fake, target = torch.empty(4, 8, device="cuda"), torch.empty(4, device="cuda", dtype=torch.int64)
        loss, *statistics = cross_entropy_forward(fake, target, "mean", -100, 0.0)
        assert (loss.shape, loss.device.type) == ((), "cuda")
        dx = ops.cross_entropy_backward(loss, fake, target, *statistics, "mean", -100, 0.0)
        assert dx.shape == fake.shape
        assert binary_cross_entropy_with_logits(fake, fake, "none").shape == fake.shape


X, SAME, ROW = torch.randn(4, 5), torch.randn(4, 5), torch.randn(4)
MISTAKES: list[tuple[Callable[[], object], type[Exception], str]] = [
    (
        lambda: cross_entropy(X, TARGET[:3], "mean", -100, 0.0),
        ValueError,
        r"cross_entropy: target must have logits' leading shape \(4,\), it is \(3,\)",
    ),
    (
        lambda: cross_entropy(X, SAME, "mean", -100, 0.0),
        TypeError,
        "target must be torch.int64 or torch.int32",
    ),
    (
        lambda: cross_entropy(X, TARGET, "max", -100, 0.0),
        ValueError,
        "reduction must be one of none, mean, sum",
    ),
    (lambda: cross_entropy(X, TARGET, "mean", -100, 1.5), ValueError, "label_smoothing must be from 0 to 1"),
    (lambda: cross_entropy(X[:, :0], TARGET, "mean", -100, 0.0), ValueError, "have at least one class"),
    (lambda: cross_entropy(X.int(), TARGET, "mean", -100, 0.0), TypeError, "logits must be one of"),
    (
        lambda: cross_entropy(X, TARGET.to("meta"), "mean", -100, 0.0),
        ValueError,
        "on cpu like logits, it is meta",
    ),
    (
        lambda: ops.cross_entropy_backward(ROW, X, TARGET, ROW, ROW, ROW[:1], "mean", -100, 0.0),
        ValueError,
        r"cross_entropy_backward: dloss must have the loss's shape \(\), it is \(4,\)",
    ),
    (
        lambda: ops.cross_entropy_backward(ROW, X, TARGET, ROW, ROW, ROW, "none", -100, 0.0),
        ValueError,
        r"count must have shape \(0,\), it is \(4,\)",
    ),
    (lambda: mse_loss(X, ROW, "mean"), ValueError, r"mse_loss: target must have input's shape \(4, 5\)"),
    (
        lambda: mse_loss(X, SAME.half(), "mean"),
        TypeError,
        "target must be torch.float32, it is torch.float16",
    ),
    (
        lambda: binary_cross_entropy_with_logits(X, SAME, "all"),
        ValueError,
        "binary_cross_entropy_with_logits: reduction must be one of",
    ),
    (
        lambda: ops.mse_loss_backward(ROW, X, SAME, "none"),
        ValueError,
        r"mse_loss_backward: dloss must have the loss's shape \(4, 5\)",
    ),
]


@pytest.mark.parametrize("call, error, message", MISTAKES, ids=[m[2][:40] for m in MISTAKES])
def test_mistakes_are_named(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_second_derivatives_are_refused() -> None:
    x = leaf(4, 5)
    for loss in (cross_entropy(x, TARGET, "mean", -100, 0.0), mse_loss(x, SAME, "mean")):
        (dx,) = torch.autograd.grad(loss.square(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            dx.sum().backward()
