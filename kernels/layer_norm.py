"""Layer normalisation over the last dimension.

    y = (x - mean) * rstd * weight + bias,   rstd = 1 / sqrt(variance + eps)

With g = dy * weight and n = (x - mean) * rstd, averages taken over the row:

    dx = rstd * (g - average(g) - n * average(g * n)),   dweight = sum over rows of dy * n,   dbias = of dy

Statistics and sums are float32 whatever the dtype of x. The gradient of x and those of weight and bias are
separate operators, so a graph that needs one of them does not run the other. A row's result does not depend
on how many rows there are; the sums over rows are made in a fixed order, without atomics.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .library import check_dtype, check_tensors, register, register_autograd, require
from .norm import differentiate_input, differentiate_weight, normalise
from .rows import statistics_dtype, widened


def launch_forward(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Any:
    """(y, mean, rstd): y like x, the statistics float32 with x's leading shape."""
    y, mean, rstd = empty_forward(x, weight, bias, eps)
    normalise(x, weight, bias, eps, y, mean, rstd)
    return y, mean, rstd


def launch_backward_input(dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None) -> Tensor:
    """dx, like x."""
    dx = empty_backward_input(dy, x, mean, rstd, weight)
    differentiate_input(dy, x, mean, rstd, weight, dx)
    return dx


