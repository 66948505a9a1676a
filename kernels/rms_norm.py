"""Root-mean-square normalisation over the last dimension.

    y = x * rstd * weight,   rstd = 1 / sqrt(mean of x^2 + eps)

With g = dy * weight and n = x * rstd, averages taken over the row:

    dx = rstd * (g - n * average(g * n)),   dweight = sum over rows of dy * n

Statistics and sums are float32 whatever the dtype of x. The gradients of x and of weight are separate
operators, so a graph that needs one of them does not run the other.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .library import check_dtype, check_tensors, register, register_autograd, require
from .norm import differentiate_input, differentiate_weight, normalise
from .rows import statistics_dtype, widened


def launch_forward(x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """(y, rstd): y like x, the statistic float32 with x's leading shape."""
    y, rstd = empty_forward(x, weight, eps)
    normalise(x, weight, None, eps, y, None, rstd)
    return y, rstd


def launch_backward_input(dy: Tensor, x: Tensor, rstd: Tensor, weight: Tensor | None) -> Tensor:
    """dx, like x."""
    dx = empty_backward_input(dy, x, rstd, weight)
    differentiate_input(dy, x, None, rstd, weight, dx)
    return dx


def launch_backward_weight(dy: Tensor, x: Tensor, rstd: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient of the weight, of the given dtype."""
    dweight = empty_backward_weight(dy, x, rstd, dtype)
    differentiate_weight(dy, x, None, rstd, dweight, None)
    return dweight


def empty_forward(x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """The results of the forward operator, not computed."""
    return x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=statistics_dtype(x))


def empty_backward_input(dy: Tensor, x: Tensor, rstd: Tensor, weight: Tensor | None) -> Tensor:
    """The gradient of x, not computed."""
    return x.new_empty(x.shape)


def empty_backward_weight(dy: Tensor, x: Tensor, rstd: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient of the weight, not computed."""
    return x.new_empty(x.shape[-1:], dtype=dtype)


def reference_forward(x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """The forward operator in ATen, as torch composes it."""
    wide = x.to(statistics_dtype(x)).contiguous()
    rstd = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    y = wide * rstd if weight is None else wide * rstd * weight
    return y.to(x.dtype), rstd.view(x.shape[:-1])


def reference_backward_input(dy: Tensor, x: Tensor, rstd: Tensor, weight: Tensor | None) -> Tensor:
    """The gradient of x in ATen."""
    wide = statistics_dtype(x)
    scale, g = rstd[..., None], dy.to(wide)
    vector = widened(weight, wide)
    if vector is not None:
        g = g * vector
    normal = x.to(wide) * scale
    dx = scale * (g - normal * (g * normal).mean(-1, keepdim=True))
    return dx.to(x.dtype).contiguous()


def reference_backward_weight(dy: Tensor, x: Tensor, rstd: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient of the weight in ATen."""
    wide, width = statistics_dtype(x), x.shape[-1]
    product = dy.to(wide) * (x.to(wide) * rstd[..., None])
    return product.reshape(-1, width).sum(0).to(dtype)


def check_forward(x: Tensor, weight: Tensor | None, eps: float) -> None:
    """The weight has the width of x, and its dtype or float32."""
    name = "rms_norm"
    check_tensors(name, x=x, weight=weight)
    require(x.dim() >= 1, name, "x", "have at least one dimension", tuple(x.shape))
    require(x.shape[-1] >= 1, name, "x", "be at least one element wide", tuple(x.shape))
    if weight is not None:
        rule = f"have shape ({x.shape[-1]},), the width of x"
        fits = weight.dim() == 1 and weight.shape[0] == x.shape[-1]
        require(fits, name, "weight", rule, tuple(weight.shape))
        check_dtype(name, "weight", weight, x.dtype, statistics_dtype(x))


def _check_gradient(name: str, dy: Tensor, x: Tensor, rstd: Tensor) -> None:
    require(dy.shape == x.shape, name, "dy", f"have x's shape {tuple(x.shape)}", tuple(dy.shape))
    rule = f"have x's leading shape {tuple(x.shape[:-1])}"
    require(rstd.shape == x.shape[:-1], name, "rstd", rule, tuple(rstd.shape))
    check_dtype(name, "rstd", rstd, statistics_dtype(x))


def check_backward_input(dy: Tensor, x: Tensor, rstd: Tensor, weight: Tensor | None) -> None:
    """dy is like x, the statistic has its leading shape."""
    name = "rms_norm_backward_input"
    check_tensors(name, dy=dy, x=x, rstd=rstd, weight=weight)
    _check_gradient(name, dy, x, rstd)
    check_dtype(name, "dy", dy, x.dtype)


def check_backward_weight(dy: Tensor, x: Tensor, rstd: Tensor, dtype: torch.dtype) -> None:
    """dy is like x, the statistic has its leading shape."""
    name = "rms_norm_backward_weight"
    check_tensors(name, dy=dy, x=x, rstd=rstd)
    _check_gradient(name, dy, x, rstd)
    check_dtype(name, "dy", dy, x.dtype, torch.bfloat16, torch.float16)  # `add_norm` may narrow y


rms_norm_forward = register(
    "rms_norm_forward(Tensor x, Tensor? weight, float eps) -> (Tensor y, Tensor rstd)",
    check=check_forward,
    kernel=launch_forward,
    reference=reference_forward,
    fake=empty_forward,
)
rms_norm_backward_input = register(
    "rms_norm_backward_input(Tensor dy, Tensor x, Tensor rstd, Tensor? weight) -> Tensor",
    check=check_backward_input,
    kernel=launch_backward_input,
    reference=reference_backward_input,
    fake=empty_backward_input,
)
rms_norm_backward_weight = register(
    "rms_norm_backward_weight(Tensor dy, Tensor x, Tensor rstd, ScalarType dtype) -> Tensor",
    check=check_backward_weight,
    kernel=launch_backward_weight,
    reference=reference_backward_weight,
    fake=empty_backward_weight,
)
rms_norm = register(
    "rms_norm(Tensor x, Tensor? weight, float eps) -> Tensor",
    check=check_forward,
    kernel=lambda x, weight, eps: launch_forward(x, weight, eps)[0],
    reference=lambda x, weight, eps: reference_forward(x, weight, eps)[0],
    fake=lambda x, weight, eps: empty_forward(x, weight, eps)[0],
)


class _RMSNorm(torch.autograd.Function):
    """Saves x and one number a row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        y: Tensor
        y, rstd = rms_norm_forward(x, weight, eps)
        ctx.save_for_backward(x, rstd, weight)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, rstd, weight = ctx.saved_tensors
        needs_x, needs_weight, _ = ctx.needs_input_grad
        dx = rms_norm_backward_input(dy, x, rstd, weight) if needs_x else None
        dweight = rms_norm_backward_weight(dy, x, rstd, weight.dtype) if needs_weight else None
        return dx, dweight, None


register_autograd(rms_norm, _RMSNorm)
