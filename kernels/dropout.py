"""Dropout by the bits of `keyed`: y = x * factor, dx = dy * factor.

The operator is its own backward. It keeps nothing but where it stands: the bits are made again.
"""

# Kernel parameters have no Python types: mypy sees the functions that a host calls.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from .keyed import check_keyed, keyed_factor, keyed_stream, reference_factor, threshold_and_scale
from .launch import blocks, launch
from .library import check_tensors, register, register_autograd
from .rows import Block
from .tuning import tuned

STATIC = Block(elements=1024, warps=4)


@triton.jit(do_not_specialize=["count", "key", "elements", "threshold"])
def dropout_kernel(x_ptr, y_ptr, position_ptr, count, key, elements, threshold, scale, BLOCK: tl.constexpr):
    """One block of y."""
    stream, first = keyed_stream(position_ptr, key, elements)
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + index, mask=index < count, other=0.0).to(tl.float32)
    y = x * keyed_factor(stream, first + index, threshold, scale)
    tl.store(y_ptr + index, y.to(y_ptr.dtype.element_ty), mask=index < count)


def launch_forward(x: Tensor, position: Tensor, key: int, elements: int, p: float) -> Tensor:
    """y, like x and contiguous."""
    y = empty_forward(x, position, key, elements, p)
    block = tuned("dropout", STATIC, x, count=y.numel())
    grid = (blocks(y.numel(), block.elements),)
    numbers = (y.numel(), key, elements, *threshold_and_scale(p))
    how = {"BLOCK": block.elements, "num_warps": block.warps}
    launch(dropout_kernel, grid, x.contiguous(), y, position, *numbers, **how)
    return y


def empty_forward(x: Tensor, position: Tensor, key: int, elements: int, p: float) -> Tensor:
    """y, not computed."""
    return x.new_empty(x.shape)


def reference_forward(x: Tensor, position: Tensor, key: int, elements: int, p: float) -> Tensor:
    """y in ATen."""
    factor = reference_factor(x, position, key, elements, p)
    return (x.to(factor.dtype) * factor).to(x.dtype).contiguous()


def check_forward(x: Tensor, position: Tensor, key: int, elements: int, p: float) -> None:
    """x of any shape; the rest as `keyed` says."""
    check_tensors("dropout", x=x)
    check_keyed("dropout", position, elements, p, x)


dropout = register(
    "dropout(Tensor x, Tensor position, int key, int elements, float p) -> Tensor",
    check=check_forward,
    kernel=launch_forward,
    reference=reference_forward,
    fake=empty_forward,
)


class _Dropout(torch.autograd.Function):
    """Saves the position alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, position: Tensor, key: int, elements: int, p: float) -> Tensor:
        ctx.save_for_backward(position)
        ctx.numbers = key, elements, p
        y: Tensor = dropout(x, position, key, elements, p)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return dropout(dy, *ctx.saved_tensors, *ctx.numbers), None, None, None, None


register_autograd(dropout, _Dropout)