def launch_backward_weight(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(dweight, dbias) of the given dtype."""
    dweight, dbias = empty_backward_weight(dy, x, mean, rstd, dtype)
    differentiate_weight(dy, x, mean, rstd, dweight, dbias)
    return dweight, dbias


def empty_forward(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Any:
    """The results of the forward operator, not computed."""
    statistics = [x.new_empty(x.shape[:-1], dtype=statistics_dtype(x)) for _ in range(2)]
    return x.new_empty(x.shape), *statistics


def empty_backward_input(dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None) -> Tensor:
    """The gradient of x, not computed."""
    return x.new_empty(x.shape)


def empty_backward_weight(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The gradients of weight and bias, not computed."""
    return x.new_empty(x.shape[-1:], dtype=dtype), x.new_empty(x.shape[-1:], dtype=dtype)


def reference_forward(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Any:
    """The forward operator in ATen, in the dtype of the statistics."""
    wide = statistics_dtype(x)
    shape = [x.shape[-1]]
    y, mean, rstd = torch.native_layer_norm(
        x.to(wide).contiguous(), shape, widened(weight, wide), widened(bias, wide), eps
    )
    return y.to(x.dtype), mean.view(x.shape[:-1]), rstd.view(x.shape[:-1])


def _reference_backward(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, mask: list[bool]
) -> Any:
    wide = statistics_dtype(x)
    return torch.ops.aten.native_layer_norm_backward.default(
        dy.to(wide).contiguous(),
        x.to(wide).contiguous(),
        [x.shape[-1]],
        mean[..., None],
        rstd[..., None],
        widened(weight, wide),
        mean.new_ones(x.shape[-1]),  # the bias: its values are not read, its presence is
        mask,
    )


def reference_backward_input(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None
) -> Tensor:
    """The gradient of x in ATen."""
    dx: Tensor = _reference_backward(dy, x, mean, rstd, weight, [True, False, False])[0]
    return dx.to(x.dtype)


def reference_backward_weight(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The gradients of weight and bias in ATen."""
    ones = mean.new_ones(x.shape[-1])
    _, dweight, dbias = _reference_backward(dy, x, mean, rstd, ones, [False, True, True])
    return dweight.to(dtype), dbias.to(dtype)


def check_forward(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> None:
    """weight and bias have the width of x and both either its dtype or float32."""
    name = "layer_norm"
    check_tensors(name, x=x, weight=weight, bias=bias)
    require(x.dim() >= 1, name, "x", "have at least one dimension", tuple(x.shape))
    require(x.shape[-1] >= 1, name, "x", "be at least one element wide", tuple(x.shape))
    for key, vector in (("weight", weight), ("bias", bias)):
        if vector is not None:
            rule = f"have shape ({x.shape[-1]},), the width of x"
            fits = vector.dim() == 1 and vector.shape[0] == x.shape[-1]
            require(fits, name, key, rule, tuple(vector.shape))
            check_dtype(name, key, vector, x.dtype, statistics_dtype(x))
    if weight is not None and bias is not None:
        check_dtype(name, "bias", bias, weight.dtype)


def _check_gradient(name: str, dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor) -> None:
    require(dy.shape == x.shape, name, "dy", f"have x's shape {tuple(x.shape)}", tuple(dy.shape))
    for key, statistic in (("mean", mean), ("rstd", rstd)):
        rule = f"have x's leading shape {tuple(x.shape[:-1])}"
        require(statistic.shape == x.shape[:-1], name, key, rule, tuple(statistic.shape))
        check_dtype(name, key, statistic, statistics_dtype(x))


def check_backward_input(dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None) -> None:
    """dy is like x, the statistics have its leading shape."""
    name = "layer_norm_backward_input"
    check_tensors(name, dy=dy, x=x, mean=mean, rstd=rstd, weight=weight)
    _check_gradient(name, dy, x, mean, rstd)
    check_dtype(name, "dy", dy, x.dtype)


def check_backward_weight(dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, dtype: torch.dtype) -> None:
    """dy is like x, the statistics have its leading shape."""
    name = "layer_norm_backward_weight"
    check_tensors(name, dy=dy, x=x, mean=mean, rstd=rstd)
    _check_gradient(name, dy, x, mean, rstd)
    check_dtype(name, "dy", dy, x.dtype, torch.bfloat16, torch.float16)  # `add_norm` may narrow y


layer_norm_forward = register(
    "layer_norm_forward(Tensor x, Tensor? weight, Tensor? bias, float eps)"
    " -> (Tensor y, Tensor mean, Tensor rstd)",
    check=check_forward,
    kernel=launch_forward,
    reference=reference_forward,
    fake=empty_forward,
)
layer_norm_backward_input = register(
    "layer_norm_backward_input(Tensor dy, Tensor x, Tensor mean, Tensor rstd, Tensor? weight) -> Tensor",
    check=check_backward_input,
    kernel=launch_backward_input,
    reference=reference_backward_input,
    fake=empty_backward_input,
)
layer_norm_backward_weight = register(
    "layer_norm_backward_weight(Tensor dy, Tensor x, Tensor mean, Tensor rstd, ScalarType dtype)"
    " -> (Tensor dweight, Tensor dbias)",
    check=check_backward_weight,
    kernel=launch_backward_weight,
    reference=reference_backward_weight,
    fake=empty_backward_weight,
)
layer_norm = register(
    "layer_norm(Tensor x, Tensor? weight, Tensor? bias, float eps) -> Tensor",
    check=check_forward,
    kernel=lambda x, weight, bias, eps: launch_forward(x, weight, bias, eps)[0],
    reference=lambda x, weight, bias, eps: reference_forward(x, weight, bias, eps)[0],
    fake=lambda x, weight, bias, eps: empty_forward(x, weight, bias, eps)[0],
)


class _LayerNorm(torch.autograd.Function):
    """Saves x and two numbers a row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
        y: Tensor
        y, mean, rstd = layer_norm_forward(x, weight, bias, eps)
        ctx.save_for_backward(x, mean, rstd, weight)
        parameters = [t for t in (weight, bias) if t is not None]
        ctx.dtype = parameters[0].dtype if parameters else x.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, rstd, weight = ctx.saved_tensors
        dx = dweight = dbias = None
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        if needs_x:
            dx = layer_norm_backward_input(dy, x, mean, rstd, weight)
        if needs_weight or needs_bias:
            dweight, dbias = layer_norm_backward_weight(dy, x, mean, rstd, ctx.dtype)
        return dx, dweight if needs_weight else None, dbias if needs_bias else None, None


register_autograd(layer_norm, _LayerNorm)
