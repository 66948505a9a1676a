"""The norm of a residual sum as torch sees it: schema, shapes, autograd, tracing; by its reference on CPU."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional

from kernels.add_norm import add_norm, add_norm_forward
from kernels.dropout import dropout

ops = torch.ops.gpp_kernels
POSITION = torch.tensor([3, 8])
DROPPED = (POSITION, 12345, 24, 0.25)
KEPT = (None, 0, 0, 0.0)
both = pytest.mark.parametrize("dropped", [KEPT, DROPPED], ids=["kept", "dropped"])


def leaf(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def operands(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [leaf(4, 3, 8, dtype=dtype), leaf(4, 3, 8, dtype=dtype, seed=1), leaf(8, dtype=dtype, seed=2)]


@both
@pytest.mark.parametrize("centred", [True, False])
def test_opcheck(centred: bool, dropped: Any) -> None:
    x, residual, vector = operands()
    bias = vector if centred else None
    options = (1e-5, centred, torch.float32, *dropped)
    torch.library.opcheck(add_norm, (x, residual, vector, bias, *options))
    given = (x.detach(), residual.detach(), vector.detach(), bias if bias is None else bias.detach())
    torch.library.opcheck(add_norm_forward, (*given, *options))
    y, s, mean, rstd = add_norm_forward(*given, *options)
    saved = (y, s, s, mean if centred else None, rstd, given[2])
    torch.library.opcheck(ops.add_norm_backward.default, (*saved, torch.float32))
    types = (torch.float32, torch.bfloat16)
    torch.library.opcheck(ops.add_norm_backward_both.default, (*saved, *types, *dropped))


@both
def test_gradients_by_finite_differences(dropped: Any) -> None:
    inputs = [leaf(*shape, dtype=torch.float64, seed=s) for s, shape in enumerate(((2, 4), (2, 4), (4,)))]

    def layer(x: Tensor, residual: Tensor, vector: Tensor) -> Any:
        return add_norm(x, residual, vector, vector, 1e-5, True, torch.float64, *dropped)

    def root(x: Tensor, residual: Tensor, vector: Tensor) -> Any:
        return add_norm(x, residual, vector, None, 1e-5, False, torch.float64, *dropped)

    for function in (layer, root):
        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradcheck(lambda *t, f=function: f(*t)[1], [*inputs[:2], inputs[2].detach()])


@both
def test_the_reference_has_the_bits_of_torch(dropped: Any) -> None:
    x, residual, vector = operands()
    y, s = add_norm(x, residual, vector, vector, 1e-5, True, torch.float32, *dropped)
    kept = x if dropped is KEPT else dropout(x, *dropped)
    stream = kept + residual
    exact = functional.layer_norm(stream, (8,), vector, vector)
    assert torch.equal(s, stream) and torch.equal(y, exact)
    tangents = (leaf(4, 3, 8, seed=5), leaf(4, 3, 8, seed=6))
    inputs = (x, residual, vector)
    for got, right in zip(
        torch.autograd.grad((y, s), inputs, tangents),
        torch.autograd.grad((exact, stream), inputs, tangents),
        strict=True,
    ):
        torch.testing.assert_close(got, right)


def test_the_sum_keeps_the_dtype_of_the_wider_and_the_norm_has_that_asked_for() -> None:
    x, residual = leaf(4, 8, dtype=torch.bfloat16), leaf(4, 8)
    y, s = add_norm(x, residual, None, None, 1e-5, True, torch.bfloat16, *KEPT)
    assert (y.dtype, s.dtype) == (torch.bfloat16, torch.float32)
    exact = functional.layer_norm(x + residual, (8,))
    assert torch.equal(y, exact.bfloat16())
    dx, dresidual = torch.autograd.grad((y, s), (x, residual), (torch.ones_like(y), s.detach()))
    assert (dx.dtype, dresidual.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(dx, dresidual.bfloat16())


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor, residual: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        weights = self.norm.weight, self.norm.bias
        made: tuple[Tensor, Tensor] = add_norm(
            x, residual, *weights, 1e-5, True, torch.float32, position, 5, 24, 0.25
        )
        return made


def test_export_and_compile() -> None:
    module = Block()
    x, residual, _ = (t.detach() for t in operands())
    batch = torch.export.Dim("batch")
    shapes = {"x": {0: batch}, "residual": {0: batch}, "position": None}
    program = torch.export.export(module, (x, residual, POSITION), dynamic_shapes=shapes)
    given = (torch.randn(7, 3, 8), torch.randn(7, 3, 8), POSITION)
    expected = module(*given)
    for got, right in zip(program.run_decompositions().module()(*given), expected, strict=True):
        assert torch.equal(got, right)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    got, right = (
        torch.autograd.grad(sum(t.square().sum() for t in made), module.norm.weight)
        for made in (compiled(*given), expected)
    )
    assert torch.equal(got[0], right[0])


def targets(wanted: int, dropped: Any, readers: slice = slice(None)) -> list[str]:
    """The operators of a joint graph that returns one gradient."""

    def step(*given: Tensor) -> Tensor:
        leaves = [t.detach().requires_grad_() for t in given]
        made = add_norm(*leaves, 1e-5, True, torch.float32, *dropped)[readers]
        tangents = [torch.ones_like(t) for t in made]
        return torch.autograd.grad(made, leaves, tangents, allow_unused=True)[wanted]

    x, residual, vector = (t.detach() for t in operands())
    graph = make_fx(step)(x, residual, vector, vector).graph
    graph.eliminate_dead_code()
    return [str(n.target).split(".")[1] for n in graph.nodes if "gpp_kernels" in str(n.target)]


def test_a_half_that_is_not_needed_is_not_run() -> None:
    assert targets(0, KEPT) == ["add_norm_forward", "add_norm_backward"]
    assert targets(0, DROPPED) == ["add_norm_forward", "add_norm_backward_both"]
    assert targets(2, DROPPED) == ["add_norm_forward", "layer_norm_backward_weight"]
    assert targets(0, DROPPED, slice(1, 2)) == ["add_norm_forward", "dropout"]
    assert targets(1, DROPPED, slice(1, 2)) == ["add_norm_forward"]


def test_one_gradient_serves_both_addends() -> None:
    x, residual, _ = operands()
    y, _ = add_norm(x, residual, None, None, 1e-5, True, torch.float32, *KEPT)
    dx, dresidual = torch.autograd.grad(y, (x, residual), torch.randn_like(y))
    assert dx.data_ptr() == dresidual.data_ptr()


def test_an_addend_without_a_gradient() -> None:
    x, residual, _ = operands()
    for dropped in (KEPT, DROPPED):
        y, s = add_norm(x, residual.detach(), None, None, 1e-5, True, torch.float32, *dropped)
        (alone,) = torch.autograd.grad((y, s), x, (y.detach(), s.detach()))
        y, s = add_norm(x, residual, None, None, 1e-5, True, torch.float32, *dropped)
        assert torch.equal(alone, torch.autograd.grad((y, s), x, (y.detach(), s.detach()))[0])


def test_shapes_are_known_of_meta_and_fake_tensors() -> None:
    x = torch.empty(2, 5, 8, device="meta", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.empty(8, device="meta", requires_grad=True)
    residual = torch.empty(2, 5, 8, device="meta", requires_grad=True)
    y, s = add_norm(x, residual, weight, None, 1e-5, False, torch.bfloat16, POSITION.to("meta"), 5, 40, 0.1)
    (y.sum() + s.sum()).backward()
    for t in (x, residual, weight):
        assert t.grad is not None and (t.grad.shape, t.grad.dtype) == (t.shape, t.dtype)
    with FakeTensorMode():
        fake = torch.empty(2, 5, 8, device="cuda")
        made = add_norm_forward(fake, fake, None, None, 1e-5, True, torch.float16, *KEPT)
        assert [(t.device.type, tuple(t.shape)) for t in made] == [
            *[("cuda", (2, 5, 8))] * 2,
            *[("cuda", (2, 5))] * 2,
        ]


X, ROW = torch.randn(4, 8), torch.randn(8)


def called(x: Tensor = X, residual: Tensor = X, weight: Any = None, bias: Any = None, **other: Any) -> Any:
    options = {"centred": True, "dtype": torch.float32, "dropped": KEPT} | other
    return add_norm(
        x, residual, weight, bias, 1e-5, options["centred"], options["dtype"], *options["dropped"]
    )


def differentiated(dy: Tensor = X, ds: Any = None, s: Tensor = X, rstd: Tensor = ROW[:4]) -> Any:
    return ops.add_norm_backward(dy, ds, s, None, rstd, None, torch.float32)


MISTAKES: list[tuple[Callable[[], object], type[Exception], str]] = [
    (lambda: called(residual=X[:1]), ValueError, r"add_norm: residual must have x's shape \(4, 8\)"),
    (lambda: called(x=X.int()), TypeError, "add_norm: x must be one of"),
    (lambda: called(x=X[0, 0], residual=X[0, 0]), ValueError, "x must have at least one dimension"),
    (lambda: called(x=X[:, :0], residual=X[:, :0]), ValueError, "x must be at least one element wide"),
    (lambda: called(weight=ROW[:6]), ValueError, r"weight must have shape \(8,\).*it is \(6,\)"),
    (lambda: called(weight=ROW.half()), TypeError, "weight must be torch.float32, it is torch.float16"),
    (lambda: called(bias=ROW, centred=False), ValueError, "bias must be None for RMS norm"),
    (lambda: called(dtype=torch.float64), ValueError, "dtype must be one of torch.float32, torch.bfloat16"),
    (lambda: called(dropped=(None, 1, 8, 0.1)), ValueError, "p must be 0 without a position, it is 0.1"),
    (lambda: called(dropped=(POSITION, 1, 8, 1.1)), ValueError, r"add_norm: p must lie in \[0, 1\]"),
    (lambda: differentiated(dy=X[:2]), ValueError, r"add_norm_backward: dy must have s's shape \(4, 8\)"),
    (lambda: differentiated(ds=X.half()), TypeError, "ds must be torch.float32, it is torch.float16"),
    (lambda: differentiated(rstd=ROW), ValueError, r"rstd must have s's leading shape \(4,\)"),
]


@pytest.mark.parametrize("call, error, message", MISTAKES, ids=[m[2][:40] for m in MISTAKES])
def test_mistakes_are_named(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
