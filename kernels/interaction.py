"""The pairwise-dot interaction of DLRM, with the dense features' rows in front.

For the rows x[0], ..., x[F - 1] of a sample, of which the first `dense` are dense features
(arXiv 1906.00091, §2.1.3):

    out = [x[0], ..., x[dense - 1], x[1].x[0], x[2].x[0], x[2].x[1], x[3].x[0], ...]

that is the lower triangle of x x^T without its diagonal, row by row. With G the gradients of the products,
put on both sides of the diagonal: dx = G x, plus the gradients of the dense rows as they are.

Neither the F x F products nor their gradients are written out in full. One program a sample and tile, sums in
float32 in one order: a sample's result does not depend on how many samples there are.
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

from .bags import wide_dtype
from .launch import blocks, launch, power_of_two
from .library import check_dtype, check_tensors, register, register_autograd, require
from .product import precision
from .tuning import tuned


@dataclass(frozen=True, slots=True)
class Tile:
    """Features and elements of them that one program takes at a time."""

    features: int
    width: int
    warps: int


def configuration(features: int, width: int) -> Tile:
    """A function of a sample's shape alone, so that its sums have one order whatever the batch."""
    block = max(16, min(64, power_of_two(features)))
    return Tile(block, max(16, min(64, power_of_two(width))), {16: 1, 32: 2, 64: 8}[block])


