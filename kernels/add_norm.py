"""Layer norm or RMS norm of a residual sum, as transformers have before or behind each of their parts.

    s = residual + dropout(x),   y = (s - mean) * rstd * weight + bias,   rstd = 1 / sqrt(variance + eps)

RMS norm, where not `centred`, takes a mean of zero. With ds the gradient of s as others read it (where the
norm comes first) and g = dy * weight, n = (s - mean) * rstd, averages taken over the row:

    dresidual = ds + rstd * (g - average(g) - n * average(g * n)),   dx = dresidual * factor of the dropout

s has the dtype that torch promotes x and residual to, and is rounded to it before its statistics are taken:
forward and backward see the same s, and the error is torch's own, less the roundings between what is fused.
y has the dtype asked for, which spares a cast behind it. The dropout is that of `keyed`, backward makes its
bits again. Where there is neither dropout nor another dtype, dx is dresidual: one tensor for both, which
autograd may return and an operator may not, so there are two operators. The gradients of weight and bias are
those of the norm of s.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import layer_norm, rms_norm
from .add_norm_forward import Dropped, normalise_sum
from .add_norm_gradient import add_norm_backward, add_norm_backward_both
from .dropout import dropout
from .keyed import check_keyed, reference_factor
from .library import check_dtype, check_tensors, register, register_autograd, require
from .rows import statistics_dtype


def sum_dtype(x: Tensor, residual: Tensor) -> torch.dtype:
    """The dtype of s."""
    return torch.promote_types(x.dtype, residual.dtype)


def launch_forward(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    centred: bool,
    dtype: torch.dtype,
    position: Tensor | None,
    key: int,
    elements: int,
    p: float,
) -> Any:
    """(y, s, mean, rstd): the statistics float32 with the leading shape, the mean empty if not centred."""
    y, s, mean, rstd = empty_forward(
        x, residual, weight, bias, eps, centred, dtype, position, key, elements, p
    )
    dropped = Dropped(position, key, elements, p)
    normalise_sum(x, residual, weight, bias, eps, dropped, y, s, mean if centred else None, rstd)
    return y, s, mean, rstd


def empty_forward(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    centred: bool,
    dtype: torch.dtype,
    position: Tensor | None,
    key: int,
    elements: int,
    p: float,
) -> Any:
    """The results of the forward operator, not computed."""
    s = x.new_empty(x.shape, dtype=sum_dtype(x, residual))
    wide = statistics_dtype(s)
    mean = x.new_empty(x.shape[:-1] if centred else (0,), dtype=wide)
    return x.new_empty(x.shape, dtype=dtype), s, mean, x.new_empty(x.shape[:-1], dtype=wide)


def reference_forward(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    centred: bool,
    dtype: torch.dtype,
    position: Tensor | None,
    key: int,
    elements: int,
    p: float,
) -> Any:
    """The forward operator in ATen, in the dtype of the statistics."""
    kind = sum_dtype(x, residual)
    wide = torch.float64 if kind == torch.float64 else torch.float32
    added = x.to(wide)
    if position is not None:
        added = added * reference_factor(x, position, key, elements, p)
    s = (added + residual.to(wide)).to(kind).contiguous()
    if centred:
        y, mean, rstd = layer_norm.reference_forward(s.to(wide), weight, bias, eps)
    else:
        y, rstd = rms_norm.reference_forward(s.to(wide), weight, eps)
        mean = rstd.new_empty(0)
    return y.to(dtype), s, mean, rstd


def check_forward(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    centred: bool,
    dtype: torch.dtype,
    position: Tensor | None,
    key: int,
    elements: int,
    p: float,
) -> None:
    """x and residual of one shape, y no wider than their sum, parameters as for the norm of the sum."""
    name = "add_norm"
    check_tensors(name, x=x, residual=residual, weight=weight, bias=bias)
    require(x.dim() >= 1, name, "x", "have at least one dimension", tuple(x.shape))
    require(x.shape[-1] >= 1, name, "x", "be at least one element wide", tuple(x.shape))
    rule = f"have x's shape {tuple(x.shape)}"
    require(residual.shape == x.shape, name, "residual", rule, tuple(residual.shape))
    kind = sum_dtype(x, residual)
    narrow = dict.fromkeys((kind, torch.bfloat16, torch.float16))
    require(dtype in narrow, name, "dtype", f"be one of {', '.join(map(str, narrow))}", dtype)
    wide = torch.float64 if kind == torch.float64 else torch.float32
    for key_name, vector in (("weight", weight), ("bias", bias)):
        if vector is not None:
            rule = f"have shape ({x.shape[-1]},), the width of x"
            fits = vector.dim() == 1 and vector.shape[0] == x.shape[-1]
            require(fits, name, key_name, rule, tuple(vector.shape))
            check_dtype(name, key_name, vector, kind, wide)
    if weight is not None and bias is not None:
        check_dtype(name, "bias", bias, weight.dtype)
    require(centred or bias is None, name, "bias", "be None for RMS norm, which has none", "a tensor")
    if position is None:
        require(p == 0.0, name, "p", "be 0 without a position", p)
    else:
        check_keyed(name, position, elements, p, x)


_ARGUMENTS = (
    "Tensor x, Tensor residual, Tensor? weight, Tensor? bias, float eps, bool centred, ScalarType dtype"
)
_SCHEMA = f"({_ARGUMENTS}, Tensor? position, int key, int elements, float p) -> "

add_norm_forward = register(
    f"add_norm_forward{_SCHEMA}(Tensor y, Tensor s, Tensor mean, Tensor rstd)",
    check=check_forward,
    kernel=launch_forward,
    reference=reference_forward,
    fake=empty_forward,
)
add_norm = register(
    f"add_norm{_SCHEMA}(Tensor y, Tensor s)",
    check=check_forward,
    kernel=lambda *arguments: launch_forward(*arguments)[:2],
    reference=lambda *arguments: reference_forward(*arguments)[:2],
    fake=lambda *arguments: empty_forward(*arguments)[:2],
)


class _AddNorm(torch.autograd.Function):
    """Saves s, two numbers a row (one for RMS norm) and the position of the dropout."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        x, residual, weight, bias, _, centred, _, position, *numbers = arguments
        y, s, mean, rstd = add_norm_forward(*arguments)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(s, mean if centred else None, rstd, weight, position)
        parameters = [t.dtype for t in (weight, bias) if t is not None]
        ctx.dtypes = x.dtype, residual.dtype, parameters[0] if parameters else s.dtype
        ctx.numbers = numbers
        return y, s

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, ds: Tensor | None) -> tuple[Tensor | None, ...]:
        s, mean, rstd, weight, position = ctx.saved_tensors
        needs_x, needs_residual, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        x_dtype, dtype, parameter_dtype = ctx.dtypes
        dx = dresidual = dweight = dbias = None
        if dy is None and ds is not None:  # nobody reads y: a plain sum
            dresidual, dx = ds.to(dtype), ds.to(x_dtype)
            if position is not None:
                dx = dropout(dx, position, *ctx.numbers)
        elif dy is not None:
            given = dy, ds, s, mean, rstd, weight
            if needs_x and (position is not None or (needs_residual and x_dtype != dtype)):
                dx, dresidual = add_norm_backward_both(*given, dtype, x_dtype, position, *ctx.numbers)
            elif needs_x or needs_residual:
                dx = dresidual = add_norm_backward(*given, dtype if needs_residual else x_dtype)
            if needs_weight or needs_bias:
                if mean is None:
                    dweight = rms_norm.rms_norm_backward_weight(dy, s, rstd, parameter_dtype)
                else:
                    dweight, dbias = layer_norm.layer_norm_backward_weight(dy, s, mean, rstd, parameter_dtype)
        made = dx, dresidual, dweight, dbias
        needed = needs_x, needs_residual, needs_weight, needs_bias
        return *(g if n else None for g, n in zip(made, needed, strict=True)), *[None] * 7


register_autograd(add_norm, _AddNorm)
