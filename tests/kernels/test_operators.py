"""The operators as torch sees them: schema, shapes, autograd, tracing; on CPU, so by their references."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from kernels.activation import ACTIVATIONS, NEEDS_PREACTIVATION
from kernels.layer_norm import layer_norm, layer_norm_forward
from kernels.linear import linear
from kernels.product import configuration as linear_configuration
from kernels.product import precision

functional = torch.nn.functional
ops = torch.ops.gpp_kernels


def unfused_linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    z = functional.linear(x, weight, bias)
    if activation == "gelu_tanh":
        return functional.gelu(z, approximate="tanh")
    if activation == "gelu_erf":
        return functional.gelu(z)
    return {"none": lambda v: v, "relu": functional.relu, "silu": functional.silu}[activation](z)


def unfused_layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    return functional.layer_norm(x, x.shape[-1:], weight, bias, eps)


def leaf(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def linear_leaves(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    return leaf(4, 3, 8, dtype=dtype), leaf(6, 8, dtype=dtype, seed=1), leaf(6, dtype=dtype, seed=2)


def norm_leaves(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    return leaf(4, 3, 8, dtype=dtype), leaf(8, dtype=dtype, seed=1), leaf(8, dtype=dtype, seed=2)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_linear_passes_opcheck(activation: str) -> None:
    x, weight, bias = linear_leaves()
    torch.library.opcheck(linear, (x, weight, bias, activation))
    torch.library.opcheck(linear, (x, weight, None, activation))


def test_linear_gradients_pass_opcheck() -> None:
    x, weight, bias = (t.detach() for t in linear_leaves())
    z = functional.linear(x, weight, bias)
    for activation in sorted(NEEDS_PREACTIVATION):
        torch.library.opcheck(ops.linear_keeping.default, (x, weight, bias, activation))
    for activation in ACTIVATIONS[1:]:
        torch.library.opcheck(ops.linear_backward_activation.default, (z, z, activation))
    torch.library.opcheck(ops.linear_backward_input.default, (z, weight))
    torch.library.opcheck(ops.linear_backward_weight.default, (z, x))
    torch.library.opcheck(ops.linear_backward_bias.default, (z,))


def test_layer_norm_passes_opcheck() -> None:
    x, weight, bias = norm_leaves()
    torch.library.opcheck(layer_norm, (x, weight, bias, 1e-5))
    torch.library.opcheck(layer_norm, (x, None, None, 1e-5))
    x, weight, bias = (t.detach() for t in (x, weight, bias))
    torch.library.opcheck(layer_norm_forward, (x, weight, bias, 1e-5))
    _, mean, rstd = layer_norm_forward(x, weight, bias, 1e-5)
    torch.library.opcheck(ops.layer_norm_backward_input.default, (x, x, mean, rstd, weight))
    torch.library.opcheck(ops.layer_norm_backward_weight.default, (x, x, mean, rstd, torch.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weight_gradients_are_added_in_place(dtype: torch.dtype) -> None:
    total, dz, x = (leaf(*shape, dtype=dtype).detach() for shape in ((6, 8), (4, 3, 6), (4, 3, 8)))
    total = total.float()
    torch.library.opcheck(ops.linear_accumulate_weight.default, (total, dz, x))
    before = total.clone()
    ops.linear_accumulate_weight(total, dz, x)
    expected = before.double() + dz.double().view(12, 6).t() @ x.double().view(12, 8)
    torch.testing.assert_close(total.double(), expected, rtol=1e-6, atol=1e-6)
    with pytest.raises(TypeError, match=r"linear_accumulate_weight: total must be torch\.float32"):
        ops.linear_accumulate_weight(total.half(), dz, x)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_linear_gradients_by_finite_differences(activation: str) -> None:
    inputs = linear_leaves(torch.float64)
    assert torch.autograd.gradcheck(lambda *tensors: linear(*tensors, activation), inputs)


def test_layer_norm_gradients_by_finite_differences() -> None:
    inputs = norm_leaves(torch.float64)
    assert torch.autograd.gradcheck(lambda *tensors: layer_norm(*tensors, 1e-5), inputs)


def bits(function: Callable[..., Tensor], inputs: tuple[Tensor, ...], dy: Tensor) -> list[Tensor]:
    y = function(*inputs)
    return [y, *torch.autograd.grad(y, inputs, dy)]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_linear_on_cpu_has_the_bits_of_torch(activation: str) -> None:
    inputs, dy = linear_leaves(), leaf(4, 3, 6, seed=3).detach()
    fused = bits(lambda *t: linear(*t, activation), inputs, dy)
    plain = bits(lambda *t: unfused_linear(*t, activation), inputs, dy)
    assert all(torch.equal(a, b) for a, b in zip(fused, plain, strict=True))


def test_layer_norm_on_cpu_has_the_bits_of_torch() -> None:
    inputs, dy = norm_leaves(), leaf(4, 3, 8, seed=3).detach()
    fused = bits(lambda *t: layer_norm(*t, 1e-5), inputs, dy)
    plain = bits(lambda *t: unfused_layer_norm(*t, 1e-5), inputs, dy)
    assert all(torch.equal(a, b) for a, b in zip(fused, plain, strict=True))


def test_statistics_are_float32_for_bfloat16() -> None:
    x = leaf(4, 100, dtype=torch.bfloat16).detach()
    y, mean, rstd = layer_norm_forward(x, None, None, 1e-5)
    assert (y.dtype, mean.dtype, rstd.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    torch.testing.assert_close(mean, x.float().mean(-1))


class Block(torch.nn.Module):
    """Layer norm and linear, by the operators themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.LayerNorm(8)
        self.linear = torch.nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = ops.layer_norm(x, self.norm.weight, self.norm.bias, self.norm.eps)
        return ops.linear(x, self.linear.weight, self.linear.bias, "gelu_tanh")

    def unfused(self, x: Tensor) -> Tensor:
        return functional.gelu(self.linear(self.norm(x)), approximate="tanh")


