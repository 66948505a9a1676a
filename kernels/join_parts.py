"""What the operators on a linear layer over several parts share: how their products are laid on programs.

The parts go to one kernel as tuples of arguments, from which it selects: their blocks of columns are one row
of blocks, and no block belongs to two parts.
"""

# Kernel parameters have no Python types: mypy sees the functions that a host calls.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import blocks
from .library import as_rows, check_dtype, check_tensors, require

GROUP = 8  # most parts of one launch; more are added to what the launches before left


@dataclass(frozen=True, slots=True)
class Tile:
    """Rows and columns of the result that one program computes, `inner` elements of the sum at a time."""

    rows: int
    columns: int
    inner: int
    warps: int
    stages: int


def configuration(rows: int, columns: int, dtype: torch.dtype) -> Tile:
    """A function of the result's shape and the dtype; `inner` depends on the dtype alone."""
    if dtype.itemsize > 2:
        return Tile(64, 64, 32, 4, 3)
    if blocks(rows, 128) * blocks(columns, 128) < 64:
        return Tile(64, 64, 64, 4, 4)
    return Tile(128, 128, 64, 8, 3)


@triton.jit
def place_of_tile(tile, rows, columns):
    """(block of rows, block of columns): eight blocks of rows share their columns before the next ones come,
    for the sake of the cache."""
    band = 8 * columns
    first = tile // band * 8
    height = tl.minimum(rows - first, 8)
    return first + tile % band % height, tile % band // height


@triton.jit
def place_in_parts(block, widths, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """(part, number of the block in it, first column of the part) of a block of columns of all parts."""
    part = block * 0
    first_block = block * 0
    first_column = block * 0
    blocks_before = 0
    columns_before = 0
    for other in tl.static_range(1, PARTS):
        blocks_before += tl.cdiv(widths[other - 1], BLOCK)
        columns_before += widths[other - 1]
        here = block >= blocks_before
        part = tl.where(here, other, part)
        first_block = tl.where(here, blocks_before, first_block)
        first_column = tl.where(here, columns_before, first_column)
    return part, block - first_block, first_column


def groups_of(xs: Sequence[Tensor]) -> Iterator[tuple[int, list[Tensor]]]:
    """(first column, parts as rows) of those of one launch."""
    first = 0
    for place in range(0, len(xs), GROUP):
        group = [as_rows(x, x.shape[-1]) for x in xs[place : place + GROUP]]
        yield first, group
        first += sum(x.shape[1] for x in group)


def columns_of(xs: Sequence[Tensor]) -> list[slice]:
    """Where the parts are in weight."""
    ends = list(accumulate(x.shape[-1] for x in xs))
    return [slice(end - x.shape[-1], end) for x, end in zip(xs, ends, strict=True)]


def check_parts(name: str, xs: Sequence[Tensor]) -> None:
    """There is one, and all are of one leading shape and dtype."""
    require(len(xs) > 0, name, "xs", "have at least one part", "empty")
    check_tensors(name, **{f"xs[{place}]": x for place, x in enumerate(xs)})
    require(xs[0].dim() >= 1, name, "xs[0]", "have at least one dimension", tuple(xs[0].shape))
    for place, x in enumerate(xs):
        rule = f"have the leading shape of xs[0], {tuple(xs[0].shape[:-1])}"
        fits = x.dim() == xs[0].dim() and x.shape[:-1] == xs[0].shape[:-1]
        require(fits, name, f"xs[{place}]", rule, tuple(x.shape))
        check_dtype(name, f"xs[{place}]", x, xs[0].dtype)
