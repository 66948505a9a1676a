"""The gradients of the addends of a residual sum that is normalised: see `add_norm`.

One of them where both are the same, which is then read by both; two where dropout or their dtypes tell them
apart. The result of an operator may not be another one's storage, so these are two operators.
"""

import torch
from torch import Tensor

from . import layer_norm, rms_norm
from .add_norm_backward import differentiate_sum
from .add_norm_forward import Dropped
from .keyed import check_keyed, reference_factor
from .library import check_dtype, check_tensors, register, require
from .rows import statistics_dtype


def launch_backward(
    dy: Tensor,
    ds: Tensor | None,
    s: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    weight: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """The gradient of either addend, where nothing is dropped."""
    gradient = empty_backward(dy, ds, s, mean, rstd, weight, dtype)
    differentiate_sum(dy, ds, s, mean, rstd, weight, Dropped(), None, gradient)
    return gradient


def launch_backward_both(
    dy: Tensor,
    ds: Tensor | None,
    s: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    weight: Tensor | None,
    dtype: torch.dtype,
    x_dtype: torch.dtype,
    position: Tensor | None,
    key: int,
    elements: int,
    p: float,
) -> tuple[Tensor, Tensor]:
    """(dx, dresidual)."""
    dropped = Dropped(position, key, elements, p)
    dx, dresidual = empty_backward_both(
        dy, ds, s, mean, rstd, weight, dtype, x_dtype, position, key, elements, p
    )
    differentiate_sum(dy, ds, s, mean, rstd, weight, dropped, dx, dresidual)
    return dx, dresidual


def empty_backward(
    dy: Tensor,
    ds: Tensor | None,
    s: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    weight: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """The gradient of an addend, not computed."""
    return s.new_empty(s.shape, dtype=dtype)


def empty_backward_both(
    dy: Tensor,
    ds: Tensor | None,
    s: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    weight: Tensor | None,
    dtype: torch.dtype,
    x_dtype: torch.dtype,
    position: Tensor | None,
    key: int,
    elements: int,
    p: float,
) -> tuple[Tensor, Tensor]:
    """The gradients of both addends, not computed."""
    return s.new_empty(s.shape, dtype=x_dtype), s.new_empty(s.shape, dtype=dtype)


def reference_backward(
    dy: Tensor,
    ds: Tensor | None,
    s: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    weight: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """The gradient of either addend in ATen."""
    wide = statistics_dtype(s)
    if mean is None:
        gradient = rms_norm.reference_backward_input(dy.to(wide), s.to(wide), rstd, weight)
    else:
        gradient = layer_norm.reference_backward_input(dy.to(wide), s.to(wide), mean, rstd, weight)
    total = gradient if ds is None else gradient + ds
    return total.to(dtype).contiguous()


def reference_backward_both(
    dy: Tensor,
    ds: Tensor | None,
    s: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    weight: Tensor | None,
    dtype: torch.dtype,
    x_dtype: torch.dtype,
    position: Tensor | None,
    key: int,
    elements: int,
    p: float,
) -> tuple[Tensor, Tensor]:
    """(dx, dresidual) in ATen."""
    total = reference_backward(dy, ds, s, mean, rstd, weight, statistics_dtype(s))
    kept = total
    if position is not None:
        kept = total * reference_factor(total, position, key, elements, p)
    return kept.to(x_dtype, copy=True), total.to(dtype, copy=True)


def check_backward(
    dy: Tensor,
    ds: Tensor | None,
    s: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    weight: Tensor | None,
    dtype: torch.dtype,
) -> None:
    """Gradients and statistics have the shapes that forward gave them, ds the dtype of s."""
    name = "add_norm_backward"
    check_tensors(name, dy=dy, ds=ds, s=s, mean=mean, rstd=rstd, weight=weight)
    for key, tensor in (("dy", dy), ("ds", ds)):
        if tensor is not None:
            rule = f"have s's shape {tuple(s.shape)}"
            require(tensor.shape == s.shape, name, key, rule, tuple(tensor.shape))
    if ds is not None:
        check_dtype(name, "ds", ds, s.dtype)
    for key, tensor in (("mean", mean), ("rstd", rstd)):
        if tensor is not None:
            rule = f"have s's leading shape {tuple(s.shape[:-1])}"
            require(tensor.shape == s.shape[:-1], name, key, rule, tuple(tensor.shape))
            check_dtype(name, key, tensor, statistics_dtype(s))


def check_backward_both(
    dy: Tensor,
    ds: Tensor | None,
    s: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    weight: Tensor | None,
    dtype: torch.dtype,
    x_dtype: torch.dtype,
    position: Tensor | None,
    key: int,
    elements: int,
    p: float,
) -> None:
    """As for one gradient; the dropout as `keyed` says."""
    check_backward(dy, ds, s, mean, rstd, weight, dtype)
    if position is not None:
        check_keyed("add_norm_backward_both", position, elements, p, s)


add_norm_backward = register(
    "add_norm_backward(Tensor dy, Tensor? ds, Tensor s, Tensor? mean, Tensor rstd, Tensor? weight,"
    " ScalarType dtype) -> Tensor",
    check=check_backward,
    kernel=launch_backward,
    reference=reference_backward,
    fake=empty_backward,
)
add_norm_backward_both = register(
    "add_norm_backward_both(Tensor dy, Tensor? ds, Tensor s, Tensor? mean, Tensor rstd, Tensor? weight,"
    " ScalarType dtype, ScalarType x_dtype, Tensor? position, int key, int elements, float p)"
    " -> (Tensor dx, Tensor dresidual)",
    check=check_backward_both,
    kernel=launch_backward_both,
    reference=reference_backward_both,
    fake=empty_backward_both,
)
