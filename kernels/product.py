"""Matrix products with an epilogue: tiles of the result, one program each.

Products accumulate in float32, in blocks of the inner dimension in their order and never split over programs:
a row of the result does not depend on how many rows there are, and no result on timing.
"""

# Kernel parameters have no Python types: mypy sees the functions that a host calls.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activation import ACTIVATIONS, activate
from .launch import blocks, launch
from .tuning import tuned


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
    ADD: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
):
    """out[r, c] = activation(sum over i of a[r, i] b[c, i] + bias[c]), one tile; the strides are free. With
    ADD this is added to what out, of float32, has in it.

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
    y = activate(z, ACTIVATION)
    if ADD:
        y += tl.load(out_ptr + offset, mask=mask, other=0.0)
    tl.store(out_ptr + offset, y.to(out_ptr.dtype.element_ty), mask=mask)


def product(
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    out: Tensor,
    activation: str = "none",
    z: Tensor | None = None,
    *,
    add: bool = False,
) -> None:
    """out = activation(a b^T + bias) for a [rows, inner], b [columns, inner]; z gets the pre-activation.

    With `add` the result is added to what is in out, of float32.
    """
    (rows, inner), columns = a.shape, b.shape[0]
    static = configuration(rows, columns, a.dtype)
    tile = tuned("product", static, a, rows=rows, columns=columns, inner=inner)
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
        ADD=add,
        PRECISION=precision(),
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        INNER=tile.inner,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


def matrix(tensor: Tensor) -> Tensor:
    """All leading dimensions as one; strides are kept wherever torch can."""
    count = 1
    for size in tensor.shape[:-1]:
        count *= size
    return tensor.reshape(count, tensor.shape[-1])
