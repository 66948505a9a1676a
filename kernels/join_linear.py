"""A linear layer over the concatenation of its inputs, which is not made.

    z = sum over parts i of x_i W_i^T + bias,   y = activation(z)      weight = [W_1 | W_2 | ...]

    dz = dy * activation'(z),   dx_i = dz W_i,   dW_i = dz^T x_i,   dbias = sum over rows of dz

Sums are float32, in blocks of each part in its order, the parts in theirs, never split over programs. Each
dx_i is an operator call of its own on columns of weight, so a graph that needs some does not run the others.
That of the weight is in `join_gradient`. What forward keeps for backward besides the parts and weight
is what a linear layer keeps.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .activation import ACTIVATIONS, NEEDS_PREACTIVATION, reference_activate
from .bias_gradient import linear_backward_bias
from .join_gradient import join_linear_backward_weight
from .join_kernels import join_described_kernel, join_forward_kernel
from .join_parts import check_parts, columns_of, configuration, descriptor, groups_of, is_described
from .launch import blocks, launch
from .library import check_dtype, check_tensors, register, register_autograd, require
from .linear_gradient import linear_backward_activation, linear_backward_input
from .product import is_ragged, precision
from .tuning import tuned


def _launch(xs: Sequence[Tensor], weight: Tensor, bias: Tensor | None, activation: str, keep: bool) -> Any:
    y = empty_forward(xs, weight, bias, activation)
    z = empty_forward(xs, weight, bias, activation) if keep else y
    columns = weight.shape[0]
    rows = y.numel() // columns if columns else 0
    groups = list(groups_of(xs))
    described = is_described(weight, [group for _, group in groups])
    wide = described and not keep and len(groups) == 1  # else the epilogue has more to hold
    static = configuration(rows, columns, weight.dtype, wide)
    if weight.dtype.itemsize > 2 and is_ragged(columns, *(x.shape[-1] for x in xs)):
        static = replace(static, warps=8)
    tile = tuned("join", static, weight, rows=rows, columns=columns, inner=weight.shape[1])
    total = y if len(groups) == 1 else weight.new_empty((rows, columns), dtype=torch.float32)
    bias = y if bias is None else bias.contiguous()
    for first, group in groups:
        widths, strides = tuple(x.shape[1] for x in group), tuple(x.stride(0) for x in group)
        own = weight[:, first:]
        options = {
            "PARTS": len(group),
            "ACTIVATION": ACTIVATIONS.index(activation),
            "HAS_BIAS": bias is not y,
            "KEEP_Z": keep,
            "CONTINUED": first > 0,
            "ENDS": group is groups[-1][1],
            "ROWS": tile.rows,
            "COLUMNS": tile.columns,
            "INNER": tile.inner,
            "num_warps": tile.warps,
            "num_stages": tile.stages,
        }
        grid = (blocks(rows, tile.rows) * blocks(columns, tile.columns),)
        if described and 0 not in grid:
            parts = tuple(descriptor(x, tile.rows, tile.inner) for x in group)
            read = descriptor(own, tile.columns, tile.inner)
            described_arguments = (y, z, total, parts, widths, read, bias, rows, columns)
            launch(join_described_kernel, grid, *described_arguments, **options)
        else:
            arguments = (y, z, total, tuple(group), strides, widths, own, bias, rows, columns, *own.stride())
            launch(join_forward_kernel, grid, *arguments, PRECISION=precision(), **options)
    return (y, z) if keep else y


def launch_forward(xs: Sequence[Tensor], weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """y alone."""
    y: Tensor = _launch(xs, weight, bias, activation, False)
    return y


def launch_forward_keeping(
    xs: Sequence[Tensor], weight: Tensor, bias: Tensor | None, activation: str
) -> tuple[Tensor, Tensor]:
    """(y, z)."""
    made: tuple[Tensor, Tensor] = _launch(xs, weight, bias, activation, True)
    return made


def empty_forward(xs: Sequence[Tensor], weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """y, not computed."""
    return xs[0].new_empty((*xs[0].shape[:-1], weight.shape[0]))


def empty_forward_keeping(
    xs: Sequence[Tensor], weight: Tensor, bias: Tensor | None, activation: str
) -> tuple[Tensor, Tensor]:
    """(y, z), not computed."""
    return empty_forward(xs, weight, bias, activation), empty_forward(xs, weight, bias, activation)


def reference_forward_keeping(
    xs: Sequence[Tensor], weight: Tensor, bias: Tensor | None, activation: str
) -> tuple[Tensor, Tensor]:
    """(y, z) in ATen, of the concatenation."""
    z = torch.nn.functional.linear(torch.cat(list(xs), -1), weight, bias)
    return reference_activate(z, activation), z


def check_forward(xs: Sequence[Tensor], weight: Tensor, bias: Tensor | None, activation: str) -> None:
    """xs [..., inner_i] with one leading shape, weight [columns, sum of inner_i], bias [columns]."""
    name = "join_linear"
    check_parts(name, xs)
    check_tensors(name, **{"xs[0]": xs[0], "weight": weight, "bias": bias})
    require(activation in ACTIVATIONS, name, "activation", f"be one of {', '.join(ACTIVATIONS)}", activation)
    width = sum(x.shape[-1] for x in xs)
    rule = f"be [columns, {width}], the widths of xs together"
    fits = weight.dim() == 2 and weight.shape[1] == width
    require(fits, name, "weight", rule, tuple(weight.shape))
    check_dtype(name, "weight", weight, xs[0].dtype)
    if bias is not None:
        rule = f"have shape ({weight.shape[0]},), the rows of weight"
        require(tuple(bias.shape) == (weight.shape[0],), name, "bias", rule, tuple(bias.shape))
        check_dtype(name, "bias", bias, xs[0].dtype)


def check_forward_keeping(xs: Sequence[Tensor], weight: Tensor, bias: Tensor | None, activation: str) -> None:
    """As the forward operator, with an activation that keeps z."""
    names = sorted(NEEDS_PREACTIVATION)
    rule = f"be one of {', '.join(names)}"
    require(activation in names, "join_linear_keeping", "activation", rule, activation)
    check_forward(xs, weight, bias, activation)


_ARGUMENTS = "(Tensor[] xs, Tensor weight, Tensor? bias, str activation)"

join_linear = register(
    f"join_linear{_ARGUMENTS} -> Tensor",
    check=check_forward,
    kernel=launch_forward,
    reference=lambda *arguments: reference_forward_keeping(*arguments)[0],
    fake=empty_forward,
)
join_linear_keeping = register(
    f"join_linear_keeping{_ARGUMENTS} -> (Tensor y, Tensor z)",
    check=check_forward_keeping,
    kernel=launch_forward_keeping,
    reference=reference_forward_keeping,
    fake=empty_forward_keeping,
)


class _JoinLinear(torch.autograd.Function):
    """Saves the parts, weight and what the activation's derivative needs."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, bias: Tensor | None, activation: str, *xs: Tensor) -> Tensor:
        y: Tensor
        saved: Tensor | None
        if activation in NEEDS_PREACTIVATION:
            y, saved = join_linear_keeping(xs, weight, bias, activation)
        else:
            y = join_linear(xs, weight, bias, activation)
            saved = y if activation == "relu" else None
        ctx.save_for_backward(weight, saved, *xs)
        ctx.activation = activation
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        weight, saved, *xs = ctx.saved_tensors
        dz = dy if saved is None else linear_backward_activation(dy, saved, ctx.activation)
        needs_weight, needs_bias, _, *needs_x = ctx.needs_input_grad
        return (
            join_linear_backward_weight(dz, xs) if needs_weight else None,
            linear_backward_bias(dz) if needs_bias else None,
            None,
            *(
                linear_backward_input(dz, weight[:, columns]) if needed else None
                for columns, needed in zip(columns_of(xs), needs_x, strict=True)
            ),
        )


def _apply(xs: Sequence[Tensor], *arguments: Any) -> Any:
    return _JoinLinear.apply(*arguments, *xs)  # type: ignore[no-untyped-call]


register_autograd(join_linear, _apply)
