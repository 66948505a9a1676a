"""Kernels of the normalisations over the last dimension: layer norm, and RMS norm which has no mean.

What they have in common is all but one sum: RMS norm is layer norm with a mean of zero that is no function of
x, so its statistic is the mean square and the gradient of x has no average. Where a launch is given no tensor
for the mean (CENTRED is false in its kernels) that part is not computed.

Statistics and sums are float32 whatever the dtype of x. A row's result does not depend on how many rows there
are; the sums over rows are made in a fixed order, without atomics.
"""

# Kernel parameters have no Python types: mypy sees the functions that a host calls.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import blocks, launch
from .library import as_rows
from .rows import configuration
from .tuning import tuned

SUM_ROWS, SUM_COLUMNS, SUM_GROUPS = 16, 128, 64  # tile of the sum over rows, and its most parts


@triton.jit(do_not_specialize=["rows"])
def forward_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    mean_ptr,
    rstd_ptr,
    rows,
    width,
    x_stride,
    eps,
    CENTRED: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WHOLE: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One block of rows: the mean, then the mean square of what is left, then y."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    here = row < rows
    x_row = x_ptr + row[:, None] * x_stride
    y_row = y_ptr + row[:, None] * width
    column = tl.arange(0, WIDTH)
    if WHOLE:
        inside = column < width
        mask = here[:, None] & inside[None, :]
        x = tl.load(x_row + column[None, :], mask=mask, other=0.0).to(tl.float32)
        if CENTRED:
            mean = tl.sum(x, axis=1) / width
            x = tl.where(mask, x - mean[:, None], 0.0)
        rstd = tl.rsqrt(tl.sum(x * x, axis=1) / width + eps)
        y = x * rstd[:, None]
        if HAS_WEIGHT:
            y *= tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)[None, :]
        if HAS_BIAS:
            y += tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)[None, :]
        tl.store(y_row + column[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)
    else:
        if CENTRED:
            total = tl.zeros((ROWS, WIDTH), tl.float32)
            for start in range(0, width, WIDTH):
                mask = here[:, None] & (start + column < width)[None, :]
                total += tl.load(x_row + (start + column)[None, :], mask=mask, other=0.0).to(tl.float32)
            mean = tl.sum(total, axis=1) / width
        total = tl.zeros((ROWS, WIDTH), tl.float32)
        for start in range(0, width, WIDTH):
            mask = here[:, None] & (start + column < width)[None, :]
            x = tl.load(x_row + (start + column)[None, :], mask=mask, other=0.0).to(tl.float32)
            if CENTRED:
                x = tl.where(mask, x - mean[:, None], 0.0)
            total += x * x
        rstd = tl.rsqrt(tl.sum(total, axis=1) / width + eps)
        for start in range(0, width, WIDTH):
            inside = start + column < width
            mask = here[:, None] & inside[None, :]
            x = tl.load(x_row + (start + column)[None, :], mask=mask, other=0.0).to(tl.float32)
            if CENTRED:
                x -= mean[:, None]
            y = x * rstd[:, None]
            if HAS_WEIGHT:
                y *= tl.load(weight_ptr + start + column, mask=inside, other=0.0).to(tl.float32)[None, :]
            if HAS_BIAS:
                y += tl.load(bias_ptr + start + column, mask=inside, other=0.0).to(tl.float32)[None, :]
            tl.store(y_row + (start + column)[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)
    if CENTRED:
        tl.store(mean_ptr + row, mean, mask=here)
    tl.store(rstd_ptr + row, rstd, mask=here)


@triton.jit
def load_gradient(
    dy_row,
    x_row,
    weight_ptr,
    mean,
    rstd,
    column,
    width,
    here,
    CENTRED: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
):
    """g = dy * weight, zero outside, and the normalised x of a block of rows and columns."""
    inside = column < width
    mask = here[:, None] & inside[None, :]
    g = tl.load(dy_row + column[None, :], mask=mask, other=0.0).to(tl.float32)
    if HAS_WEIGHT:
        g *= tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    x = tl.load(x_row + column[None, :], mask=mask, other=0.0).to(tl.float32)
    if CENTRED:
        x -= mean[:, None]
    return g, x * rstd[:, None], mask


@triton.jit(do_not_specialize=["rows"])
def backward_input_kernel(
    dy_ptr,
    x_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    dx_ptr,
    rows,
    width,
    dy_stride,
    x_stride,
    CENTRED: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    WHOLE: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """dx of one block of rows."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    here = row < rows
    dy_row = dy_ptr + row[:, None] * dy_stride
    x_row = x_ptr + row[:, None] * x_stride
    dx_row = dx_ptr + row[:, None] * width
    rstd = tl.load(rstd_ptr + row, mask=here, other=0.0)
    mean = rstd  # read by nobody if not CENTRED
    if CENTRED:
        mean = tl.load(mean_ptr + row, mask=here, other=0.0)
    column = tl.arange(0, WIDTH)
    if WHOLE:
        g, normal, mask = load_gradient(
            dy_row, x_row, weight_ptr, mean, rstd, column, width, here, CENTRED, HAS_WEIGHT
        )
        slope = tl.sum(g * normal, axis=1) / width
        if CENTRED:
            average = tl.sum(g, axis=1) / width
            g -= average[:, None]
        dx = rstd[:, None] * (g - normal * slope[:, None])
        tl.store(dx_row + column[None, :], dx.to(dx_ptr.dtype.element_ty), mask=mask)
    else:
        total = tl.zeros((ROWS, WIDTH), tl.float32)
        product = tl.zeros((ROWS, WIDTH), tl.float32)
        for start in range(0, width, WIDTH):
            g, normal, mask = load_gradient(
                dy_row, x_row, weight_ptr, mean, rstd, start + column, width, here, CENTRED, HAS_WEIGHT
            )
            if CENTRED:
                total += g
            product += g * normal
        average = tl.sum(total, axis=1) / width
        slope = tl.sum(product, axis=1) / width
        for start in range(0, width, WIDTH):
            g, normal, mask = load_gradient(
                dy_row, x_row, weight_ptr, mean, rstd, start + column, width, here, CENTRED, HAS_WEIGHT
            )
            if CENTRED:
                g -= average[:, None]
            dx = rstd[:, None] * (g - normal * slope[:, None])
            tl.store(dx_row + (start + column)[None, :], dx.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def backward_weight_kernel(
    dy_ptr,
    x_ptr,
    mean_ptr,
    rstd_ptr,
    partial_ptr,
    rows,
    width,
    dy_stride,
    x_stride,
    tiles,
    CENTRED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Sums over `tiles` * ROWS rows: partial[0, group] is of dweight, partial[1, group] of dbias if any."""
    group = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = column < width
    dweight = tl.zeros((ROWS, WIDTH), tl.float32)
    dbias = tl.zeros((ROWS, WIDTH), tl.float32)
    for tile in range(0, tiles):
        row = (group * tiles + tile) * ROWS + tl.arange(0, ROWS)
        here = row < rows
        mask = here[:, None] & inside[None, :]
        rstd = tl.load(rstd_ptr + row, mask=here, other=0.0)
        x = tl.load(x_ptr + row[:, None] * x_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + row[:, None] * dy_stride + column[None, :], mask=mask, other=0.0)
        if CENTRED:
            mean = tl.load(mean_ptr + row, mask=here, other=0.0)
            x -= mean[:, None]
        if HAS_BIAS:
            dbias += dy.to(tl.float32)
        dweight += dy.to(tl.float32) * x * rstd[:, None]
    out = partial_ptr + group * width + column
    tl.store(out, tl.sum(dweight, axis=0), mask=inside)
    if HAS_BIAS:
        tl.store(out + tl.num_programs(0).to(tl.int64) * width, tl.sum(dbias, axis=0), mask=inside)


@triton.jit
def finish_weight_kernel(
    partial_ptr,
    dweight_ptr,
    dbias_ptr,
    groups,
    width,
    HAS_BIAS: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """The groups' sums added up in their order."""
    column = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    inside = column < width
    group = tl.arange(0, GROUPS)
    mask = (group < groups)[:, None] & inside[None, :]
    offset = group[:, None] * width + column[None, :]
    dweight = tl.sum(tl.load(partial_ptr + offset, mask=mask, other=0.0), axis=0)
    tl.store(dweight_ptr + column, dweight.to(dweight_ptr.dtype.element_ty), mask=inside)
    if HAS_BIAS:
        dbias = tl.sum(tl.load(partial_ptr + groups * width + offset, mask=mask, other=0.0), axis=0)
        tl.store(dbias_ptr + column, dbias.to(dbias_ptr.dtype.element_ty), mask=inside)


def normalise(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    y: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
) -> None:
    """Write y, like x, and the float32 statistics of its rows; RMS norm where there is no `mean`."""
    width = x.shape[-1]
    rows = as_rows(x, width)
    how = tuned("norm", configuration(width), x, width=width)
    launch(
        forward_kernel,
        (blocks(rows.shape[0], how.rows),),
        rows,
        unit_stride(weight, rows),
        unit_stride(bias, rows),
        y,
        rstd if mean is None else mean,
        rstd,
        rows.shape[0],
        width,
        rows.stride(0),
        eps,
        CENTRED=mean is not None,
        HAS_WEIGHT=weight is not None,
        HAS_BIAS=bias is not None,
        WHOLE=how.whole,
        ROWS=how.rows,
        WIDTH=how.width,
        num_warps=how.warps,
    )


def differentiate_input(
    dy: Tensor, x: Tensor, mean: Tensor | None, rstd: Tensor, weight: Tensor | None, dx: Tensor
) -> None:
    """Write the gradient of x."""
    width = x.shape[-1]
    dy_rows, x_rows = as_rows(dy, width), as_rows(x, width)
    how = tuned("norm_backward", configuration(width), x, width=width)
    launch(
        backward_input_kernel,
        (blocks(x_rows.shape[0], how.rows),),
        dy_rows,
        x_rows,
        unit_stride(mean, rstd),
        rstd.contiguous(),
        unit_stride(weight, x_rows),
        dx,
        x_rows.shape[0],
        width,
        dy_rows.stride(0),
        x_rows.stride(0),
        CENTRED=mean is not None,
        HAS_WEIGHT=weight is not None,
        WHOLE=how.whole,
        ROWS=how.rows,
        WIDTH=how.width,
        num_warps=how.warps,
    )


def differentiate_weight(
    dy: Tensor, x: Tensor, mean: Tensor | None, rstd: Tensor, dweight: Tensor, dbias: Tensor | None
) -> None:
    """Write the gradient of the weight, and of the bias where there is a tensor for it."""
    width = x.shape[-1]
    dy_rows, x_rows = as_rows(dy, width), as_rows(x, width)
    rows = x_rows.shape[0]
    if rows == 0:
        dweight.zero_()
        if dbias is not None:
            dbias.zero_()
        return
    tiles = blocks(blocks(rows, SUM_ROWS), SUM_GROUPS)
    groups = blocks(rows, tiles * SUM_ROWS)
    partial = x.new_empty((1 if dbias is None else 2, groups, width), dtype=torch.float32)
    launch(
        backward_weight_kernel,
        (groups, blocks(width, SUM_COLUMNS)),
        dy_rows,
        x_rows,
        unit_stride(mean, rstd),
        rstd.contiguous(),
        partial,
        rows,
        width,
        dy_rows.stride(0),
        x_rows.stride(0),
        tiles,
        CENTRED=mean is not None,
        HAS_BIAS=dbias is not None,
        ROWS=SUM_ROWS,
        WIDTH=SUM_COLUMNS,
        num_warps=4,
    )
    launch(
        finish_weight_kernel,
        (blocks(width, SUM_COLUMNS),),
        partial,
        dweight,
        dweight if dbias is None else dbias,
        groups,
        width,
        HAS_BIAS=dbias is not None,
        GROUPS=SUM_GROUPS,
        WIDTH=SUM_COLUMNS,
        num_warps=4,
    )


def unit_stride(vector: Tensor | None, stand_in: Tensor) -> Tensor:
    """The vector with its elements next to each other; where there is none a pointer that is not read."""
    return stand_in if vector is None else vector.contiguous()