def targets(module: torch.fx.GraphModule) -> list[str]:
    names = [str(node.target) for node in module.graph.nodes if node.op == "call_function"]
    return [name.removeprefix("gpp_kernels.").removesuffix(".default") for name in names if "gpp_k" in name]


def test_export_with_a_dynamic_batch() -> None:
    block = Block()
    batch = torch.export.Dim("batch")
    program = torch.export.export(block, (torch.randn(4, 3, 8),), dynamic_shapes={"x": {0: batch}})
    assert targets(program.graph_module) == ["layer_norm", "linear"]
    x = torch.randn(7, 3, 8)
    assert torch.equal(program.module()(x), block.unfused(x))
    assert torch.equal(program.run_decompositions().module()(x), block.unfused(x))


def test_compile_in_one_graph() -> None:
    block = Block()
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    x = torch.randn(5, 3, 8, requires_grad=True)
    inputs = (x, *block.parameters())
    assert torch.equal(compiled(x), block.unfused(x))
    got = torch.autograd.grad(compiled(x).square().sum(), inputs)
    expected = torch.autograd.grad(block.unfused(x).square().sum(), inputs)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def joint(names: tuple[str, ...]) -> torch.fx.GraphModule:
    """The block's forward and the gradients of x ("x") and of the parameters ("p"), without dead code."""
    block = Block()
    values = [p.detach() for p in block.parameters()]

    def step(x: Tensor, dy: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        x, leaves = x.detach().requires_grad_(), [p.detach().requires_grad_() for p in parameters]
        y = ops.layer_norm(x, leaves[0], leaves[1], 1e-5)
        y = ops.linear(y, leaves[2], leaves[3], "gelu_tanh")
        grads = torch.autograd.grad(y, (x, *leaves), dy)
        return (y, *(grads[:1] if "x" in names else ()), *(grads[1:] if "p" in names else ()))

    traced = make_fx(step)(torch.randn(4, 3, 8), torch.randn(4, 3, 6), *values)
    traced.graph.eliminate_dead_code()
    return traced


def test_gradients_of_inputs_and_weights_are_separate_in_a_joint_trace() -> None:
    forward = ["layer_norm_forward", "linear_keeping"]
    weights = ["linear_backward_weight", "linear_backward_bias", "layer_norm_backward_weight"]
    assert sorted(targets(joint(()))) == forward
    inputs = targets(joint(("x",)))
    assert inputs[2:] == ["linear_backward_activation", "linear_backward_input", "layer_norm_backward_input"]
    parameters = targets(joint(("p",)))
    assert set(weights) < set(parameters) and "layer_norm_backward_input" not in parameters
    assert set(targets(joint(("x", "p")))) == set(inputs) | set(parameters)


def test_nothing_is_kept_where_no_gradient_is_wanted() -> None:
    block = Block().requires_grad_(False)
    assert targets(make_fx(block)(torch.randn(4, 3, 8))) == ["layer_norm", "linear"]
    with torch.no_grad():
        assert targets(make_fx(Block())(torch.randn(4, 3, 8))) == ["layer_norm", "linear"]


@pytest.mark.parametrize("activation, kept", [("none", 2), ("relu", 3), ("gelu_erf", 3), ("silu", 3)])
def test_forward_keeps_what_backward_needs(activation: str, kept: int) -> None:
    x, weight, bias = linear_leaves()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = linear(x, weight, bias, activation)
    assert len(saved) == kept
    if activation == "relu":
        assert saved[2].data_ptr() == y.data_ptr()


def test_shapes_are_known_of_meta_tensors() -> None:
    x = torch.empty(2, 5, 8, device="meta", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.empty(6, 8, device="meta", dtype=torch.bfloat16, requires_grad=True)
    y = linear(layer_norm(x, None, None, 1e-5), weight, None, "silu")
    assert (y.shape, y.dtype, y.device.type) == ((2, 5, 6), torch.bfloat16, "meta")
    y.sum().backward()
    assert x.grad is not None and x.grad.shape == x.shape
    assert weight.grad is not None and weight.grad.shape == weight.shape


def test_shapes_are_known_of_a_gpu_that_is_not_there() -> None:
    # without gradients: torch's own operators abort the process for fake CUDA tensors that need one
    with FakeTensorMode():
        x, weight = torch.empty(2, 5, 8, device="cuda"), torch.empty(6, 8, device="cuda")
        y, mean, rstd = layer_norm_forward(x, None, None, 1e-5)
        z = linear(y, weight, None, "silu")
        dz = ops.linear_backward_activation(z, z, "silu")
        dy = ops.linear_backward_input(dz, weight)
        dx = ops.layer_norm_backward_input(dy, x, mean, rstd, None)
        assert (dx.shape, dx.device.type) == (x.shape, "cuda")
        assert ops.linear_backward_weight(dz, y).shape == weight.shape
        assert ops.linear_backward_bias(dz).shape == (6,)


def test_second_derivatives_are_refused() -> None:
    x, weight, bias = linear_leaves()
    for y in (linear(x, weight, bias, "silu"), layer_norm(x, None, None, 1e-5)):
        (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            dx.sum().backward()


X, WEIGHT, BIAS = torch.randn(4, 8), torch.randn(6, 8), torch.randn(6)
MISTAKES: list[tuple[Callable[[], object], type[Exception], str]] = [
    (
        lambda: ops.linear_backward_bias(torch.tensor(1.0)),
        ValueError,
        r"linear_backward_bias: dz must have at least one dimension, it is \(\)",
    ),
    (lambda: linear(X, WEIGHT, BIAS, "tanh"), ValueError, "linear: activation must be one of none, relu"),
    (
        lambda: linear(X, WEIGHT.t(), BIAS, "none"),
        ValueError,
        r"linear: weight must have 8 columns.*\(8, 6\)",
    ),
    (lambda: linear(X, WEIGHT[0], BIAS, "none"), ValueError, "linear: weight must have two dimensions"),
    (lambda: linear(X, WEIGHT, BIAS[:5], "none"), ValueError, r"linear: bias must have shape \(6,\)"),
    (
        lambda: linear(X, WEIGHT.half(), BIAS, "none"),
        TypeError,
        "weight must be torch.float32, it is torch.float16",
    ),
    (
        lambda: linear(X.int(), WEIGHT, BIAS, "none"),
        TypeError,
        "linear: x must be one of .*it is torch.int32",
    ),
    (
        lambda: linear(X, WEIGHT.to("meta"), None, "none"),
        ValueError,
        "weight must be on cpu like x, it is meta",
    ),
    (lambda: linear(X[0, 0], WEIGHT, None, "none"), ValueError, "x must have at least one dimension"),
    (lambda: layer_norm(X, BIAS, None, 1e-5), ValueError, r"layer_norm: weight must have shape \(8,\)"),
    (lambda: layer_norm(X[:, :0], None, None, 1e-5), ValueError, "at least one element wide"),
    (lambda: layer_norm(X, X[0].half(), None, 1e-5), TypeError, "layer_norm: weight must be torch.float32"),
    (lambda: layer_norm(X.half(), X[0].half(), X[0], 1e-5), TypeError, "bias must be torch.float16"),
    (lambda: ops.linear_keeping(X, WEIGHT, None, "relu"), ValueError, "one of gelu_tanh, gelu_erf, silu"),
    (lambda: ops.linear_backward_activation(X, X[:2], "relu"), ValueError, "saved must have dy's shape"),
    (lambda: ops.linear_backward_input(X, WEIGHT), ValueError, r"weight must be \[8, inner\]"),
    (lambda: ops.linear_backward_weight(X, X[:3]), ValueError, "x must have dz's leading shape"),
    (lambda: ops.layer_norm_backward_input(X, X, BIAS, BIAS, None), ValueError, "mean must have x's leading"),
]


@pytest.mark.parametrize("call, error, message", MISTAKES, ids=[m[2][:40] for m in MISTAKES])
def test_mistakes_are_named(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_the_inner_block_depends_on_the_dtype_alone() -> None:
    for dtype in (torch.bfloat16, torch.float32):
        shapes = [(rows, columns) for rows in (1, 64, 1000, 10**6) for columns in (1, 64, 5000)]
        assert len({linear_configuration(*shape, dtype).inner for shape in shapes}) == 1


def test_tf32_only_where_the_user_allowed_it() -> None:
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = "ieee"
        assert precision() == "ieee"
        matmul.fp32_precision = "tf32"
        assert precision() == "tf32"
    finally:
        matmul.fp32_precision = before
