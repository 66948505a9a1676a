"""How rows are laid on programs, for operators that reduce over the last dimension."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .launch import power_of_two

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


def statistics_dtype(x: Tensor) -> torch.dtype:
    """float32, or float64 where the reference computes in it."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def widened(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The tensor in another dtype, where there is one."""
    return None if tensor is None else tensor.to(dtype)
