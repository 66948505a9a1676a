"""The gradients of a linear layer, each an operator of its own.

    dz = dropout(dy) * activation'(z),   dx = dz weight,   dweight = dz^T x

so a graph that needs one does not run the others; dz is shared. Where dx is the dy of the linear layer
before, its dz is made in the epilogue of the product (`backward` finds such places). Gradients of weights can
be added in place to their sum over micro-batches, in float32 whatever dz and x are. Products with nothing to
fuse are torch's own, from the library that is fastest at them.
"""

# Kernel parameters have no Python types: mypy sees the functions that a host calls.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import dropout
from .activation import ACTIVATIONS, differentiate, reference_differentiate
from .keyed import check_keyed, keyed_factor, keyed_stream
from .launch import blocks, launch
from .library import as_rows, check_dtype, check_tensors, register, require
from .product import dropout_numbers, dropout_of, matrix, product

POINTWISE_ROWS, POINTWISE_COLUMNS = 8, 128


@triton.jit(do_not_specialize=["rows", "key", "elements", "threshold"])
def activation_backward_kernel(
    dy_ptr,
    saved_ptr,
    dz_ptr,
    rows,
    columns,
    dy_stride,
    saved_stride,
    position,
    key,
    elements,
    threshold,
    scale,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """dz of one tile."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    dy = tl.load(dy_ptr + row[:, None] * dy_stride + column[None, :], mask=mask, other=0.0)
    saved = tl.load(saved_ptr + row[:, None] * saved_stride + column[None, :], mask=mask, other=0.0)
    dz = differentiate(dy.to(tl.float32), saved.to(tl.float32), ACTIVATION)
    place = row[:, None] * columns + column[None, :]
    if position is not None:
        stream, first = keyed_stream(position, key, elements)
        dz *= keyed_factor(stream, first + place, threshold, scale)
    tl.store(dz_ptr + place, dz.to(dz_ptr.dtype.element_ty), mask=mask)


def launch_backward_activation(
    dy: Tensor,
    saved: Tensor,
    activation: str,
    position: Tensor | None = None,
    key: int = 0,
    elements: int = 0,
    p: float = 0.0,
) -> Tensor:
    """dz, like dy."""
    dz = empty_backward_activation(dy, saved, activation)
    width = dy.shape[-1]
    dy_rows, saved_rows = as_rows(dy, width), as_rows(saved, width)
    rows = dy_rows.shape[0]
    launch(
        activation_backward_kernel,
        (blocks(rows, POINTWISE_ROWS), blocks(width, POINTWISE_COLUMNS)),
        *(dy_rows, saved_rows, dz, rows, width, dy_rows.stride(0), saved_rows.stride(0)),
        *dropout_numbers(dropout_of(position, key, elements, p)),
        ACTIVATION=ACTIVATIONS.index(activation),
        ROWS=POINTWISE_ROWS,
        COLUMNS=POINTWISE_COLUMNS,
        num_warps=4,
    )
    return dz


def launch_backward_input_activation(
    dz: Tensor,
    weight: Tensor,
    saved: Tensor,
    activation: str,
    position: Tensor | None = None,
    key: int = 0,
    elements: int = 0,
    p: float = 0.0,
) -> Tensor:
    """dx times the derivative, of the shape of saved."""
    made = empty_backward_input_activation(dz, weight, saved, activation)
    drops = dropout_of(position, key, elements, p)
    product(matrix(dz), weight.t(), made, activation=activation, saved=saved, dropout=drops)
    return made


def launch_accumulate_weight(total: Tensor, dz: Tensor, x: Tensor) -> None:
    """total += dweight. Where nothing is widened that is a plain product, for which torch has libraries."""
    if dz.dtype == total.dtype:
        total.addmm_(matrix(dz).t(), matrix(x))
    else:
        product(matrix(dz).t(), matrix(x).t(), total, residual=total)


def empty_backward_activation(dy: Tensor, saved: Tensor, activation: str, *_: Any) -> Tensor:
    """dz, not computed."""
    return dy.new_empty(dy.shape)


def empty_backward_input_activation(
    dz: Tensor, weight: Tensor, saved: Tensor, activation: str, *_: Any
) -> Tensor:
    """dx times the derivative, not computed."""
    return saved.new_empty(saved.shape)


def empty_backward_input(dz: Tensor, weight: Tensor) -> Tensor:
    """dx, not computed."""
    return dz.new_empty((*dz.shape[:-1], weight.shape[1]))


def empty_backward_weight(dz: Tensor, x: Tensor) -> Tensor:
    """dweight, not computed."""
    return dz.new_empty((dz.shape[-1], x.shape[-1]))


def reference_backward_activation(
    dy: Tensor,
    saved: Tensor,
    activation: str,
    position: Tensor | None = None,
    key: int = 0,
    elements: int = 0,
    p: float = 0.0,
) -> Tensor:
    """dz in ATen."""
    if position is not None:
        dy = dropout.reference_forward(dy, position, key, elements, p)
    return reference_differentiate(dy, saved, activation)


def reference_backward_input_activation(
    dz: Tensor, weight: Tensor, saved: Tensor, activation: str, *keyed: Any
) -> Tensor:
    """dx times the derivative in ATen, dx rounded in between."""
    dx = torch.mm(matrix(dz), weight).view(saved.shape)
    return reference_backward_activation(dx, saved, activation, *keyed)


def backward_input(dz: Tensor, weight: Tensor) -> Tensor:
    """dx by torch, which has libraries for it."""
    return torch.mm(matrix(dz), weight).view((*dz.shape[:-1], weight.shape[1]))


def backward_weight(dz: Tensor, x: Tensor) -> Tensor:
    """dweight by torch."""
    return torch.mm(matrix(dz).t(), matrix(x))


def reference_accumulate_weight(total: Tensor, dz: Tensor, x: Tensor) -> None:
    """total += dweight in ATen, not rounded in between."""
    total.addmm_(matrix(dz).t().to(total.dtype), matrix(x).to(total.dtype))


def check_backward_activation(
    dy: Tensor,
    saved: Tensor,
    activation: str,
    position: Tensor | None = None,
    key: int = 0,
    elements: int = 0,
    p: float = 0.0,
) -> None:
    """dy and what was saved are alike."""
    name = "linear_backward_activation"
    check_tensors(name, dy=dy, saved=saved)
    check_activation(name, activation, ACTIVATIONS[1:])
    require(saved.shape == dy.shape, name, "saved", f"have dy's shape {tuple(dy.shape)}", tuple(saved.shape))
    check_dtype(name, "saved", saved, dy.dtype)
    check_dropout(name, position, elements, p, dy)


def check_backward_input_activation(
    dz: Tensor,
    weight: Tensor,
    saved: Tensor,
    activation: str,
    position: Tensor | None = None,
    key: int = 0,
    elements: int = 0,
    p: float = 0.0,
) -> None:
    """dz [..., columns], weight [columns, inner], saved [..., inner] with as many rows as dz."""
    name = "linear_backward_input_activation"
    check_tensors(name, dz=dz, weight=weight, saved=saved)
    _check_product(name, dz, weight)
    check_activation(name, activation, ACTIVATIONS[1:])
    rows = matrix(dz).shape[0]
    rule = f"have {rows} rows of {weight.shape[1]}, those of dz times weight"
    fits = saved.dim() >= 1 and saved.shape[-1] == weight.shape[1] and saved.numel() == rows * weight.shape[1]
    require(fits, name, "saved", rule, tuple(saved.shape))
    check_dtype(name, "saved", saved, dz.dtype)
    check_dropout(name, position, elements, p, dz)


def check_backward_input(dz: Tensor, weight: Tensor) -> None:
    """dz [..., columns], weight [columns, inner]."""
    check_tensors("linear_backward_input", dz=dz, weight=weight)
    _check_product("linear_backward_input", dz, weight)


def _check_product(name: str, dz: Tensor, weight: Tensor) -> None:
    require(dz.dim() >= 1, name, "dz", "have at least one dimension", tuple(dz.shape))
    rule = f"be [{dz.shape[-1]}, inner], its rows the width of dz"
    fits = weight.dim() == 2 and weight.shape[0] == dz.shape[-1]
    require(fits, name, "weight", rule, tuple(weight.shape))
    check_dtype(name, "weight", weight, dz.dtype)


def check_backward_weight(dz: Tensor, x: Tensor) -> None:
    """dz [..., columns], x [..., inner] with the same leading shape."""
    name = "linear_backward_weight"
    check_tensors(name, dz=dz, x=x)
    rule = f"have dz's leading shape {tuple(dz.shape[:-1])}"
    require(x.shape[:-1] == dz.shape[:-1], name, "x", rule, tuple(x.shape))
    check_dtype(name, "x", x, dz.dtype)


def check_accumulate_weight(total: Tensor, dz: Tensor, x: Tensor) -> None:
    """total [columns, inner] of float32, or of dz's dtype, contiguous."""
    name = "linear_accumulate_weight"
    check_tensors(name, dz=dz, x=x, total=total)
    rule = f"have dz's leading shape {tuple(dz.shape[:-1])}"
    require(x.shape[:-1] == dz.shape[:-1], name, "x", rule, tuple(x.shape))
    check_dtype(name, "x", x, dz.dtype)
    shape = (dz.shape[-1], x.shape[-1])
    require(tuple(total.shape) == shape, name, "total", f"have shape {shape}", tuple(total.shape))
    require(total.is_contiguous(), name, "total", "be contiguous", total.stride())
    check_dtype(name, "total", total, torch.float32, *([torch.float64] if dz.dtype == torch.float64 else []))


def check_activation(name: str, activation: str, allowed: Any) -> None:
    """`activation` is one of those allowed."""
    require(activation in allowed, name, "activation", f"be one of {', '.join(allowed)}", repr(activation))


def check_dropout(name: str, position: Tensor | None, elements: int, p: float, beside: Tensor) -> None:
    """Keyed dropout, or none."""
    if position is None:
        require(p == 0.0, name, "p", "be 0 without a position", p)
    else:
        check_keyed(name, position, elements, p, beside)


KEYED_ARGUMENTS = "Tensor? position=None, int key=0, int elements=0, float p=0.0"

linear_backward_activation = register(
    f"linear_backward_activation(Tensor dy, Tensor saved, str activation, {KEYED_ARGUMENTS}) -> Tensor",
    check=check_backward_activation,
    kernel=launch_backward_activation,
    reference=reference_backward_activation,
    fake=empty_backward_activation,
)
linear_backward_input_activation = register(
    "linear_backward_input_activation(Tensor dz, Tensor weight, Tensor saved, str activation, "
    f"{KEYED_ARGUMENTS}) -> Tensor",
    check=check_backward_input_activation,
    kernel=launch_backward_input_activation,
    reference=reference_backward_input_activation,
    fake=empty_backward_input_activation,
)
linear_backward_input = register(
    "linear_backward_input(Tensor dz, Tensor weight) -> Tensor",
    check=check_backward_input,
    kernel=backward_input,
    reference=backward_input,
    fake=empty_backward_input,
)
linear_backward_weight = register(
    "linear_backward_weight(Tensor dz, Tensor x) -> Tensor",
    check=check_backward_weight,
    kernel=backward_weight,
    reference=backward_weight,
    fake=empty_backward_weight,
)
linear_accumulate_weight = register(
    "linear_accumulate_weight(Tensor(a!) total, Tensor dz, Tensor x) -> ()",
    check=check_accumulate_weight,
    kernel=launch_accumulate_weight,
    reference=reference_accumulate_weight,
    fake=lambda *_: None,
)
