"""The gradient of the weight of a linear layer over several parts, `join_linear`.

    dweight = [dz^T x_1 | dz^T x_2 | ...]

Its columns are filled part by part, or it is added in place to its sum over micro-batches, in float32
whatever dz and x are. Products that widen nothing are plain ones, for which torch has libraries.
"""

# Kernel parameters have no Python types: mypy sees the functions that a host calls.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from collections.abc import Sequence
from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from .bags import pick
from .join_parts import check_parts, columns_of, configuration, groups_of, place_in_parts, place_of_tile
from .launch import blocks, launch
from .library import as_rows, check_dtype, check_tensors, register, require
from .product import is_ragged, matrix, precision


@triton.jit(do_not_specialize=["rows"])
def join_weight_kernel(
    out_ptr,
    dz_ptr,
    parts,
    strides,
    widths,
    rows,
    columns,
    out_stride,
    dz_stride,
    PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
):
    """Adds dz^T x_i to the columns of part i of a float32 sum, one tile of one part."""
    column_blocks = 0
    for other in tl.static_range(0, PARTS):
        column_blocks += tl.cdiv(widths[other], COLUMNS)
    row_block, column_block = place_of_tile(tl.program_id(0), tl.cdiv(columns, ROWS), column_blocks)
    part, number, first = place_in_parts(column_block, widths, PARTS, COLUMNS)
    width = pick(widths, part, PARTS)
    x_stride = tl.cast(pick(strides, part, PARTS), tl.int64)
    row = row_block * ROWS + tl.arange(0, ROWS)
    column = number * COLUMNS + tl.arange(0, COLUMNS)
    step = tl.arange(0, INNER).to(tl.int64)
    dz = dz_ptr + row[:, None] + step[None, :] * dz_stride
    x = pick(parts, part, PARTS) + step[:, None] * x_stride + column[None, :]
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for block in range(0, tl.cdiv(rows, INNER)):
        inside = step < rows - block * INNER
        dz_tile = tl.load(dz, mask=(row < columns)[:, None] & inside[None, :], other=0.0)
        x_tile = tl.load(x, mask=inside[:, None] & (column < width)[None, :], other=0.0)
        total = tl.dot(dz_tile, x_tile, total, input_precision=PRECISION)
        dz += tl.cast(dz_stride, tl.int64) * INNER
        x += x_stride * INNER
    mask = (row < columns)[:, None] & (column < width)[None, :]
    out = out_ptr + row.to(tl.int64)[:, None] * out_stride + (first + column)[None, :]
    total += tl.load(out, mask=mask, other=0.0)
    tl.store(out, total, mask=mask)


def backward_weight(dz: Tensor, xs: Sequence[Tensor]) -> Tensor:
    """dweight: a plain product a part, for which torch has libraries."""
    dweight = empty_backward_weight(dz, xs)
    for x, columns in zip(xs, columns_of(xs), strict=True):
        torch.mm(matrix(dz).t(), matrix(x), out=dweight[:, columns])
    return dweight


def launch_accumulate_weight(total: Tensor, dz: Tensor, xs: Sequence[Tensor]) -> None:
    """total += dweight. Where nothing is widened these are plain products too."""
    if dz.dtype == total.dtype:
        reference_accumulate_weight(total, dz, xs)
        return
    dz = as_rows(dz, dz.shape[-1])
    rows, columns = dz.shape
    for first, group in groups_of(xs):
        tile = configuration(columns, sum(x.shape[1] for x in group), dz.dtype)
        if is_ragged(columns, *(x.shape[1] for x in group)):
            tile = replace(tile, columns=64)
        launch(
            join_weight_kernel,
            (blocks(columns, tile.rows) * sum(blocks(x.shape[1], tile.columns) for x in group),),
            total[:, first:],
            dz,
            tuple(group),
            tuple(x.stride(0) for x in group),
            tuple(x.shape[1] for x in group),
            rows,
            columns,
            total.stride(0),
            dz.stride(0),
            PARTS=len(group),
            PRECISION=precision(),
            ROWS=tile.rows,
            COLUMNS=tile.columns,
            INNER=tile.inner,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )


def empty_backward_weight(dz: Tensor, xs: Sequence[Tensor]) -> Tensor:
    """dweight, not computed."""
    return dz.new_empty((dz.shape[-1], sum(x.shape[-1] for x in xs)))


def reference_accumulate_weight(total: Tensor, dz: Tensor, xs: Sequence[Tensor]) -> None:
    """total += dweight in ATen, not rounded in between."""
    wide = matrix(dz).t().to(total.dtype)
    for x, columns in zip(xs, columns_of(xs), strict=True):
        total[:, columns].addmm_(wide, matrix(x).to(total.dtype))


def check_backward_weight(dz: Tensor, xs: Sequence[Tensor]) -> None:
    """dz [..., columns] with the leading shape of xs."""
    _check_gradient("join_linear_backward_weight", dz, xs)


def check_accumulate_weight(total: Tensor, dz: Tensor, xs: Sequence[Tensor]) -> None:
    """total [columns, sum of inner_i] of float32, or of dz's dtype if that is float64, contiguous."""
    name = "join_linear_accumulate_weight"
    _check_gradient(name, dz, xs)
    check_tensors(name, dz=dz, total=total)
    shape = (dz.shape[-1], sum(x.shape[-1] for x in xs))
    require(tuple(total.shape) == shape, name, "total", f"have shape {shape}", tuple(total.shape))
    require(total.is_contiguous(), name, "total", "be contiguous", total.stride())
    check_dtype(name, "total", total, torch.float32, *([torch.float64] if dz.dtype == torch.float64 else []))


def _check_gradient(name: str, dz: Tensor, xs: Sequence[Tensor]) -> None:
    check_parts(name, xs)
    check_tensors(name, **{"xs[0]": xs[0], "dz": dz})
    rule = f"have the leading shape of xs[0], {tuple(xs[0].shape[:-1])}"
    fits = dz.dim() == xs[0].dim() and dz.shape[:-1] == xs[0].shape[:-1]
    require(fits, name, "dz", rule, tuple(dz.shape))
    check_dtype(name, "dz", dz, xs[0].dtype)


join_linear_backward_weight = register(
    "join_linear_backward_weight(Tensor dz, Tensor[] xs) -> Tensor",
    check=check_backward_weight,
    kernel=backward_weight,
    reference=backward_weight,
    fake=empty_backward_weight,
)
join_linear_accumulate_weight = register(
    "join_linear_accumulate_weight(Tensor(a!) total, Tensor dz, Tensor[] xs) -> ()",
    check=check_accumulate_weight,
    kernel=launch_accumulate_weight,
    reference=reference_accumulate_weight,
    fake=lambda *_: None,
)
