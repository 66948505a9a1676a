"""Reductions of losses as torch names them: none, sum and mean, in a fixed order and without atomics.

The kernel of a loss leaves one float32 sum a program; one more program adds those up in their order.
"""

# Kernel parameters have no Python types: mypy sees the functions that a host calls.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch
from .library import check_dtype, require

REDUCTIONS = ("none", "mean", "sum")  # in the order of ATen's numbers 0, 1, 2
SUM_BLOCK = 4096  # sums added at a time


@triton.jit(do_not_specialize=["size"])
def total_kernel(
    sums_ptr, counts_ptr, total_ptr, count_ptr, size, divisor, COUNTED: tl.constexpr, BLOCK: tl.constexpr
):
    """The total of `size` sums by the total of as many counts, or by `divisor`; 0 / 0 is not-a-number."""
    index = tl.arange(0, BLOCK)
    sums = tl.zeros((BLOCK,), tl.float32)
    counts = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, size, BLOCK):
        inside = start + index < size
        sums += tl.load(sums_ptr + start + index, mask=inside, other=0.0)
        if COUNTED:
            counts += tl.load(counts_ptr + start + index, mask=inside, other=0.0)
    total = tl.sum(sums, axis=0)
    if COUNTED:
        count = tl.sum(counts, axis=0)
        tl.store(count_ptr, count)
        total = total / count
    else:
        total = total / divisor
    tl.store(total_ptr, total.to(total_ptr.dtype.element_ty))


def launch_total(sums: Tensor, total: Tensor, divisor: float) -> None:
    """Write the total of the float32 sums by `divisor`, to a scalar of any dtype."""
    size = sums.shape[0]
    launch(
        total_kernel,
        (1,),
        sums,
        sums,
        total,
        total,
        size,
        divisor,
        COUNTED=False,
        BLOCK=SUM_BLOCK,
        num_warps=8,
    )


def launch_counted_total(sums: Tensor, counts: Tensor, total: Tensor, count: Tensor) -> None:
    """Write the total of the float32 counts, and the total of the sums by it.

    Counts are exact below 2^24, beyond that within a float32 rounding, as torch's are.
    """
    size = sums.shape[0]
    launch(
        total_kernel, (1,), sums, counts, total, count, size, 1.0, COUNTED=True, BLOCK=SUM_BLOCK, num_warps=8
    )


def check_reduction(name: str, reduction: str) -> None:
    """It is one that torch has."""
    require(reduction in REDUCTIONS, name, "reduction", f"be one of {', '.join(REDUCTIONS)}", reduction)


def check_loss_gradient(
    name: str, dloss: Tensor, shape: torch.Size, reduction: str, dtype: torch.dtype
) -> None:
    """The gradient has the shape of the loss: `shape`, or that of a scalar if it is reduced."""
    expected = tuple(shape) if reduction == "none" else ()
    fits = tuple(dloss.shape) == expected
    require(fits, name, "dloss", f"have the loss's shape {expected}", tuple(dloss.shape))
    check_dtype(name, "dloss", dloss, dtype)
