"""The gradient of a bias: the sum over all rows, of groups of rows first and then of the groups."""

# Kernel parameters have no Python types: mypy sees the functions that a host calls.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import blocks, launch
from .library import as_rows, check_tensors, register, require
from .product import matrix

SUM_ROWS, SUM_COLUMNS, SUM_GROUPS = 16, 128, 64  # tile of the sum over rows, and its most parts


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


def empty_backward_bias(dz: Tensor) -> Tensor:
    """dbias, not computed."""
    return dz.new_empty(dz.shape[-1:])


def reference_backward_bias(dz: Tensor) -> Tensor:
    """dbias in ATen."""
    return matrix(dz).sum(0)


def check_backward_bias(dz: Tensor) -> None:
    """dz [..., columns]."""
    name = "linear_backward_bias"
    check_tensors(name, dz=dz)
    require(dz.dim() >= 1, name, "dz", "have at least one dimension", tuple(dz.shape))


linear_backward_bias = register(
    "linear_backward_bias(Tensor dz) -> Tensor",
    check=check_backward_bias,
    kernel=launch_backward_bias,
    reference=reference_backward_bias,
    fake=empty_backward_bias,
)
