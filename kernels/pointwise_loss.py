"""Losses of single elements: mean squared error and binary cross entropy with logits, reduced as torch does.

    mse: loss = (x - t)^2,                  dx = dloss * 2 * (x - t),       dt = -dx
    bce: loss = (1 - t) * x - log p,        dx = dloss * (p - t),           dt = -dloss * x

with p = sigmoid(x) and log p = min(x, 0) - log(1 + exp(-abs(x))).

Backward reads input and target again. A gradient made in the forward would move as many bytes in all, since
it is read and written once more to multiply it by the gradient of the loss, and would be held in between.

Input and target have one shape and dtype and are copied where they are not contiguous. The weights and
positive weights of torch's binary cross entropy are left to torch.
"""

# Kernel parameters have no Python types: mypy sees the functions that a host calls.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from .launch import blocks, launch
from .library import check_dtype, check_tensors, register, register_autograd, require
from .reduction import REDUCTIONS, check_loss_gradient, check_reduction, launch_total
from .rows import Block, statistics_dtype
from .tuning import tuned

STATIC = Block(elements=2048, warps=4)  # held by a program at a time
SUMS = 1024  # most programs of a reduced loss

# The codes that kernels get.
MSE, BCE = 0, 1


@triton.jit
def _log1p(e):
    """log(1 + e) for e from 0 to 1, within some units in the last place: a logarithm of 1 + e has lost e."""
    s = e / (2.0 + e)
    q = s * s  # at most 1 / 9, so that the next term of the series is below 2^-25
    series = 1.0 / 13 + q * (1.0 / 15)
    series = 1.0 / 9 + q * (1.0 / 11 + q * series)
    series = 1.0 + q * (1.0 / 3 + q * (1.0 / 5 + q * (1.0 / 7 + q * series)))
    return 2.0 * s * series


