"""Matrix products with an epilogue, on the device.

    z = a b^T + bias,   y = activation(z)  or  z * activation'(saved),   out = y * dropout + residual

One kernel takes operands of any strides. The other has its blocks moved by tensor descriptors, the bulk
copies of Hopper, which take no registers and no instructions of the warps that compute. They differ in how
memory is reached and in nothing that is computed: a row has the same numbers from both. What an epilogue does
without is None.
"""

# Kernel parameters have no Python types: mypy sees the functions that a host calls.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import triton
import triton.language as tl

from .activation import activate, differentiate
from .keyed import keyed_factor, keyed_stream

_BAND = tl.constexpr(8)  # blocks of rows that share their columns before the next ones come


@triton.jit
def _first(tile, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The first row and column of a tile: neighbours in time read the same operands, for the cache's sake."""
    band = tl.cdiv(columns, COLUMNS) * _BAND
    start = tile // band * _BAND
    height = min(tl.cdiv(rows, ROWS) - start, _BAND)
    return (start + tile % band % height) * ROWS, tile % band // height * COLUMNS


@triton.jit
def _places(row, column, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Where the elements of a block are in a [rows, columns] matrix, and whether they are."""
    r = tl.arange(0, ROWS).to(tl.int64) + row
    c = tl.arange(0, COLUMNS) + column
    return r[:, None] * columns + c[None, :], (r < rows)[:, None] & (c < columns)[None, :]


@triton.jit
def _read(source, row, column, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BY: tl.constexpr):
    """A block of a [rows, columns] matrix, in float32."""
    if BY == "descriptor":
        block = source.load([row, column])
    else:
        place, inside = _places(row, column, rows, columns, ROWS, COLUMNS)
        block = tl.load(source + place, mask=inside, other=0.0)
    return block.to(tl.float32)


@triton.jit
def _write(
    target, block, row, column, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BY: tl.constexpr
):
    """A block into a [rows, columns] matrix."""
    if BY == "descriptor":
        target.store([row, column], block.to(target.dtype))
    else:
        place, inside = _places(row, column, rows, columns, ROWS, COLUMNS)
        tl.store(target + place, block.to(target.dtype.element_ty), mask=inside)


@triton.jit
def _finish(
    z,
    row,
    column,
    rows,
    columns,
    out,
    kept,
    saved,
    residual,
    bias,
    position,
    stream,
    first,
    threshold,
    scale,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PARTS: tl.constexpr,
    BY: tl.constexpr,
):
    """The epilogue of a block, in parts of its columns: less of it is in registers at a time."""
    if PARTS > 1:
        halves = tl.split(tl.permute(tl.reshape(z, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))
        for half in tl.static_range(2):
            _finish(
                halves[half],
                row,
                column + half * (COLUMNS // 2),
                rows,
                columns,
                out,
                kept,
                saved,
                residual,
                bias,
                position,
                stream,
                first,
                threshold,
                scale,
                ACTIVATION,
                ROWS,
                COLUMNS // 2,
                PARTS // 2,
                BY,
            )
    else:
        if bias is not None:
            c = tl.arange(0, COLUMNS) + column
            z += tl.load(bias + c, mask=c < columns, other=0.0).to(tl.float32)[None, :]
        if kept is not None:
            _write(kept, z, row, column, rows, columns, ROWS, COLUMNS, BY)
        if saved is not None:
            y = differentiate(z, _read(saved, row, column, rows, columns, ROWS, COLUMNS, BY), ACTIVATION)
        else:
            y = activate(z, ACTIVATION)
        if position is not None:
            place, _ = _places(row, column, rows, columns, ROWS, COLUMNS)
            y *= keyed_factor(stream, first + place, threshold, scale)
        if residual is not None:
            y += _read(residual, row, column, rows, columns, ROWS, COLUMNS, BY)
        _write(out, y, row, column, rows, columns, ROWS, COLUMNS, BY)


@triton.jit(do_not_specialize=["rows", "key", "elements", "threshold"])
def product_kernel(
    a_ptr,
    b_ptr,
    out,
    kept,
    saved,
    residual,
    bias,
    rows,
    columns,
    inner,
    a_stride,
    a_inner_stride,
    b_stride,
    b_inner_stride,
    position,
    key,
    elements,
    threshold,
    scale,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    PARTS: tl.constexpr,
):
    """One tile, a [rows, inner] and b [columns, inner] of any strides."""
    row_start, column_start = _first(tl.program_id(0), rows, columns, ROWS, COLUMNS)
    row = tl.arange(0, ROWS).to(tl.int64) + row_start
    column = tl.arange(0, COLUMNS).to(tl.int64) + column_start
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
    stream, first = 0, 0
    if position is not None:
        stream, first = keyed_stream(position, key, elements)
    ends = (out, kept, saved, residual, bias, position, stream, first, threshold, scale)
    _finish(z, row_start, column_start, rows, columns, *ends, ACTIVATION, ROWS, COLUMNS, PARTS, "pointer")


@triton.jit(do_not_specialize=["rows", "inner", "key", "elements", "threshold"])
def described_product_kernel(
    a,
    b,
    out,
    kept,
    saved,
    residual,
    bias,
    rows,
    columns,
    inner,
    position,
    key,
    elements,
    threshold,
    scale,
    A_TURNED: tl.constexpr,
    B_TURNED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Every so manieth tile, so that the next one is fetched while the epilogue of one runs. A matrix that is
    turned lies in memory as [inner, rows or columns]."""
    stream, first = 0, 0
    if position is not None:
        stream, first = keyed_stream(position, key, elements)
    ends = (out, kept, saved, residual, bias, position, stream, first, threshold, scale)
    tiles = tl.cdiv(rows, ROWS) * tl.cdiv(columns, COLUMNS)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
        row, column = _first(tile, rows, columns, ROWS, COLUMNS)
        z = tl.zeros((ROWS, COLUMNS), tl.float32)
        for block in range(0, tl.cdiv(inner, INNER)):
            if A_TURNED:
                a_tile = a.load([block * INNER, row]).T
            else:
                a_tile = a.load([row, block * INNER])
            if B_TURNED:
                b_tile = b.load([block * INNER, column])
            else:
                b_tile = b.load([column, block * INNER]).T
            z = tl.dot(a_tile, b_tile, z)
        _finish(z, row, column, rows, columns, *ends, ACTIVATION, ROWS, COLUMNS, PARTS, "descriptor")
