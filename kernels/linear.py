"""A linear layer with its activation in the epilogue of the product.

    z = x weight^T + bias,   y = activation(z)            activation: none relu gelu_tanh gelu_erf silu

    dz = dy * activation'(z),   dx = dz weight,   dweight = dz^T x,   dbias = sum over rows of dz

Each gradient is an operator of its own, so a graph that needs one does not run the others; dz is shared. That
of weights can be added in place to its sum over micro-batches, in float32 whatever dz and x are. What forward
keeps for backward besides x and weight: nothing without an activation, y itself for relu, z for the smooth
ones. How products are made: `product`.
"""

# Kernel parameters have no Python types: mypy sees the functions that a host calls.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from .activation import (
    ACTIVATIONS,
    NEEDS_PREACTIVATION,
    differentiate,
    reference_activate,
    reference_differentiate,
)
from .launch import blocks, launch
from .library import as_rows, check_dtype, check_tensors, register, register_autograd, require
from .product import matrix, product

SUM_ROWS, SUM_COLUMNS, SUM_GROUPS = 16, 128, 64  # tile of the sum over rows, and its most parts
POINTWISE_ROWS, POINTWISE_COLUMNS = 8, 128


@triton.jit(do_not_specialize=["rows"])
def activation_backward_kernel(
    dy_ptr,
    saved_ptr,
    dz_ptr,
    rows,
    columns,
    dy_stride,
    saved_stride,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """dz of one tile."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    dy = tl.load(dy_ptr + row[:, None] * dy_stride + column[None, :], mask=mask, other=0.0)
    saved = tl.load(saved_ptr + row[:, None] * saved_stride + column[None, :], mask=mask, other=0.0)
    dz = differentiate(dy.to(tl.float32), saved.to(tl.float32), ACTIVATION)
    tl.store(dz_ptr + row[:, None] * columns + column[None, :], dz.to(dz_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def column_sum_kernel(
    x_ptr, out_ptr, rows, columns, stride, tiles, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """out[group] = the sum of `tiles` * ROWS rows of x, in their order."""
    group = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < columns
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for tile in range(0, tiles):
        row = (group * tiles + tile) * ROWS + tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & inside[None, :]
        total += tl.load(x_ptr + row[:, None] * stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
    out = out_ptr + group * columns + column
    tl.store(out, tl.sum(total, axis=0).to(out_ptr.dtype.element_ty), mask=inside)


def launch_forward(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """y alone."""
    y = empty_forward(x, weight, bias, activation)
    product(matrix(x), weight, bias, y, activation)
    return y


def launch_forward_keeping(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str
) -> tuple[Tensor, Tensor]:
    """(y, z)."""
    y, z = empty_forward_keeping(x, weight, bias, activation)
    product(matrix(x), weight, bias, y, activation, z)
    return y, z


def launch_backward_activation(dy: Tensor, saved: Tensor, activation: str) -> Tensor:
    """dz, like dy."""
    dz = empty_backward_activation(dy, saved, activation)
    width = dy.shape[-1]
    dy_rows, saved_rows = as_rows(dy, width), as_rows(saved, width)
    launch(
        activation_backward_kernel,
        (blocks(dy_rows.shape[0], POINTWISE_ROWS), blocks(width, POINTWISE_COLUMNS)),
        dy_rows,
        saved_rows,
        dz,
        dy_rows.shape[0],
        width,
        dy_rows.stride(0),
        saved_rows.stride(0),
        ACTIVATION=ACTIVATIONS.index(activation),
        ROWS=POINTWISE_ROWS,
        COLUMNS=POINTWISE_COLUMNS,
        num_warps=4,
    )
    return dz


def launch_backward_input(dz: Tensor, weight: Tensor) -> Tensor:
    """dx."""
    dx = empty_backward_input(dz, weight)
    product(matrix(dz), weight.t(), None, dx)
    return dx


def launch_backward_weight(dz: Tensor, x: Tensor) -> Tensor:
    """dweight."""
    dweight = empty_backward_weight(dz, x)
    product(matrix(dz).t(), matrix(x).t(), None, dweight)
    return dweight


def launch_accumulate_weight(total: Tensor, dz: Tensor, x: Tensor) -> None:
    """total += dweight. Where nothing is widened that is a plain product, for which torch has libraries."""
    if dz.dtype == total.dtype:
        total.addmm_(matrix(dz).t(), matrix(x))
    else:
        product(matrix(dz).t(), matrix(x).t(), None, total, add=True)


def launch_backward_bias(dz: Tensor) -> Tensor:
    """dbias: first the sums of groups of rows, then their sum."""
    dbias = empty_backward_bias(dz)
    x = as_rows(dz, dz.shape[-1])
    rows, columns = x.shape
    if rows == 0:
        return dbias.zero_()
    tiles = blocks(blocks(rows, SUM_ROWS), SUM_GROUPS)
    groups = blocks(rows, tiles * SUM_ROWS)
    partial = x.new_empty((groups, columns), dtype=torch.float32)
    for source, target, count in ((x, partial, tiles), (partial, dbias, blocks(groups, SUM_ROWS))):
        launch(
            column_sum_kernel,
            (groups if target is partial else 1, blocks(columns, SUM_COLUMNS)),
            source,
            target,
            source.shape[0],
            columns,
            source.stride(0),
            count,
            ROWS=SUM_ROWS,
            COLUMNS=SUM_COLUMNS,
            num_warps=4,
        )
    return dbias


def empty_forward(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """y, not computed."""
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def empty_forward_keeping(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str
) -> tuple[Tensor, Tensor]:
    """(y, z), not computed."""
    return empty_forward(x, weight, bias, activation), empty_forward(x, weight, bias, activation)


def empty_backward_activation(dy: Tensor, saved: Tensor, activation: str) -> Tensor:
    """dz, not computed."""
    return dy.new_empty(dy.shape)


def empty_backward_input(dz: Tensor, weight: Tensor) -> Tensor:
    """dx, not computed."""
    return dz.new_empty((*dz.shape[:-1], weight.shape[1]))


def empty_backward_weight(dz: Tensor, x: Tensor) -> Tensor:
    """dweight, not computed."""
    return dz.new_empty((dz.shape[-1], x.shape[-1]))


def empty_backward_bias(dz: Tensor) -> Tensor:
    """dbias, not computed."""
    return dz.new_empty(dz.shape[-1:])


def reference_forward_keeping(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str
) -> tuple[Tensor, Tensor]:
    """(y, z) in ATen."""
    z = torch.nn.functional.linear(x, weight, bias).contiguous()
    return reference_activate(z, activation), z


def reference_backward_input(dz: Tensor, weight: Tensor) -> Tensor:
    """dx in ATen."""
    return torch.mm(matrix(dz), weight).view((*dz.shape[:-1], weight.shape[1]))


def reference_backward_weight(dz: Tensor, x: Tensor) -> Tensor:
    """dweight in ATen."""
    return torch.mm(matrix(dz).t(), matrix(x))


def reference_accumulate_weight(total: Tensor, dz: Tensor, x: Tensor) -> None:
    """total += dweight in ATen, not rounded in between."""
    total.addmm_(matrix(dz).t().to(total.dtype), matrix(x).to(total.dtype))


def reference_backward_bias(dz: Tensor) -> Tensor:
    """dbias in ATen."""
    return matrix(dz).sum(0)


def check_forward(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> None:
    """x [..., inner], weight [columns, inner], bias [columns], all of one dtype."""
    name = "linear"
    check_tensors(name, x=x, weight=weight, bias=bias)
    _check_activation(name, activation, ACTIVATIONS)
    require(x.dim() >= 1, name, "x", "have at least one dimension", tuple(x.shape))
    require(weight.dim() == 2, name, "weight", "have two dimensions", tuple(weight.shape))
    rule = f"have {x.shape[-1]} columns, the width of x"
    require(weight.shape[1] == x.shape[-1], name, "weight", rule, tuple(weight.shape))
    check_dtype(name, "weight", weight, x.dtype)
    if bias is not None:
        rule = f"have shape ({weight.shape[0]},), the rows of weight"
        require(bias.dim() == 1 and bias.shape[0] == weight.shape[0], name, "bias", rule, tuple(bias.shape))
        check_dtype(name, "bias", bias, x.dtype)


def check_forward_keeping(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> None:
    """As the forward operator, with an activation that keeps z."""
    _check_activation("linear_keeping", activation, sorted(NEEDS_PREACTIVATION))
    check_forward(x, weight, bias, activation)


def check_backward_activation(dy: Tensor, saved: Tensor, activation: str) -> None:
    """dy and what was saved are alike."""
    name = "linear_backward_activation"
    check_tensors(name, dy=dy, saved=saved)
    _check_activation(name, activation, ACTIVATIONS[1:])
    require(saved.shape == dy.shape, name, "saved", f"have dy's shape {tuple(dy.shape)}", tuple(saved.shape))
    check_dtype(name, "saved", saved, dy.dtype)


def check_backward_input(dz: Tensor, weight: Tensor) -> None:
    """dz [..., columns], weight [columns, inner]."""
    name = "linear_backward_input"
    check_tensors(name, dz=dz, weight=weight)
    rule = f"be [{dz.shape[-1]}, inner], its rows the width of dz"
    fits = weight.dim() == 2 and weight.shape[0] == dz.shape[-1]
    require(fits, name, "weight", rule, tuple(weight.shape))
    check_dtype(name, "weight", weight, dz.dtype)


def check_backward_weight(dz: Tensor, x: Tensor) -> None:
    """dz [..., columns], x [..., inner] with the same leading shape."""
    name = "linear_backward_weight"
    check_tensors(name, dz=dz, x=x)
    rule = f"have dz's leading shape {tuple(dz.shape[:-1])}"
    require(x.shape[:-1] == dz.shape[:-1], name, "x", rule, tuple(x.shape))
    check_dtype(name, "x", x, dz.dtype)


def check_accumulate_weight(total: Tensor, dz: Tensor, x: Tensor) -> None:
    """total [columns, inner] of float32, or of dz's dtype, contiguous."""
    name = "linear_accumulate_weight"
    check_tensors(name, dz=dz, x=x, total=total)
    rule = f"have dz's leading shape {tuple(dz.shape[:-1])}"
    require(x.shape[:-1] == dz.shape[:-1], name, "x", rule, tuple(x.shape))
    check_dtype(name, "x", x, dz.dtype)
    shape = (dz.shape[-1], x.shape[-1])
    require(tuple(total.shape) == shape, name, "total", f"have shape {shape}", tuple(total.shape))
    require(total.is_contiguous(), name, "total", "be contiguous", total.stride())
    check_dtype(name, "total", total, torch.float32, *([torch.float64] if dz.dtype == torch.float64 else []))


def check_backward_bias(dz: Tensor) -> None:
    """Any floating dz."""
    check_tensors("linear_backward_bias", dz=dz)


def _check_activation(name: str, activation: str, allowed: Any) -> None:
    require(activation in allowed, name, "activation", f"be one of {', '.join(allowed)}", repr(activation))


_ARGUMENTS = "(Tensor x, Tensor weight, Tensor? bias, str activation)"

linear = register(
    f"linear{_ARGUMENTS} -> Tensor",
    check=check_forward,
    kernel=launch_forward,
    reference=lambda x, weight, bias, activation: reference_forward_keeping(x, weight, bias, activation)[0],
    fake=empty_forward,
)
linear_keeping = register(
    f"linear_keeping{_ARGUMENTS} -> (Tensor y, Tensor z)",
    check=check_forward_keeping,
    kernel=launch_forward_keeping,
    reference=reference_forward_keeping,
    fake=empty_forward_keeping,
)
linear_backward_activation = register(
    "linear_backward_activation(Tensor dy, Tensor saved, str activation) -> Tensor",
    check=check_backward_activation,
    kernel=launch_backward_activation,
    reference=reference_differentiate,
    fake=empty_backward_activation,
)
linear_backward_input = register(
    "linear_backward_input(Tensor dz, Tensor weight) -> Tensor",
    check=check_backward_input,
    kernel=launch_backward_input,
    reference=reference_backward_input,
    fake=empty_backward_input,
)
linear_backward_weight = register(
    "linear_backward_weight(Tensor dz, Tensor x) -> Tensor",
    check=check_backward_weight,
    kernel=launch_backward_weight,
    reference=reference_backward_weight,
    fake=empty_backward_weight,
)
linear_accumulate_weight = register(
    "linear_accumulate_weight(Tensor(a!) total, Tensor dz, Tensor x) -> ()",
    check=check_accumulate_weight,
    kernel=launch_accumulate_weight,
    reference=reference_accumulate_weight,
    fake=lambda *_: None,
)
linear_backward_bias = register(
    "linear_backward_bias(Tensor dz) -> Tensor",
    check=check_backward_bias,
    kernel=launch_backward_bias,
    reference=reference_backward_bias,
    fake=empty_backward_bias,
)


class _Linear(torch.autograd.Function):
    """Saves x, weight and what the activation's derivative needs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
        y: Tensor
        saved: Tensor | None
        if activation in NEEDS_PREACTIVATION:
            y, saved = linear_keeping(x, weight, bias, activation)
        else:
            y = linear(x, weight, bias, activation)
            saved = y if activation == "relu" else None
        ctx.save_for_backward(x, weight, saved)
        ctx.activation = activation
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, saved = ctx.saved_tensors
        dz = dy if saved is None else linear_backward_activation(dy, saved, ctx.activation)
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        return (
            linear_backward_input(dz, weight) if needs_x else None,
            linear_backward_weight(dz, x) if needs_weight else None,
            linear_backward_bias(dz) if needs_bias else None,
            None,
        )


register_autograd(linear, _Linear)