@triton.jit(do_not_specialize=["size", "tiles"])
def pointwise_loss_kernel(
    input_ptr,
    target_ptr,
    loss_ptr,
    size,
    tiles,
    LOSS: tl.constexpr,
    REDUCED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The losses of `tiles` * BLOCK elements, or their sum."""
    first = tl.program_id(0).to(tl.int64) * tiles * BLOCK
    total = tl.zeros((BLOCK,), tl.float32)
    for tile in range(0, tiles):
        index = first + tile * BLOCK + tl.arange(0, BLOCK)
        inside = index < size
        x = tl.load(input_ptr + index, mask=inside, other=0.0).to(tl.float32)
        t = tl.load(target_ptr + index, mask=inside, other=0.0).to(tl.float32)
        if LOSS == 0:
            loss = (x - t) * (x - t)
        else:
            # the first two cancel exactly for a confident logit of a target 0 or 1, before the small one
            loss = ((1.0 - t) * x - tl.where(x > 0, 0.0, x)) + _log1p(tl.exp(-tl.abs(x)))
        if REDUCED:
            total += tl.where(inside, loss, 0.0)
        else:
            tl.store(loss_ptr + index, loss.to(loss_ptr.dtype.element_ty), mask=inside)
    if REDUCED:
        tl.store(loss_ptr + tl.program_id(0), tl.sum(total, axis=0))


@triton.jit(do_not_specialize=["size"])
def pointwise_loss_backward_kernel(
    dloss_ptr,
    input_ptr,
    target_ptr,
    dinput_ptr,
    size,
    divisor,
    LOSS: tl.constexpr,
    REDUCED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The gradient of the input."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < size
    x = tl.load(input_ptr + index, mask=inside, other=0.0).to(tl.float32)
    t = tl.load(target_ptr + index, mask=inside, other=0.0).to(tl.float32)
    if REDUCED:
        scale = tl.load(dloss_ptr).to(tl.float32) / divisor
    else:
        scale = tl.load(dloss_ptr + index, mask=inside, other=0.0).to(tl.float32)
    if LOSS == 0:
        dinput = 2.0 * (x - t) * scale
    else:
        dinput = (tl.sigmoid(x) - t) * scale
    tl.store(dinput_ptr + index, dinput.to(dinput_ptr.dtype.element_ty), mask=inside)


def launch_forward(code: int, input: Tensor, target: Tensor, reduction: str) -> Tensor:
    """The loss, of the input's dtype: a scalar, or like the input for reduction none."""
    loss = empty_forward(input, target, reduction)
    size, reduced = input.numel(), reduction != "none"
    block = tuned("pointwise_loss", STATIC, input)
    tiles = blocks(blocks(size, block.elements), SUMS) if reduced else 1
    programs = blocks(size, tiles * block.elements) if size else 0
    out = input.new_empty((programs,), dtype=torch.float32) if reduced else loss
    launch(
        pointwise_loss_kernel,
        (programs,),
        input.contiguous(),
        target.contiguous(),
        out,
        size,
        tiles,
        LOSS=code,
        REDUCED=reduced,
        BLOCK=block.elements,
        num_warps=block.warps,
    )
    if reduced:
        launch_total(out, loss, float(size) if reduction == "mean" else 1.0)
    return loss


def launch_backward(code: int, dloss: Tensor, input: Tensor, target: Tensor, reduction: str) -> Tensor:
    """The gradient of the input."""
    dinput = empty_backward(dloss, input, target, reduction)
    size = input.numel()
    block = tuned("pointwise_loss", STATIC, input)
    launch(
        pointwise_loss_backward_kernel,
        (blocks(size, block.elements),),
        dloss.contiguous(),
        input.contiguous(),
        target.contiguous(),
        dinput,
        size,
        float(size) if reduction == "mean" else 1.0,
        LOSS=code,
        REDUCED=reduction != "none",
        BLOCK=block.elements,
        num_warps=block.warps,
    )
    return dinput


def empty_forward(input: Tensor, target: Tensor, reduction: str) -> Tensor:
    """The loss, not computed."""
    return input.new_empty(input.shape if reduction == "none" else ())


def empty_backward(dloss: Tensor, input: Tensor, target: Tensor, reduction: str) -> Tensor:
    """The gradient of the input, not computed."""
    return input.new_empty(input.shape)


def _like(result: Tensor, input: Tensor) -> Tensor:
    return result.to(input.dtype).contiguous()


def reference_mse(input: Tensor, target: Tensor, reduction: str) -> Tensor:
    """The squared error in ATen."""
    wide = statistics_dtype(input)
    loss = torch.ops.aten.mse_loss.default(input.to(wide), target.to(wide), REDUCTIONS.index(reduction))
    return _like(loss, input)


def reference_bce(input: Tensor, target: Tensor, reduction: str) -> Tensor:
    """The binary cross entropy in ATen."""
    wide = statistics_dtype(input)
    loss = torch.ops.aten.binary_cross_entropy_with_logits.default(
        input.to(wide), target.to(wide), None, None, REDUCTIONS.index(reduction)
    )
    return _like(loss, input)


def reference_mse_backward(dloss: Tensor, input: Tensor, target: Tensor, reduction: str) -> Tensor:
    """The gradient of the input in ATen."""
    wide = statistics_dtype(input)
    dinput = torch.ops.aten.mse_loss_backward.default(
        dloss.to(wide), input.to(wide), target.to(wide), REDUCTIONS.index(reduction)
    )
    return _like(dinput, input)


def reference_bce_backward(dloss: Tensor, input: Tensor, target: Tensor, reduction: str) -> Tensor:
    """The gradient of the input in ATen."""
    wide = statistics_dtype(input)
    dinput = (torch.sigmoid(input.to(wide)) - target.to(wide)) * dloss.to(wide)
    if reduction == "mean":
        dinput = dinput / input.numel()
    return _like(dinput, input)


def check_forward(name: str, input: Tensor, target: Tensor, reduction: str) -> None:
    """One shape and dtype, and a reduction that torch has."""
    check_tensors(name, input=input, target=target)
    rule = f"have input's shape {tuple(input.shape)}"
    require(target.shape == input.shape, name, "target", rule, tuple(target.shape))
    check_dtype(name, "target", target, input.dtype)
    check_reduction(name, reduction)


def check_backward(name: str, dloss: Tensor, input: Tensor, target: Tensor, reduction: str) -> None:
    """As in the forward, and dloss like the loss."""
    check_forward(name, input, target, reduction)
    check_tensors(name, input=input, dloss=dloss)
    check_loss_gradient(name, dloss, input.shape, reduction, input.dtype)


mse_loss_backward = register(
    "mse_loss_backward(Tensor dloss, Tensor input, Tensor target, str reduction) -> Tensor",
    check=partial(check_backward, "mse_loss_backward"),
    kernel=partial(launch_backward, MSE),
    reference=reference_mse_backward,
    fake=empty_backward,
)
mse_loss = register(
    "mse_loss(Tensor input, Tensor target, str reduction) -> Tensor",
    check=partial(check_forward, "mse_loss"),
    kernel=partial(launch_forward, MSE),
    reference=reference_mse,
    fake=empty_forward,
)
binary_cross_entropy_with_logits_backward = register(
    "binary_cross_entropy_with_logits_backward(Tensor dloss, Tensor input, Tensor target, str reduction)"
    " -> Tensor",
    check=partial(check_backward, "binary_cross_entropy_with_logits_backward"),
    kernel=partial(launch_backward, BCE),
    reference=reference_bce_backward,
    fake=empty_backward,
)
binary_cross_entropy_with_logits = register(
    "binary_cross_entropy_with_logits(Tensor input, Tensor target, str reduction) -> Tensor",
    check=partial(check_forward, "binary_cross_entropy_with_logits"),
    kernel=partial(launch_forward, BCE),
    reference=reference_bce,
    fake=empty_forward,
)


class _MSELoss(torch.autograd.Function):
    """Saves input and target; the error is odd in them, so one operator makes both gradients."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, target: Tensor, reduction: str) -> Tensor:
        ctx.save_for_backward(input, target)
        ctx.reduction = reduction
        loss: Tensor = mse_loss(input, target, reduction)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        input, target = ctx.saved_tensors
        needs_input, needs_target, _ = ctx.needs_input_grad
        dinput = mse_loss_backward(dloss, input, target, ctx.reduction) if needs_input else None
        dtarget = mse_loss_backward(dloss, target, input, ctx.reduction) if needs_target else None
        return dinput, dtarget, None


class _BinaryCrossEntropy(torch.autograd.Function):
    """Saves input and target."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, target: Tensor, reduction: str) -> Tensor:
        ctx.save_for_backward(input, target)
        ctx.reduction = reduction
        loss: Tensor = binary_cross_entropy_with_logits(input, target, reduction)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        input, target = ctx.saved_tensors
        needs_input, needs_target, _ = ctx.needs_input_grad
        dinput = dtarget = None
        if needs_input:
            dinput = binary_cross_entropy_with_logits_backward(dloss, input, target, ctx.reduction)
        if needs_target:  # seldom: targets are data
            count = input.numel() if ctx.reduction == "mean" else 1
            dtarget = -input * (dloss / count)
        return dinput, dtarget, None


register_autograd(mse_loss, _MSELoss)
register_autograd(binary_cross_entropy_with_logits, _BinaryCrossEntropy)
