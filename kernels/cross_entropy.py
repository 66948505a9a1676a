"""Cross entropy of logits [..., classes] over the last dimension with integer targets [...].

With p the softmax of a row, t its target, s the label smoothing and C classes:

    loss = (1 - s) * -log p[t] + s / C * sum over c of -log p[c]
    dlogits[c] = dloss * (p[c] - (1 - s) * [c = t] - s / C)

A row whose target is `ignore_index` has a loss and a gradient of exactly zero, whatever its logits; the mean
is over the other rows. A target that is neither that nor a class makes the row's loss and gradient
not-a-number on a GPU, where torch stops the device.

Forward keeps the maximum of each row and the sum of exp(x - maximum), two float32 numbers, and backward reads
the logits again. With N bytes of logits that moves 3 N in all (read; read and write). The gradient made in
the forward would move 2 N in the forward, and as much again to multiply it by the gradient of the loss, which
is known on the device alone and is not one where a micro-batch is weighted: 4 N, and the work would be done
where no gradient is wanted. Two numbers and not their one logsumexp, because that is rounded to its own size:
logits far from zero would lose digits that torch keeps.

Rows wider than a block are read once in the forward, with a running maximum. Statistics are float32, sums
have a fixed order, and a row's results do not depend on how many rows there are.
"""

# Kernel parameters have no Python types: mypy sees the functions that a host calls.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from .launch import blocks, launch
from .library import as_rows, check_dtype, check_tensors, register, register_autograd, require
from .reduction import REDUCTIONS, check_loss_gradient, check_reduction, launch_counted_total, launch_total
from .rows import configuration, statistics_dtype
from .tuning import tuned


@triton.jit
def _finite(peak):
    """The maximum to subtract: zero where every logit so far is minus infinity, so that exp makes zeros."""
    return tl.where(peak == float("-inf"), 0.0, peak)


