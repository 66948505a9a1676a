"""The kernels of a linear layer over several parts: one that can read any of them, and one for Hopper.

Both go through the blocks of the parts in order. Of several launches those that are CONTINUED start from the
sum so far, and those that are not the last (ENDS) leave it.
"""

# Kernel parameters have no Python types: mypy sees the functions that a host calls.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import triton
import triton.language as tl

from .activation import activate
from .bags import pick
from .join_parts import place_in_parts, place_of_tile


@triton.jit
def begin(
    row,
    column,
    sum_ptr,
    rows,
    columns,
    CONTINUED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The sum that a tile starts from."""
    if CONTINUED:
        mask = (row < rows)[:, None] & (column < columns)[None, :]
        z = tl.load(sum_ptr + row[:, None] * columns + column[None, :], mask=mask, other=0.0)
    else:
        z = tl.zeros((ROWS, COLUMNS), tl.float32)
    return z


@triton.jit
def finish(
    z,
    row,
    column,
    out_ptr,
    z_ptr,
    sum_ptr,
    bias_ptr,
    rows,
    columns,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    KEEP_Z: tl.constexpr,
    ENDS: tl.constexpr,
):
    """Writes a tile of the result, or of the sum so far."""
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    offset = row[:, None] * columns + column[None, :]
    if ENDS:
        if HAS_BIAS:
            z += tl.load(bias_ptr + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
        if KEEP_Z:
            tl.store(z_ptr + offset, z.to(z_ptr.dtype.element_ty), mask=mask)
        tl.store(out_ptr + offset, activate(z, ACTIVATION).to(out_ptr.dtype.element_ty), mask=mask)
    else:
        tl.store(sum_ptr + offset, z, mask=mask)


@triton.jit(do_not_specialize=["rows"])
def join_forward_kernel(
    out_ptr,
    z_ptr,
    sum_ptr,
    parts,
    strides,
    widths,
    weight_ptr,
    bias_ptr,
    rows,
    columns,
    weight_stride,
    weight_inner_stride,
    PARTS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    KEEP_Z: tl.constexpr,
    CONTINUED: tl.constexpr,
    ENDS: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
):
    """One tile of the result: the blocks of all parts in one loop."""
    row_block, column_block = place_of_tile(tl.program_id(0), tl.cdiv(rows, ROWS), tl.cdiv(columns, COLUMNS))
    row = row_block.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = column_block.to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    step = tl.arange(0, INNER)
    z = begin(row, column, sum_ptr, rows, columns, CONTINUED, ROWS, COLUMNS)
    count = 0
    for other in tl.static_range(0, PARTS):
        count += tl.cdiv(widths[other], INNER)
    for block in range(0, count):
        part, number, first = place_in_parts(block, widths, PARTS, INNER)
        inner = number * INNER + step
        inside = inner < pick(widths, part, PARTS)
        x = pick(parts, part, PARTS) + row[:, None] * pick(strides, part, PARTS) + inner[None, :]
        x_tile = tl.load(x, mask=(row < rows)[:, None] & inside[None, :], other=0.0)
        place = (first + inner).to(tl.int64)[:, None] * weight_inner_stride
        weight = weight_ptr + column[None, :] * weight_stride + place
        weight_tile = tl.load(weight, mask=(column < columns)[None, :] & inside[:, None], other=0.0)
        z = tl.dot(x_tile, weight_tile, z, input_precision=PRECISION)
    finish(
        z, row, column, out_ptr, z_ptr, sum_ptr, bias_ptr, rows, columns, ACTIVATION, HAS_BIAS, KEEP_Z, ENDS
    )


@triton.jit(do_not_specialize=["rows"])
def join_described_kernel(
    out_ptr,
    z_ptr,
    sum_ptr,
    parts,
    widths,
    weight,
    bias_ptr,
    rows,
    columns,
    PARTS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    KEEP_Z: tl.constexpr,
    CONTINUED: tl.constexpr,
    ENDS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
):
    """One tile of the result; parts and weight come by tensor descriptors, which a loop cannot choose among:
    each part has its own. Widths are multiples of INNER but for the last, behind which there are zeros."""
    row_block, column_block = place_of_tile(tl.program_id(0), tl.cdiv(rows, ROWS), tl.cdiv(columns, COLUMNS))
    row = row_block.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = column_block.to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    z = begin(row, column, sum_ptr, rows, columns, CONTINUED, ROWS, COLUMNS)
    first = 0
    for part in tl.static_range(0, PARTS):
        for block in range(0, tl.cdiv(widths[part], INNER)):
            x_tile = parts[part].load([row_block * ROWS, block * INNER])
            weight_tile = weight.load([column_block * COLUMNS, first + block * INNER])
            z = tl.dot(x_tile, tl.trans(weight_tile), z)
        first += widths[part]
    finish(
        z, row, column, out_ptr, z_ptr, sum_ptr, bias_ptr, rows, columns, ACTIVATION, HAS_BIAS, KEEP_Z, ENDS
    )
