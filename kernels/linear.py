"""A linear layer with what follows it in the epilogue of the product.

    z = x weight^T + bias,   y = residual + dropout(activation(z))

The activation is none, relu, gelu_tanh, gelu_erf or silu. Bias, residual and dropout are there or not; the
bits of dropout are those of `keyed`. What forward keeps for backward besides x and weight: nothing without an
activation, y itself for relu if nothing was added to it, else z. The gradient of residual is dy; the others:
`linear_gradient`, `bias_gradient`. How products are made: `product`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import dropout
from .activation import ACTIVATIONS, NEEDS_PREACTIVATION, reference_activate
from .bias_gradient import linear_backward_bias
from .library import check_dtype, check_tensors, register, register_autograd, require
from .linear_gradient import (
    KEYED_ARGUMENTS,
    check_activation,
    check_dropout,
    linear_backward_activation,
    linear_backward_input,
    linear_backward_weight,
)
from .product import dropout_of, matrix, product


def keeps_z(activation: str, residual: Tensor | None) -> bool:
    """Whether y does not tell what the activation's derivative is."""
    return activation in NEEDS_PREACTIVATION or (activation == "relu" and residual is not None)


def launch_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    residual: Tensor | None = None,
    *keyed: Any,
) -> Tensor:
    """y alone."""
    y = empty_forward(x, weight)
    drops = dropout_of(*keyed)
    product(matrix(x), weight, y, bias=bias, activation=activation, dropout=drops, residual=residual)
    return y


def launch_forward_keeping(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    residual: Tensor | None = None,
    *keyed: Any,
) -> tuple[Tensor, Tensor]:
    """(y, z)."""
    y, z = empty_forward_keeping(x, weight)
    drops = dropout_of(*keyed)
    product(matrix(x), weight, y, bias=bias, activation=activation, kept=z, dropout=drops, residual=residual)
    return y, z


def empty_forward(x: Tensor, weight: Tensor, *_: Any) -> Tensor:
    """y, not computed."""
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def empty_forward_keeping(x: Tensor, weight: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    """(y, z), not computed."""
    return empty_forward(x, weight), empty_forward(x, weight)


def reference_forward_keeping(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    residual: Tensor | None = None,
    position: Tensor | None = None,
    key: int = 0,
    elements: int = 0,
    p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """(y, z) in ATen."""
    z = torch.nn.functional.linear(x, weight, bias).contiguous()
    y = reference_activate(z, activation)
    if position is not None:
        y = dropout.reference_forward(y, position, key, elements, p)
    return (y if residual is None else y + residual).contiguous(), z


def reference_forward(*arguments: Any) -> Tensor:
    """y in ATen."""
    return reference_forward_keeping(*arguments)[0]


def check_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    residual: Tensor | None = None,
    position: Tensor | None = None,
    key: int = 0,
    elements: int = 0,
    p: float = 0.0,
) -> None:
    """x [..., inner], weight [columns, inner], bias [columns], residual [..., columns], all of one dtype."""
    name = "linear"
    check_tensors(name, x=x, weight=weight, bias=bias, residual=residual)
    check_activation(name, activation, ACTIVATIONS)
    require(x.dim() >= 1, name, "x", "have at least one dimension", tuple(x.shape))
    require(weight.dim() == 2, name, "weight", "have two dimensions", tuple(weight.shape))
    rule = f"have {x.shape[-1]} columns, the width of x"
    require(weight.shape[1] == x.shape[-1], name, "weight", rule, tuple(weight.shape))
    check_dtype(name, "weight", weight, x.dtype)
    if bias is not None:
        rule = f"have shape ({weight.shape[0]},), the rows of weight"
        require(bias.dim() == 1 and bias.shape[0] == weight.shape[0], name, "bias", rule, tuple(bias.shape))
        check_dtype(name, "bias", bias, x.dtype)
    if residual is not None:
        shape = (*x.shape[:-1], weight.shape[0])
        rule = f"have the result's shape {shape}"
        require(residual.shape == shape, name, "residual", rule, tuple(residual.shape))
        check_dtype(name, "residual", residual, x.dtype)
    check_dropout(name, position, elements, p, x)


def check_forward_keeping(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    residual: Tensor | None = None,
    *keyed: Any,
) -> None:
    """As the forward operator, with an activation that keeps z."""
    allowed = [a for a in ACTIVATIONS if keeps_z(a, residual)]
    check_activation("linear_keeping", activation, allowed)
    check_forward(x, weight, bias, activation, residual, *keyed)


_ARGUMENTS = (
    f"(Tensor x, Tensor weight, Tensor? bias, str activation, Tensor? residual=None, {KEYED_ARGUMENTS})"
)

linear = register(
    f"linear{_ARGUMENTS} -> Tensor",
    check=check_forward,
    kernel=launch_forward,
    reference=reference_forward,
    fake=empty_forward,
)
linear_keeping = register(
    f"linear_keeping{_ARGUMENTS} -> (Tensor y, Tensor z)",
    check=check_forward_keeping,
    kernel=launch_forward_keeping,
    reference=reference_forward_keeping,
    fake=empty_forward_keeping,
)


class _Linear(torch.autograd.Function):
    """Saves x, weight, where dropout stands and what the activation's derivative needs."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        activation: str,
        residual: Tensor | None,
        position: Tensor | None,
        *numbers: Any,
    ) -> Tensor:
        y: Tensor
        saved: Tensor | None
        arguments = (x, weight, bias, activation, residual, position, *numbers)
        if keeps_z(activation, residual):
            y, saved = linear_keeping(*arguments)
        else:
            y = linear(*arguments)
            saved = y if activation == "relu" else None
        ctx.save_for_backward(x, weight, saved, position)
        ctx.activation, ctx.numbers = activation, numbers
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, saved, position = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, _, needs_residual, *_ = ctx.needs_input_grad
        dz = dy
        if saved is not None:
            dz = linear_backward_activation(dy, saved, ctx.activation, position, *ctx.numbers)
        elif position is not None:
            dz = dropout.dropout(dy, position, *ctx.numbers)
        return (
            linear_backward_input(dz, weight) if needs_x else None,
            linear_backward_weight(dz, x) if needs_weight else None,
            linear_backward_bias(dz) if needs_bias else None,
            None,
            dy if needs_residual else None,
            *[None] * 4,
        )


def _differentiable(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    residual: Tensor | None = None,
    position: Tensor | None = None,
    key: int = 0,
    elements: int = 0,
    p: float = 0.0,
) -> Any:
    apply: Callable[..., Any] = _Linear.apply
    return apply(x, weight, bias, activation, residual, position, key, elements, p)


register_autograd(linear, _differentiable)