@triton.jit(do_not_specialize=["rows"])
def cross_entropy_kernel(
    logits_ptr,
    target_ptr,
    loss_ptr,
    peak_ptr,
    total_ptr,
    count_ptr,
    rows,
    classes,
    stride,
    ignored,
    smoothing,
    SMOOTH: tl.constexpr,
    REDUCED: tl.constexpr,
    WHOLE: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """The losses of a block of rows, or their sum and the number of rows that count."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    here = row < rows
    x_row = logits_ptr + row[:, None] * stride
    target = tl.load(target_ptr + row, mask=here, other=0).to(tl.int64)
    counted = here & (target != ignored)
    valid = (target >= 0) & (target < classes)
    chosen = tl.load(logits_ptr + row * stride + target, mask=counted & valid, other=0.0).to(tl.float32)
    # smoothing sums differences to one logit of the row, which do not cancel where all logits are large
    anchor = tl.where(chosen == float("-inf"), 0.0, chosen)
    column = tl.arange(0, WIDTH)
    if WHOLE:
        mask = here[:, None] & (column < classes)[None, :]
        x = tl.load(x_row + column[None, :], mask=mask, other=float("-inf")).to(tl.float32)
        peak = _finite(tl.max(x, axis=1))
        total = tl.sum(tl.exp(x - peak[:, None]), axis=1)
        if SMOOTH:
            spread = tl.sum(tl.where(mask, x - anchor[:, None], 0.0), axis=1)
    else:
        peak = tl.full((ROWS,), float("-inf"), tl.float32)
        lanes = tl.zeros((ROWS, WIDTH), tl.float32)
        spreads = tl.zeros((ROWS, WIDTH), tl.float32)
        for start in range(0, classes, WIDTH):
            mask = here[:, None] & (start + column < classes)[None, :]
            x = tl.load(x_row + (start + column)[None, :], mask=mask, other=float("-inf")).to(tl.float32)
            higher = tl.maximum(peak, tl.max(x, axis=1))
            level = _finite(higher)
            lanes = lanes * tl.exp(peak - level)[:, None] + tl.exp(x - level[:, None])
            peak = higher
            if SMOOTH:
                spreads += tl.where(mask, x - anchor[:, None], 0.0)
        peak = _finite(peak)
        total = tl.sum(lanes, axis=1)
        spread = tl.sum(spreads, axis=1)
    total = tl.where(counted & ~valid, float("nan"), total)
    log_total = tl.log(total)
    loss = log_total + (peak - chosen)
    if SMOOTH:
        even = log_total + ((peak - anchor) - spread / classes)
        loss = (1.0 - smoothing) * loss + smoothing * even
    loss = tl.where(counted, loss, 0.0)
    tl.store(peak_ptr + row, peak, mask=here)
    tl.store(total_ptr + row, total, mask=here)
    if REDUCED:
        tl.store(loss_ptr + tl.program_id(0), tl.sum(loss, axis=0))
        tl.store(count_ptr + tl.program_id(0), tl.sum(counted.to(tl.float32), axis=0))
    else:
        tl.store(loss_ptr + row, loss.to(loss_ptr.dtype.element_ty), mask=here)


@triton.jit(do_not_specialize=["rows"])
def cross_entropy_backward_kernel(
    dloss_ptr,
    logits_ptr,
    target_ptr,
    peak_ptr,
    total_ptr,
    count_ptr,
    dlogits_ptr,
    rows,
    classes,
    dloss_stride,
    stride,
    ignored,
    smoothing,
    MEAN: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """dlogits of one block of rows and columns."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    here = row < rows
    mask = here[:, None] & (column < classes)[None, :]
    target = tl.load(target_ptr + row, mask=here, other=0).to(tl.int64)
    counted = here & (target != ignored)
    scale = tl.load(dloss_ptr + row * dloss_stride, mask=here, other=0.0).to(tl.float32)
    if MEAN:
        scale = scale / tl.load(count_ptr)
    peak = tl.load(peak_ptr + row, mask=here, other=0.0)
    total = tl.load(total_ptr + row, mask=here, other=1.0)
    x = tl.load(logits_ptr + row[:, None] * stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
    p = tl.exp(x - peak[:, None]) / total[:, None]
    one = tl.where(column[None, :] == target[:, None], 1.0 - smoothing, 0.0)
    dlogits = tl.where(counted[:, None], scale[:, None] * (p - one - smoothing / classes), 0.0)
    out = dlogits_ptr + row[:, None] * classes + column[None, :]
    tl.store(out, dlogits.to(dlogits_ptr.dtype.element_ty), mask=mask)


def launch_forward(
    logits: Tensor, target: Tensor, reduction: str, ignore_index: int, label_smoothing: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, peak, total, count) as `empty_forward` describes them."""
    loss, peak, total, count = empty_forward(logits, target, reduction, ignore_index, label_smoothing)
    classes = logits.shape[-1]
    rows = as_rows(logits, classes)
    how = tuned("cross_entropy", configuration(classes), logits, width=classes)
    programs = blocks(rows.shape[0], how.rows)
    reduced = reduction != "none"
    sums, counts = peak.new_empty((2, programs)) if reduced else (loss, loss)
    launch(
        cross_entropy_kernel,
        (programs,),
        rows,
        target.contiguous(),
        sums,
        peak,
        total,
        counts,
        rows.shape[0],
        classes,
        rows.stride(0),
        ignore_index,
        label_smoothing,
        SMOOTH=label_smoothing > 0.0,
        REDUCED=reduced,
        WHOLE=how.whole,
        ROWS=how.rows,
        WIDTH=how.width,
        num_warps=how.warps,
    )
    if reduction == "mean":
        launch_counted_total(sums, counts, loss, count)
    elif reduction == "sum":
        launch_total(sums, loss, 1.0)
    return loss, peak, total, count


def launch_backward(
    dloss: Tensor,
    logits: Tensor,
    target: Tensor,
    peak: Tensor,
    total: Tensor,
    count: Tensor,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
) -> Tensor:
    """dlogits, like logits."""
    dlogits = logits.new_empty(logits.shape)
    classes = logits.shape[-1]
    rows = as_rows(logits, classes)
    how = tuned("cross_entropy_backward", configuration(classes), logits, width=classes)
    launch(
        cross_entropy_backward_kernel,
        (blocks(rows.shape[0], how.rows), blocks(classes, how.width)),
        dloss.contiguous(),
        rows,
        target.contiguous(),
        peak.contiguous(),
        total.contiguous(),
        count,
        dlogits,
        rows.shape[0],
        classes,
        int(reduction == "none"),
        rows.stride(0),
        ignore_index,
        label_smoothing,
        MEAN=reduction == "mean",
        ROWS=how.rows,
        WIDTH=how.width,
        num_warps=how.warps,
    )
    return dlogits


def empty_forward(
    logits: Tensor, target: Tensor, reduction: str, ignore_index: int, label_smoothing: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, peak, total, count), not computed.

    The loss is of the dtype of logits. Peak and total are the statistics of the rows, of the target's shape;
    count [1] is the number of rows that a mean is over, and [0] of the other reductions.
    """
    wide = statistics_dtype(logits)
    return (
        logits.new_empty(target.shape if reduction == "none" else ()),
        logits.new_empty(target.shape, dtype=wide),
        logits.new_empty(target.shape, dtype=wide),
        logits.new_empty((int(reduction == "mean"),), dtype=wide),
    )


def reference_forward(
    logits: Tensor, target: Tensor, reduction: str, ignore_index: int, label_smoothing: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The forward operator in ATen."""
    wide = as_rows(logits, logits.shape[-1]).to(statistics_dtype(logits))
    flat = target.reshape(-1).long()
    loss = torch.ops.aten.cross_entropy_loss.default(
        wide, flat, None, REDUCTIONS.index(reduction), ignore_index, label_smoothing
    )
    if reduction == "none":
        loss = loss.view(target.shape)
    peak = wide.amax(-1)
    peak = peak.masked_fill(peak == -torch.inf, 0.0)
    total = (wide - peak[:, None]).exp().sum(-1)
    count = (flat != ignore_index).sum().to(wide.dtype).view(1)
    return (
        loss.to(logits.dtype),
        peak.view(target.shape),
        total.view(target.shape),
        count if reduction == "mean" else count.new_empty(0),
    )


def reference_backward(
    dloss: Tensor,
    logits: Tensor,
    target: Tensor,
    peak: Tensor,
    total: Tensor,
    count: Tensor,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
) -> Tensor:
    """The gradient of logits in ATen, by the formula above."""
    x = logits.to(peak.dtype)
    scale = dloss.to(peak.dtype).expand(target.shape)
    if reduction == "mean":
        scale = scale / count
    index = target.long()
    valid = (index >= 0) & (index < logits.shape[-1])
    place = torch.where(valid, index, 0)[..., None]
    gradient = (x - peak[..., None]).exp() / total[..., None] - label_smoothing / logits.shape[-1]
    gradient = gradient.scatter_add(-1, place, torch.full_like(place, label_smoothing - 1.0, dtype=x.dtype))
    gradient = torch.where((index == ignore_index)[..., None], 0.0, gradient * scale[..., None])
    return gradient.to(logits.dtype).contiguous()


def empty_backward(dloss: Tensor, logits: Tensor, *_: Any) -> Tensor:
    """The gradient of logits, not computed."""
    return logits.new_empty(logits.shape)


def check_forward(
    logits: Tensor, target: Tensor, reduction: str, ignore_index: int, label_smoothing: float
) -> None:
    """Integer targets of the logits' leading shape, on their device."""
    name = "cross_entropy"
    check_tensors(name, logits=logits)
    _check_rows(name, logits, target)
    check_reduction(name, reduction)
    inside = 0.0 <= label_smoothing <= 1.0
    require(inside, name, "label_smoothing", "be from 0 to 1", label_smoothing)


def _check_rows(name: str, logits: Tensor, target: Tensor) -> None:
    require(logits.dim() >= 1, name, "logits", "have at least one dimension", tuple(logits.shape))
    require(logits.shape[-1] >= 1, name, "logits", "have at least one class", tuple(logits.shape))
    check_dtype(name, "target", target, torch.int64, torch.int32)
    require(
        target.device == logits.device, name, "target", f"be on {logits.device} like logits", target.device
    )
    leading = logits.shape[:-1]
    rule = f"have logits' leading shape {tuple(leading)}"
    require(target.shape == leading, name, "target", rule, tuple(target.shape))


def check_backward(
    dloss: Tensor,
    logits: Tensor,
    target: Tensor,
    peak: Tensor,
    total: Tensor,
    count: Tensor,
    reduction: str,
    *_: Any,
) -> None:
    """dloss is like the loss, the statistics are the forward's."""
    name = "cross_entropy_backward"
    check_tensors(name, dloss=dloss, logits=logits, peak=peak, total=total, count=count)
    _check_rows(name, logits, target)
    check_reduction(name, reduction)
    check_loss_gradient(name, dloss, target.shape, reduction, logits.dtype)
    for key, statistic, shape in (
        ("peak", peak, target.shape),
        ("total", total, target.shape),
        ("count", count, (int(reduction == "mean"),)),
    ):
        rule = f"have shape {tuple(shape)}"
        require(tuple(statistic.shape) == tuple(shape), name, key, rule, tuple(statistic.shape))
        check_dtype(name, key, statistic, statistics_dtype(logits))


cross_entropy_forward = register(
    "cross_entropy_forward(Tensor logits, Tensor target, str reduction, int ignore_index,"
    " float label_smoothing) -> (Tensor loss, Tensor peak, Tensor total, Tensor count)",
    check=check_forward,
    kernel=launch_forward,
    reference=reference_forward,
    fake=empty_forward,
)
cross_entropy_backward = register(
    "cross_entropy_backward(Tensor dloss, Tensor logits, Tensor target, Tensor peak, Tensor total,"
    " Tensor count, str reduction, int ignore_index, float label_smoothing) -> Tensor",
    check=check_backward,
    kernel=launch_backward,
    reference=reference_backward,
    fake=empty_backward,
)
cross_entropy = register(
    "cross_entropy(Tensor logits, Tensor target, str reduction, int ignore_index,"
    " float label_smoothing) -> Tensor",
    check=check_forward,
    kernel=lambda *arguments: launch_forward(*arguments)[0],
    reference=lambda *arguments: reference_forward(*arguments)[0],
    fake=lambda *arguments: empty_forward(*arguments)[0],
)


class _CrossEntropy(torch.autograd.Function):
    """Saves logits, targets and two numbers a row."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, target: Tensor, reduction: str, ignore_index: int, label_smoothing: float
    ) -> Tensor:
        loss: Tensor
        ctx.options = (reduction, ignore_index, label_smoothing)
        loss, *statistics = cross_entropy_forward(logits, target, *ctx.options)
        ctx.save_for_backward(logits, target, *statistics)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        dlogits = cross_entropy_backward(dloss, *ctx.saved_tensors, *ctx.options)
        return dlogits, None, None, None, None


register_autograd(cross_entropy, _CrossEntropy)