@triton.jit(do_not_specialize=["samples"])
def interaction_forward_kernel(
    x_ptr,
    out_ptr,
    samples,
    features,
    width,
    dense,
    x_stride,
    x_feature_stride,
    out_stride,
    PRECISION: tl.constexpr,
    WHOLE: tl.constexpr,
    FEATURES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """The products of two blocks of features of one sample; blocks on the diagonal copy x too."""
    sample = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * FEATURES + tl.arange(0, FEATURES)
    other = tl.program_id(2) * FEATURES + tl.arange(0, FEATURES)
    if tl.program_id(2) <= tl.program_id(1):
        x = x_ptr + sample * x_stride
        out = out_ptr + sample * out_stride
        products = tl.zeros((FEATURES, FEATURES), tl.float32)
        for start in range(0, width, WIDTH):
            column = start + tl.arange(0, WIDTH)
            mask = (row < features)[:, None] & (column < width)[None, :]
            a = tl.load(x + row.to(tl.int64)[:, None] * x_feature_stride + column[None, :], mask, other=0.0)
            if WHOLE:
                b = a
            else:
                mask = (other < features)[:, None] & (column < width)[None, :]
                offset = other.to(tl.int64)[:, None] * x_feature_stride
                b = tl.load(x + offset + column[None, :], mask, other=0.0)
            products = tl.dot(a, tl.trans(b), products, input_precision=PRECISION)
            if tl.program_id(2) == tl.program_id(1):
                mask = (row < dense)[:, None] & (column < width)[None, :]
                tl.store(out + row.to(tl.int64)[:, None] * width + column[None, :], a, mask=mask)
        i, j = row.to(tl.int64)[:, None], other[None, :]
        target = out + tl.cast(dense, tl.int64) * width + i * (i - 1) // 2 + j
        tl.store(target, products.to(out_ptr.dtype.element_ty), mask=(j < i) & (i < features))


@triton.jit(do_not_specialize=["samples"])
def interaction_backward_kernel(
    dy_ptr,
    x_ptr,
    dx_ptr,
    samples,
    features,
    width,
    dense,
    dy_stride,
    x_stride,
    x_feature_stride,
    PRECISION: tl.constexpr,
    FEATURES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """dx of a block of features and columns of one sample."""
    sample = tl.program_id(0).to(tl.int64)
    row = (tl.program_id(1) * FEATURES + tl.arange(0, FEATURES)).to(tl.int64)
    column = tl.program_id(2) * WIDTH + tl.arange(0, WIDTH)
    dy = dy_ptr + sample * dy_stride
    x = x_ptr + sample * x_stride
    triangle = dy + tl.cast(dense, tl.int64) * width
    mask = (row < dense)[:, None] & (column < width)[None, :]
    dx = tl.load(dy + row[:, None] * width + column[None, :], mask=mask, other=0.0).to(tl.float32)
    for start in range(0, features, FEATURES):
        other = (start + tl.arange(0, FEATURES)).to(tl.int64)
        i = tl.maximum(row[:, None], other[None, :])
        j = tl.minimum(row[:, None], other[None, :])
        g = tl.load(triangle + i * (i - 1) // 2 + j, mask=(i != j) & (i < features), other=0.0)
        mask = (other < features)[:, None] & (column < width)[None, :]
        value = tl.load(x + other[:, None] * x_feature_stride + column[None, :], mask=mask, other=0.0)
        dx = tl.dot(g, value, dx, input_precision=PRECISION)
    mask = (row < features)[:, None] & (column < width)[None, :]
    target = dx_ptr + (sample * features + row)[:, None] * width + column[None, :]
    tl.store(target, dx.to(dx_ptr.dtype.element_ty), mask=mask)


def _samples(x: Tensor) -> Tensor:
    """x as [samples, features, width], the last dimension contiguous; copied only if strides force it."""
    count = 1
    for size in x.shape[:-2]:
        count *= size
    samples = x.reshape(count, *x.shape[-2:])
    return samples if x.shape[-1] <= 1 or samples.stride(2) == 1 else samples.contiguous()


def launch_forward(x: Tensor, dense: int) -> Tensor:
    """out."""
    out = empty_forward(x, dense)
    samples = _samples(x)
    count, features, width = samples.shape
    tile = tuned("interaction", configuration(features, width), x, features=features, width=width)
    rows = blocks(features, tile.features)
    launch(
        interaction_forward_kernel,
        (count, rows, rows),
        samples,
        out,
        count,
        features,
        width,
        dense,
        *samples.stride()[:2],
        out.shape[-1],
        PRECISION=precision(),
        WHOLE=rows == 1,
        FEATURES=tile.features,
        WIDTH=tile.width,
        num_warps=tile.warps,
    )
    return out


def launch_backward(dy: Tensor, x: Tensor, dense: int) -> Tensor:
    """dx."""
    dx = empty_backward(dy, x, dense)
    samples = _samples(x)
    count, features, width = samples.shape
    rows = dy.reshape(count, dy.shape[-1])
    if rows.shape[1] > 1 and rows.stride(1) != 1:
        rows = rows.contiguous()
    tile = tuned("interaction", configuration(features, width), x, features=features, width=width)
    launch(
        interaction_backward_kernel,
        (count, blocks(features, tile.features), blocks(width, tile.width)),
        rows,
        samples,
        dx,
        count,
        features,
        width,
        dense,
        rows.stride(0),
        *samples.stride()[:2],
        PRECISION=precision(),
        FEATURES=tile.features,
        WIDTH=tile.width,
        num_warps=tile.warps,
    )
    return dx


def out_width(x: Tensor, dense: int) -> int:
    """Elements of a sample's result."""
    features: int = x.shape[-2]
    return dense * x.shape[-1] + features * (features - 1) // 2


def empty_forward(x: Tensor, dense: int) -> Tensor:
    """out, not computed."""
    return x.new_empty((*x.shape[:-2], out_width(x, dense)))


def empty_backward(dy: Tensor, x: Tensor, dense: int) -> Tensor:
    """dx, not computed."""
    return x.new_empty(x.shape)


def _triangle(x: Tensor) -> tuple[Tensor, Tensor]:
    i, j = torch.tril_indices(x.shape[-2], x.shape[-2], -1, device=x.device)
    return i, j


def reference_forward(x: Tensor, dense: int) -> Tensor:
    """The forward operator in ATen."""
    wide = _samples(x).to(wide_dtype(x))
    i, j = _triangle(x)
    products = torch.bmm(wide, wide.transpose(1, 2))[:, i, j].to(x.dtype)
    out = torch.cat([_samples(x)[:, :dense].flatten(1), products], dim=-1)
    return out.view((*x.shape[:-2], out.shape[-1]))


def reference_backward(dy: Tensor, x: Tensor, dense: int) -> Tensor:
    """dx in ATen."""
    wide = _samples(x).to(wide_dtype(x))
    count, features, width = wide.shape
    rows = dy.reshape(count, dy.shape[-1]).to(wide.dtype)
    i, j = _triangle(x)
    g = wide.new_zeros((count, features, features))
    g[:, i, j] = rows[:, dense * width :]
    dx = torch.bmm(g + g.transpose(1, 2), wide)
    dx[:, :dense] += rows[:, : dense * width].view(count, dense, width)
    return dx.to(x.dtype).view(x.shape)


def _check_x(name: str, x: Tensor, dense: int) -> None:
    require(x.dim() >= 2, name, "x", "have at least two dimensions, features and width", tuple(x.shape))
    require(x.shape[-2] >= 1, name, "x", "have at least one feature", tuple(x.shape))
    require(0 <= dense <= x.shape[-2], name, "dense", f"be from 0 to {x.shape[-2]}, x's features", dense)


def check_forward(x: Tensor, dense: int) -> None:
    """x [..., features, width], of which the first `dense` features are copied too."""
    name = "interaction"
    check_tensors(name, x=x)
    _check_x(name, x, dense)


def check_backward(dy: Tensor, x: Tensor, dense: int) -> None:
    """dy is like the result of x."""
    name = "interaction_backward"
    check_tensors(name, dy=dy, x=x)
    _check_x(name, x, dense)
    shape = (*x.shape[:-2], out_width(x, dense))
    require(tuple(dy.shape) == shape, name, "dy", f"have the result's shape {shape}", tuple(dy.shape))
    check_dtype(name, "dy", dy, x.dtype)


interaction = register(
    "interaction(Tensor x, int dense) -> Tensor",
    check=check_forward,
    kernel=launch_forward,
    reference=reference_forward,
    fake=empty_forward,
)
interaction_backward = register(
    "interaction_backward(Tensor dy, Tensor x, int dense) -> Tensor",
    check=check_backward,
    kernel=launch_backward,
    reference=reference_backward,
    fake=empty_backward,
)


class _Interaction(torch.autograd.Function):
    """Saves x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dense: int) -> Tensor:
        out: Tensor = interaction(x, dense)
        ctx.save_for_backward(x)
        ctx.dense = dense
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return interaction_backward(dy, x, ctx.dense), None


register_autograd(interaction, _Interaction)
