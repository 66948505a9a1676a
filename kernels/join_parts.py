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
from triton.tools.tensor_descriptor import TensorDescriptor

from .launch import INTERPRETED, architecture, blocks, is_counting
from .library import as_rows, check_dtype, check_tensors, require
from .product import DESCRIBING

INNER = 64  # elements of a sum in 16 bits that are multiplied at a time
GROUP = 8  # most parts of one launch; more are added to what the launches before left


@dataclass(frozen=True, slots=True)
class Tile:
    """Rows and columns of the result that one program computes, `inner` elements of the sum at a time."""

    rows: int
    columns: int
    inner: int
    warps: int
    stages: int


def configuration(rows: int, columns: int, dtype: torch.dtype, wide: bool = False) -> Tile:
    """A function of the result's shape, the dtype and the kernel; `inner` depends on the dtype alone.

    `wide` tiles are for a kernel whose epilogue leaves the registers for them.
    """
    if dtype.itemsize > 2:
        return Tile(64, 64, 32, 4, 3)
    if wide and blocks(rows, 128) * blocks(columns, 256) >= 128:
        return Tile(128, 256, INNER, 8, 3)
    if blocks(rows, 128) * blocks(columns, 128) < 64:
        return Tile(64, 64, INNER, 4, 4)
    return Tile(128, 128, INNER, 8, 3)


def is_described(weight: Tensor, groups: Sequence[Sequence[Tensor]]) -> bool:
    """Whether tensor descriptors can describe the weight and all parts: on Hopper, in 16 bits, where rows
    start at multiples of 16 bytes and no block is of two parts. That does not depend on how many rows there
    are."""
    if weight.dtype.itemsize != 2 or not _is_hopper(weight):
        return False
    parts = [x for group in groups for x in group]
    return all(x.shape[1] % INNER == 0 for x in parts[:-1]) and all(map(_is_describable, (weight, *parts)))


def _is_hopper(tensor: Tensor) -> bool:
    """Whether the chip has descriptors and memory for the tiles; of a tensor that is nowhere, the one that is
    compiled for. The interpreter has them too."""
    if INTERPRETED or is_counting():
        return not is_counting()
    return (tensor.is_cuda or tensor.is_meta) and architecture(tensor) in DESCRIBING


def _is_describable(matrix: Tensor) -> bool:
    (rows, columns), stride = matrix.shape, matrix.stride(0)
    aligned = stride * matrix.element_size() % 16 == 0 and matrix.data_ptr() % 16 == 0
    return rows > 0 and columns > 0 and matrix.stride(1) == 1 and stride >= columns and aligned


def descriptor(matrix: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """Of a matrix that is read in blocks of this size."""
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), [rows, columns])


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
