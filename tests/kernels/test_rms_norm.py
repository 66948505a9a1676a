"""RMS norm as torch sees it: schema, shapes, autograd, tracing; on CPU, so by its reference."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from kernels.rms_norm import rms_norm, rms_norm_forward

functional = torch.nn.functional
ops = torch.ops.gpp_kernels


def leaf(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def unfused(x: Tensor, weight: Tensor | None) -> Tensor:
    return functional.rms_norm(x, x.shape[-1:], weight, 1e-5)


def fused(x: Tensor, weight: Tensor | None) -> Tensor:
    y: Tensor = ops.rms_norm(x, weight, 1e-5)
    return y


def test_opcheck() -> None:
    x, weight = leaf(4, 3, 8), leaf(8, seed=1)
    torch.library.opcheck(rms_norm, (x, weight, 1e-5))
    torch.library.opcheck(rms_norm, (x, None, 1e-5))
    x, weight = x.detach(), weight.detach()
    torch.library.opcheck(rms_norm_forward, (x, weight, 1e-5))
    _, rstd = rms_norm_forward(x, weight, 1e-5)
    torch.library.opcheck(ops.rms_norm_backward_input.default, (x, x, rstd, weight))
    torch.library.opcheck(ops.rms_norm_backward_weight.default, (x, x, rstd, torch.float32))


def test_gradients_by_finite_differences() -> None:
    x, weight = leaf(4, 3, 8, dtype=torch.float64), leaf(8, dtype=torch.float64, seed=1)
    assert torch.autograd.gradcheck(fused, (x, weight))
    assert torch.autograd.gradcheck(lambda x: fused(x, None), (x,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_reference_has_the_bits_of_torch(dtype: torch.dtype) -> None:
    x, weight, dy = (
        leaf(4, 3, 8, dtype=dtype),
        leaf(8, dtype=dtype, seed=1),
        leaf(4, 3, 8, dtype=dtype, seed=2),
    )
    y, expected = fused(x, weight), unfused(x, weight)
    assert torch.equal(y, expected)
    for got, exact in zip(
        torch.autograd.grad(y, (x, weight), dy), torch.autograd.grad(expected, (x, weight), dy), strict=True
    ):
        torch.testing.assert_close(got, exact)


def test_the_statistic_is_float32_for_bfloat16() -> None:
    y, rstd = rms_norm_forward(leaf(4, 100, dtype=torch.bfloat16).detach(), None, 1e-5)
    assert (y.dtype, rstd.dtype, rstd.shape) == (torch.bfloat16, torch.float32, (4,))


class Norm(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.rand(8) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return fused(x, self.weight)


def test_export_and_compile() -> None:
    module, x = Norm(), torch.randn(7, 3, 8)
    shapes = {"x": {0: torch.export.Dim("batch")}}
    program = torch.export.export(module, (torch.randn(4, 3, 8),), dynamic_shapes=shapes)
    assert torch.equal(program.run_decompositions().module()(x), unfused(x, module.weight))
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    got = torch.autograd.grad(compiled(x).square().sum(), module.weight)
    assert torch.equal(got[0], torch.autograd.grad(module(x).square().sum(), module.weight)[0])


def test_a_half_that_is_not_needed_is_not_run() -> None:
    def targets(wanted: int) -> list[str]:
        def step(x: Tensor, weight: Tensor, dy: Tensor) -> Tensor:
            leaves = [t.detach().requires_grad_() for t in (x, weight)]
            return torch.autograd.grad(fused(*leaves), leaves, dy)[wanted]

        graph = make_fx(step)(torch.randn(4, 8), torch.randn(8), torch.randn(4, 8)).graph
        graph.eliminate_dead_code()
        return [str(n.target).split(".")[1] for n in graph.nodes if "gpp_kernels" in str(n.target)]

    assert targets(0) == ["rms_norm_forward", "rms_norm_backward_input"]
    assert targets(1) == ["rms_norm_forward", "rms_norm_backward_weight"]


def test_shapes_are_known_of_meta_and_fake_tensors() -> None:
    x = torch.empty(2, 5, 8, device="meta", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.empty(8, device="meta", dtype=torch.bfloat16, requires_grad=True)
    fused(x, weight).sum().backward()
    assert x.grad is not None and x.grad.shape == x.shape
    assert weight.grad is not None and weight.grad.shape == weight.shape
    with FakeTensorMode():
        fake = torch.empty(2, 5, 8, device="cuda")
        y, rstd = rms_norm_forward(fake, None, 1e-5)
        assert (y.device.type, rstd.shape) == ("cuda", (2, 5))
        assert ops.rms_norm_backward_input(y, fake, rstd, None).shape == fake.shape


X, ROW = torch.randn(4, 8), torch.randn(8)
MISTAKES: list[tuple[Callable[[], object], type[Exception], str]] = [
    (lambda: fused(X, ROW[:6]), ValueError, r"rms_norm: weight must have shape \(8,\).*it is \(6,\)"),
    (lambda: fused(X, ROW.half()), TypeError, "weight must be torch.float32, it is torch.float16"),
    (lambda: fused(X[:, :0], None), ValueError, "x must be at least one element wide"),
    (lambda: fused(X[0, 0], None), ValueError, "x must have at least one dimension"),
    (lambda: ops.rms_norm_backward_input(X, X, ROW, None), ValueError, "rstd must have x's leading"),
    (lambda: ops.rms_norm_backward_input(X[:2], X, ROW[:4], None), ValueError, "dy must have x's shape"),
    (
        lambda: ops.rms_norm_backward_input(X.half(), X, ROW[:4], None),
        TypeError,
        "dy must be torch.float32",
    ),
]


@pytest.mark.parametrize("call, error, message", MISTAKES, ids=[m[2][:40] for m in MISTAKES])
def test_mistakes_are_named(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
