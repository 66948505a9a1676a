"""Sums of several tensors as torch sees them, and the graphs they are put in; by the reference on CPU."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional
from torch.utils import _pytree as pytree

from gpp.capture.capture import capture
from gpp.program.build import Hooks, Roots, alone
from kernels.backward_sums import sum_gradients
from kernels.fuse import fuse
from kernels.gradient_sum import sum_of
from kernels.in_place import accumulate

aten = torch.ops.aten


def leaf(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def leaves(count: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [leaf(4, 3, dtype=dtype, seed=seed) for seed in range(count)]


def test_opcheck_and_finite_differences() -> None:
    torch.library.opcheck(sum_of, (leaves(3), torch.float32))
    assert torch.autograd.gradcheck(lambda *parts: sum_of(parts, torch.float64), leaves(3, torch.float64))
    x, y = leaves(2)
    (gradient,) = torch.autograd.grad(sum_of([x, y.detach(), x], torch.float32).sum(), x)
    assert torch.equal(gradient, torch.full_like(x, 2.0))


def test_export_and_compile() -> None:
    class Module(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            made: Tensor = sum_of([x, y, x], torch.float32)
            return made

    module, batch = Module(), torch.export.Dim("batch")
    shapes = {"x": {0: batch}, "y": {0: batch}}
    program = torch.export.export(module, (torch.randn(4, 6), torch.randn(4, 6)), dynamic_shapes=shapes)
    given = torch.randn(5, 6), torch.randn(5, 6)
    assert torch.equal(program.module()(*given), module(*given))
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(*given), module(*given))
    made = sum_of([given[0].to("meta").half(), given[1].to("meta")], torch.float32)
    assert (made.shape, made.dtype) == ((5, 6), torch.float32)


X = torch.randn(4, 8)
MISTAKES: list[tuple[Sequence[Tensor], torch.dtype, type[Exception], str]] = [
    ([X], torch.float32, ValueError, "sum_of: parts must have at least two tensors, it is 1"),
    ([X, X[:2]], torch.float32, ValueError, r"parts\[1\] must have the shape of parts\[0\], \(4, 8\)"),
    ([X, X.int()], torch.float32, TypeError, r"parts\[1\] must be one of"),
    ([X, X.half()], torch.float16, TypeError, r"parts\[0\] must be torch.float16, it is torch.float32"),
]


@pytest.mark.parametrize("parts, dtype, error, message", MISTAKES, ids=[m[3][:30] for m in MISTAKES])
def test_mistakes_are_named(
    parts: Sequence[Tensor], dtype: torch.dtype, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        sum_of(parts, dtype)


def traced(function: Callable[..., Any], *inputs: Tensor, before: bool = True) -> fx.GraphModule:
    module = make_fx(function, pre_dispatch=before, tracing_mode="fake")(*inputs)
    assert isinstance(module, fx.GraphModule)
    return module


def calls(module: fx.GraphModule) -> list[str]:
    names = [str(n.target) for n in module.graph.nodes if n.op == "call_function"]
    return [name.split(".")[1] for name in names if "add" in name or "sum_of" in name or "to." in name]


JOINS: list[tuple[Callable[..., Any], list[str]]] = [
    (lambda a, b, c: a + b + c, ["sum_of"]),
    (lambda a, b, c: a + (b + (c + a)), ["sum_of"]),
    (lambda a, b, c: (a + b) + (c + a), ["add", "sum_of"]),
    (lambda a, b, c: a.half().float() + b, ["to", "sum_of"]),  # of the half itself
    (lambda a, b, c: a + b, ["add"]),
    (lambda a, b, c: torch.add(a + b, c, alpha=2), ["add", "add"]),
    (lambda a, b, c: (a + b) + c[:1], ["add", "add"]),  # stretched
    (lambda a, b, c: a + b.t() + c, ["add", "add"]),  # in another order
    (lambda a, b, c: (a + b).sum() + c.sum() + a.sum(), ["add", "add", "add"]),  # of numbers
    (lambda a, b, c: ((s := a + b) + c, s), ["add", "add"]),  # others read a part of the sum
    (lambda a, b, c: (s := a + b) + s, ["add", "add"]),
]


@pytest.mark.parametrize("function, expected", JOINS, ids=map(str, range(len(JOINS))))
def test_joins_of_branches_keep_their_bits(function: Callable[..., Any], expected: list[str]) -> None:
    square = [torch.randn(4, 4) for _ in range(3)]
    plain = traced(function, *square)
    fused, report = fuse(plain)
    assert calls(fused) == expected and not report.left
    for got, right in zip(*(pytree.tree_leaves(m(*square)) for m in (fused, plain)), strict=True):
        assert torch.equal(got, right)


def fork(x: Tensor) -> Tensor:
    """A value with four readers."""
    value = x.sin()
    return value.cos() * value.exp() + value.tanh() * value.sigmoid()


def test_gradients_of_a_fork_are_one_sum() -> None:
    def step(x: Tensor, dy: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        return torch.autograd.grad(fork(x), x, dy)[0]

    plain = traced(step, X, X, before=False)
    assert calls(plain).count("add") == 4  # one of them forward's
    found = sum_gradients(traced(step, X, X, before=False))
    assert calls(found) == ["add", "sum_of"]
    assert torch.equal(found(X, X), plain(X, X))


def test_casts_of_gradients_are_not_written() -> None:
    """As where several products read a value under autocast."""

    def step(x: Tensor, dy: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        y = x.bfloat16() * 2 + x.bfloat16() * 3 + x.bfloat16() * 0.3
        return torch.autograd.grad(y, x, dy)[0]

    plain = traced(step, X, X.bfloat16(), before=False)
    found = sum_gradients(traced(step, X, X.bfloat16(), before=False))
    sums = [n for n in found.graph.nodes if n.target is sum_of]
    assert sums[-1].args[1] == torch.float32
    assert {part.meta["val"].dtype for part in sums[-1].args[0]} == {torch.bfloat16}
    assert torch.equal(found(X, X.bfloat16()), plain(X, X.bfloat16()))


def test_what_is_overwritten_meanwhile_is_added_before() -> None:
    def function(x: Tensor, y: Tensor) -> Tensor:
        z = y * 2
        total = z + x
        z.mul_(3)
        return total + y

    plain = traced(function, X, X)
    assert calls(sum_gradients(traced(function, X, X))) == ["add", "add"]
    fused, _ = fuse(plain)
    assert calls(fused) == ["add", "add"] and torch.equal(fused(X, X), plain(X, X))


class Forked(nn.Module):
    """An input layer whose result four layers read, of which two share a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x = self.first(x).tanh()
        a, b, c = self.layers
        return functional.mse_loss(a(x).tanh() * b(x) + c(x) * a(x).sigmoid(), y)


