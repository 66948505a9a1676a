"""Backward kernel of a normalisation fused with the residual addition before it, and the dropout before that.

What reaches the sum through the norm and from its other readers is added up, and goes to both addends. Where
these gradients differ, by dropout or by their dtype, both are written; else one is, and stands for both.
"""

# Kernel parameters have no Python types: mypy sees the functions that a host calls.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import triton
import triton.language as tl
from torch import Tensor

from .add_norm_forward import Dropped
from .keyed import keyed_factor, keyed_stream, threshold_and_scale
from .launch import blocks, launch
from .library import as_rows
from .norm import load_gradient, unit_stride
from .rows import configuration, nested_rows
from .tuning import tuned

WHOLE_ROW = 8192  # the bits of a dropout take as many registers again as a row's gradients


@triton.jit
def _store_gradients(
    gradient,
    ds_row,
    dx_row,
    dresidual_row,
    stream,
    counter,
    threshold,
    scale,
    column,
    mask,
    HAS_DS: tl.constexpr,
    DROPPED: tl.constexpr,
    TWO: tl.constexpr,
):
    """What came through the norm and what came to the sum itself, to one addend or to both."""
    total = gradient
    if HAS_DS:
        total += tl.load(ds_row + column[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(dresidual_row + column[None, :], total.to(dresidual_row.dtype.element_ty), mask=mask)
    if TWO:
        if DROPPED:
            total *= keyed_factor(stream, counter[:, None] + column[None, :], threshold, scale)
        tl.store(dx_row + column[None, :], total.to(dx_row.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "dy_inner", "ds_inner", "key", "elements", "threshold"])
def add_norm_backward_kernel(
    dy_ptr,
    ds_ptr,
    s_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    dx_ptr,
    dresidual_ptr,
    position_ptr,
    rows,
    width,
    dy_inner,
    dy_outer_stride,
    dy_stride,
    ds_inner,
    ds_outer_stride,
    ds_stride,
    s_stride,
    key,
    elements,
    threshold,
    scale,
    NESTED: tl.constexpr,
    CENTRED: tl.constexpr,
    DROPPED: tl.constexpr,
    TWO: tl.constexpr,
    HAS_DS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    WHOLE: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """The gradients of both addends of one block of rows; of the residual alone if not TWO."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    here = row < rows
    dy_place, ds_place = row * dy_stride, row * ds_stride
    if NESTED:
        dy_place = row // dy_inner * dy_outer_stride + row % dy_inner * dy_stride
        ds_place = row // ds_inner * ds_outer_stride + row % ds_inner * ds_stride
    dy_row, ds_row = dy_ptr + dy_place[:, None], ds_ptr + ds_place[:, None]
    s_row = s_ptr + row[:, None] * s_stride
    dx_row = dx_ptr + row[:, None] * width
    dresidual_row = dresidual_ptr + row[:, None] * width
    rstd = tl.load(rstd_ptr + row, mask=here, other=0.0)
    mean = rstd  # read by nobody if not CENTRED
    if CENTRED:
        mean = tl.load(mean_ptr + row, mask=here, other=0.0)
    stream, counter = 0, row * width
    if DROPPED:
        stream, first = keyed_stream(position_ptr, key, elements)
        counter += first
    column = tl.arange(0, WIDTH)
    if WHOLE:
        g, normal, mask = load_gradient(
            dy_row, s_row, weight_ptr, mean, rstd, column, width, here, CENTRED, HAS_WEIGHT
        )
        slope = tl.sum(g * normal, axis=1) / width
        if CENTRED:
            average = tl.sum(g, axis=1) / width
            g -= average[:, None]
        _store_gradients(
            rstd[:, None] * (g - normal * slope[:, None]),
            ds_row,
            dx_row,
            dresidual_row,
            stream,
            counter,
            threshold,
            scale,
            column,
            mask,
            HAS_DS,
            DROPPED,
            TWO,
        )
    else:
        total = tl.zeros((ROWS, WIDTH), tl.float32)
        product = tl.zeros((ROWS, WIDTH), tl.float32)
        for start in range(0, width, WIDTH):
            g, normal, mask = load_gradient(
                dy_row, s_row, weight_ptr, mean, rstd, start + column, width, here, CENTRED, HAS_WEIGHT
            )
            if CENTRED:
                total += g
            product += g * normal
        average = tl.sum(total, axis=1) / width
        slope = tl.sum(product, axis=1) / width
        for start in range(0, width, WIDTH):
            g, normal, mask = load_gradient(
                dy_row, s_row, weight_ptr, mean, rstd, start + column, width, here, CENTRED, HAS_WEIGHT
            )
            if CENTRED:
                g -= average[:, None]
            _store_gradients(
                rstd[:, None] * (g - normal * slope[:, None]),
                ds_row,
                dx_row,
                dresidual_row,
                stream,
                counter,
                threshold,
                scale,
                start + column,
                mask,
                HAS_DS,
                DROPPED,
                TWO,
            )


def differentiate_sum(
    dy: Tensor,
    ds: Tensor | None,
    s: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    weight: Tensor | None,
    dropped: Dropped,
    dx: Tensor | None,
    dresidual: Tensor,
) -> None:
    """Write the gradient of the residual, and that of x where there is a tensor for it."""
    width = s.shape[-1]
    dy_rows, s_rows = nested_rows(dy), as_rows(s, width)
    ds_rows = dy_rows if ds is None else nested_rows(ds)
    how = tuned("add_norm_backward", configuration(width, WHOLE_ROW), s, width=width)
    launch(
        add_norm_backward_kernel,
        (blocks(s_rows.shape[0], how.rows),),
        dy_rows.tensor,
        ds_rows.tensor,
        s_rows,
        unit_stride(mean, rstd),
        rstd.contiguous(),
        unit_stride(weight, s_rows),
        dresidual if dx is None else dx,
        dresidual,
        unit_stride(dropped.position, rstd),
        s_rows.shape[0],
        width,
        dy_rows.inner,
        dy_rows.outer_stride,
        dy_rows.inner_stride,
        ds_rows.inner,
        ds_rows.outer_stride,
        ds_rows.inner_stride,
        s_rows.stride(0),
        dropped.key,
        dropped.elements,
        *threshold_and_scale(dropped.p),
        NESTED=not (dy_rows.even and ds_rows.even),
        CENTRED=mean is not None,
        DROPPED=dropped.position is not None,
        TWO=dx is not None,
        HAS_DS=ds is not None,
        HAS_WEIGHT=weight is not None,
        WHOLE=how.whole,
        ROWS=how.rows,
        WIDTH=how.width,
        num_warps=how.warps,
    )
