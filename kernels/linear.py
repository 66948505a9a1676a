"""A linear layer with its activation in the epilogue of the product.

    z = x weight^T + bias,   y = activation(z)            activation: none relu gelu_tanh gelu_erf silu

    dz = dy * activation'(z),   dx = dz weight,   dweight = dz^T x,   dbias = sum over rows of dz

Each gradient is an operator of its own, so a graph that needs one does not run the others; dz is shared. What
forward keeps for backward besides x and weight: nothing without an activation, y itself for relu, z for the
smooth ones. Products accumulate in float32, in blocks of the inner dimension in their order and never split
over programs: a row of y does not depend on how many rows there are, and no result on timing.
"""

# Kernel parameters have no Python types: mypy sees the functions that a host calls.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from .activation import (
    ACTIVATIONS,
    NEEDS_PREACTIVATION,
    activate,
    differentiate,
    reference_activate,
    reference_differentiate,
)
from .launch import blocks, launch
from .library import as_rows, check_dtype, check_tensors, register, register_autograd, require

SUM_ROWS, SUM_COLUMNS, SUM_GROUPS = 16, 128, 64  # tile of the sum over rows, and its most parts
POINTWISE_ROWS, POINTWISE_COLUMNS = 8, 128


@dataclass(frozen=True, slots=True)
class Tile:
    """Rows and columns of the result that one program computes, `inner` elements of the sum at a time."""

    rows: int
    columns: int
    inner: int
    warps: int
    stages: int


def configuration(rows: int, columns: int, dtype: torch.dtype) -> Tile:
    """A function of the result's shape and the dtype; `inner` depends on the dtype alone.

    Large tiles take 8 warps: with 4 an epilogue with GELU does not fit in their registers.
    """
    if dtype.itemsize > 2:
        return Tile(64, 64, 32, 4, 3)
    if blocks(rows, 128) * blocks(columns, 128) < 64:
        return Tile(64, 64, 64, 4, 4)
    return Tile(128, 128, 64, 8, 3)


def precision() -> str:
    """How float32 products are made: TF32 only where the user allowed it for torch's own."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


@triton.jit(do_not_specialize=["rows"])
def product_kernel(
    a_ptr,
    b_ptr,
    bias_ptr,
    out_ptr,
    z_ptr,
    rows,
    columns,
    inner,
    a_stride,
    a_inner_stride,
    b_stride,
    b_inner_stride,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    KEEP_Z: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
):
    """out[r, c] = activation(sum over i of a[r, i] b[c, i] + bias[c]), one tile; the strides are free.

    Eight blocks of rows share their columns before the next ones come, for the sake of the cache.
    """
    row_blocks = tl.cdiv(rows, ROWS)
    band = 8 * tl.cdiv(columns, COLUMNS)
    first = tl.program_id(0) // band * 8
    height = min(row_blocks - first, 8)
    row_block = first + tl.program_id(0) % band % height
    column_block = tl.program_id(0) % band // height

    row = row_block.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = column_block.to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    step = tl.arange(0, INNER)
    a = a_ptr + row[:, None] * a_stride + step.to(tl.int64)[None, :] * a_inner_stride
    b = b_ptr + column[None, :] * b_stride + step.to(tl.int64)[:, None] * b_inner_stride
    a_jump = tl.cast(a_inner_stride, tl.int64) * INNER
    b_jump = tl.cast(b_inner_stride, tl.int64) * INNER
    z = tl.zeros((ROWS, COLUMNS), tl.float32)
    for block in range(0, tl.cdiv(inner, INNER)):
        left = inner - block * INNER
        a_tile = tl.load(a, mask=(row < rows)[:, None] & (step < left)[None, :], other=0.0)
        b_tile = tl.load(b, mask=(column < columns)[None, :] & (step < left)[:, None], other=0.0)
        z = tl.dot(a_tile, b_tile, z, input_precision=PRECISION)
        a += a_jump
        b += b_jump

    mask = (row < rows)[:, None] & (column < columns)[None, :]
    offset = row[:, None] * columns + column[None, :]
    if HAS_BIAS:
        z += tl.load(bias_ptr + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
    if KEEP_Z:
        tl.store(z_ptr + offset, z.to(z_ptr.dtype.element_ty), mask=mask)
    tl.store(out_ptr + offset, activate(z, ACTIVATION).to(out_ptr.dtype.element_ty), mask=mask)


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


def _product(
    a: Tensor, b: Tensor, bias: Tensor | None, out: Tensor, activation: str = "none", z: Tensor | None = None
) -> None:
    """out = activation(a b^T + bias) for a [rows, inner], b [columns, inner]; z gets the pre-activation."""
    (rows, inner), columns = a.shape, b.shape[0]
    tile = configuration(rows, columns, a.dtype)
    launch(
        product_kernel,
        (blocks(rows, tile.rows) * blocks(columns, tile.columns),),
        a,
        b,
        out if bias is None else bias.contiguous(),
        out,
        out if z is None else z,
        rows,
        columns,
        inner,
        *a.stride(),
        *b.stride(),
        ACTIVATION=ACTIVATIONS.index(activation),
        HAS_BIAS=bias is not None,
        KEEP_Z=z is not None,
        PRECISION=precision(),
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        INNER=tile.inner,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


def _matrix(tensor: Tensor) -> Tensor:
    """All leading dimensions as one; strides are kept wherever torch can."""
    count = 1
    for size in tensor.shape[:-1]:
        count *= size
    return tensor.reshape(count, tensor.shape[-1])


def launch_forward(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """y alone."""
    y = empty_forward(x, weight, bias, activation)
    _product(_matrix(x), weight, bias, y, activation)
    return y


def launch_forward_keeping(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str
) -> tuple[Tensor, Tensor]:
    """(y, z)."""
    y, z = empty_forward_keeping(x, weight, bias, activation)
    _product(_matrix(x), weight, bias, y, activation, z)
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
    _product(_matrix(dz), weight.t(), None, dx)
    return dx


def launch_backward_weight(dz: Tensor, x: Tensor) -> Tensor:
    """dweight."""
    dweight = empty_backward_weight(dz, x)
    _product(_matrix(dz).t(), _matrix(x).t(), None, dweight)
    return dweight


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
    return torch.mm(_matrix(dz), weight).view((*dz.shape[:-1], weight.shape[1]))


def reference_backward_weight(dz: Tensor, x: Tensor) -> Tensor:
    """dweight in ATen."""
    return torch.mm(_matrix(dz).t(), _matrix(x))


def reference_backward_bias(dz: Tensor) -> Tensor:
    """dbias in ATen."""
    return _matrix(dz).sum(0)


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