def test_the_halves_of_a_stage_keep_their_bits() -> None:
    torch.manual_seed(0)
    model = capture(Forked(), {"x": torch.randn(4, 8), "y": torch.randn(4, 8)})
    operators = [operator.name for operator in model.graph.operators]
    roots = Roots({term: 1.0 for term in model.traced.train.terms}, mean=True)
    found: list[int] = []

    def rewritten(module: fx.GraphModule) -> fx.GraphModule:
        sum_gradients(module)
        found.append(sum(node.target is sum_of for node in module.graph.nodes))
        return module

    def run(hooks: Hooks) -> list[Tensor]:
        part = alone(model.traced, operators, 4, roots, torch.device("cpu"), hooks)
        generator = torch.Generator().manual_seed(1)
        given = [torch.rand(t.shape, generator=generator) for t in part.examples[:-1]]
        weights = given[: len(part.face.parameters)]
        made = part.functions.forward(weights, [], given[len(weights) :], torch.tensor([0, 0]))
        back = part.functions.backward_input(weights, list(made.stash), [])
        totals = [torch.zeros_like(weight) for weight in weights]
        part.functions.backward_weight(weights, list(back.stash), totals)
        return totals

    plain = run(Hooks(backward=accumulate))
    summed = run(Hooks(backward=accumulate, compile=rewritten))
    assert sum(found) == 1
    assert all(torch.equal(a, b) for a, b in zip(plain, summed, strict=True))
