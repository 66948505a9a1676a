"""How rows are laid on programs, for operators that reduce over the last dimension."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .launch import power_of_two
from .library import as_rows

WHOLE_ROW = 16384  # elements of the widest row that is kept in registers


@dataclass(frozen=True, slots=True)
class Configuration:
    """How a row is laid on a program: `rows` rows of `width` columns at a time, in a loop if not `whole`."""

    rows: int
    width: int
    whole: bool
    warps: int


def configuration(width: int, widest: int = WHOLE_ROW) -> Configuration:
    """A function of the width alone, so that a row's sums have one order whatever the batch.

    A kernel that needs more registers than others says what the `widest` row is that it keeps in them.
    """
    if width > widest:
        return Configuration(1, 4096, False, 8)
    block = power_of_two(width)
    rows = max(1, min(16, 1024 // block))
    return Configuration(rows, block, True, max(1, min(16, rows * block // 512)))


@dataclass(frozen=True, slots=True)
class Block:
    """Elements that one program takes, of an operator that is free in how they are laid on programs."""

    elements: int
    warps: int


@dataclass(frozen=True, slots=True)
class NestedRows:
    """Rows of which row i starts at (i // inner) * outer_stride + (i % inner) * inner_stride."""

    tensor: Tensor
    inner: int
    outer_stride: int
    inner_stride: int
    even: bool  # whether there is but one stride


def nested_rows(tensor: Tensor) -> NestedRows:
    """The rows of a tensor, be it transposed; copied only if its strides are of more levels than two."""
    levels: list[tuple[int, int]] = []
    for size, stride in zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True):
        if levels and levels[-1][1] == size * stride:
            levels[-1] = levels[-1][0] * size, stride
        elif size != 1:
            levels.append((size, stride))
    width = tensor.shape[-1]
    if len(levels) > 2 or (width > 1 and tensor.stride(-1) != 1):
        rows = as_rows(tensor, width)
        return NestedRows(rows, max(rows.shape[0], 1), 0, rows.stride(0), True)
    if len(levels) == 2:
        (_, outer), (inner, stride) = levels
        return NestedRows(tensor, max(inner, 1), outer, stride, False)
    count, stride = levels[0] if levels else (1, width)
    return NestedRows(tensor, max(count, 1), 0, stride, True)


def statistics_dtype(x: Tensor) -> torch.dtype:
    """float32, or float64 where the reference computes in it."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def widened(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The tensor in another dtype, where there is one."""
    return None if tensor is None else tensor.to(dtype)
