"""Forward kernel of a normalisation fused with the residual addition before it, and the dropout before that.

The sum is rounded to the type it is stored in before anything is computed of it, as in torch: its statistics,
the result and backward all see what is stored. Rows that are too wide for registers are summed anew in each
pass, from the same values to the same bits: to read what other threads have just stored they would have to
wait for each other.
"""

# Kernel parameters have no Python types: mypy sees the functions that a host calls.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from .keyed import keyed_factor, keyed_stream, threshold_and_scale
from .launch import blocks, launch
from .norm import unit_stride
from .rows import configuration, nested_rows
from .tuning import tuned


@dataclass(frozen=True, slots=True)
class Dropped:
    """Keyed dropout of what is added, as `kernels.keyed` has it; none without a position."""

    position: Tensor | None = None
    key: int = 0
    elements: int = 0
    p: float = 0.0


@triton.jit
def _load_sum(
    x_row,
    residual_row,
    s_row,
    stream,
    counter,
    threshold,
    scale,
    column,
    width,
    here,
    DROPPED: tl.constexpr,
):
    """The sum of a block of rows and columns as it is stored, in float32 and zero outside; and the mask."""
    mask = here[:, None] & (column < width)[None, :]
    s = tl.load(x_row + column[None, :], mask=mask, other=0.0).to(tl.float32)
    if DROPPED:
        s *= keyed_factor(stream, counter[:, None] + column[None, :], threshold, scale)
    s += tl.load(residual_row + column[None, :], mask=mask, other=0.0).to(tl.float32)
    return s.to(s_row.dtype.element_ty).to(tl.float32), mask


@triton.jit
def _store_result(
    y_row, normal, weight_ptr, bias_ptr, column, width, mask, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr
):
    inside = column < width
    y = normal
    if HAS_WEIGHT:
        y *= tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    if HAS_BIAS:
        y += tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    tl.store(y_row + column[None, :], y.to(y_row.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "x_inner", "residual_inner", "key", "elements", "threshold"])
def add_norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    s_ptr,
    mean_ptr,
    rstd_ptr,
    position_ptr,
    rows,
    width,
    x_inner,
    x_outer_stride,
    x_stride,
    residual_inner,
    residual_outer_stride,
    residual_stride,
    eps,
    key,
    elements,
    threshold,
    scale,
    NESTED: tl.constexpr,
    CENTRED: tl.constexpr,
    DROPPED: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WHOLE: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One block of rows: the sum, its statistics, then y."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    here = row < rows
    x_place, residual_place = row * x_stride, row * residual_stride
    if NESTED:
        x_place = row // x_inner * x_outer_stride + row % x_inner * x_stride
        residual_place = (
            row // residual_inner * residual_outer_stride + row % residual_inner * residual_stride
        )
    x_row, residual_row = x_ptr + x_place[:, None], residual_ptr + residual_place[:, None]
    s_row = s_ptr + row[:, None] * width
    y_row = y_ptr + row[:, None] * width
    column = tl.arange(0, WIDTH)
    stream, counter = 0, row * width
    if DROPPED:
        stream, first = keyed_stream(position_ptr, key, elements)
        counter += first
    if WHOLE:
        s, mask = _load_sum(
            x_row, residual_row, s_row, stream, counter, threshold, scale, column, width, here, DROPPED
        )
        tl.store(s_row + column[None, :], s.to(s_ptr.dtype.element_ty), mask=mask)
        if CENTRED:
            mean = tl.sum(s, axis=1) / width
            s = tl.where(mask, s - mean[:, None], 0.0)
        rstd = tl.rsqrt(tl.sum(s * s, axis=1) / width + eps)
        _store_result(
            y_row, s * rstd[:, None], weight_ptr, bias_ptr, column, width, mask, HAS_WEIGHT, HAS_BIAS
        )
    else:
        total = tl.zeros((ROWS, WIDTH), tl.float32)
        for start in range(0, width, WIDTH):
            place = start + column
            s, mask = _load_sum(
                x_row, residual_row, s_row, stream, counter, threshold, scale, place, width, here, DROPPED
            )
            tl.store(s_row + place[None, :], s.to(s_ptr.dtype.element_ty), mask=mask)
            if CENTRED:
                total += s
            else:
                total += s * s
        if CENTRED:
            mean = tl.sum(total, axis=1) / width
            total = tl.zeros((ROWS, WIDTH), tl.float32)
            for start in range(0, width, WIDTH):
                place = start + column
                s, mask = _load_sum(
                    x_row, residual_row, s_row, stream, counter, threshold, scale, place, width, here, DROPPED
                )
                s = tl.where(mask, s - mean[:, None], 0.0)
                total += s * s
        rstd = tl.rsqrt(tl.sum(total, axis=1) / width + eps)
        for start in range(0, width, WIDTH):
            place = start + column
            s, mask = _load_sum(
                x_row, residual_row, s_row, stream, counter, threshold, scale, place, width, here, DROPPED
            )
            if CENTRED:
                s -= mean[:, None]
            _store_result(
                y_row, s * rstd[:, None], weight_ptr, bias_ptr, place, width, mask, HAS_WEIGHT, HAS_BIAS
            )
    if CENTRED:
        tl.store(mean_ptr + row, mean, mask=here)
    tl.store(rstd_ptr + row, rstd, mask=here)


def normalise_sum(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dropped: Dropped,
    y: Tensor,
    s: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
) -> None:
    """Write y, the sum and the float32 statistics of its rows; RMS norm where there is no `mean`."""
    width = s.shape[-1]
    rows = rstd.numel()
    x_rows, residual_rows = nested_rows(x), nested_rows(residual)
    how = tuned("add_norm", configuration(width), s, width=width)
    launch(
        add_norm_kernel,
        (blocks(rows, how.rows),),
        x_rows.tensor,
        residual_rows.tensor,
        unit_stride(weight, s),
        unit_stride(bias, s),
        y,
        s,
        unit_stride(mean, rstd),
        rstd,
        unit_stride(dropped.position, s),
        rows,
        width,
        x_rows.inner,
        x_rows.outer_stride,
        x_rows.inner_stride,
        residual_rows.inner,
        residual_rows.outer_stride,
        residual_rows.inner_stride,
        eps,
        dropped.key,
        dropped.elements,
        *threshold_and_scale(dropped.p),
        NESTED=not (x_rows.even and residual_rows.even),
        CENTRED=mean is not None,
        DROPPED=dropped.position is not None,
        HAS_WEIGHT=weight is not None,
        HAS_BIAS=bias is not None,
        WHOLE=how.whole,
        ROWS=how.rows,
        WIDTH=how.width,
        num_warps=how.warps,
    )
