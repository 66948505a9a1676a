"""Layer normalisation over the last dimension.

    y = (x - mean) * rstd * weight + bias,   rstd = 1 / sqrt(variance + eps)

With g = dy * weight and n = (x - mean) * rstd, averages taken over the row:

    dx = rstd * (g - average(g) - n * average(g * n)),   dweight = sum over rows of dy * n,   dbias = of dy

Statistics and sums are float32 whatever the dtype of x. The gradient of x and those of weight and bias are
separate operators, so a graph that needs one of them does not run the other. A row's result does not depend
on how many rows there are; the sums over rows are made in a fixed order, without atomics.
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

from .launch import blocks, launch, power_of_two
from .library import as_rows, check_dtype, check_tensors, register, register_autograd, require

WHOLE_ROW = 16384  # elements of the widest row that is kept in registers
SUM_ROWS, SUM_COLUMNS, SUM_GROUPS = 16, 128, 64  # tile of the sum over rows, and its most parts


@dataclass(frozen=True, slots=True)
class Configuration:
    """How a row is laid on a program: `rows` rows of `width` columns at a time, in a loop if not `whole`."""

    rows: int
    width: int
    whole: bool
    warps: int


def configuration(width: int) -> Configuration:
    """A function of the width alone, so that a row's sums have one order whatever the batch."""
    if width > WHOLE_ROW:
        return Configuration(1, 4096, False, 8)
    block = power_of_two(width)
    rows = max(1, min(16, 1024 // block))
    return Configuration(rows, block, True, max(1, min(16, rows * block // 512)))


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
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WHOLE: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One block of rows: statistics in two passes (mean first, then squares of what is left), then y."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    here = row < rows
    x_row = x_ptr + row[:, None] * x_stride
    y_row = y_ptr + row[:, None] * width
    column = tl.arange(0, WIDTH)
    if WHOLE:
        inside = column < width
        mask = here[:, None] & inside[None, :]
        x = tl.load(x_row + column[None, :], mask=mask, other=0.0).to(tl.float32)
        mean = tl.sum(x, axis=1) / width
        centred = tl.where(mask, x - mean[:, None], 0.0)
        rstd = tl.rsqrt(tl.sum(centred * centred, axis=1) / width + eps)
        y = centred * rstd[:, None]
        if HAS_WEIGHT:
            y *= tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)[None, :]
        if HAS_BIAS:
            y += tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)[None, :]
        tl.store(y_row + column[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)
    else:
        total = tl.zeros((ROWS, WIDTH), tl.float32)
        for start in range(0, width, WIDTH):
            mask = here[:, None] & (start + column < width)[None, :]
            total += tl.load(x_row + (start + column)[None, :], mask=mask, other=0.0).to(tl.float32)
        mean = tl.sum(total, axis=1) / width
        total = tl.zeros((ROWS, WIDTH), tl.float32)
        for start in range(0, width, WIDTH):
            mask = here[:, None] & (start + column < width)[None, :]
            x = tl.load(x_row + (start + column)[None, :], mask=mask, other=0.0).to(tl.float32)
            centred = tl.where(mask, x - mean[:, None], 0.0)
            total += centred * centred
        rstd = tl.rsqrt(tl.sum(total, axis=1) / width + eps)
        for start in range(0, width, WIDTH):
            inside = start + column < width
            mask = here[:, None] & inside[None, :]
            x = tl.load(x_row + (start + column)[None, :], mask=mask, other=0.0).to(tl.float32)
            y = (x - mean[:, None]) * rstd[:, None]
            if HAS_WEIGHT:
                y *= tl.load(weight_ptr + start + column, mask=inside, other=0.0).to(tl.float32)[None, :]
            if HAS_BIAS:
                y += tl.load(bias_ptr + start + column, mask=inside, other=0.0).to(tl.float32)[None, :]
            tl.store(y_row + (start + column)[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(mean_ptr + row, mean, mask=here)
    tl.store(rstd_ptr + row, rstd, mask=here)


@triton.jit
def _load_gradient(dy_row, x_row, weight_ptr, mean, rstd, column, width, here, HAS_WEIGHT: tl.constexpr):
    """g = dy * weight, zero outside, and the normalised x of a block of rows and columns."""
    inside = column < width
    mask = here[:, None] & inside[None, :]
    g = tl.load(dy_row + column[None, :], mask=mask, other=0.0).to(tl.float32)
    if HAS_WEIGHT:
        g *= tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    x = tl.load(x_row + column[None, :], mask=mask, other=0.0).to(tl.float32)
    normal = (x - mean[:, None]) * rstd[:, None]
    return g, normal, mask


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
    mean = tl.load(mean_ptr + row, mask=here, other=0.0)
    rstd = tl.load(rstd_ptr + row, mask=here, other=0.0)
    column = tl.arange(0, WIDTH)
    if WHOLE:
        g, normal, mask = _load_gradient(
            dy_row, x_row, weight_ptr, mean, rstd, column, width, here, HAS_WEIGHT
        )
        average = tl.sum(g, axis=1) / width
        slope = tl.sum(g * normal, axis=1) / width
        dx = rstd[:, None] * (g - average[:, None] - normal * slope[:, None])
        tl.store(dx_row + column[None, :], dx.to(dx_ptr.dtype.element_ty), mask=mask)
    else:
        total = tl.zeros((ROWS, WIDTH), tl.float32)
        product = tl.zeros((ROWS, WIDTH), tl.float32)
        for start in range(0, width, WIDTH):
            g, normal, mask = _load_gradient(
                dy_row, x_row, weight_ptr, mean, rstd, start + column, width, here, HAS_WEIGHT
            )
            total += g
            product += g * normal
        average = tl.sum(total, axis=1) / width
        slope = tl.sum(product, axis=1) / width
        for start in range(0, width, WIDTH):
            g, normal, mask = _load_gradient(
                dy_row, x_row, weight_ptr, mean, rstd, start + column, width, here, HAS_WEIGHT
            )
            dx = rstd[:, None] * (g - average[:, None] - normal * slope[:, None])
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
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Sums over `tiles` * ROWS rows: partial[0, group] is of dweight, partial[1, group] of dbias."""
    group = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = column < width
    dweight = tl.zeros((ROWS, WIDTH), tl.float32)
    dbias = tl.zeros((ROWS, WIDTH), tl.float32)
    for tile in range(0, tiles):
        row = (group * tiles + tile) * ROWS + tl.arange(0, ROWS)
        here = row < rows
        mask = here[:, None] & inside[None, :]
        mean = tl.load(mean_ptr + row, mask=here, other=0.0)
        rstd = tl.load(rstd_ptr + row, mask=here, other=0.0)
        x = tl.load(x_ptr + row[:, None] * x_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + row[:, None] * dy_stride + column[None, :], mask=mask, other=0.0)
        dbias += dy.to(tl.float32)
        dweight += dy.to(tl.float32) * (x - mean[:, None]) * rstd[:, None]
    out = partial_ptr + group * width + column
    tl.store(out, tl.sum(dweight, axis=0), mask=inside)
    tl.store(out + tl.num_programs(0).to(tl.int64) * width, tl.sum(dbias, axis=0), mask=inside)


@triton.jit
def finish_weight_kernel(
    partial_ptr, dweight_ptr, dbias_ptr, groups, width, GROUPS: tl.constexpr, WIDTH: tl.constexpr
):
    """The groups' sums added up in their order."""
    column = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    inside = column < width
    group = tl.arange(0, GROUPS)
    mask = (group < groups)[:, None] & inside[None, :]
    offset = group[:, None] * width + column[None, :]
    dweight = tl.sum(tl.load(partial_ptr + offset, mask=mask, other=0.0), axis=0)
    dbias = tl.sum(tl.load(partial_ptr + groups * width + offset, mask=mask, other=0.0), axis=0)
    tl.store(dweight_ptr + column, dweight.to(dweight_ptr.dtype.element_ty), mask=inside)
    tl.store(dbias_ptr + column, dbias.to(dbias_ptr.dtype.element_ty), mask=inside)


def launch_forward(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Any:
    """(y, mean, rstd): y like x, the statistics float32 with x's leading shape."""
    y, mean, rstd = empty_forward(x, weight, bias, eps)
    width = x.shape[-1]
    rows = as_rows(x, width)
    how = configuration(width)
    launch(
        forward_kernel,
        (blocks(rows.shape[0], how.rows),),
        rows,
        _unit_stride(weight, rows),
        _unit_stride(bias, rows),
        y,
        mean,
        rstd,
        rows.shape[0],
        width,
        rows.stride(0),
        eps,
        HAS_WEIGHT=weight is not None,
        HAS_BIAS=bias is not None,
        WHOLE=how.whole,
        ROWS=how.rows,
        WIDTH=how.width,
        num_warps=how.warps,
    )
    return y, mean, rstd


def launch_backward_input(dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None) -> Tensor:
    """dx, like x."""
    dx = empty_backward_input(dy, x, mean, rstd, weight)
    width = x.shape[-1]
    dy_rows, x_rows = as_rows(dy, width), as_rows(x, width)
    how = configuration(width)
    launch(
        backward_input_kernel,
        (blocks(x_rows.shape[0], how.rows),),
        dy_rows,
        x_rows,
        mean.contiguous(),
        rstd.contiguous(),
        _unit_stride(weight, x_rows),
        dx,
        x_rows.shape[0],
        width,
        dy_rows.stride(0),
        x_rows.stride(0),
        HAS_WEIGHT=weight is not None,
        WHOLE=how.whole,
        ROWS=how.rows,
        WIDTH=how.width,
        num_warps=how.warps,
    )
    return dx


def launch_backward_weight(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(dweight, dbias) of the given dtype."""
    width = x.shape[-1]
    dy_rows, x_rows = as_rows(dy, width), as_rows(x, width)
    rows = x_rows.shape[0]
    dweight, dbias = empty_backward_weight(dy, x, mean, rstd, dtype)
    if rows == 0:
        return dweight.zero_(), dbias.zero_()
    tiles = blocks(blocks(rows, SUM_ROWS), SUM_GROUPS)
    groups = blocks(rows, tiles * SUM_ROWS)
    partial = x.new_empty((2, groups, width), dtype=torch.float32)
    launch(
        backward_weight_kernel,
        (groups, blocks(width, SUM_COLUMNS)),
        dy_rows,
        x_rows,
        mean.contiguous(),
        rstd.contiguous(),
        partial,
        rows,
        width,
        dy_rows.stride(0),
        x_rows.stride(0),
        tiles,
        ROWS=SUM_ROWS,
        WIDTH=SUM_COLUMNS,
        num_warps=4,
    )
    launch(
        finish_weight_kernel,
        (blocks(width, SUM_COLUMNS),),
        partial,
        dweight,
        dbias,
        groups,
        width,
        GROUPS=SUM_GROUPS,
        WIDTH=SUM_COLUMNS,
        num_warps=4,
    )
    return dweight, dbias


def _unit_stride(vector: Tensor | None, stand_in: Tensor) -> Tensor:
    """The vector with its elements next to each other; where there is none a pointer that is not read."""
    return stand_in if vector is None else vector.contiguous()


def statistics_dtype(x: Tensor) -> torch.dtype:
    """float32, or float64 where the reference computes in it."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def empty_forward(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Any:
    """The results of the forward operator, not computed."""
    statistics = [x.new_empty(x.shape[:-1], dtype=statistics_dtype(x)) for _ in range(2)]
    return x.new_empty(x.shape), *statistics


def empty_backward_input(dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None) -> Tensor:
    """The gradient of x, not computed."""
    return x.new_empty(x.shape)


def empty_backward_weight(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The gradients of weight and bias, not computed."""
    return x.new_empty(x.shape[-1:], dtype=dtype), x.new_empty(x.shape[-1:], dtype=dtype)


def _wide(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype)


def reference_forward(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Any:
    """The forward operator in ATen, in the dtype of the statistics."""
    wide = statistics_dtype(x)
    shape = [x.shape[-1]]
    y, mean, rstd = torch.native_layer_norm(
        x.to(wide).contiguous(), shape, _wide(weight, wide), _wide(bias, wide), eps
    )
    return y.to(x.dtype), mean.view(x.shape[:-1]), rstd.view(x.shape[:-1])


def _reference_backward(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, mask: list[bool]
) -> Any:
    wide = statistics_dtype(x)
    return torch.ops.aten.native_layer_norm_backward.default(
        dy.to(wide).contiguous(),
        x.to(wide).contiguous(),
        [x.shape[-1]],
        mean[..., None],
        rstd[..., None],
        _wide(weight, wide),
        mean.new_ones(x.shape[-1]),  # the bias: its values are not read, its presence is
        mask,
    )


def reference_backward_input(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None
) -> Tensor:
    """The gradient of x in ATen."""
    dx: Tensor = _reference_backward(dy, x, mean, rstd, weight, [True, False, False])[0]
    return dx.to(x.dtype)


def reference_backward_weight(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The gradients of weight and bias in ATen."""
    ones = mean.new_ones(x.shape[-1])
    _, dweight, dbias = _reference_backward(dy, x, mean, rstd, ones, [False, True, True])
    return dweight.to(dtype), dbias.to(dtype)


def check_forward(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> None:
    """weight and bias have the width of x and both either its dtype or float32."""
    name = "layer_norm"
    check_tensors(name, x=x, weight=weight, bias=bias)
    require(x.dim() >= 1, name, "x", "have at least one dimension", tuple(x.shape))
    require(x.shape[-1] >= 1, name, "x", "be at least one element wide", tuple(x.shape))
    for key, vector in (("weight", weight), ("bias", bias)):
        if vector is not None:
            rule = f"have shape ({x.shape[-1]},), the width of x"
            fits = vector.dim() == 1 and vector.shape[0] == x.shape[-1]
            require(fits, name, key, rule, tuple(vector.shape))
            check_dtype(name, key, vector, x.dtype, statistics_dtype(x))
    if weight is not None and bias is not None:
        check_dtype(name, "bias", bias, weight.dtype)


def _check_gradient(name: str, dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor) -> None:
    require(dy.shape == x.shape, name, "dy", f"have x's shape {tuple(x.shape)}", tuple(dy.shape))
    check_dtype(name, "dy", dy, x.dtype)
    for key, statistic in (("mean", mean), ("rstd", rstd)):
        rule = f"have x's leading shape {tuple(x.shape[:-1])}"
        require(statistic.shape == x.shape[:-1], name, key, rule, tuple(statistic.shape))
        check_dtype(name, key, statistic, statistics_dtype(x))


def check_backward_input(dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None) -> None:
    """dy is like x, the statistics have its leading shape."""
    name = "layer_norm_backward_input"
    check_tensors(name, dy=dy, x=x, mean=mean, rstd=rstd, weight=weight)
    _check_gradient(name, dy, x, mean, rstd)


def check_backward_weight(dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, dtype: torch.dtype) -> None:
    """dy is like x, the statistics have its leading shape."""
    name = "layer_norm_backward_weight"
    check_tensors(name, dy=dy, x=x, mean=mean, rstd=rstd)
    _check_gradient(name, dy, x, mean, rstd)


layer_norm_forward = register(
    "layer_norm_forward(Tensor x, Tensor? weight, Tensor? bias, float eps)"
    " -> (Tensor y, Tensor mean, Tensor rstd)",
    check=check_forward,
    kernel=launch_forward,
    reference=reference_forward,
    fake=empty_forward,
)
layer_norm_backward_input = register(
    "layer_norm_backward_input(Tensor dy, Tensor x, Tensor mean, Tensor rstd, Tensor? weight) -> Tensor",
    check=check_backward_input,
    kernel=launch_backward_input,
    reference=reference_backward_input,
    fake=empty_backward_input,
)
layer_norm_backward_weight = register(
    "layer_norm_backward_weight(Tensor dy, Tensor x, Tensor mean, Tensor rstd, ScalarType dtype)"
    " -> (Tensor dweight, Tensor dbias)",
    check=check_backward_weight,
    kernel=launch_backward_weight,
    reference=reference_backward_weight,
    fake=empty_backward_weight,
)
layer_norm = register(
    "layer_norm(Tensor x, Tensor? weight, Tensor? bias, float eps) -> Tensor",
    check=check_forward,
    kernel=lambda x, weight, bias, eps: launch_forward(x, weight, bias, eps)[0],
    reference=lambda x, weight, bias, eps: reference_forward(x, weight, bias, eps)[0],
    fake=lambda x, weight, bias, eps: empty_forward(x, weight, bias, eps)[0],
)


class _LayerNorm(torch.autograd.Function):
    """Saves x and two numbers a row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
        y: Tensor
        y, mean, rstd = layer_norm_forward(x, weight, bias, eps)
        ctx.save_for_backward(x, mean, rstd, weight)
        parameters = [t for t in (weight, bias) if t is not None]
        ctx.dtype = parameters[0].dtype if parameters else x.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, rstd, weight = ctx.saved_tensors
        dx = dweight = dbias = None
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        if needs_x:
            dx = layer_norm_backward_input(dy, x, mean, rstd, weight)
        if needs_weight or needs_bias:
            dweight, dbias = layer_norm_backward_weight(dy, x, mean, rstd, ctx.dtype)
        return dx, dweight if needs_weight else None, dbias if needs_bias else None, None


register_autograd(layer_norm, _LayerNorm)
